"""Meta-train the best pre-trained candidate on all workers."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.config import load_section, load_value
from pipeline.core.files import write_json
from pipeline.runtime.logs import run_main
from pipeline.runtime.tracking import stage_run
from pipeline.training.meta_train import MetaTrainConfig, choose_candidate, meta_train

PRETRAINED = Path("models/pretrained")
START = Path("data/start/champion")
"""A learner to begin at, where there is one (data/start/README.md)."""


def main() -> None:
    config = load_section("params.yaml", "meta_train", MetaTrainConfig)
    candidates = load_value("params.yaml", "pretrain.candidates", list)
    store = Path("data/store") / load_value("params.yaml", "preprocess.domain", str)
    tasks, target = Path("data/tasks"), Path("models/meta")
    pretrained = START if START.is_dir() else choose_candidate(PRETRAINED, candidates)
    inputs = {"store": store, "tasks": tasks}
    with stage_run("meta_train", config, inputs=inputs, outputs=[target]) as run:
        metrics = meta_train(
            config,
            store=store,
            tasks=tasks,
            pretrained=pretrained,
            target=target,
            journal=run.journal,
        )
        run.log({"best_val_accuracy": metrics["val_accuracy"]})
        write_json("results/meta_train/metrics.json", metrics)
    stopped = f" ({metrics['stopped']})" if metrics["stopped"] else ""
    print(
        f"validation accuracy {metrics['val_accuracy']:.4f}, step {metrics['best_step']}{stopped}"
    )


if __name__ == "__main__":
    run_main(main)
