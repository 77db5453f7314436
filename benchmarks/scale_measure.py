"""What the scaling model is made of, measured in worker processes that the local launcher starts.

V values: all parameters as one vector. G groups.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.algorithms.table import AlgorithmConfig
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.config import Section
from pipeline.core.files import new_folder
from pipeline.engine.choice import EngineConfig
from pipeline.engine.learner import Learner, Preprocessing, save_learner
from pipeline.runtime.checkpoint import save_checkpoint
from pipeline.runtime.collectives import barrier, exact_sum, gather_shares, tree_sum
from pipeline.runtime.context import SINGLE, Context
from pipeline.store.reader import StoredClass, open_store
from pipeline.store.writer import StoreContent, write_store
from pipeline.tasks.frozen import read_episodes
from pipeline.tasks.plan import SampleTasksConfig, sample_tasks
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec
from pipeline.training.adam import adam_step, zero_moments
from pipeline.training.loop import OuterConfig
from pipeline.training.meta_train import MetaTrainConfig, MetaTrainJob, program
from pipeline.training.state import flatten, fresh_state, unflatten
from pipeline.training.validation import validator

SHAPE, WIDTH, EXAMPLES = (1, 28, 28), 64, 20
VALIDATION_EPISODES = 40
_SPLITS = {"train": 200, "val": 40, "test": 40}


class Compute(Section):
    """Seconds of each part of a step, in one thread."""

    group: float
    """A group's meta-gradient"""
    read: float
    """A group's pictures: sample, gather, normalise, cut into tasks"""
    update: float
    """Norm, clipping and Adam on V values, and the copies around them"""
    add: float
    """Adding V values to V values"""
    validation_episode: float
    checkpoint: float
    """Writing one; the other workers wait"""
    values: int
    """V"""
    bytes_gathered: int
    """Of a group's metrics"""


class Network(Section):
    """One message between two workers takes latency + bytes / bandwidth."""

    name: str
    latency_seconds: float
    bytes_per_second: float
    measured: bool


class Sizes(Section):
    """Vectors to exchange."""

    values: list[int]
    repeats: int = 60


def prepare(folder: Path) -> None:
    """A store of random pictures, episodes over it, and an untrained Conv4-64."""
    rng, classes, offset = np.random.default_rng(0), [], 0
    for split, count in _SPLITS.items():
        for i in range(count):
            classes.append(StoredClass(f"{split}{i}", split, split, offset, EXAMPLES))
            offset += EXAMPLES
    pixels = rng.integers(0, 256, (offset, *SHAPE), dtype=np.uint8)
    names = [str(i) for i in range(offset)]
    content = StoreContent("noise", tuple(classes), pixels, np.arange(offset), names)
    write_store(folder / "store", content, rows_per_shard=20_000, report={})
    frozen = FrozenSpec(ways=[5], shots=[1], queries=15, episodes=VALIDATION_EPISODES)
    config = SampleTasksConfig(
        train=EpisodeSpec(ways=5, shots=1, queries=15), val=frozen, test=frozen
    )
    sample_tasks(config, open_store(folder / "store"), folder / "tasks")
    spec = BackboneSpec(name="conv4", settings={"width": WIDTH}, image_shape=SHAPE)
    scaling = Preprocessing(image_shape=SHAPE, mean=[0.5], std=[0.25])
    algorithm = AlgorithmConfig(name="maml").chosen()
    model = build_model(spec, algorithm.batch_norm)
    origin = {"stage": "benchmark", "val_accuracy": 0.0}
    with new_folder(folder / "pretrained", kind="learner") as building:
        params = init_params(spec, 0)
        save_learner(building, Learner(algorithm, model, params, scaling, spec, origin))


def make_job(folder: Path, name: str, outer: OuterConfig, num_groups: int) -> MetaTrainJob:
    """A real run; its files lie in `folder`."""
    return MetaTrainJob(
        config=MetaTrainConfig(
            algorithm=AlgorithmConfig(name="maml"),
            engine=EngineConfig(strategy="split"),
            num_groups=num_groups,
            outer=outer,
        ),
        store=folder / "store",
        tasks=folder / "tasks",
        pretrained=folder / "pretrained",
        target=folder / name / "learner",
        checkpoints=folder / name / "checkpoints",
        journal=folder / name / "journal.jsonl",
        choices=folder / "engine.json",
        incidents=folder / name / "incidents",
    )


def compute(job: MetaTrainJob, context: Context) -> dict[str, Any]:
    """An entry: every worker measures at the same time, and none waits for another meanwhile."""
    training, start = program(job, SINGLE)
    vector, batches, reads = flatten(start), [], []
    with training.feed(range(1)) as feed:
        for position in range(8):
            begin = time.perf_counter()
            batches.append(feed.take(position, 0))
            reads.append(time.perf_counter() - begin)
    params = unflatten(vector, start)
    barrier()
    groups = [_seconds(lambda b=b: training.gradient(params, b)) for b in [batches[0], *batches]]
    result = training.gradient(params, batches[0])
    metrics = sum(v.numel() for v in result.metrics.values())
    moments = zero_moments(vector)

    def update() -> None:
        gradient = flatten(result.gradient) / vector.norm()
        after, _ = adam_step(vector, gradient, moments, step=1, lr=1e-3, weight_decay=0.0)
        unflatten(after, start)

    validate = validator(training.store, read_episodes(job.tasks, "val"), SINGLE)
    learner = training.learner(start)
    measured = Compute(
        group=statistics.median(groups[1:]),
        read=statistics.median(reads[1:]),
        update=_median(update, 20),
        add=_median(lambda: tree_sum([vector, vector]), 50),
        validation_episode=_median(lambda: validate(learner, 0), 3) / VALIDATION_EPISODES,
        checkpoint=_checkpoint(job, context, start),
        values=vector.numel(),
        bytes_gathered=4 * (metrics + 4),
    )
    barrier()
    return measured.model_dump()


def _checkpoint(job: MetaTrainJob, context: Context, start: dict[str, torch.Tensor]) -> float:
    folder = job.checkpoints / f"measured-{context.rank}"
    tensors, values = fresh_state(start).checkpoint()
    steps = iter(range(1, 100))
    return _median(lambda: save_checkpoint(folder, next(steps), tensors, values), 7)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _median(work: Callable[[], object], times: int) -> float:
    work()
    return statistics.median(_seconds(work) for _ in range(times))


def exchange(sizes: Sizes, context: Context) -> list[tuple[int, float]]:
    """An entry for two workers: seconds to exchange and add vectors, by bytes sent."""
    found = []
    for size in sizes.values:
        part = [torch.ones(size)]
        found.append((4 * size, _median(lambda p=part: exact_sum(p, 2, context), sizes.repeats)))
    return found


def gather(sizes: Sizes, context: Context) -> list[tuple[int, float]]:
    """An entry: seconds to gather a row of each worker on all of them, by bytes of a row."""
    found = []
    for size in sizes.values:
        row = torch.ones(1, size)
        work = lambda r=row: gather_shares(r, context.world_size, context)  # noqa: E731
        found.append((4 * size, _median(work, sizes.repeats)))
    return found
