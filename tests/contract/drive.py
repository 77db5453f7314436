"""A launcher in a process of its own, as a stage is: for those that read the environment once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core import errors
from pipeline.core.errors import PipelineError
from pipeline.launch.base import Job
from pipeline.launch.table import LAUNCHERS
from pipeline.launch.worker import resolve
from pipeline.runtime.tracking import stage_run

REPOSITORY = Path(__file__).resolve().parents[2]


def start(
    name: str,
    job: Job,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    record: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Begin a job under a launcher, in the present folder.

    Args:
        record: a folder to record it in as a stage does, with MLflow's database there.
    """
    write_drive(name, job, folder, record=record)
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with (folder / "drive.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.contract.drive", str(folder)],
            env={**os.environ, **(environment or {}), "PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def write_drive(name: str, job: Job, folder: Path, *, record: Path | None = None) -> None:
    """What `python -m tests.contract.drive FOLDER` is to do."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = type(job.config)
    told = {
        "name": name,
        "job": {**job._asdict(), "outputs": list(map(str, job.outputs)), "config": None},
        "kind": f"{kind.__module__}:{kind.__qualname__}",
        "config": job.config.model_dump(mode="json"),
        "record": None if record is None else str(record),
    }
    (folder / "drive.json").write_text(json.dumps(told))


def outcome(driver: subprocess.Popen[bytes], folder: Path) -> Any:
    """What the job returned, when it has ended; what it raised is raised here."""
    code = driver.wait()
    answer = folder / "outcome.json"
    if not answer.exists():
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        raise AssertionError(f"the driver ended with {how}:\n{(folder / 'drive.log').read_text()}")
    told = json.loads(answer.read_text())
    if "error" in told:
        raise getattr(errors, told["error"])(told["message"])
    return told["result"]


def drive(name: str, job: Job, folder: Path, environment: Mapping[str, str] | None = None) -> Any:
    """Run a job under a launcher to its end."""
    return outcome(start(name, job, folder, environment), folder)


def main() -> None:
    """Run the job that `start` wrote; leave what came of it."""
    folder = Path(sys.argv[1])
    told = json.loads((folder / "drive.json").read_text())
    config = resolve(told["kind"]).model_validate(told["config"])
    outputs = tuple(map(Path, told["job"]["outputs"]))
    job = Job(**{**told["job"], "config": config, "outputs": outputs})
    launcher = LAUNCHERS[told["name"]]
    try:
        if told["record"] is None:
            answer = {"result": launcher(job, folder / "launch")}
        else:
            with stage_run("meta_train", config, root=Path(told["record"])) as run:
                recorded = config.model_copy(update={"journal": run.journal})
                answer = {"result": launcher(job._replace(config=recorded), folder / "launch")}
    except PipelineError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    (folder / "outcome.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
