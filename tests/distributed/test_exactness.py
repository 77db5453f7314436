"""The same run on any number of workers ends with the same bits."""

from __future__ import annotations

from pathlib import Path

from pipeline.store.reader import Store
from pipeline.training.loop import OuterConfig
from tests.distributed.small_run import digest, make_job, run


def test_one_two_three_and_four_workers_end_with_the_same_weights(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    digests, metrics = {}, []
    for workers in (1, 2, 3, 4):
        job = make_job(tmp_path / str(workers), blob_store, blob_tasks, num_steps=12)
        metrics.append(run(job, workers))
        digests[workers] = digest(job)
    assert len(set(digests.values())) == 1, digests
    assert all(m == metrics[0] for m in metrics)


def test_the_comparison_can_fail(blob_store: Store, blob_tasks: Path, tmp_path: Path) -> None:
    """With the backend's own all-reduce the worlds differ: the exactness above is the tree's doing."""
    digests = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        job = make_job(folder, blob_store, blob_tasks, num_steps=12, reduction="fast")
        run(job, workers)
        digests.append(digest(job))
    assert digests[0] != digests[1]
    assert OuterConfig().reduction == "exact"
