"""Pre-train one candidate backbone (DVC runs one such stage for each)."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.core.config import load_section, load_value
from pipeline.core.files import write_json
from pipeline.runtime.logs import run_main
from pipeline.runtime.tracking import stage_run
from pipeline.training.pretrain import PretrainConfig, pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("candidate", help="a backbone of pretrain.candidates, such as conv4")
    candidate: str = parser.parse_args().candidate
    config = load_section("params.yaml", "pretrain", PretrainConfig)
    store = Path("data/store") / load_value("params.yaml", "preprocess.domain", str)
    tasks, target = Path("data/tasks"), Path("models/pretrained") / candidate
    inputs = {"store": store, "tasks": tasks}
    with stage_run("pretrain", config, inputs=inputs, outputs=[target]) as run:
        metrics = pretrain(
            config, candidate, store=store, tasks=tasks, target=target, journal=run.journal
        )
        run.log({"best_val_accuracy": metrics["val_accuracy"]})
        write_json(f"results/pretrain/{candidate}.json", metrics)
    print(f"{candidate}: validation accuracy {metrics['val_accuracy']:.4f}")


if __name__ == "__main__":
    run_main(main)
