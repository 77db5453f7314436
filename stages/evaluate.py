"""Score the learner and its baselines on the frozen test episodes; write the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.config import load_section, load_value
from pipeline.engine.learner import load_learner
from pipeline.evaluation.evaluate import (
    EPISODES,
    METRICS,
    PLOTS,
    REPORT,
    EvaluateConfig,
    run_evaluation,
)
from pipeline.evaluation.order import by_size
from pipeline.runtime.logs import run_main
from pipeline.runtime.tracking import stage_run

TARGET = Path("results/evaluate")
START = Path("data/start/champion")
"""What meta-training began at, where it was none of the candidates."""


def main() -> None:
    config = load_section("params.yaml", "evaluate", EvaluateConfig)
    domain = load_value("params.yaml", "preprocess.domain", str)
    store, tasks = Path("data/store") / domain, Path("data/tasks")
    learner = Path("models/meta")
    name = load_learner(learner).origin["pretrained"]
    pretrained = START if name == START.name else Path("models/pretrained") / name
    inputs = {"store": store, "tasks": tasks, "learner": learner}
    outputs = [TARGET / name for name in (EPISODES, METRICS, PLOTS, REPORT)]
    with stage_run("evaluate", config, inputs=inputs, outputs=outputs) as run:
        found = run_evaluation(config, learner, pretrained, tasks, store, TARGET)
        run.log(tracked(found[domain]))
    print_table(found[domain])
    print(f"\nreport: {TARGET / REPORT}")


def tracked(settings: dict[str, Any]) -> dict[str, float]:
    """The numbers that the tracking server keeps."""
    numbers = {}
    for setting, found in settings.items():
        numbers[f"accuracy_{setting}"] = found["accuracy"]
        numbers[f"ci95_{setting}"] = found["ci95"]
        numbers[f"ece_{setting}"] = found["ece"]
    return {name: float(value) for name, value in numbers.items() if value is not None}


def print_table(settings: dict[str, Any]) -> None:
    """One line for each setting: the model, then its baselines."""
    names = list(next(iter(settings.values()))["baselines"])
    print("".join(f"{title:>16}" for title in ("test accuracy %", "model", *names, "chance")))
    for setting, found in by_size(settings):
        learners = [found, *(found["baselines"][name] for name in names)]
        cells = [_cell(one["accuracy"], one["ci95"]) for one in learners]
        print("".join(f"{cell:>16}" for cell in (setting, *cells, f"{found['chance'] * 100:.1f}")))


def _cell(accuracy: float, half_width: float | None) -> str:
    interval = "" if half_width is None else f" ± {half_width * 100:.2f}"
    return f"{accuracy * 100:.2f}{interval}"


if __name__ == "__main__":
    run_main(main)
