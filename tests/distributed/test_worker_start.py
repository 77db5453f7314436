"""What a worker imports before it works: every start of every worker waits for it."""

from __future__ import annotations

from pathlib import Path

from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.store.reader import Store
from tests.distributed.small_run import make_job

UNUSED = ["torch._dynamo", "torch._inductor", "sympy", "pandas", "mlflow", "dvc", "ray"]


def test_a_worker_imports_nothing_heavy_that_it_does_not_use(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """PyTorch's compiler and pandas come in by harmless calls, and double the time of a start."""
    job = make_job(tmp_path, blob_store, blob_tasks)
    entry = "tests.distributed.entries:modules_of_a_run"
    imported = launch_local(Job(entry, job, 1), tmp_path / "launch")
    assert {"torch", "pyarrow"} <= set(imported)
    assert not set(imported) & set(UNUSED)
