"""Meta-training: the chosen backbone, trained on episodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt

from pipeline.algorithms.table import AlgorithmConfig
from pipeline.backbones.table import build_model, init_params
from pipeline.core.config import Section
from pipeline.core.errors import ConfigError
from pipeline.core.files import read_json
from pipeline.core.functional import BACKBONE
from pipeline.core.types import Params
from pipeline.engine.choice import EngineConfig, choose_engine, example_group
from pipeline.engine.learner import Learner, load_learner
from pipeline.engine.meta_gradient import Engine
from pipeline.engine.runner import Runner
from pipeline.launch.table import launch
from pipeline.runtime.agreement import check_same_inputs
from pipeline.runtime.context import Context
from pipeline.runtime.lineage import content_hash
from pipeline.runtime.resume import drop_copies
from pipeline.store.reader import Store, open_store
from pipeline.tasks.frozen import read_episodes
from pipeline.tasks.plan import TrainingStream, read_training_stream
from pipeline.tasks.stream import TrainStream, train_stream
from pipeline.training.artefact import begin_run, best_of, finish_run, leave_learner
from pipeline.training.augment import AugmentConfig
from pipeline.training.incidents import Incidents
from pipeline.training.loop import OuterConfig, Validate, optimise
from pipeline.training.programs import MetaTraining
from pipeline.training.state import Best, TrainState, fresh_state, unflatten
from pipeline.training.validation import validator


class MetaTrainConfig(Section):
    """Meta-training of the best candidate."""

    algorithm: AlgorithmConfig = AlgorithmConfig()
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the algorithm's own initial parameters."""
    warm_start: bool = True
    """Start from the pre-trained backbone instead of fresh weights."""
    num_groups: PositiveInt = 8
    """Groups of the meta-batch, each computed whole by one worker: part of the run's identity."""
    tasks_per_group: PositiveInt = 1
    """Episodes in a group; they share ways and shots."""
    augment: AugmentConfig = AugmentConfig()
    engine: EngineConfig = EngineConfig()
    outer: OuterConfig = OuterConfig()


class MetaTrainJob(Section):
    """One run, as the workers get it."""

    config: MetaTrainConfig
    store: Path
    tasks: Path
    pretrained: Path
    target: Path
    checkpoints: Path
    journal: Path
    choices: Path = Path(".metaloom/engine.json")
    """Which strategy was the fastest on this machine, by shape of task."""
    incidents: Path = Path(".metaloom/incidents")
    """Where steps that a guard refused are kept for `metaloom replay`."""


def choose_candidate(folder: Path, candidates: list[str]) -> Path:
    """The candidate with the best validation accuracy; the first of equals."""
    cards = {name: read_json(folder / name / "learner.json") for name in candidates}
    return folder / max(candidates, key=lambda name: cards[name]["origin"]["val_accuracy"])


def meta_train(
    config: MetaTrainConfig,
    *,
    store: Path,
    tasks: Path,
    pretrained: Path,
    target: Path,
    journal: Path,
) -> dict[str, Any]:
    """Meta-train a learner on all workers; leave a sealed one; return its metrics.

    Args:
        pretrained: what to begin at: a candidate of pre-training, or an earlier run's learner.
    """
    inputs = [store, tasks, pretrained]
    checkpoints = begin_run("meta_train", config.model_dump(mode="json"), inputs)
    job = MetaTrainJob(
        config=config,
        store=store,
        tasks=tasks,
        pretrained=pretrained,
        target=target,
        checkpoints=checkpoints,
        journal=journal,
    )
    metrics: dict[str, Any] = launch(
        "pipeline.training.meta_train:run", job, most=config.num_groups, outputs=[target]
    )
    finish_run(checkpoints)
    return metrics


def program(
    job: MetaTrainJob, context: Context, engine: Engine | None = None
) -> tuple[MetaTraining, Params]:
    """What a run optimises, and the parameters that it starts from.

    Args:
        engine: of an earlier run, to compute what it computed; None chooses one.
    """
    store = open_store(job.store)
    job.config.augment.check_fits(store.image_shape, where="meta_train.augment")
    stream = read_training_stream(job.tasks)
    template = _template(job, store, context)
    runner = Runner(engine or _engine(job, template, store, stream, context))
    source = _stream(job.config, store, stream)
    made = MetaTraining(template, store, source, context, runner, job.config.augment)
    return made, template.params


def run(job: MetaTrainJob, context: Context) -> dict[str, Any]:
    """What every worker does."""
    training, start = program(job, context)
    template, store = training.template, training.store
    inputs = {"tasks": job.tasks, "pretrained": job.pretrained}
    digests = {name: content_hash(path) or "none" for name, path in inputs.items()}
    check_same_inputs({"store": store.digest, **digests}, context)
    validate = validator(store, read_episodes(job.tasks, "val"), context)
    if template.algorithm.trainable:
        state = optimise(
            training,
            start,
            job.config.outer,
            validate,
            context,
            checkpoints=job.checkpoints,
            journal=job.journal,
            label=f"meta-train {template.name}",
            incidents=Incidents(
                job.incidents / job.checkpoints.name,
                __name__,
                job,
                ("store", "tasks", "pretrained"),
                training.runner,
            ),
            runner=training.runner,
        )
    else:
        state = _validated_as_it_is(template, validate)
    learner = training.learner(unflatten(best_of(state).vector, start))
    stream = TrainingStream(seed=training.stream.seed, episodes=training.stream.spec)
    engine = training.runner.engine
    origin = {
        "stage": "meta_train",
        "pretrained": job.pretrained.name,
        "warm_start": job.config.warm_start,
        "store_digest": store.digest,
        "reduction": job.config.outer.reduction,
        "training_episodes": stream.model_dump(mode="json"),
        "num_groups": job.config.num_groups,
        "tasks_per_group": job.config.tasks_per_group,
        "augment": job.config.augment.model_dump(mode="json"),
        "engine": {
            "strategy": engine.strategy,
            "precision": engine.precision,
            "chunk": engine.chunk,
        },
    }
    metrics = leave_learner(job.target, learner, state, origin, context)
    drop_copies(job.checkpoints, context)
    return metrics


def _engine(
    job: MetaTrainJob,
    template: Learner,
    store: Store,
    stream: TrainingStream,
    context: Context,
) -> Engine:
    """The strategy for this run's tasks; chosen before the run, for all of its shapes."""
    if not template.algorithm.trainable:
        return Engine()
    group = example_group(
        stream.episodes, store.image_shape, job.config.tasks_per_group, context.device
    )
    model = template.model.with_statistics(None)
    return choose_engine(
        job.config.engine,
        template.algorithm,
        model,
        template.params,
        group,
        context,
        memory=job.choices,
    )


def _stream(config: MetaTrainConfig, store: Store, stream: TrainingStream) -> TrainStream:
    return train_stream(
        store,
        stream.episodes,
        seed=stream.seed,
        num_groups=config.num_groups,
        tasks_per_group=config.tasks_per_group,
    )


def _template(job: MetaTrainJob, store: Store, context: Context) -> Learner:
    """The backbone to begin at under the configured algorithm, before any training of this run.

    Raises:
        ConfigError: it takes other pictures than the store holds.
    """
    config = job.config
    pretrained = load_learner(job.pretrained, device=context.device)
    if (takes := pretrained.preprocessing.image_shape) != store.image_shape:
        raise ConfigError(
            f"{job.pretrained} takes pictures of {_sizes(takes)}, and {store.folder} holds "
            f"{_sizes(store.image_shape)}: training cannot begin at it. Set retrain.start to "
            "`scratch`, or call `dvc remove data/start/champion.dvc`."
        )
    algorithm = config.algorithm.chosen()
    model = build_model(pretrained.backbone, algorithm.batch_norm)
    features = pretrained.params
    if not config.warm_start:
        features = init_params(pretrained.backbone, config.seed)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(config.seed))
    if config.warm_start and type(pretrained.algorithm) is type(algorithm):
        own |= {n: p for n, p in features.items() if n in own and p.shape == own[n].shape}
    features = {n: p for n, p in features.items() if n.startswith(BACKBONE)}
    params = {n: p.to(context.device) for n, p in {**features, **own}.items()}
    return replace(pretrained, algorithm=algorithm, model=model, params=params, origin={})


def _sizes(image_shape: tuple[int, int, int]) -> str:
    channels, height, width = image_shape
    return f"{channels} x {height} x {width}"


def _validated_as_it_is(template: Learner, validate: Validate) -> TrainState:
    """The state of a run that has nothing to train: validated once."""
    accuracy, measured = validate(template, 0)
    state = fresh_state(template.params)
    best = Best(0, accuracy, state.vector, measured.model.statistics or {})
    return replace(state, best=best)
