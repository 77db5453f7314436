"""Draw the frozen validation and test episodes, and state the training stream."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.config import load_section, load_value
from pipeline.core.files import write_json
from pipeline.runtime.logs import run_main
from pipeline.runtime.tracking import stage_run
from pipeline.store.reader import open_store
from pipeline.tasks.plan import SampleTasksConfig, sample_tasks


def main() -> None:
    config = load_section("params.yaml", "sample_tasks", SampleTasksConfig)
    store = Path("data/store") / load_value("params.yaml", "preprocess.domain", str)
    target = Path("data/tasks")
    with stage_run("sample_tasks", config, inputs={"store": store}, outputs=[target]) as run:
        result = sample_tasks(config, open_store(store), target)
        run.log({f"classes_{name}": float(classes) for name, classes in result["sets"].items()})
        write_json("results/sample_tasks/metrics.json", result)
    print("kept: " + ", ".join(f"{n} ({c} classes)" for n, c in result["sets"].items()))
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    run_main(main)
