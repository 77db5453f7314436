"""A whole meta-training run, as the `meta_train` stage does it, on a store of random pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.cases import Case, make_algorithm
from pipeline.algorithms.maml import MAML
from pipeline.algorithms.table import AlgorithmConfig
from pipeline.backbones.table import build_model, init_params
from pipeline.core.files import new_folder
from pipeline.engine.learner import Learner, Preprocessing, save_learner
from pipeline.runtime.collectives import barrier
from pipeline.runtime.context import Context
from pipeline.runtime.journal import read_points
from pipeline.store.reader import StoredClass, open_store
from pipeline.store.writer import StoreContent, write_store
from pipeline.tasks.plan import SampleTasksConfig, sample_tasks
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec
from pipeline.training.loop import OuterConfig
from pipeline.training.meta_train import MetaTrainConfig, MetaTrainJob, run

_VALIDATE_EVERY = {"cpu": 4, "cuda": 50}
_ROUNDS = {"cpu": 1, "cuda": 4}
"""Validations in a run; on a card, where a step is short, enough to outweigh setting up"""
_EPISODES_PER_STEP = 8
"""To validate on, as the defaults of params.yaml: 200 of two kinds every 50 steps."""
_SPLITS = {"train": 200, "val": 40, "test": 40}
_EXAMPLES = 20


class WholeLoop:
    """Trains anew each time that it is asked, in processes that are running already."""

    def __init__(self, case: Case, context: Context, folder: Path) -> None:
        self._case, self._context, self._folder = case, context, folder
        self._count = 0
        if context.is_main:
            prepare(case, folder, context)
        barrier()

    def train(self) -> int:
        """The number of training tasks."""
        self._count += 1
        job = job_of(self._case, self._folder, f"run-{self._count}", self._context)
        run(job, self._context)
        return job.config.outer.num_steps * self._case.meta_batch

    def data_wait_fraction(self) -> float | None:
        """Mean over the steps of the last run; None on workers that keep no journal."""
        journal = _journal(self._folder, f"run-{self._count}")
        if not journal.exists():
            return None
        return fmean(point.metrics["data_wait_fraction"] for point, _ in read_points(journal))


def _journal(folder: Path, name: str) -> Path:
    return folder / name / "journal.jsonl"


def job_of(case: Case, folder: Path, name: str, context: Context) -> MetaTrainJob:
    """A run of a case, its own files in a folder of its name."""
    algorithm = make_algorithm(case)
    assert isinstance(algorithm, MAML)
    device = context.device.type
    every, num_groups = _VALIDATE_EVERY[device], case.groups if device == "cpu" else 1
    config = MetaTrainConfig(
        algorithm=AlgorithmConfig(name="maml", maml=algorithm),
        num_groups=num_groups,
        tasks_per_group=case.meta_batch // num_groups,
        outer=OuterConfig(num_steps=_ROUNDS[device] * every, validate_every=every),
    )
    return MetaTrainJob(
        config=config,
        store=folder / "store",
        tasks=folder / "tasks",
        pretrained=folder / "pretrained",
        target=folder / name / "learner",
        checkpoints=folder / name / "checkpoints",
        journal=_journal(folder, name),
        choices=folder / "engine.json",
    )


def prepare(case: Case, folder: Path, context: Context) -> None:
    """Write what the runs of a case read."""
    rng = np.random.default_rng(0)
    classes, offset = [], 0
    for split, count in _SPLITS.items():
        for i in range(count):
            classes.append(StoredClass(f"{split}{i}", split, split, offset, _EXAMPLES))
            offset += _EXAMPLES
    shape = case.backbone.image_shape
    content = StoreContent(
        domain="noise",
        classes=tuple(classes),
        pixels=rng.integers(0, 256, (offset, *shape), dtype=np.uint8),
        order=np.arange(offset),
        names=[str(i) for i in range(offset)],
    )
    write_store(folder / "store", content, rows_per_shard=20000, report={})
    frozen = FrozenSpec(
        ways=[case.ways],
        shots=[case.shots],
        queries=case.queries,
        episodes=_EPISODES_PER_STEP * _VALIDATE_EVERY[context.device.type],
    )
    episodes = EpisodeSpec(ways=case.ways, shots=case.shots, queries=case.queries)
    config = SampleTasksConfig(train=episodes, val=frozen, test=frozen)
    sample_tasks(config, open_store(folder / "store"), folder / "tasks")
    _save_untrained(case, folder / "pretrained")


def _save_untrained(case: Case, target: Path) -> None:
    algorithm = MAML()
    channels = case.backbone.image_shape[0]
    learner = Learner(
        algorithm,
        build_model(case.backbone, algorithm.batch_norm),
        init_params(case.backbone, 0),
        Preprocessing(
            image_shape=case.backbone.image_shape, mean=[0.5] * channels, std=[0.25] * channels
        ),
        case.backbone,
        {"stage": "benchmark", "val_accuracy": 0.0},
    )
    with new_folder(target, kind="learner") as building:
        save_learner(building, learner)
