"""Accuracy on Omniglot under the honest protocol: `python -m benchmarks.omniglot`.

Vinyals split, rotations as extra classes in training alone, inductive, one model, 10,000 test
episodes of 15 queries a class, training pictures shifted by up to two pixels. `protonet` starts
from a pre-trained Conv4-64. `maml` and `maml_bf16` start from the same fresh weights, for features
that were pre-trained on the training classes make their episodes too easy to learn from; they
differ in precision alone, and are scored on the same frozen episodes.

What is finished is kept in `.metaloom/omniglot`, under a hash of its settings (not of the code), so
that a stopped run goes on. The results go to `benchmarks/results/omniglot.json`, with the
validation curves. `--quick` takes a few steps and episodes, into a folder of its own, to see that
everything runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.scoring import ScoreJob
from pipeline.algorithms.maml import MAML
from pipeline.algorithms.protonet import ProtoNet
from pipeline.algorithms.table import AlgorithmConfig
from pipeline.core.config import Section
from pipeline.core.files import canonical_json, read_json, write_json
from pipeline.domains.omniglot import OmniglotConfig
from pipeline.engine.choice import EngineConfig
from pipeline.launch.table import launch
from pipeline.runtime.logs import run_main, say
from pipeline.store.build import PreprocessConfig, build_store
from pipeline.store.reader import Store, open_store
from pipeline.tasks.plan import SampleTasksConfig, sample_tasks
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec
from pipeline.training.augment import AugmentConfig
from pipeline.training.loop import OuterConfig
from pipeline.training.meta_train import MetaTrainConfig, meta_train
from pipeline.training.pretrain import PretrainConfig, pretrain

FOLDER = Path(".metaloom/omniglot")
RECORD = Path("benchmarks/results/omniglot.json")
_PRETRAINING_STEPS = 1500
_QUICK_STEPS, _QUICK_EPISODES = 2, 4


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
            warm_start=False,
            num_groups=8,
            tasks_per_group=2,
            augment=AugmentConfig(max_shift=2),
            engine=EngineConfig(precision=precision),  # type: ignore[arg-type]
            outer=OuterConfig(num_steps=450, lr=0.002, validate_every=50),
        ),
        settings=("5w1s",),
    )


RUNS: Mapping[str, Run] = {
    "protonet": Run(
        episodes=EpisodeSpec(ways=60, shots=1, queries=5),
        config=MetaTrainConfig(
            algorithm=AlgorithmConfig(name="protonet", protonet=ProtoNet()),
            num_groups=2,
            augment=AugmentConfig(max_shift=2),
            outer=OuterConfig(num_steps=3500, lr=0.002, validate_every=250),
        ),
        settings=("5w1s", "5w5s", "20w1s", "20w5s"),
    ),
    "maml": _maml("fp32"),
    "maml_bf16": _maml("bf16"),
}


class Bench(NamedTuple):
    """Where the runs live, and whether they are real."""

    folder: Path
    quick: bool

    def kept(self, name: str, settings: Section, *others: str) -> Path:
        """Where something lives that was made by these settings from these others."""
        facts = [settings.model_dump(mode="json"), *others]
        return (
            self.folder / f"{name}-{hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:8]}"
        )

    def steps(self, outer: OuterConfig) -> OuterConfig:
        """As they are, or a few."""
        return outer.model_copy(update={"num_steps": _QUICK_STEPS} if self.quick else {})

    def episodes(self, number: int) -> int:
        """To validate on or to test on."""
        return _QUICK_EPISODES if self.quick else number


def main() -> None:
    """Make the store, pre-train, meta-train and score each run that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"runs, of {', '.join(RUNS)}; all")
    parser.add_argument(
        "--data", type=Path, help="folder `omniglot` of the data set", required=True
    )
    parser.add_argument("--quick", action="store_true", help="a few steps: numbers mean nothing")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in RUNS]:
        parser.error(f"no run {unknown[0]}; there are {', '.join(RUNS)}")
    bench = Bench(FOLDER.with_name("omniglot-quick") if options.quick else FOLDER, options.quick)
    record = bench.folder / RECORD.name if options.quick else RECORD
    store = _store(bench, options.data)
    pretrained = _pretrained(bench, store)
    for name in options.names or RUNS:
        row = _row(bench, name, RUNS[name], store, pretrained)
        _keep(row, record, open_store(store))
        print(json.dumps({"run": name, **row["test"]}))


def _store(bench: Bench, data: Path) -> Path:
    settings = OmniglotConfig(split_dir="splits_vinyals", rotations="train_only")
    target = bench.kept("store", settings)
    if not target.exists():
        build_store(PreprocessConfig(domain="omniglot", source=data, omniglot=settings), target)
    return target


def _tasks(bench: Bench, store: Path, episodes: EpisodeSpec) -> Path:
    val = FrozenSpec(ways=[5], shots=[1], queries=15, episodes=bench.episodes(400))
    test = FrozenSpec(ways=[5, 20], shots=[1, 5], queries=15, episodes=bench.episodes(10_000))
    config = SampleTasksConfig(train=episodes, val=val, test=test)
    target = bench.kept("tasks", config, store.name)
    if not target.exists():
        sample_tasks(config, open_store(store), target)
    return target


def _pretrained(bench: Bench, store: Path) -> Path:
    """Conv4-64 as a classifier of the training classes."""
    outer = bench.steps(OuterConfig(num_steps=_PRETRAINING_STEPS, lr=0.003, validate_every=250))
    config = PretrainConfig(candidates=["conv4"], outer=outer)
    target = bench.kept("pretrained", config, store.name)
    if not (target / "conv4").exists():
        pretrain(
            config,
            "conv4",
            store=store,
            tasks=_tasks(bench, store, RUNS["protonet"].episodes),
            target=target / "conv4",
            journal=target.with_suffix(".jsonl"),
        )
    return target


def _row(bench: Bench, name: str, run: Run, store: Path, pretrained: Path) -> dict[str, Any]:
    tasks = _tasks(bench, store, run.episodes)
    config = run.config.model_copy(update={"outer": bench.steps(run.config.outer)})
    target = bench.kept(name, config, tasks.name, pretrained.name if config.warm_start else "")
    if not target.exists():
        start = time.monotonic()
        meta_train(
            config,
            store=store,
            tasks=tasks,
            pretrained=pretrained / "conv4",
            target=target,
            journal=target.with_suffix(".jsonl"),
        )
        say("omniglot", run=name, seconds=round(time.monotonic() - start))
    history = read_json(target / "history.json")
    curve = [[r["step"], r["val_accuracy"]] for r in history if r["val_accuracy"] is not None]
    job = ScoreJob(learner=target, store=store, tasks=tasks, settings=run.settings)
    tasks_per_step = config.num_groups * config.tasks_per_group
    return {
        "run": name,
        "precision": config.engine.precision,
        "pretrained": config.warm_start,
        "episodes": run.episodes.model_dump(mode="json"),
        "tasks": history[-1]["step"] * tasks_per_step,
        "tasks_per_step": tasks_per_step,
        "test": launch("benchmarks.scoring:score_all", job, most=64),
        "curve": curve,
    }


def _keep(row: dict[str, Any], record: Path, store: Store) -> None:
    """The row in the record, in place of an earlier one of the same run."""
    known = read_json(record)["rows"] if record.exists() else []
    rows = [*(r for r in known if r["run"] != row["run"]), row]
    document = {
        "classes": {split: len(store.class_ids(split)) for split in ("train", "val", "test")},
        "split_hash": store.split_hash("test"),
        "rows": sorted(rows, key=lambda r: list(RUNS).index(r["run"])),
    }
    write_json(record, document)


if __name__ == "__main__":
    run_main(main)
