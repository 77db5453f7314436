"""A small but whole meta-training run that the tests of this folder start, kill and compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.algorithms.table import AlgorithmConfig
from pipeline.backbones.mlp import MLPConfig
from pipeline.core.files import new_folder, sha256_file
from pipeline.engine.choice import EngineConfig
from pipeline.engine.learner import WEIGHTS, Preprocessing, save_learner
from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.runtime.checkpoint import checkpoint_folders
from pipeline.runtime.context import SINGLE
from pipeline.store.reader import Store
from pipeline.training.augment import OFF, AugmentConfig
from pipeline.training.loop import OuterConfig
from pipeline.training.meta_train import MetaTrainConfig, MetaTrainJob
from pipeline.training.pretrain import PretrainConfig, initial_learner

NUM_STEPS, CHECKPOINT_EVERY = 60, 5
_PROTONET, _AUTO = AlgorithmConfig(name="protonet"), EngineConfig()


def write_pretrained(store: Store, target: Path) -> Path:
    """A learner folder as `pretrain` leaves it, without the training."""
    config = PretrainConfig(candidates=["mlp"], mlp=MLPConfig(hidden=(24, 16)))
    learner = initial_learner(config.backbone("mlp", store.image_shape), store, 0, SINGLE)
    assert isinstance(learner.preprocessing, Preprocessing)
    with new_folder(target, kind="learner") as folder:
        save_learner(folder, replace(learner, origin={"val_accuracy": 0.0}))
    return target


def make_job(
    folder: Path,
    store: Store,
    tasks: Path,
    *,
    algorithm: AlgorithmConfig = _PROTONET,
    engine: EngineConfig = _AUTO,
    tasks_per_group: int = 1,
    augment: AugmentConfig = OFF,
    **changes: Any,
) -> MetaTrainJob:
    """A job whose files all live in `folder`; `changes` go to the outer configuration."""
    outer = {
        "num_steps": NUM_STEPS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "validate_every": 20,
        "warmup_steps": 2,
        "lr": 3e-3,
        **changes,
    }
    pretrained = folder / "pretrained" / "mlp"
    if not pretrained.exists():
        write_pretrained(store, pretrained)
    return MetaTrainJob(
        config=MetaTrainConfig(
            algorithm=algorithm,
            engine=engine,
            tasks_per_group=tasks_per_group,
            augment=augment,
            outer=OuterConfig(**outer),
        ),
        store=store.folder,
        tasks=tasks,
        pretrained=pretrained,
        target=folder / "meta",
        checkpoints=folder / "checkpoints",
        journal=folder / "journal.jsonl",
        choices=folder / "engine.json",
        incidents=folder / "incidents",
    )


def run(job: MetaTrainJob, num_workers: int) -> dict[str, Any]:
    """Train to the end with real processes; returns the metrics."""
    scratch = job.target.parent / f"launch-{num_workers}"
    entry = "pipeline.training.meta_train:run"
    result: dict[str, Any] = launch_local(Job(entry, job, num_workers), scratch)
    return result


def last_state(job: MetaTrainJob) -> str:
    """SHA-256 of the last checkpoint's tensors: the weights and the optimiser's state."""
    return sha256_file(checkpoint_folders(job.checkpoints)[0] / "tensors.safetensors")


def digest(job: MetaTrainJob) -> tuple[str, str]:
    """SHA-256 of the final weights and of the history."""
    return sha256_file(job.target / WEIGHTS), sha256_file(job.target / "history.json")
