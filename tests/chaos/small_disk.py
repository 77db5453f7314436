"""Programs that run where a small disk of their own is mounted: `unshare -Urm python -m ...`.

A user and mount namespace of its own, so nobody else sees the disk, no privilege is needed, and it
goes when the program ends.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import PipelineError
from pipeline.core.files import read_json, verify, write_json
from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.runtime.checkpoint import load_checkpoint
from pipeline.runtime.context import SINGLE
from pipeline.runtime.journal import read_points
from pipeline.runtime.logs import run_main
from pipeline.store.reader import open_store
from pipeline.training.meta_train import MetaTrainJob, run
from tests.distributed.small_run import CHECKPOINT_EVERY, digest, make_job
from tests.unit.test_store_integrity import small_store

DISK_BYTES = 16 << 20


def command(*arguments: object) -> list[str]:
    """What runs one of this module's programs in a namespace of its own."""
    return ["unshare", "-Urm", sys.executable, "-m", "tests.chaos.small_disk", *map(str, arguments)]


def why_not() -> str:
    """Why no small disk can be mounted here; empty if one can."""
    if shutil.which("unshare") is None:
        return "there is no `unshare`"
    tried = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, text=True)
    return tried.stderr.strip()


def mount(folder: Path, options: str) -> None:
    """Mount a disk in memory, or change the one that is mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def train_on_a_filling_disk(job_file: Path, at_step: int, left_bytes: int, result: Path) -> None:
    """Train; when a step is reached, somebody else fills the disk. Then make room and go on."""
    job = MetaTrainJob.model_validate_json(job_file.read_text())
    mount(job.checkpoints, f"size={DISK_BYTES}")
    filler = threading.Thread(target=_fill, args=(job, at_step, left_bytes), daemon=True)
    filler.start()
    trained = _child("train", job_file)
    saved = load_checkpoint(job.checkpoints)
    found: dict[str, Any] = {
        "status": trained.returncode,
        "said": trained.stderr,
        "reached": _last_step(job),
        "checkpoint": saved and saved.state["progress"]["step"],
        "hidden": [p.name for p in job.checkpoints.glob(".step-*")],
    }
    (job.checkpoints / "filler").unlink()
    found["second_status"] = _child("train", job_file).returncode
    write_json(result, found)


def _child(*arguments: object) -> subprocess.CompletedProcess[str]:
    own = [sys.executable, "-m", "tests.chaos.small_disk", *map(str, arguments)]
    return subprocess.run(own, capture_output=True, text=True)


def _last_step(job: MetaTrainJob) -> int:
    if not job.journal.exists():
        return 0
    return max((point.step for point, _ in read_points(job.journal)), default=0)


def _fill(job: MetaTrainJob, at_step: int, left_bytes: int) -> None:
    while _last_step(job) < at_step:
        time.sleep(0.002)
    chunk = 64 << 10 if left_bytes else 4 << 10
    with (job.checkpoints / "filler").open("wb", buffering=0) as file:
        while shutil.disk_usage(job.checkpoints).free > max(left_bytes, chunk):
            file.write(bytes(chunk))
        with contextlib.suppress(OSError):
            while not left_bytes:
                file.write(bytes(chunk))


def train(job_file: Path) -> None:
    """As a worker does it, with one thread; an error ends the process with its own status."""
    torch.set_num_threads(1)
    job = MetaTrainJob.model_validate_json(job_file.read_text())
    run_main(lambda: run(job, SINGLE) and None)


def launch(job_file: Path, folder: Path) -> None:
    """The same with workers of their own."""
    job = MetaTrainJob.model_validate_json(job_file.read_text())
    whole = Job("pipeline.training.meta_train:run", job, 2, max_restarts=3)
    run_main(lambda: launch_local(whole, folder) and None)


def launch_where_all_is_full(folder: Path, store: Path, tasks: Path, result: Path) -> None:
    """Checkpoints, journal and the launcher's own files on one disk; it fills to its last byte."""
    mount(folder, f"size={DISK_BYTES // 2}")
    job = make_job(folder / "run", open_store(store), tasks, num_steps=400)
    job_file = folder / "job.json"
    job_file.write_text(job.model_dump_json())
    filler = threading.Thread(target=_fill, args=(job, 2 * CHECKPOINT_EVERY, 0), daemon=True)
    filler.start()
    launched = _child("launch", job_file, folder / "launch")
    found = {"status": launched.returncode, "said": launched.stderr, "reached": _last_step(job)}
    saved = load_checkpoint(job.checkpoints)
    found["checkpoint"] = saved and saved.state["progress"]["step"]
    (job.checkpoints / "filler").unlink()
    found["second_status"] = _child("launch", job_file, folder / "launch").returncode
    write_json(result, {**found, "digest": digest(job)})


def read_only(job_file: Path, folder: Path, result: Path) -> None:
    """Two checkpoints' worth of training and a store; then the disk is made read-only."""
    job = MetaTrainJob.model_validate_json(job_file.read_text())
    mount(job.checkpoints, f"size={DISK_BYTES}")
    mount(folder, f"size={DISK_BYTES}")
    small_store(folder / "store")
    half = job.config.outer.model_copy(update={"num_steps": job.config.outer.num_steps // 2})
    short = job.model_copy(update={"config": job.config.model_copy(update={"outer": half})})
    run(short, SINGLE)
    before = load_checkpoint(job.checkpoints)
    mount(job.checkpoints, "remount,ro")
    mount(folder, "remount,ro")
    trained = _child("train", job_file)
    after = load_checkpoint(job.checkpoints)
    try:
        small_store(folder / "store", level=1)
        store_error = "none"
    except PipelineError as error:
        store_error = str(error)
    found = {
        "status": trained.returncode,
        "said": trained.stderr,
        "before": before and before.state["progress"]["step"],
        "after": after and after.state["progress"]["step"],
        "store_error": store_error,
        "store_rows": open_store(folder / "store").num_rows,
    }
    write_json(result, found)


def store_on_a_small_disk(folder: Path, rooms: str, result: Path) -> None:
    """Write over a store again and again on disks that are too small for two of them."""
    found = []
    for room in json.loads(rooms):
        mount(folder, f"size={room}")
        small_store(folder / "store")
        before = verify(folder / "store")
        try:
            small_store(folder / "store", level=1, num_shards=30, size=64)
            error = "none"
        except PipelineError as refused:
            error = str(refused)
        same = verify(folder / "store") == before and open_store(folder / "store").num_rows == 60
        left = [p.name for p in folder.iterdir()]
        found.append({"room": room, "error": error, "same": same, "left": left})
        subprocess.run(["umount", str(folder)], check=True)
    write_json(result, found)


def main() -> None:
    """Run the program of this name."""
    name, *arguments = sys.argv[1:]
    if name == "train":
        train(Path(arguments[0]))
    elif name == "launch":
        launch(*map(Path, arguments))
    elif name == "all-full":
        launch_where_all_is_full(*map(Path, arguments))
    elif name == "filling":
        job_file, at_step, left_bytes, result = arguments
        train_on_a_filling_disk(Path(job_file), int(at_step), int(left_bytes), Path(result))
    elif name == "read-only":
        read_only(*map(Path, arguments))
    else:
        folder, rooms, result = arguments
        store_on_a_small_disk(Path(folder), rooms, Path(result))


def results(path: Path) -> Any:
    """What a program left."""
    return read_json(path)


if __name__ == "__main__":
    main()
