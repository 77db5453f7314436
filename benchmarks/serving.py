"""Requests per second of the service, beside a bare handler and MLflow's scoring server.

    python -m benchmarks.serving [--seconds 300] [--connections 16]

All serve the same bundle (Conv4 on 28x28 pictures, as by default; its weights do not matter here)
on loopback, one after the other, several rounds in turn, with load from `wrk`. `predict`: one query
to a learner of 5 classes, one example each. `adapt+predict`: the same classes taught and asked in
one request. The bare handler is the least that answers the same request over FastAPI: it decodes
the pictures and runs the same `adapt` and `predict`, with no keys, limits, storage or batching.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.errors import MachineError
from pipeline.core.files import new_folder, write_json
from pipeline.deploy.bundle import Bundle, make_bundle
from pipeline.deploy.smoke import free_port, serve_command, serve_environment
from pipeline.engine.learner import Learner, Preprocessing, save_learner
from pipeline.runtime.logs import run_main
from tests.serve.service_process import ServiceProcess

RECORD = Path("results/serve/load.json")
_SHAPE, _WAYS = (1, 28, 28), 5
_PATIENCE_SECONDS = 90.0
_OPEN = {"requests_per_second": 1e6, "burst": 10**6, "concurrent": 10**4}
_WRK = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer {key}"
local file = io.open("{body}", "r")
wrk.body = file:read("*a")
file:close()
done = function(summary, latency, requests)
    for _, share in ipairs({{50, 95, 99}}) do
        io.write(string.format("p%d %.3f\\n", share, latency:percentile(share) / 1000))
    end
end
"""


def default_bundle(folder: Path) -> Bundle:
    """A bundle like the default one, with fresh weights."""
    spec = BackboneSpec(name="conv4", settings={"width": 64}, image_shape=_SHAPE)
    algorithm = ProtoNet()
    model = build_model(spec, algorithm.batch_norm)
    params = init_params(spec, 0)
    noise = torch.randn(64, *_SHAPE, generator=torch.Generator().manual_seed(1))
    model = model.with_statistics(model.features(params, noise)[1])
    scaling = Preprocessing(image_shape=_SHAPE, mean=[0.9], std=[0.25])
    with new_folder(folder / "learner", kind="learner") as building:
        save_learner(building, Learner(algorithm, model, params, scaling, spec, {"stage": "none"}))
    return make_bundle(folder / "bundle", folder / "learner", {}, domain="noise", card="# Noise\n")


def _png(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, _SHAPE[1:], dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


SUPPORT = [{"image": _png(i), "label": f"class {i}"} for i in range(_WAYS)]
QUERY = {"image": _png(100)}


@contextmanager
def ours(folder: Path, bundle: Bundle, **settings: Any) -> Iterator[dict[str, Any]]:
    """The service; gives addresses, bodies, the key, the process and the seconds to be ready."""
    service = ServiceProcess(folder, str(bundle.folder), rates={**_OPEN, **settings})
    cold = service.start()
    try:
        key = service.key()
        taught = _post(f"{service.url}/v1/learners", {"support": SUPPORT}, key)
        assert service.process is not None
        yield {
            "cold_start_seconds": round(cold, 2),
            "key": key,
            "process": service.process.pid,
            "predict": (f"{service.url}/v1/learners/{taught['id']}/predict", {"queries": [QUERY]}),
            "adapt+predict": (
                f"{service.url}/v1/predict",
                {"support": SUPPORT, "queries": [QUERY]},
            ),
        }
    finally:
        service.stop()


@contextmanager
def bare(folder: Path, bundle: Bundle) -> Iterator[dict[str, Any]]:
    """The least that answers the same requests over FastAPI."""
    command = [sys.executable, "-m", "benchmarks.bare_handler", str(bundle.folder)]
    with _process(command, folder / "bare.log") as (port, process):
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/ping")
        yield {
            "key": "",
            "process": process,
            "predict": (f"{url}/predict", {"queries": [QUERY]}),
            "adapt+predict": (f"{url}/both", {"support": SUPPORT, "queries": [QUERY]}),
        }


@contextmanager
def mlflow(folder: Path, bundle: Bundle) -> Iterator[dict[str, Any]]:
    """`mlflow models serve`; it has no learners that are kept."""
    from mlflow import pyfunc  # noqa: TID251 - it is what we are measured against

    from pipeline.deploy.packing import pyfunc_parts
    from pipeline.runtime.lineage import code_root

    target = folder / "model"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            parts = pyfunc_parts(bundle, code_root() / "pipeline", Path(scratch))
            pyfunc.save_model(path=str(target), **parts)
    port = free_port()
    with (folder / "mlflow.log").open("ab") as log:
        process = subprocess.Popen(
            serve_command(str(target), port),
            env=serve_environment({}),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(f"http://127.0.0.1:{port}/ping")
        episode = {"support": SUPPORT, "query": [QUERY["image"]]}
        yield {
            "key": "",
            "process": process.pid,
            "adapt+predict": (f"http://127.0.0.1:{port}/invocations", {"inputs": [episode]}),
        }
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


SERVERS = {"ours": ours, "bare": bare, "mlflow": mlflow}


def load(target: dict[str, Any], case: str, seconds: float, connections: int) -> dict[str, Any]:
    """What `wrk` measures of one case, and the server's memory behind it."""
    url, body = target[case]
    with tempfile.TemporaryDirectory() as scratch:
        body_file, script = Path(scratch) / "body.json", Path(scratch) / "post.lua"
        body_file.write_text(json.dumps(body))
        script.write_text(_WRK.format(key=target["key"], body=body_file))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s"]
        told = subprocess.run(
            [*command, "-s", str(script), url],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", told)
    broken = re.search(
        r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", told
    )
    (requests,) = re.findall(r"(\d+) requests in", told)
    return {
        "requests": int(requests),
        "requests_per_second": float(re.findall(r"Requests/sec:\s+([\d.]+)", told)[0]),
        **{
            f"p{share}_milliseconds": float(milliseconds)
            for share, milliseconds in re.findall(r"^p(\d+) ([\d.]+)$", told, re.MULTILINE)
        },
        "refused_or_failed": int(failed[1]) if failed else 0,
        "socket_errors": sum(map(int, broken.groups())) if broken else 0,
        "resident_megabytes": round(_resident(target["process"]) / 2**20, 1),
    }


def _resident(process: int) -> int:
    family = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    return sum(one.memory_info().rss for one in family)


def measure(seconds: float, rounds: int, connections: int) -> dict[str, Any]:
    """All servers in turn, so that a slow spell of the machine meets each of them."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = default_bundle(folder)
        for number in range(rounds):
            for name, server in SERVERS.items():
                with server(
                    folder / f"{name}-{number}" if name == "ours" else folder, bundle
                ) as up:
                    for case in ("predict", "adapt+predict"):
                        if case in up:
                            load(up, case, 2, connections)
                            found = load(up, case, seconds / rounds, connections)
                            cold = up.get("cold_start_seconds")
                            rows.append({"server": name, "case": case, **found, "cold": cold})
                            print(
                                f"{name:7} {case:14} {found['requests_per_second']:8.1f} /s, "
                                f"p50 {found['p50_milliseconds']:.1f} ms, "
                                f"p99 {found['p99_milliseconds']:.1f} ms, "
                                f"{found['refused_or_failed']} refused or failed"
                            )
    return {"connections": connections, "seconds": seconds, "rows": rows, **_ratios(rows)}


def _ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def rate(server: str, case: str) -> float:
        return statistics.median(
            row["requests_per_second"]
            for row in rows
            if (row["server"], row["case"]) == (server, case)
        )

    return {
        "against_bare": {
            case: round(rate("ours", case) / rate("bare", case), 3)
            for case in ("predict", "adapt+predict")
        },
        # MLflow's server keeps no learners: each of its requests teaches and asks.
        "against_mlflow": {
            case: round(rate("ours", case) / rate("mlflow", "adapt+predict"), 3)
            for case in ("predict", "adapt+predict")
        },
        "cold_start_seconds": statistics.median(row["cold"] for row in rows if row["cold"]),
    }


def overload(seconds: float) -> dict[str, Any]:
    """Ten times as many connections as may wait: what is answered, and how the rest is refused."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ours(folder / "ours", default_bundle(folder), waiting=32) as up:
            return load(up, "predict", seconds, 320)


def flat(requests: int) -> dict[str, Any]:
    """Memory after each tenth of so many requests."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ours(folder / "ours", default_bundle(folder)) as up:
            done, memory = 0, []
            while done < requests:
                found = load(up, "predict", 10, 16)
                done += found["requests"]
                memory.append(found["resident_megabytes"])
            return {"requests": done, "resident_megabytes": memory}


def _post(url: str, body: Any, key: str) -> Any:
    request = urllib.request.Request(
        url,
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@contextmanager
def _process(command: list[str], log_file: Path) -> Iterator[tuple[int, int]]:
    port = free_port()
    with log_file.open("ab") as log:
        process = subprocess.Popen([*command, str(port)], stdout=log, stderr=log)
    try:
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="for each server and case")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--flat", type=int, default=100_000, help="requests to watch memory over")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        raise MachineError("`wrk` is not installed. Install it: apt-get install wrk.")
    found = measure(options.seconds, options.rounds, options.connections)
    found["overload"] = overload(min(options.seconds, 30))
    found["memory"] = flat(options.flat)
    write_json(RECORD, found)
    print(
        f"ours against bare: {found['against_bare']}, against MLflow {found['against_mlflow']}, "
        f"ready after {found['cold_start_seconds']} s; wrote {RECORD}"
    )


if __name__ == "__main__":
    run_main(main)
