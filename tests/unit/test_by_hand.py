"""A person may overrule the gate, but says so, says why, and both are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from pipeline.core.errors import RegistryError
from pipeline.deploy.by_hand import FORCED_TAG, VERDICT_REASON_TAG, VERDICT_TAG, promote_by_hand
from pipeline.deploy.champions import CHAMPION, PREVIOUS
from pipeline.deploy.promotions import LostRaceError, Standing
from pipeline.deploy.registry import PASSED, SMOKE_TAG, Registry, Version
from tests.unit.test_registry import EXAMPLE
from tests.unit.tiny_learner import tiny_bundle

TAGS: tuple[Mapping[str, str], ...] = (
    {VERDICT_TAG: "champion", SMOKE_TAG: PASSED},
    {VERDICT_TAG: "challenger", VERDICT_REASON_TAG: "5w1s: too low.", SMOKE_TAG: PASSED},
    {VERDICT_TAG: "overtaken", VERDICT_REASON_TAG: "Another was first.", SMOKE_TAG: PASSED},
    {SMOKE_TAG: PASSED},
    {VERDICT_TAG: "challenger", SMOKE_TAG: "failed: no answer"},
)
PASSED_GATE, REFUSED, OVERTAKEN, UNJUDGED, FAILED_TRIAL = range(1, 6)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = tmp_path_factory.mktemp("by-hand")
        registry = Registry(root, "tiny-hand")
        for seed, tags in enumerate(TAGS):
            registry.register(tiny_bundle(root, seed), EXAMPLE, tags=tags)
        yield registry


@pytest.fixture
def registry(filled: Registry) -> Registry:
    """Version 1 is champion, by a record of its own, and nothing is forced."""
    champions = filled._champions
    for alias in filled.aliases():
        champions.drop(alias)
    if champions.standing().winners:
        filled._client.delete_registered_model(champions.record_name)
    for version in filled.versions():
        if FORCED_TAG in version.tags:
            filled._client.delete_model_version_tag(filled.name, str(version.number), FORCED_TAG)
    promote_by_hand(filled, filled.version(PASSED_GATE))
    return filled


def reasons(registry: Registry) -> list[str]:
    return [record.reason for record in registry.promotions()]


def test_what_the_gate_passed_needs_no_force(registry: Registry) -> None:
    assert registry.aliases() == {CHAMPION: PASSED_GATE}
    assert reasons(registry) == ["a person's choice"]
    assert FORCED_TAG not in registry.version(PASSED_GATE).tags


def test_a_reason_is_recorded_without_force_too(registry: Registry) -> None:
    promote_by_hand(registry, registry.version(REFUSED), force=True, reason="a demonstration")
    promote_by_hand(registry, registry.version(PASSED_GATE), reason="the demonstration is over")
    assert reasons(registry)[-1] == "the demonstration is over"
    assert FORCED_TAG not in registry.version(PASSED_GATE).tags


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (REFUSED, r"the gate says 'challenger': 5w1s: too low\. If it must serve"),
        (OVERTAKEN, r"the gate says 'overtaken': Another was first\."),
        (UNJUDGED, "the gate has not judged it"),
    ],
)
def test_what_the_gate_did_not_pass_must_be_forced(
    registry: Registry, number: int, told: str
) -> None:
    command = rf'metaloom promote {number} --force --reason "\.\.\."'
    with pytest.raises(RegistryError, match=f"{told}.*{command}"):
        promote_by_hand(registry, registry.version(number))
    with pytest.raises(RegistryError, match=f"{told}.*{command}"):
        promote_by_hand(registry, registry.version(number), reason="but I want it")
    assert registry.aliases() == {CHAMPION: PASSED_GATE}
    assert len(reasons(registry)) == 1


@pytest.mark.parametrize("reason", [None, "", " \n\t"])
def test_force_without_a_reason_changes_nothing(registry: Registry, reason: str | None) -> None:
    with pytest.raises(RegistryError, match="needs a reason, which is recorded"):
        promote_by_hand(registry, registry.version(REFUSED), force=True, reason=reason)
    assert registry.aliases() == {CHAMPION: PASSED_GATE}


@pytest.mark.parametrize("number", [REFUSED, OVERTAKEN, UNJUDGED])
def test_a_forced_promotion_is_recorded_and_marked(registry: Registry, number: int) -> None:
    reason = " the sensor was changed: old data lie "
    old = promote_by_hand(registry, registry.version(number), force=True, reason=reason)
    assert old is not None and old.number == PASSED_GATE
    assert registry.aliases() == {CHAMPION: number, PREVIOUS: PASSED_GATE}
    assert registry.version(number).tags[FORCED_TAG] == reason.strip()
    assert reasons(registry)[-1] == f"forced: {reason.strip()}"


def test_a_forced_version_is_marked_before_it_is_champion(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or services that look in between would refuse it, and leave word of that."""
    seen, change = list[str | None](), registry._champions.change

    def watched(*arguments: Any, **more: Any) -> None:
        seen.append(registry.version(REFUSED).tags.get(FORCED_TAG))
        change(*arguments, **more)

    monkeypatch.setattr(registry._champions, "change", watched)
    promote_by_hand(registry, registry.version(REFUSED), force=True, reason="needed")
    assert seen == ["needed"]


def test_a_promotion_whose_answer_is_lost_keeps_its_mark(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = registry._champions.change

    def lost(*arguments: Any, **more: Any) -> None:
        change(*arguments, **more)
        raise RegistryError("the registry does not answer.")

    monkeypatch.setattr(registry._champions, "change", lost)
    with pytest.raises(RegistryError, match="does not answer"):
        promote_by_hand(registry, registry.version(REFUSED), force=True, reason="needed")
    assert registry.aliases()[CHAMPION] == REFUSED
    assert registry.version(REFUSED).tags[FORCED_TAG] == "needed"


def test_forcing_twice_is_forcing_once(registry: Registry) -> None:
    for _ in range(2):
        promote_by_hand(registry, registry.version(REFUSED), force=True, reason="needed")
    assert len(reasons(registry)) == 2
    assert registry.version(REFUSED).tags[FORCED_TAG] == "needed"


def test_force_does_not_help_a_version_that_failed_its_trial(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="has not passed the smoke test"):
        promote_by_hand(registry, registry.version(FAILED_TRIAL), force=True, reason="needed")
    assert FORCED_TAG not in registry.version(FAILED_TRIAL).tags


def test_a_forced_promotion_that_loses_its_race_leaves_no_mark(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale, real = Standing(), registry.promote

    def late(version: Version, *, reason: str) -> Version | None:
        return real(version, since=stale, reason=reason)

    monkeypatch.setattr(registry, "promote", late)
    with pytest.raises(LostRaceError):
        promote_by_hand(registry, registry.version(REFUSED), force=True, reason="needed")
    assert registry.aliases() == {CHAMPION: PASSED_GATE}
    assert FORCED_TAG not in registry.version(REFUSED).tags
