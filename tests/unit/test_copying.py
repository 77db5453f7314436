"""A version goes on to another model whole, once, with its record; what may not serve stays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.core.errors import ArtefactError, RegistryError
from pipeline.deploy.bundle import Bundle
from pipeline.deploy.by_hand import FORCED_TAG, VERDICT_REASON_TAG, VERDICT_TAG
from pipeline.deploy.champions import CHAMPION, PREVIOUS, ROLLED_BACK_TAG
from pipeline.deploy.copying import (
    AT_TAG,
    BY_TAG,
    FROM_TAG,
    REASON_TAG,
    TRAIL_TAG,
    Copied,
    copy_to,
    trail,
)
from pipeline.deploy.lineage import FIELDS, as_text, of_version, trace
from pipeline.deploy.promotions import LostRaceError
from pipeline.deploy.registry import BUNDLE_TAG, DAMAGED_TAG, PASSED, SMOKE_TAG, TOKEN_TAG, Registry
from pipeline.deploy.serve.admission import LINEAGE, REFUSED_TAG, refusal
from tests.unit.test_registry import EXAMPLE, model_folder
from tests.unit.tiny_learner import tiny_bundle

KNOWN = {name: f"{name}, known" for name in LINEAGE if not name.startswith("metaloom.")}
GOOD: Mapping[str, str] = {
    **KNOWN,
    VERDICT_TAG: "champion",
    VERDICT_REASON_TAG: "better",
    "gate.rules": "[]",
    SMOKE_TAG: PASSED,
}
AUDIT = {FROM_TAG, BY_TAG, AT_TAG, TRAIL_TAG}
GONE_ON, NOT_PASSED, NOT_TRIED, ROOTLESS, ANOTHER = range(1, 6)
TAGS: tuple[Mapping[str, str], ...] = (
    {**GOOD, ROLLED_BACK_TAG: "yesterday", REFUSED_TAG: "it was not ready"},
    {**GOOD, VERDICT_TAG: "challenger", VERDICT_REASON_TAG: "5w1s: too low."},
    {**GOOD, SMOKE_TAG: "failed: no answer"},
    {name: value for name, value in GOOD.items() if name != "git.commit"},
    GOOD,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield tmp_path_factory.mktemp("copying")


@pytest.fixture(scope="module")
def bundles(root: Path) -> list[Bundle]:
    return [tiny_bundle(root, seed) for seed in range(len(TAGS))]


@pytest.fixture(scope="module")
def dev(root: Path, bundles: list[Bundle]) -> Registry:
    registry = Registry(root, "toy-dev")
    for bundle, tags in zip(bundles, TAGS, strict=True):
        registry.register(bundle, EXAMPLE, tags=tags)
    return registry


def go(dev: Registry, number: int, to: str, **options: Any) -> tuple[Copied, Registry]:
    target = Registry(dev._root, to)
    return copy_to(dev, dev.version(number), target, **options), target


def test_a_version_goes_on_with_its_lineage_and_serves(
    dev: Registry, bundles: list[Bundle], tmp_path: Path
) -> None:
    done, staging = go(dev, GONE_ON, "toy-whole")
    original, copy = dev.version(GONE_ON), done.version
    assert (done.new, done.promoted, done.before, copy.number) == (True, True, None, 1)
    left_behind = {ROLLED_BACK_TAG, REFUSED_TAG, TOKEN_TAG}
    same = {k: v for k, v in original.tags.items() if k not in left_behind}
    assert {k: v for k, v in copy.tags.items() if k not in AUDIT | {TOKEN_TAG}} == same
    lineage, theirs = of_version(copy), of_version(original)
    assert {name: lineage[name] for name in ("run", *FIELDS)} == {
        name: theirs[name] for name in ("run", *FIELDS)
    }
    assert staging.fetch(copy, tmp_path / "bundle").digest == bundles[GONE_ON - 1].digest
    assert refusal(copy.tags) is None
    assert staging.aliases() == {CHAMPION: 1}
    assert [r.reason for r in staging.promotions()] == ["promoted from toy-dev version 1"]
    found = staging._client.get_model_version("toy-whole", "1")
    assert found.description == bundles[0].card


def test_its_tags_tell_where_it_came_from_by_whom_and_when(dev: Registry) -> None:
    """All of them come with the version, in the transaction that makes it."""
    staging, seen = Registry(dev._root, "toy-staging"), list[dict[str, str]]()
    create = staging._client.create_model_version

    def watched(name: str, **values: Any) -> Any:
        if name == staging.name:
            seen.append(values["tags"])
        return create(name, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging._client, "create_model_version", watched)
        copy = copy_to(dev, dev.version(GONE_ON), staging, reason=" for the fair ").version
    assert seen == [dict(copy.tags)]
    assert copy.tags[FROM_TAG] == "models:/toy-dev/1"
    assert "@" in copy.tags[BY_TAG] and copy.tags[AT_TAG].startswith("20")
    assert copy.tags[REASON_TAG] == "for the fair"
    prod = Registry(dev._root, "toy-prod")
    last = copy_to(staging, copy, prod).version
    steps = trail(last.tags)
    assert [step["from"] for step in steps] == ["models:/toy-dev/1", "models:/toy-staging/1"]
    assert [step["reason"] for step in steps] == ["for the fair", "none given"]
    assert REASON_TAG not in last.tags
    told = trace(prod, "1")
    assert told["copied"] == steps and "git commit" not in told["missing"]
    assert "  copied from models:/toy-staging/1 by " in as_text(told)
    assert trace(dev, "1")["copied"] == []
    assert dev.version(GONE_ON).digest == last.digest


def test_a_second_time_makes_no_second_version(dev: Registry) -> None:
    go(dev, GONE_ON, "toy-twice")
    done, target = go(dev, GONE_ON, "toy-twice")
    assert (done.new, done.promoted, done.version.number) == (False, False, 1)
    assert len(target.versions()) == len(target.promotions()) == 1


def test_a_copy_that_was_stopped_before_its_promotion_is_finished(dev: Registry) -> None:
    go(dev, GONE_ON, "toy-slow", only_copy=True)
    done, target = go(dev, GONE_ON, "toy-slow")
    assert (done.new, done.promoted) == (False, True)
    assert target.aliases() == {CHAMPION: 1}


def test_only_a_copy_leaves_the_champion(dev: Registry) -> None:
    go(dev, GONE_ON, "toy-waits")
    done, target = go(dev, ANOTHER, "toy-waits", only_copy=True)
    assert (done.new, done.promoted, done.version.number) == (True, False, 2)
    assert target.aliases() == {CHAMPION: 1}
    done, target = go(dev, ANOTHER, "toy-waits", reason="now")
    assert done.before is not None and done.before.number == 1
    assert target.aliases() == {CHAMPION: 2, PREVIOUS: 1}
    assert target.promotions()[-1].reason == f"promoted from toy-dev version {ANOTHER}: now"


@pytest.mark.parametrize("options", [{}, {"force": True, "reason": "needed"}])
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (NOT_TRIED, r"not promoted to toy-none: .* smoke test \(failed: no answer\)"),
        (ROOTLESS, "not promoted to toy-none: its lineage lacks the git commit"),
    ],
)
def test_what_may_not_serve_stays(
    dev: Registry, number: int, told: str, options: Mapping[str, Any]
) -> None:
    with pytest.raises(RegistryError, match=told):
        go(dev, number, "toy-none", **options)
    assert Registry(dev._root, "toy-none").versions() == []


def test_what_the_gate_did_not_pass_needs_force_and_a_reason(dev: Registry) -> None:
    command = r'`metaloom promote 2 --to toy-forced --force --reason "\.\.\."`'
    for options in ({}, {"force": True}, {"reason": "but I want it"}):
        with pytest.raises(RegistryError, match=f"5w1s: too low.*{command}"):
            go(dev, NOT_PASSED, "toy-forced", **options)
    assert Registry(dev._root, "toy-forced").versions() == []
    done, target = go(dev, NOT_PASSED, "toy-forced", force=True, reason="a demonstration")
    assert done.version.tags[FORCED_TAG] == "a demonstration"
    assert refusal(done.version.tags) is None
    assert target.promotions()[-1].reason.endswith("version 2, forced: a demonstration")
    assert FORCED_TAG not in dev.version(NOT_PASSED).tags
    with pytest.raises(RegistryError, match="--to toy-further --force"):
        copy_to(target, done.version, Registry(dev._root, "toy-further"))


def test_a_bundle_that_another_gate_kept_out_there_stays_out(
    dev: Registry, bundles: list[Bundle]
) -> None:
    """It was registered there before, and not passed; the reason to serve it is left with it."""
    target = Registry(dev._root, "toy-judged")
    target.register(bundles[GONE_ON - 1], EXAMPLE, tags={**GOOD, VERDICT_TAG: "challenger"})
    with pytest.raises(RegistryError, match="version 1 of toy-judged was not promoted, for the ga"):
        copy_to(dev, dev.version(GONE_ON), target)
    done = copy_to(dev, dev.version(GONE_ON), target, force=True, reason="ours is stricter")
    assert (done.new, done.promoted) == (False, True)
    assert done.version.tags[FORCED_TAG] == "ours is stricter"


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("toy-dev", "one of toy-dev already: name another model after --to"),
        ("toy-x-promotions", "cannot be the name of a model here"),
        ("a/b", "cannot be the name of a model here"),
        ("", "cannot be the name of a model here"),
    ],
)
def test_names_that_cannot_be(dev: Registry, to: str, told: str) -> None:
    with pytest.raises(RegistryError, match=told):
        go(dev, GONE_ON, to)


def test_two_at_once_leave_one_version(dev: Registry) -> None:
    """The other one comes through between the first one's look and its creation."""
    ours, theirs = Registry(dev._root, "toy-race"), Registry(dev._root, "toy-race")
    create, others = ours._client.create_model_version, list[Copied]()

    def after_the_other(*arguments: Any, **values: Any) -> Any:
        if not others:
            others.append(copy_to(dev, dev.version(GONE_ON), theirs, only_copy=True))
        return create(*arguments, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours._client, "create_model_version", after_the_other)
        done = copy_to(dev, dev.version(GONE_ON), ours, only_copy=True)
    assert others[0].new and not done.new
    assert done.version == others[0].version
    assert [one.number for one in ours.versions()] == [done.version.number]


def test_a_champion_that_changed_meanwhile_wins(dev: Registry) -> None:
    target = Registry(dev._root, "toy-lost")
    copy_to(dev, dev.version(GONE_ON), target)
    make = target.copy

    def while_another_is_promoted(*arguments: Any) -> Any:
        go(dev, ANOTHER, "toy-lost")
        target.promote(target.version(1), reason="back again")
        return make(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "copy", while_another_is_promoted)
        with pytest.raises(LostRaceError, match="back again"):
            copy_to(dev, dev.version(ANOTHER), target)
    assert target.aliases()[CHAMPION] == 1


def test_altered_files_go_nowhere(dev: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: nothing is made. Between: the copy is marked, serves nowhere, and is made anew."""
    weights = model_folder(dev, ANOTHER) / "artifacts" / "bundle" / "weights.safetensors"
    before = weights.read_bytes()
    altered = bytes([*before[:-1], before[-1] ^ 1])
    target = Registry(dev._root, "toy-altered")
    try:
        weights.write_bytes(altered)
        with pytest.raises(ArtefactError, match="SHA-256"):
            copy_to(dev, dev.version(ANOTHER), target)
        assert target.versions() == []
        weights.write_bytes(before)
        make = target.copy

        def then_alter(*arguments: Any) -> Any:
            made = make(*arguments)
            weights.write_bytes(altered)
            return made

        monkeypatch.setattr(target, "copy", then_alter)
        with pytest.raises(ArtefactError, match="SHA-256"):
            copy_to(dev, dev.version(ANOTHER), target)
        assert DAMAGED_TAG in target.version(1).tags and target.aliases() == {}
    finally:
        weights.write_bytes(before)
    monkeypatch.undo()
    assert copy_to(dev, dev.version(ANOTHER), target).version.number == 2


def test_a_copy_outlives_the_version_that_it_was_made_from(
    dev: Registry, root: Path, tmp_path: Path
) -> None:
    first, bundle = Registry(root, "toy-first"), tiny_bundle(tmp_path, 77)
    version, _ = first.register(bundle, EXAMPLE, tags=GOOD)
    second = Registry(root, "toy-second")
    copy = copy_to(first, version, second).version
    first._client.delete_registered_model("toy-first")
    assert second.fetch(copy, tmp_path / "fetched").digest == bundle.digest
    assert copy_to(second, copy, Registry(root, "toy-third")).new


def test_a_trail_that_was_changed_by_hand_is_named(dev: Registry) -> None:
    for text in ("no list", "3", '["a"]'):
        with pytest.raises(RegistryError, match="copied.trail was changed by hand"):
            trail({TRAIL_TAG: text})


def command(root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, ["promote", "--model", "toy-dev", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_the_command(dev: Registry, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = ("--to", "toy-command")
    told = json.loads(command(root, monkeypatch, "1", *to, "--only-copy", "--json"))
    assert told == {
        "from": "models:/toy-dev/1",
        "model": "toy-command",
        "version": 1,
        "new": True,
        "promoted": False,
        "bundle": dev.version(1).tags[BUNDLE_TAG],
        "aliases": {},
    }
    again = "version 1 holds this bundle already, that of models:/toy-dev/1."
    assert f"{again} It is @champion now." in command(root, monkeypatch, "1", *to)
    assert f"{again} It was @champion before." in command(root, monkeypatch, "1", *to)
    second = command(root, monkeypatch, str(ANOTHER), *to)
    assert "version 2 is a copy of models:/toy-dev/5. It is @champion now; version 1" in second
    with pytest.raises(RegistryError, match="toy-dev has no version 99"):
        command(root, monkeypatch, "99", *to)
    with pytest.raises(RegistryError, match="toy-dev has no champion"):
        command(root, monkeypatch, *to)
    with pytest.raises(Exception, match="--only-copy needs --to NAME"):
        command(root, monkeypatch, "1", "--only-copy")
