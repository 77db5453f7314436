"""Only what is signed serves (M3), and a strict service follows signed promotions alone (P5)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("model_signing", reason="the extra `sign` is not installed")

from pipeline.core.errors import ArtefactError, ConfigError
from pipeline.deploy import signing
from pipeline.deploy.bundle import load_bundle
from pipeline.deploy.by_hand import promote_by_hand
from pipeline.deploy.promotions import as_tags
from pipeline.deploy.registry import Registry
from pipeline.deploy.serve.admission import REFUSED_TAG, unsigned_promotion
from pipeline.deploy.serve.app import build_app
from pipeline.deploy.serve.fleet import Fleet
from pipeline.deploy.serve.settings import ServeSettings
from pipeline.deploy.serve.sources import FolderSource, RegistrySource, Source
from pipeline.deploy.signing import KEY_VARIABLE, SIGNATURE, beside, keep_signature, sign
from tests.serve.registered import NAME, move_by_hand, register
from tests.serve.service_process import ServiceProcess, wait_until
from tests.serve.test_fleet import serving
from tests.unit.signing_keys import Keys, make_keys
from tests.unit.tiny_learner import tiny_bundle

UNSIGNED, BY_ANOTHER, STALE, SWAPPED = 3, 4, 5, 6


def logged(root: Path, number: int) -> Path:
    """Where the registry keeps a version, on this disk."""
    base = Registry(root, NAME)._client.get_model_version_download_uri(NAME, str(number))
    return Path(base.removeprefix("file://"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"), "other")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, keys: Keys, others: Keys) -> Iterator[Path]:
    """Versions 1 and 2 are signed; each other one passes for good in all but its signature."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = tmp_path_factory.mktemp("registry")
        patch.setenv(KEY_VARIABLE, str(keys.private))
        register(root, 1)
        register(root, 2)
        patch.delenv(KEY_VARIABLE)
        register(root, UNSIGNED)
        patch.setenv(KEY_VARIABLE, str(others.private))
        register(root, BY_ANOTHER)
        patch.setenv(KEY_VARIABLE, str(keys.private))
        register(root, STALE)
        register(root, SWAPPED)
        patch.delenv(KEY_VARIABLE)
        shutil.copy(logged(root, 1) / SIGNATURE, logged(root, STALE) / SIGNATURE)
        for name in (SIGNATURE, "artifacts"):  # bundle and signature of version 1, together
            shutil.rmtree(logged(root, SWAPPED) / name, ignore_errors=True)
        shutil.copy(logged(root, 1) / SIGNATURE, logged(root, SWAPPED) / SIGNATURE)
        shutil.copytree(logged(root, 1) / "artifacts", logged(root, SWAPPED) / "artifacts")
        yield root


def follow(source: Source, cache: Path, keys: Keys) -> Fleet:
    cache.mkdir(exist_ok=True)
    return Fleet(source, cache, 16, poll_seconds=3600, signed_by=keys.public)


@pytest.fixture
def fleet(filled: Path, tmp_path: Path, keys: Keys) -> Iterator[Fleet]:
    """Version 1 serves."""
    move_by_hand(filled, 1)
    one = follow(RegistrySource(filled, NAME), tmp_path / "cache", keys)
    one.look()
    assert serving(one) == 1 and not one.problems()
    yield one
    move_by_hand(filled, 1)


def test_a_signed_version_is_followed(fleet: Fleet, filled: Path) -> None:
    move_by_hand(filled, 2)
    fleet.look()
    assert serving(fleet) == 2 and not fleet.problems()


BAD = [
    (UNSIGNED, "is not signed. Sign it: `METALOOM_SIGNING_KEY="),
    (BY_ANOTHER, "is signed by another key than"),
    (STALE, "is of another bundle"),
    (SWAPPED, "is of another bundle"),
]


@pytest.mark.parametrize(("number", "why"), BAD)
def test_what_is_not_signed_rightly_is_kept_out_and_told_of(
    number: int, why: str, fleet: Fleet, filled: Path
) -> None:
    move_by_hand(filled, number)
    fleet.look()
    assert serving(fleet) == 1
    assert f"version {number} may not serve" in fleet.problems()[0] and why in fleet.problems()[0]
    assert why in Registry(filled, NAME).version(number).tags[REFUSED_TAG]
    with pytest.raises(ArtefactError, match=why.split(":")[0]):  # for a pinned learner neither
        version = Registry(filled, NAME).version(number)
        fleet.version(fleet.source.look()["champion"].ref.model_copy(update={"version": number}))
    assert version.digest not in {one.name for one in fleet.cache.glob("*/")}


def test_an_unsigned_version_that_is_signed_later_is_taken_on(
    fleet: Fleet, filled: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`metaloom release` signs what is registered already; the next look sees it."""
    version, bundle = register(filled, 31)
    move_by_hand(filled, version.number)
    fleet.look()
    assert serving(fleet) == 1
    assert Registry(filled, NAME).sign(version) is False
    monkeypatch.setenv(KEY_VARIABLE, str(keys.private))
    assert Registry(filled, NAME).register(bundle, []) == (
        Registry(filled, NAME).version(version.number), False,
    )  # fmt: skip
    fleet.look()
    assert serving(fleet) == version.number and not fleet.problems()


def test_with_the_check_switched_off_the_bad_ones_would_serve(
    fleet: Fleet, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the tests above can fail."""
    monkeypatch.setattr("pipeline.deploy.signing.check_is_of", lambda *_, **__: None)
    monkeypatch.setattr(signing, "check_signature", lambda folder, *_: load_bundle(folder).digest)
    for number in (UNSIGNED, BY_ANOTHER, STALE):
        move_by_hand(filled, number)
        fleet.look()
        assert serving(fleet) == number


def test_the_cache_keeps_the_signature_and_it_is_verified_again(
    fleet: Fleet, filled: Path, keys: Keys, others: Keys
) -> None:
    class Away(RegistrySource):
        def look(self) -> Any:
            raise ArtefactError("the registry does not answer.")

    current = fleet.serving()
    assert current is not None
    cached = fleet.cache / current.ref.bundle

    def from_cache() -> int | None:
        again = follow(Away(filled, NAME), fleet.cache, keys)
        again._from_cache()
        return serving(again)

    assert from_cache() == 1
    keep_signature(cached, sign(cached, others.private))
    assert from_cache() is None
    beside(cached).unlink()
    assert from_cache() is None
    again = follow(RegistrySource(filled, NAME), fleet.cache, keys)
    again.look()  # it is fetched anew, with its signature
    assert serving(again) == 1 and from_cache() == 1


def test_a_folder_needs_its_signature_beside_it(tmp_path: Path, keys: Keys) -> None:
    bundle = tiny_bundle(tmp_path, 0)
    fleet = follow(FolderSource(bundle.folder), tmp_path / "cache", keys)
    fleet.look()
    assert fleet.serving() is None and "is not signed" in fleet.problems()[0]
    keep_signature(bundle.folder, sign(bundle.folder, keys.private))
    fleet.look()
    assert fleet.serving() is not None and not fleet.problems()


# Strict: the choice of the champion is signed as well.


@pytest.fixture
def promote(filled: Path, keys: Keys) -> Callable[..., None]:
    """`metaloom promote`, with a key or without."""

    def run(number: int, key: Keys | None = keys) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(KEY_VARIABLE, raising=False)
            if key is not None:
                patch.setenv(KEY_VARIABLE, str(key.private))
            registry = Registry(filled, NAME)
            promote_by_hand(registry, registry.version(number))

    return run


@pytest.fixture
def strict(
    filled: Path, tmp_path: Path, keys: Keys, promote: Callable[..., None]
) -> Iterator[Fleet]:
    """Version 1 serves, by a signed promotion."""
    promote(1)
    source = RegistrySource(filled, NAME).strict(keys.public)
    one = follow(source, tmp_path / "cache", keys)
    one.look()
    assert serving(one) == 1 and not one.problems()
    yield one
    move_by_hand(filled, 1)


def test_strict_follows_a_signed_promotion_and_a_signed_rollback(
    strict: Fleet, filled: Path, keys: Keys, promote: Callable[..., None], monkeypatch: Any
) -> None:
    promote(2)
    strict.look()
    assert serving(strict) == 2 and not strict.problems()
    monkeypatch.setenv(KEY_VARIABLE, str(keys.private))
    Registry(filled, NAME).rollback()
    strict.look()
    assert serving(strict) == 1 and not strict.problems()
    last = Registry(filled, NAME).promotions()[-1]
    assert last.kind == "rollback" and last.signature and last.bundle


def test_strict_refuses_a_move_by_hand_until_it_is_promoted_with_a_signature(
    strict: Fleet, filled: Path, promote: Callable[..., None]
) -> None:
    move_by_hand(filled, 2)
    strict.look()
    assert serving(strict) == 1
    why = Registry(filled, NAME).version(2).tags[REFUSED_TAG]
    assert "moved by hand" in why and "=KEY.pem metaloom promote 2`" in why
    promote(2, None)  # it is the champion already, and nobody signs
    strict.look()
    assert serving(strict) == 1
    promote(2)
    strict.look()
    assert serving(strict) == 2 and not strict.problems()
    number = len(Registry(filled, NAME).promotions())
    promote(2)
    assert len(Registry(filled, NAME).promotions()) == number, "once is enough"


def test_strict_refuses_promotions_without_a_signature_or_by_another_key(
    strict: Fleet, promote: Callable[..., None], others: Keys
) -> None:
    promote(2, None)
    strict.look()
    assert serving(strict) == 1 and "promote by" in strict.problems()[0]
    promote(1)
    strict.look()
    promote(2, others)
    strict.look()
    assert serving(strict) == 1 and "not by the key" in strict.problems()[0]
    promote(2)
    strict.look()
    assert serving(strict) == 2


def test_strict_refuses_a_signed_record_that_is_written_once_more(
    strict: Fleet, filled: Path, promote: Callable[..., None]
) -> None:
    """Whoever may write to the registry copies a signature, as the last record of today."""
    promote(2)
    promote(1)
    registry = Registry(filled, NAME)
    old, last = (registry.promotions()[i] for i in (-2, -1))
    assert old.champion == 2
    replayed = replace(old, after=last.number, before=1)
    tags = as_tags(replayed)
    name = registry._champions.record_name
    registry._client.create_model_version(name, source="x", tags=tags, await_creation_for=0)
    move_by_hand(filled, 2)
    strict.look()
    assert serving(strict) == 1 and "the record was altered" in strict.problems()[0]


def test_a_signed_promotion_is_of_one_bundle(strict: Fleet, filled: Path, keys: Keys) -> None:
    registry = Registry(filled, NAME)
    version, records = registry.version(1), registry.promotions()
    assert unsigned_promotion(records, version, keys.public) is None
    forged = replace(version, tags={**version.tags, "metaloom.bundle": "f" * 64})
    told = unsigned_promotion(records, forged, keys.public)
    assert told is not None and "signed for another bundle" in told
    told = unsigned_promotion([], version, keys.public)
    assert told is not None and "no record of its promotion" in told


def test_strict_follows_the_champion_alone(keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="@challenger are not recorded"):
        RegistrySource(tmp_path, NAME, "challenger").strict(keys.public)
    one = RegistrySource(tmp_path, NAME, number=3).strict(keys.public)
    assert (one.number, one.promoted_by) == (3, keys.public)


def test_settings_that_cannot_work_are_told_of_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="strict needs signed_by"):
        ServeSettings(strict=True)
    (tmp_path / "key.pem").write_text("nothing")
    settings = ServeSettings(signed_by=str(tmp_path / "key.pem"))
    with pytest.raises(ConfigError, match="no public key"):
        build_app(FolderSource(tmp_path), settings)


def test_a_strict_service_of_its_own(
    filled: Path,
    tmp_path: Path,
    keys: Keys,
    promote: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a user starts it: it keeps out moves by hand, and all that is not signed rightly."""
    from pipeline.runtime.mlflow_tracker import tracking_uri

    promote(1)
    registry = Registry(filled, NAME)
    settings = {"signed_by": str(keys.public), "strict": True, "poll_seconds": 0.2}
    service = ServiceProcess(tmp_path / "service", NAME, **settings)
    service.start(environment={"MLFLOW_TRACKING_URI": tracking_uri(filled)})
    monkeypatch.setenv(KEY_VARIABLE, str(keys.private))
    try:
        for number, why in ((2, "moved by hand"), *BAD):
            if number == 2:
                move_by_hand(filled, number)
            else:  # the choice is signed, the bytes are not
                bundle = registry.version(number).digest
                since = registry.standing()
                registry._champions.change("promote", number, since, "a test", bundle=bundle)
            wait_until(lambda n=number: f"version {n} may not serve" in str(service.readiness()))
            status, told = service.readiness()
            assert status == 200 and why in str(told)
            assert service.client().model().champion.version == 1
            wait_until(lambda n=number, w=why: w in registry.version(n).tags.get(REFUSED_TAG, ""))
            assert f'"refused", "version": "{number}"' in service.log.read_text()
        promote(2)
        wait_until(lambda: service.client().model().champion.version == 2)
    finally:
        service.stop()
        move_by_hand(filled, 1)
    assert str(keys.private) not in service.log.read_text()
