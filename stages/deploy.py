"""Register the trained learner, judge it, try it, and promote it if it has earned it."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.config import load_section
from pipeline.core.files import write_json
from pipeline.deploy.release import DeployConfig, Sources, deploy, refuse_failed_smoke
from pipeline.runtime.logs import run_main
from pipeline.runtime.tracking import stage_run

RECORD = Path("results/deploy/release.json")


def main() -> None:
    config = load_section("params.yaml", "deploy", DeployConfig)
    sources = Sources()
    inputs = {"learner": sources.learner, "tasks": sources.tasks, "evaluation": sources.evaluation}
    with stage_run("deploy", config, inputs=inputs, outputs=[RECORD]) as run:
        run.link_restored()
        record = deploy(config, sources, root=Path.cwd(), runs=run.ids)
        write_json(RECORD, record)
        refuse_failed_smoke(record)


if __name__ == "__main__":
    run_main(main)
