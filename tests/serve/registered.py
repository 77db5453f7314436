"""A registry in a folder, with small versions that have what real ones have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.deploy.bundle import Bundle
from pipeline.deploy.by_hand import VERDICT_TAG
from pipeline.deploy.registry import PASSED, SMOKE_TAG, Registry, Version
from pipeline.deploy.serve.admission import LINEAGE
from tests.unit.tiny_learner import base64_png, picture, tiny_bundle

NAME = "tiny-toy"
GOOD = {**dict.fromkeys(LINEAGE, "there"), SMOKE_TAG: PASSED, VERDICT_TAG: "champion"}
EXAMPLE = [
    {
        "support": [{"image": base64_png(picture(i)), "label": f"class {i}"} for i in range(2)],
        "query": [base64_png(picture(0))],
    }
]


def register(
    root: Path, seed: int, *, without: tuple[str, ...] = (), tags: Mapping[str, str] | None = None
) -> tuple[Version, Bundle]:
    """One more version, with every tag of a good one but these."""
    bundle = tiny_bundle(root, seed)
    own = {tag: value for tag, value in {**GOOD, **(tags or {})}.items() if tag not in without}
    version, _ = Registry(root, NAME).register(bundle, EXAMPLE, tags=own)
    return version, bundle


def move_by_hand(root: Path, number: int, alias: str = "champion") -> None:
    """As MLflow's page or client does it."""
    from mlflow import MlflowClient

    from pipeline.runtime.mlflow_tracker import tracking_uri

    uri = tracking_uri(root)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.set_registered_model_alias(NAME, alias, str(number))
