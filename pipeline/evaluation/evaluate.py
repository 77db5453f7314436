"""The evaluation of a learner: frozen test episodes in; numbers, plots and a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, PositiveInt

from pipeline.core.config import Section
from pipeline.core.errors import ArtefactError
from pipeline.core.files import MANIFEST, read_json, write_bytes, write_json
from pipeline.engine.learner import WEIGHTS, Learner, load_learner
from pipeline.engine.population import NUM_BATCHES
from pipeline.evaluation.baselines import baselines
from pipeline.evaluation.plots import episode_columns, plot_records
from pipeline.evaluation.report import render
from pipeline.evaluation.results import MODEL, Evaluation, hardest_pairs, measure, metrics
from pipeline.evaluation.scoring import EpisodeScores, score_sets
from pipeline.launch.table import launch
from pipeline.runtime.collectives import share
from pipeline.runtime.context import SINGLE, Context
from pipeline.runtime.logs import progress
from pipeline.store.reader import Store, open_store
from pipeline.tasks.frozen import FrozenEpisodes, read_episodes

Baseline = Literal["pixels", "untrained", "pretrained"]

EPISODES, METRICS, PLOTS, REPORT = "episodes.arrow", "metrics.json", "plots", "report.html"


class EvaluateConfig(Section):
    """What is measured beside the accuracy, and what the report shows."""

    baselines: tuple[Baseline, ...] = ("pretrained", "untrained", "pixels")
    """What the model is compared with, on the same episodes."""
    calibration_bins: PositiveInt = 15
    """Equal-width confidence bins of the reliability diagram and of the calibration error."""
    example_episodes: int = Field(default=4, ge=0)
    """Episodes that the report shows as pictures; the last one is the hardest of all."""
    hardest_pairs: int = Field(default=12, ge=0)
    """Pairs of classes that are confused most often, shown with pictures of both."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the untrained baseline's weights."""
    title: str = "Few-shot evaluation"
    """Heading of the report."""


class EvaluateJob(Section):
    """One evaluation, as the workers get it."""

    config: EvaluateConfig
    learner: Path
    pretrained: Path
    tasks: Path
    store: Path
    target: Path


def run_evaluation(
    config: EvaluateConfig,
    learner_folder: Path,
    pretrained_folder: Path,
    tasks_folder: Path,
    store_folder: Path,
    target: Path,
) -> dict[str, Any]:
    """Score a learner and its baselines on the frozen test episodes and write the results.

    All workers share the scoring; how many there are does not change a bit of the results.

    Args:
        pretrained_folder: sealed folder of the pre-trained learner (the chosen candidate).
        target: gets metrics.json, episodes.arrow, plots/ and report.html.

    Returns:
        The content of metrics.json.

    Raises:
        ArtefactError: a folder was altered, or the episodes were drawn from another store.
    """
    job = EvaluateJob(
        config=config,
        learner=learner_folder,
        pretrained=pretrained_folder,
        tasks=tasks_folder,
        store=store_folder,
        target=target,
    )
    found: dict[str, Any] = launch(
        "pipeline.evaluation.evaluate:run", job, most=NUM_BATCHES, outputs=[target]
    )
    return found


def run(job: EvaluateJob, context: Context) -> dict[str, Any]:
    """What every worker does; the main one writes the results."""
    config, store = job.config, open_store(job.store)
    episodes = read_episodes(job.tasks, "test")
    _check_same_store(store, episodes)
    learner = load_learner(job.learner, device=context.device)
    known = baselines(learner, job.pretrained, store, seed=config.seed, context=context)
    learners = {MODEL: learner} | {name: known[name] for name in config.baselines}
    scores = score_all(learners, store, episodes, context=context)
    groups = [c.group for c in store.classes]
    mode = learner.model.batch_norm
    settings = {
        name: measure(
            episodes[name], ours, groups, num_bins=config.calibration_bins, batch_norm=mode
        )
        for name, ours in scores.items()
    }
    hardest, hardest_setting = hardest_pairs(settings, config.hardest_pairs)
    evaluation = Evaluation(
        title=config.title,
        store=store,
        settings=settings,
        hardest=hardest,
        hardest_setting=hardest_setting,
        facts=_facts(learner, job.learner),
        history=_read_optional(job.learner / "history.json", []),
        store_report=_read_optional(job.store / "report.json", {}),
        num_examples=config.example_episodes,
    )
    if context.is_main:
        write_results(evaluation, job.target)
    return metrics(evaluation)


def score_all(
    learners: dict[str, Learner],
    store: Store,
    episodes: dict[str, FrozenEpisodes],
    *,
    context: Context = SINGLE,
) -> dict[str, dict[str, EpisodeScores]]:
    """Every learner's answers on every set of episodes, by setting, then learner."""
    counts = [
        len(share(len(e.support_rows), context.rank, context.world_size)) for e in episodes.values()
    ]
    total = len(learners) * sum(counts)
    scores: dict[str, dict[str, EpisodeScores]] = {setting: {} for setting in episodes}
    with progress("evaluate", total=total, unit="episodes") as bar:
        for name, learner in learners.items():
            bar.note(learner=name)
            found = score_sets(learner, store, episodes, context=context, advance=bar.advance)
            for setting, answers in found.items():
                scores[setting][name] = answers
    return scores


def write_results(evaluation: Evaluation, target: Path) -> None:
    """Write every file of the results folder, each whole or not at all."""
    write_json(target / METRICS, metrics(evaluation))
    write_bytes(target / EPISODES, _arrow_file(episode_columns(evaluation)))
    for name, records in plot_records(evaluation).items():
        write_json(target / PLOTS / name, records)
    write_bytes(target / REPORT, render(evaluation).encode())


def _check_same_store(store: Store, episodes: dict[str, FrozenEpisodes]) -> None:
    for name, frozen in episodes.items():
        if frozen.protocol["store_digest"] != store.digest:
            raise ArtefactError(
                f"the {name} test episodes were drawn from another store than {store.folder}: "
                "their rows would be other pictures. Draw them again: `dvc repro sample_tasks`."
            )


def _facts(learner: Learner, folder: Path) -> dict[str, Any]:
    weights = read_json(folder / MANIFEST)["files"][WEIGHTS]["sha256"]
    return {
        "algorithm": learner.name,
        "backbone": learner.backbone.name,
        "parameters": sum(v.numel() for v in learner.params.values()),
        "batch_norm": learner.model.batch_norm,
        "image_shape": " x ".join(str(n) for n in learner.preprocessing.image_shape),
        "origin": learner.origin,
        "weights_sha256": weights,
    }


def _read_optional(path: Path, default: Any) -> Any:
    return read_json(path) if path.exists() else default


def _arrow_file(columns: dict[str, list[Any]]) -> bytes:
    schema = pa.schema(
        {
            "setting": pa.string(),
            "episode": pa.int32(),
            "learner": pa.string(),
            "accuracy": pa.float64(),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))
    content: bytes = sink.getvalue().to_pybytes()
    return content
