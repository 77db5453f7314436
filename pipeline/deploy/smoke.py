"""Serve a model in a process of its own, and see that HTTP gives the answers that were measured."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import Field, PositiveFloat, PositiveInt

from pipeline.core.config import Section
from pipeline.core.errors import RegistryError
from pipeline.engine.learner import Learner
from pipeline.store.reader import Store
from pipeline.tasks.frozen import FrozenEpisodes

HOST = "127.0.0.1"
_STOP_SECONDS = 10
_POLL_SECONDS = 0.2
_LOG_LINES = 15


class SmokeConfig(Section):
    """How the registered version is tried before it may serve."""

    timeout_seconds: PositiveFloat = 120.0
    """For the server to start and answer; a slow machine may need more."""
    max_queries: PositiveInt = 50
    """Queries of the episode that are sent."""
    tolerance: PositiveFloat = Field(default=1e-4, lt=1)
    """Largest difference between a served and an offline probability."""


@dataclass(frozen=True)
class SmokeResult:
    """How the trial went."""

    passed: bool
    reason: str
    setting: str
    queries: int
    largest_difference: float | None
    """Between served and offline probabilities; None when nothing was answered."""
    start_seconds: float
    answer_seconds: float

    def as_json(self) -> dict[str, Any]:
        """For release.json."""
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """One frozen episode as a request, with the answers that the learner gives offline."""

    setting: str
    request: dict[str, Any]
    classes: list[str]
    probabilities: npt.NDArray[np.float32]
    """[Q, N]"""


def make_trial(
    learner: Learner,
    store: Store,
    episodes: FrozenEpisodes,
    *,
    index: int = 0,
    max_queries: int = 50,
) -> Trial:
    """Turn a frozen episode into a request; offline answers come from the store's own pixels."""
    support = store.gather(episodes.support_rows[index])
    query = store.gather(_spread(episodes, index, max_queries))
    labels = episodes.support_labels[index].astype(np.int64)
    names = [f"{c}: {store.classes[c].name}" for c in episodes.classes[index].tolist()]
    with torch.no_grad():
        adapted = learner.adapt(support, torch.as_tensor(labels), episodes.num_ways)
        probabilities = learner.predict(adapted, query).cpu().numpy()
    request = {
        "support": [
            {"image": _png(picture), "label": names[label]}
            for picture, label in zip(support, labels.tolist(), strict=True)
        ],
        "query": [_png(picture) for picture in query],
    }
    return Trial(episodes.name, request, names, probabilities)


def smoke_test(
    model_uri: str, trial: Trial, config: SmokeConfig, environment: Mapping[str, str]
) -> SmokeResult:
    """Serve a model with MLflow's own server and compare its answers with the offline ones.

    A model that does not start, does not answer or answers otherwise has failed; nothing is raised.
    """
    begin = time.monotonic()
    try:
        with serving(model_uri, config.timeout_seconds, environment) as url:
            started = time.monotonic()
            answer = ask(url, trial.request, config.timeout_seconds)
    except RegistryError as error:
        return _result(trial, None, str(error), begin, time.monotonic())
    difference = _compare(trial, answer)
    if difference is None:
        return _result(trial, None, "the labels differ from the offline ones", begin, started)
    if not difference <= config.tolerance:
        reason = f"probabilities differ by {difference:.2g}, more than {config.tolerance:.2g}"
        return _result(trial, difference, reason, begin, started)
    return _result(trial, difference, "", begin, started)


@contextmanager
def serving(
    model_uri: str, timeout_seconds: float, environment: Mapping[str, str], port: int | None = None
) -> Iterator[str]:
    """`mlflow models serve` on loopback until the body ends; gives its address once it is ready.

    Raises:
        RegistryError: it did not get ready in time; with the last lines that it printed.
    """
    port = port or free_port()
    url = f"http://{HOST}:{port}"
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        process = subprocess.Popen(
            serve_command(model_uri, port),
            cwd=folder,
            env=serve_environment(environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_ready(url, process, time.monotonic() + timeout_seconds, Path(log.name))
            yield url
        finally:
            _stop(process)


def serve_command(model_uri: str, port: int) -> list[str]:
    """MLflow's scoring server for a model, with the packages that are installed here."""
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    return [*command, "--model-uri", model_uri, "--host", HOST, "--port", str(port)]


def serve_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Ours, with this Python's commands first: MLflow starts `uvicorn` by name.

    It may wait longer for the registry than the rest of the pipeline does, which asks again itself:
    the trial's own timeout is the end of that.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # A local registry serves its own files: running them must not leave compiled ones beside them.
    patient = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5"}
    return {**kept, **environment, **patient, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def free_port() -> int:
    """A loopback port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def ask(url: str, request: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
    """Send one episode and return its answer.

    Raises:
        RegistryError: the server refused it or gave no such answer.
    """
    body = json.dumps({"inputs": [request]}).encode()
    call = urllib.request.Request(
        f"{url}/invocations", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with _opener().open(call, timeout=timeout_seconds) as reply:
            (answer,) = json.load(reply)["predictions"]
            return dict(answer)
    except urllib.error.HTTPError as error:
        raise RegistryError(f"the server answered {error.code}: {_message(error.read())}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"the server gave no answer: {type(error).__name__}: {error}") from None


def _opener() -> urllib.request.OpenerDirector:
    """Never through a proxy: the server is on this machine."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return body[:500].decode(errors="replace")


def _wait_until_ready(
    url: str, process: subprocess.Popen[bytes], deadline: float, log: Path
) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RegistryError(f"the server ended (status {process.returncode}):\n{_tail(log)}")
        try:
            with _opener().open(f"{url}/ping", timeout=2) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(_POLL_SECONDS)
    raise RegistryError(f"the server was not ready in time. It printed:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server. Its session is its own: this reaches it and what it started."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        try:
            process.wait(_STOP_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue


def _compare(trial: Trial, answer: Mapping[str, Any]) -> float | None:
    """Largest difference of probabilities, or None when a label or the shape differs."""
    try:
        order = [answer["classes"].index(name) for name in trial.classes]
        served = np.asarray(answer["probabilities"], dtype=np.float64)[:, order]
    except (KeyError, ValueError, IndexError, TypeError):
        return None
    offline = [trial.classes[i] for i in trial.probabilities.argmax(axis=1).tolist()]
    if served.shape != trial.probabilities.shape or answer.get("labels") != offline:
        return None
    return float(np.abs(served - trial.probabilities).max())


def _result(
    trial: Trial, difference: float | None, problem: str, begin: float, started: float
) -> SmokeResult:
    end = time.monotonic()
    return SmokeResult(
        passed=not problem,
        reason=problem or "Served answers equal the offline ones.",
        setting=trial.setting,
        queries=len(trial.probabilities),
        largest_difference=difference,
        start_seconds=round(started - begin, 2),
        answer_seconds=round(end - started, 2),
    )


def _spread(episodes: FrozenEpisodes, index: int, most: int) -> npt.NDArray[np.int32]:
    """At most so many query rows of an episode, evenly over its classes."""
    rows = episodes.query_rows[index]
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))
    picked: npt.NDArray[np.int32] = rows[chosen]
    return picked


def _png(picture: npt.NDArray[np.uint8]) -> str:
    """A stored picture [C, H, W] as base64 PNG, which loses nothing."""
    pixels = picture[0] if len(picture) == 1 else np.moveaxis(picture, 0, -1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
