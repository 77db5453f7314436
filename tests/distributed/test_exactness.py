"""The same run on any number of workers ends with the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.algorithms.maml import MAML
from pipeline.algorithms.table import AlgorithmConfig
from pipeline.core.files import read_json, write_json
from pipeline.engine.choice import EngineConfig
from pipeline.engine.meta_gradient import STRATEGIES
from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.runtime.checkpoint import checkpoint_folders
from pipeline.runtime.context import SINGLE
from pipeline.store.reader import Store
from pipeline.training import meta_train
from pipeline.training.augment import AugmentConfig
from pipeline.training.loop import OuterConfig
from pipeline.training.meta_train import MetaTrainJob
from tests.distributed.entries import Choices
from tests.distributed.small_run import digest, last_state, make_job, run


def test_one_two_three_and_four_workers_end_with_the_same_weights(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    digests, metrics = {}, []
    for workers in (1, 2, 3, 4):
        job = make_job(tmp_path / str(workers), blob_store, blob_tasks, num_steps=12)
        metrics.append(run(job, workers))
        digests[workers] = (*digest(job), last_state(job))
    assert len(set(digests.values())) == 1, digests
    assert all(m == metrics[0] for m in metrics)


@pytest.mark.slow
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


_MAML = AlgorithmConfig(name="maml", maml=MAML(num_inner_steps=2))


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(name, marks=() if name == "vmap_split" else pytest.mark.slow)
        for name in STRATEGIES
    ],
)
def test_maml_ends_with_the_same_bits_by_every_strategy(
    strategy: Any, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """On augmented pictures: their moves do not depend on the worker either."""
    digests = set()
    for workers in (1, 2):
        job = make_job(
            tmp_path / str(workers),
            blob_store,
            blob_tasks,
            algorithm=_MAML,
            engine=EngineConfig(strategy=strategy),
            tasks_per_group=2,
            augment=AugmentConfig(max_shift=2, flip=True),
            num_steps=4,
        )
        run(job, workers)
        digests.add((*digest(job), last_state(job)))
        card = read_json(job.target / "learner.json")
        chunk = 2 if strategy.startswith("vmap") else None
        expected = {"strategy": strategy, "precision": "fp32", "chunk": chunk}
        assert card["origin"]["engine"] == expected
    assert len(digests) == 1


def test_every_worker_takes_the_main_ones_engine(tmp_path: Path) -> None:
    """Only the main worker's memory knows a choice, and it is one that no other would come to."""
    kind = Choices(folder=tmp_path)
    launch_local(Job("tests.distributed.entries:engines", kind, 1), tmp_path / "first")
    known = read_json(tmp_path / "0.json")
    (entry,) = known.values()
    entry["engine"]["stride"] = 7
    write_json(tmp_path / "0.json", known)
    found = launch_local(Job("tests.distributed.entries:engines", kind, 3), tmp_path / "then")
    assert found == [7, 7, 7]
    assert not (tmp_path / "1.json").exists()
    assert json.loads((tmp_path / "0.json").read_text()) == known


def test_another_machine_goes_on_by_the_method_of_the_checkpoint(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """It remembers another strategy as its fastest, which sums in another order."""

    def job(name: str, strategy: str) -> MetaTrainJob:
        """Of a machine that has chosen before."""
        made = make_job(
            tmp_path / name, blob_store, blob_tasks, tasks_per_group=4, num_steps=10, lr=0.1
        )
        chunk = None if strategy == "loop" else 4
        choices = read_json(tmp_path / "asked" / "engine.json")
        for choice in choices.values():
            choice["engine"] |= {"strategy": strategy, "chunk": chunk}
        write_json(made.choices, choices)
        return made

    asked = make_job(tmp_path / "asked", blob_store, blob_tasks, tasks_per_group=4, num_steps=1)
    meta_train.run(asked, SINGLE)
    whole, other = job("whole", "loop"), job("other", "vmap")
    for one in (whole, other):
        meta_train.run(one, SINGLE)
    assert digest(whole) != digest(other), "the comparison could not fail"
    moved = job("moved", "vmap")
    half = min(checkpoint_folders(whole.checkpoints))
    shutil.copytree(half, moved.checkpoints / half.name)
    meta_train.run(moved, SINGLE)
    assert digest(moved) == digest(whole)
    for one, strategy in ((moved, "loop"), (other, "vmap")):
        origin = read_json(one.target / "learner.json")["origin"]
        assert origin["engine"]["strategy"] == strategy
