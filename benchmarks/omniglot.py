"""Accuracy on Omniglot under the honest protocol: `python -m benchmarks.omniglot [NAMES]`.

Vinyals split, rotations as extra classes in training alone, inductive, one model, 10,000 test
episodes of 15 queries a class. Each named run is meta-trained from one pre-trained Conv4-64 and
scored on the same frozen episodes; `maml` and `maml_bf16` differ in precision alone. What is
finished is kept in `.metaloom/omniglot`, so that a stopped run goes on. The results go to
`benchmarks/results/omniglot.json`, with the validation curves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.algorithms.maml import MAML
from pipeline.algorithms.protonet import ProtoNet
from pipeline.algorithms.table import AlgorithmConfig
from pipeline.core.config import Section
from pipeline.core.files import read_json, write_json
from pipeline.domains.omniglot import OmniglotConfig
from pipeline.engine.choice import EngineConfig
from pipeline.engine.learner import load_learner
from pipeline.evaluation.scoring import score
from pipeline.evaluation.statistics import mean_interval
from pipeline.launch.table import launch
from pipeline.runtime.context import Context
from pipeline.runtime.logs import run_main, say
from pipeline.store.build import PreprocessConfig, build_store
from pipeline.store.reader import open_store
from pipeline.tasks.frozen import read_episodes
from pipeline.tasks.plan import SampleTasksConfig, sample_tasks
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec
from pipeline.training.loop import OuterConfig
from pipeline.training.meta_train import MetaTrainConfig, meta_train
from pipeline.training.pretrain import PretrainConfig, pretrain

FOLDER = Path(".metaloom/omniglot")
RECORD = Path("benchmarks/results/omniglot.json")
_TEST = FrozenSpec(ways=[5, 20], shots=[1, 5], queries=15, episodes=10_000)


class Run(Section):
    """One meta-training run: its episodes, its settings, and what it is scored on."""

    episodes: EpisodeSpec
    config: MetaTrainConfig
    settings: tuple[str, ...]
    """Test settings; MAML adapts anew in every episode, which takes long, so it has fewer."""


def _maml(precision: str) -> Run:
    return Run(
        episodes=EpisodeSpec(ways=5, shots=1, queries=15),
        config=MetaTrainConfig(
            algorithm=AlgorithmConfig(name="maml", maml=MAML(num_inner_steps=5, inner_lr=0.1)),
            num_groups=8,
            tasks_per_group=2,
            engine=EngineConfig(precision=precision),  # type: ignore[arg-type]
            outer=OuterConfig(num_steps=600, lr=0.002, validate_every=100),
        ),
        settings=("5w1s",),
    )


RUNS: Mapping[str, Run] = {
    "protonet": Run(
        episodes=EpisodeSpec(ways=60, shots=1, queries=5),
        config=MetaTrainConfig(
            algorithm=AlgorithmConfig(name="protonet", protonet=ProtoNet()),
            num_groups=4,
            outer=OuterConfig(num_steps=1500, lr=0.002, validate_every=100),
        ),
        settings=("5w1s", "5w5s", "20w1s", "20w5s"),
    ),
    "maml": _maml("fp32"),
    "maml_bf16": _maml("bf16"),
}


class ScoreJob(Section):
    """A finished learner and the episodes to score it on, as the workers get them."""

    learner: Path
    store: Path
    tasks: Path
    settings: tuple[str, ...]


def main() -> None:
    """Make the store, pre-train, meta-train and score each run that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], help="runs; all by default")
    names = parser.parse_args().names or list(RUNS)
    store = _store()
    pretrained = _pretrained(store)
    for name in names:
        row = _row(name, RUNS[name], store, pretrained)
        _keep(row)
        print(json.dumps({"run": name, **row["test"]}))


def _store() -> Path:
    data = Path(os.environ.get("METALOOM_DATA", "../shared/data"))
    target = FOLDER / "store"
    if not target.exists():
        config = PreprocessConfig(
            domain="omniglot",
            source=data / "omniglot",
            omniglot=OmniglotConfig(split_dir="splits_vinyals", rotations="train_only"),
        )
        build_store(config, target)
    return target


def _tasks(store: Path, name: str, episodes: EpisodeSpec) -> Path:
    target = FOLDER / f"tasks-{name}"
    if not target.exists():
        val = FrozenSpec(ways=[5], shots=[1], queries=15, episodes=400)
        config = SampleTasksConfig(train=episodes, val=val, test=_TEST)
        sample_tasks(config, open_store(store), target)
    return target


def _pretrained(store: Path) -> Path:
    """Conv4-64 as a classifier of the 4,112 training classes."""
    target = FOLDER / "pretrained"
    if not (target / "conv4").exists():
        config = PretrainConfig(
            candidates=["conv4"],
            outer=OuterConfig(num_steps=1500, lr=0.003, validate_every=250),
        )
        tasks = _tasks(store, "protonet", RUNS["protonet"].episodes)
        journal = FOLDER / "pretrained.jsonl"
        pretrain(
            config, "conv4", store=store, tasks=tasks, target=target / "conv4", journal=journal
        )
    return target


def _row(name: str, run: Run, store: Path, pretrained: Path) -> dict[str, Any]:
    tasks, target = _tasks(store, name, run.episodes), FOLDER / f"learner-{name}"
    if not target.exists():
        start = time.monotonic()
        meta_train(
            run.config,
            ["conv4"],
            store=store,
            tasks=tasks,
            pretrained=pretrained,
            target=target,
            journal=FOLDER / f"{name}.jsonl",
        )
        say("omniglot", run=name, seconds=round(time.monotonic() - start))
    history = read_json(target / "history.json")
    curve = [[r["step"], r["val_accuracy"]] for r in history if r["val_accuracy"] is not None]
    job = ScoreJob(learner=target, store=store, tasks=tasks, settings=run.settings)
    tasks_per_step = run.config.num_groups * run.config.tasks_per_group
    return {
        "run": name,
        "precision": run.config.engine.precision,
        "episodes": run.episodes.model_dump(mode="json"),
        "tasks": run.config.outer.num_steps * tasks_per_step,
        "tasks_per_step": tasks_per_step,
        "test": launch("benchmarks.omniglot:score_all", job, most=64),
        "curve": curve,
    }


def _keep(row: dict[str, Any]) -> None:
    """The row in the record, in place of an earlier one of the same run."""
    known = read_json(RECORD)["rows"] if RECORD.exists() else []
    rows = [*(r for r in known if r["run"] != row["run"]), row]
    write_json(RECORD, {"rows": sorted(rows, key=lambda r: list(RUNS).index(r["run"]))})


def score_all(job: ScoreJob, context: Context) -> dict[str, Any]:
    """What every worker does: accuracy with its 95 % interval in each setting."""
    store, learner = open_store(job.store), load_learner(job.learner, device=context.device)
    episodes = read_episodes(job.tasks, "test")
    results = {}
    for setting in job.settings:
        scores = score(learner, store, episodes[setting], context=context)
        interval = mean_interval(scores.accuracy)
        results[setting] = {
            "accuracy": round(interval.mean, 5),
            "ci95": round(interval.half_width, 5),
            "episodes": len(scores.accuracy),
            "split_hash": store.split_hash("test"),
        }
    return results


if __name__ == "__main__":
    run_main(main)
