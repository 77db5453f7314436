"""The runs that a registered version belongs to, found or made by what their tags say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.runtime.mlflow_tracker import experiment_id

_RELEASE_TAG = "metaloom.release"


def own_run(client: Any, root: Path, digest: str) -> str:
    """A run for a release outside the pipeline: made once, however often it is tried."""
    condition = f"tags.`{_RELEASE_TAG}` = '{digest}'"
    experiment = experiment_id(client, root)
    if found := client.search_runs([experiment], condition, max_results=1):
        return str(found[0].info.run_id)
    made = client.create_run(experiment, tags={_RELEASE_TAG: digest}, run_name="release")
    return str(made.info.run_id)


def makers_of(client: Any, root: Path, path: str, digest: str) -> tuple[str, ...]:
    """The newest finished run that left this content at this path, and the run above it."""
    experiment = experiment_id(client, root)
    condition = f"tags.`output.{path}` = '{digest}' and attributes.status = 'FINISHED'"
    order = ["attributes.start_time DESC"]
    found = client.search_runs([experiment], condition, max_results=1, order_by=order)
    parents = [run.data.tags.get("mlflow.parentRunId") for run in found]
    return tuple(str(run.info.run_id) for run in found) + tuple(filter(None, parents))
