"""Pre-training: one candidate backbone as a classifier of the training classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from pipeline.algorithms.nearest_centroid import NearestCentroid
from pipeline.backbones.conv4 import Conv4Config
from pipeline.backbones.mlp import MLPConfig
from pipeline.backbones.resnet12 import ResNet12Config
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.config import Section
from pipeline.core.errors import ConfigError
from pipeline.core.types import Params
from pipeline.engine.learner import Learner, Preprocessing
from pipeline.launch.table import launch
from pipeline.runtime.agreement import check_same_inputs
from pipeline.runtime.context import Context
from pipeline.runtime.lineage import content_hash
from pipeline.runtime.resume import drop_copies
from pipeline.store.reader import Store, open_store
from pipeline.tasks.frozen import read_episodes
from pipeline.training.artefact import begin_run, best_of, finish_run, leave_learner
from pipeline.training.augment import AugmentConfig
from pipeline.training.incidents import Incidents
from pipeline.training.loop import OuterConfig, optimise
from pipeline.training.programs import Supervised
from pipeline.training.state import unflatten
from pipeline.training.validation import validator


class PretrainConfig(Section):
    """Supervised training of the candidate backbones."""

    candidates: list[str] = Field(default=["conv4"], min_length=1)
    """Backbones to pre-train; the best by validation episodes is meta-trained."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the initial weights, of the examples' order and of their moves."""
    num_groups: PositiveInt = 8
    """Groups of a batch, each computed whole by one worker."""
    examples_per_group: PositiveInt = 32
    """Examples in a group: the batch that batch norm sees."""
    augment: AugmentConfig = AugmentConfig()
    outer: OuterConfig = OuterConfig()
    conv4: Conv4Config = Conv4Config()
    resnet12: ResNet12Config = ResNet12Config()
    mlp: MLPConfig = MLPConfig()

    def backbone(self, candidate: str, image_shape: tuple[int, int, int]) -> BackboneSpec:
        """A candidate with its settings.

        Raises:
            ConfigError: no such backbone.
        """
        settings = getattr(self, candidate, None)
        if candidate in ("augment", "outer", "seed") or not isinstance(settings, Section):
            raise ConfigError(
                f"pretrain.candidates: no backbone {candidate!r}. Known ones: conv4, resnet12, mlp."
            )
        return BackboneSpec(name=candidate, settings=settings.model_dump(), image_shape=image_shape)


class PretrainJob(Section):
    """One candidate's run, as the workers get it."""

    config: PretrainConfig
    candidate: str
    store: Path
    tasks: Path
    target: Path
    checkpoints: Path
    journal: Path
    incidents: Path = Path(".metaloom/incidents")
    """Where steps that a guard refused are kept for `metaloom replay`."""


def pretrain(
    config: PretrainConfig, candidate: str, *, store: Path, tasks: Path, target: Path, journal: Path
) -> dict[str, Any]:
    """Train one candidate on all workers and leave a sealed learner folder; returns its metrics."""
    identity = {"config": config.model_dump(mode="json"), "candidate": candidate}
    checkpoints = begin_run(f"pretrain-{candidate}", identity, [store, tasks])
    job = PretrainJob(
        config=config,
        candidate=candidate,
        store=store,
        tasks=tasks,
        target=target,
        checkpoints=checkpoints,
        journal=journal,
    )
    metrics: dict[str, Any] = launch(
        "pipeline.training.pretrain:run", job, most=config.num_groups, outputs=[target]
    )
    finish_run(checkpoints)
    return metrics


def program(job: PretrainJob, context: Context, engine: None = None) -> tuple[Supervised, Params]:
    """What a run optimises, and the parameters that it starts from; no engine is to be chosen."""
    store = open_store(job.store)
    config = job.config
    config.augment.check_fits(store.image_shape, where="pretrain.augment")
    spec = config.backbone(job.candidate, store.image_shape)
    template = initial_learner(spec, store, config.seed, context)
    made = Supervised(
        template,
        store,
        config.seed,
        config.num_groups,
        config.examples_per_group,
        context,
        config.augment,
    )
    head = {n: p.to(context.device) for n, p in made.init_head().items()}
    return made, {**template.params, **head}


def run(job: PretrainJob, context: Context) -> dict[str, Any]:
    """What every worker does."""
    training, start = program(job, context)
    store = training.store
    tasks_digest = content_hash(job.tasks) or "none"
    check_same_inputs({"store": store.digest, "tasks": tasks_digest}, context)
    state = optimise(
        training,
        start,
        job.config.outer,
        validator(store, read_episodes(job.tasks, "val"), context),
        context,
        checkpoints=job.checkpoints,
        journal=job.journal,
        label=f"pretrain {job.candidate}",
        incidents=Incidents(
            job.incidents / job.checkpoints.name, __name__, job, ("store", "tasks")
        ),
    )
    learner = training.learner(unflatten(best_of(state).vector, start))
    origin = {
        "stage": "pretrain",
        "candidate": job.candidate,
        "store_digest": store.digest,
        "augment": job.config.augment.model_dump(mode="json"),
    }
    metrics = leave_learner(job.target, learner, state, origin, context)
    drop_copies(job.checkpoints, context)
    return metrics


def initial_learner(spec: BackboneSpec, store: Store, seed: int, context: Context) -> Learner:
    """A backbone before any training, with the nearest-centroid head that validates it."""
    algorithm = NearestCentroid()
    preprocessing = Preprocessing(
        image_shape=store.image_shape, mean=list(store.mean), std=list(store.std)
    )
    model = build_model(spec, algorithm.batch_norm)
    params = {n: p.to(context.device) for n, p in init_params(spec, seed).items()}
    return Learner(algorithm, model, params, preprocessing, spec, {})
