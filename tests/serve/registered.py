"""A registry in a folder, with small versions that have what real ones have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from pipeline.deploy.bundle import Bundle, make_bundle
from pipeline.deploy.by_hand import VERDICT_TAG
from pipeline.deploy.registry import PASSED, SMOKE_TAG, Registry, Version
from pipeline.deploy.serve.admission import LINEAGE
from tests.unit.tiny_learner import NUMBERS, base64_png, picture, save, tiny_bundle, tiny_learner

NAME = "tiny-toy"
GOOD = {**dict.fromkeys(LINEAGE, "there"), SMOKE_TAG: PASSED, VERDICT_TAG: "champion"}
EXAMPLE = [
    {
        "support": [{"image": base64_png(picture(i)), "label": f"class {i}"} for i in range(2)],
        "query": [base64_png(picture(0))],
    }
]


def fragile_bundle(folder: Path, seed: int) -> Bundle:
    """One that answers as well as any, but for white pictures, which make its numbers overflow."""
    learner = tiny_learner(seed)
    params = {name: tensor.clone() for name, tensor in learner.params.items()}
    statistics = {name: tensor.clone() for name, tensor in (learner.model.statistics or {}).items()}
    for name, value in (
        ("layers.0.weight", 1.0),
        ("layers.0.bias", -200.0),  # 144 white pixels of 2 each come to 288, noise to less than 100
        ("norms.0.weight", 1e20),
        ("norms.0.bias", 0.0),
    ):
        params[f"backbone.{name}"][0] = value
    statistics["norms.0.mean"][0], statistics["norms.0.var"][0] = 0.0, 1.0
    broken = replace(learner, params=params, model=learner.model.with_statistics(statistics))
    saved = save(folder / f"fragile-learner-{seed}", broken)
    target = folder / f"fragile-{seed}"
    return make_bundle(target, saved, NUMBERS, domain="toy", card="# A card\n")


def register(
    root: Path,
    seed: int,
    *,
    without: tuple[str, ...] = (),
    tags: Mapping[str, str] | None = None,
    make: Callable[[Path, int], Bundle] = tiny_bundle,
) -> tuple[Version, Bundle]:
    """One more version, with every tag of a good one but these."""
    bundle = make(root, seed)
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
