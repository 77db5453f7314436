"""Versions are registered once, aliases move with checks, and a person's hand counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ArtefactError, RegistryError
from pipeline.deploy.bundle import Bundle
from pipeline.deploy.champions import CHAMPION, PREVIOUS, ROLLED_BACK_TAG
from pipeline.deploy.packing import requirements
from pipeline.deploy.patience import Patience
from pipeline.deploy.promotions import LostRaceError
from pipeline.deploy.registry import DAMAGED_TAG, PASSED, SMOKE_TAG, Registry, Version
from pipeline.runtime.mlflow_tracker import _datasets
from pipeline.runtime.tracking import DataInput, RunStart
from tests.unit.tiny_learner import base64_png, picture, tiny_bundle

EXAMPLE = [
    {
        "support": [{"image": base64_png(picture(i)), "label": f"class {i}"} for i in range(2)],
        "query": [base64_png(picture(0))],
    }
]
TESTED = {SMOKE_TAG: PASSED}
NUM_VERSIONS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def bundles(root: Path) -> list[Bundle]:
    return [tiny_bundle(root, seed) for seed in range(NUM_VERSIONS)]


@pytest.fixture(scope="module")
def filled(root: Path, bundles: list[Bundle]) -> Registry:
    registry = Registry(root, "tiny-toy")
    for bundle in bundles:
        version, new = registry.register(bundle, EXAMPLE, tags=TESTED)
        assert new and version.digest == bundle.digest
    return registry


@pytest.fixture
def registry(filled: Registry) -> Registry:
    """Without aliases and record, as just after registration."""
    champions = filled._champions
    for alias in filled.aliases():
        champions.drop(alias)
    if champions.standing().winners:
        filled._client.delete_registered_model(champions.record_name)
    return filled


def versions(registry: Registry) -> list[Version]:
    return [registry.version(number) for number in range(1, NUM_VERSIONS + 1)]


def test_registering_twice_changes_nothing(registry: Registry, bundles: list[Bundle]) -> None:
    again, new = registry.register(bundles[1], EXAMPLE)
    assert (again.number, new) == (2, False)
    with pytest.raises(RegistryError, match=f"no version {NUM_VERSIONS + 1}"):
        registry.version(NUM_VERSIONS + 1)


def test_of_two_registrations_at_once_one_version_stays(
    root: Path, bundles: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one comes through between the first one's look and its creation."""
    ours, theirs = Registry(root, "twice-toy"), Registry(root, "twice-toy")
    create, others = ours._client.create_model_version, list[tuple[Version, bool]]()

    def after_the_other(*arguments: Any, **values: Any) -> Any:
        if not others:
            others.append(theirs.register(bundles[0], EXAMPLE, tags=TESTED))
        return create(*arguments, **values)

    monkeypatch.setattr(ours._client, "create_model_version", after_the_other)
    version, new = ours.register(bundles[0], EXAMPLE, tags=TESTED)
    assert others == [(version, True)] and not new
    assert [one.number for one in ours.versions()] == [version.number]


def test_a_version_has_signature_example_card_and_pins(registry: Registry) -> None:
    import mlflow

    info = mlflow.models.get_model_info(versions(registry)[0].uri)
    assert {"support", "query"} <= set(info.signature.inputs.to_dict()[0]["properties"])
    folder = model_folder(registry, 1)
    assert json.loads((folder / "input_example.json").read_text()) == EXAMPLE
    assert (folder / "requirements.txt").read_text().split() == requirements()
    assert not any("+" in line or "://" in line for line in requirements())
    assert not list(folder.rglob("*.pyc")) and not list(folder.rglob("*.pkl"))
    found = registry._client.get_model_version(registry.name, "1")
    assert found.description == "# A card\n"


def test_what_is_fetched_is_what_was_registered(
    registry: Registry, bundles: list[Bundle], tmp_path: Path
) -> None:
    for version, bundle in zip(versions(registry), bundles, strict=True):
        fetched = registry.fetch(version, tmp_path / str(version.number))
        assert fetched.digest == bundle.digest


def test_only_a_tested_version_is_promoted(registry: Registry, bundles: list[Bundle]) -> None:
    registry.tag(versions(registry)[0], {SMOKE_TAG: "failed: no answer"})
    try:
        with pytest.raises(RegistryError, match=r"not passed the smoke test \(failed: no answer\)"):
            registry.promote(versions(registry)[0])
        assert registry.aliases() == {}
    finally:
        registry.tag(versions(registry)[0], TESTED)


def test_champions_come_back_in_order(registry: Registry) -> None:
    """Four promotions, then three rollbacks, each to the champion before; then no more."""
    numbered = versions(registry)
    for version in numbered:
        registry.promote(version)
    assert registry.aliases() == {CHAMPION: 4, PREVIOUS: 3}
    for now, dropped in ((3, 4), (2, 3), (1, 2)):
        champion, was = registry.rollback()
        assert (champion.number, was.number) == (now, dropped)
        expected = {CHAMPION: now} if now == 1 else {CHAMPION: now, PREVIOUS: now - 1}
        assert registry.aliases() == expected
        assert ROLLED_BACK_TAG in registry.version(dropped).tags
    with pytest.raises(RegistryError, match="version 1 is the first champion"):
        registry.rollback()


def test_promoting_again_changes_nothing(registry: Registry) -> None:
    first, second, *_ = versions(registry)
    assert registry.promote(first) is None
    assert registry.promote(first) is None
    assert registry.aliases() == {CHAMPION: 1}
    registry.challenge(second)
    old = registry.promote(second)
    assert old is not None and old.number == 1
    assert registry.aliases() == {CHAMPION: 2, PREVIOUS: 1}


def test_an_alias_moved_by_hand_is_a_promotion(registry: Registry) -> None:
    """Moved in MLflow, outside our code: it is the champion, and what rollback comes back from."""
    first, second, third, _ = versions(registry)
    registry.promote(first)
    registry.promote(second)
    registry._client.set_registered_model_alias(registry.name, CHAMPION, "4")
    champion = registry.champion()
    assert champion is not None and champion.number == 4
    registry.promote(third)
    assert registry.aliases() == {CHAMPION: 3, PREVIOUS: 4}
    assert [registry.rollback()[0].number for _ in range(3)] == [4, 2, 1]


def test_nothing_registered_is_an_answer_too(root: Path) -> None:
    registry = Registry(root, "nothing")
    assert (registry.aliases(), registry.champion(), registry.find("0" * 64)) == ({}, None, None)
    with pytest.raises(RegistryError, match="no champion"):
        registry.rollback()


def model_folder(registry: Registry, number: int) -> Path:
    uri = registry._client.get_model_version_download_uri(registry.name, str(number))
    return Path(str(uri).removeprefix("file://"))


def test_an_altered_artefact_neither_serves_nor_runs(registry: Registry, tmp_path: Path) -> None:
    """The code in the artefact is never looked at; a changed bundle is refused, by rollback too."""
    first, second, *_ = versions(registry)
    registry.promote(first)
    registry.promote(second)
    folder, canary = model_folder(registry, 1), tmp_path / "canary"
    weights = folder / "artifacts" / "bundle" / "weights.safetensors"
    script = folder / "mlflow_model.py"
    before = {path: path.read_bytes() for path in (weights, script, folder / "MLmodel")}
    try:
        script.write_text(f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n")
        (folder / "MLmodel").write_text("flavors: {python_function: {loader_module: evil}}\n")
        (folder / "evil.py").write_text(script.read_text())
        registry.fetch(first, tmp_path / "fetched")
        assert {path.suffix for path in (tmp_path / "fetched").iterdir()}.isdisjoint({".py"})
        assert not canary.exists()
        content = bytearray(before[weights])
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(ArtefactError, match="SHA-256"):
            registry.rollback()
        assert registry.aliases() == {CHAMPION: 2, PREVIOUS: 1}
    finally:
        for path, content in before.items():
            path.write_bytes(content)
        (folder / "evil.py").unlink(missing_ok=True)
    assert registry.rollback()[0].number == 1


def test_a_damaged_version_is_marked_and_registered_anew(root: Path, tmp_path: Path) -> None:
    """Its files are cut or gone: it is found no more, is not promoted, and does not stand in the way."""
    registry = Registry(root, "damaged-toy")
    bundle = tiny_bundle(tmp_path, 7)
    for number, damage in enumerate(("cut", "gone"), start=1):
        version, new = registry.register(bundle, EXAMPLE, tags=TESTED)
        assert (version.number, new) == (number, True)
        folder = model_folder(registry, number) / "artifacts" / "bundle"
        weights = folder / "weights.safetensors"
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:100])
        else:
            shutil.rmtree(folder)
        with pytest.raises(ArtefactError):
            registry.promote(version)
    version, new = registry.register(bundle, EXAMPLE, tags=TESTED)
    assert (version.number, new) == (3, True)
    found = registry.find(bundle.digest)
    assert found is not None and found.number == 3
    assert [DAMAGED_TAG in one.tags for one in registry.versions()] == [True, True, False]
    registry.promote(version)
    assert registry.aliases() == {CHAMPION: 3}


def test_a_decision_on_an_old_standing_loses(registry: Registry) -> None:
    """Two releases judged against the same champion: the second one is told, and changes nothing."""
    first, second, third, _ = versions(registry)
    registry.promote(first)
    judged = registry.standing()
    registry.promote(second, since=judged)
    with pytest.raises(
        LostRaceError, match=r"version 3 .* was not promoted: .* 2 became the champion"
    ):
        registry.promote(third, since=judged)
    assert registry.aliases() == {CHAMPION: 2, PREVIOUS: 1}


def test_a_strangers_version_is_not_opened(registry: Registry, tmp_path: Path) -> None:
    client: Any = registry._client
    client.create_registered_model("stranger")
    made = client.create_model_version("stranger", source=str(tmp_path))
    theirs = Registry(registry._root, "stranger")
    with pytest.raises(RegistryError, match="was not registered by metaloom"):
        theirs.fetch(theirs.version(int(made.version)), tmp_path / "bundle")
    with pytest.raises(RegistryError, match="it never ran"):
        theirs.promote(theirs.version(int(made.version)))


def test_a_registry_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    registry = Registry(tmp_path, "tiny-toy", Patience(unreached_seconds=0.5))
    told = (
        r"^the registry at http://127\.0\.0\.1:9 does not answer: .*set MLFLOW_TRACKING_URI right"
    )
    with pytest.raises(RegistryError, match=told):
        registry.champion()
    with pytest.raises(RegistryError, match=told):
        registry.version(1)


def test_an_input_with_quotes_in_its_name_is_recorded_whole(tmp_path: Path) -> None:
    source, digest = 'data/"raw"\\new\nline', "0" * 64
    start = RunStart("preprocess", "key", inputs=[DataInput("raw", digest, source)])
    ((given,),) = [_datasets(start)]
    assert json.loads(given.dataset.source) == {"uri": source, "sha256": digest}
