"""The service follows @champion, whoever moves it, and takes on only what is good (P5, S8)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.core.errors import ArtefactError, RegistryError
from pipeline.core.files import seal
from pipeline.deploy.bundle import CARD, EVIDENCE, Bundle, load_bundle
from pipeline.deploy.by_hand import FORCED_TAG, VERDICT_TAG
from pipeline.deploy.registry import SMOKE_TAG, Registry
from pipeline.deploy.serve.admission import LINEAGE, REFUSED_TAG, refusal
from pipeline.deploy.serve.fleet import Fleet, try_out
from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.serve.model import Version
from pipeline.deploy.serve.sources import FolderSource, RegistrySource
from pipeline.engine.learner import DESCRIPTION, WEIGHTS
from tests.serve.registered import GOOD, NAME, move_by_hand, register
from tests.unit.tiny_learner import tiny_bundle


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Versions: 1 and 2 good, 3 ungated, 4 ungated and forced, 5 without a commit, 6 foreign."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = tmp_path_factory.mktemp("registry")
        register(root, 1)
        register(root, 2)
        register(root, 3, tags={VERDICT_TAG: "challenger", "gate.reason": "too weak."})
        register(root, 4, tags={VERDICT_TAG: "challenger", FORCED_TAG: "a person's reason"})
        register(root, 5, without=("git.commit",))
        client = Registry(root, NAME)._client
        client.create_model_version(NAME, source=str(root / "bundle-1"), await_creation_for=0)
        yield root


@pytest.fixture
def fleet(filled: Path, tmp_path: Path) -> Iterator[Fleet]:
    """Version 1 serves."""
    move_by_hand(filled, 1)
    one = Fleet(RegistrySource(filled, NAME), tmp_path / "cache", 16, poll_seconds=3600)
    one.cache.mkdir()
    one.look()
    assert serving(one) == 1
    yield one
    move_by_hand(filled, 1)


def serving(fleet: Fleet, role: str = "champion") -> int | None:
    version = fleet.serving(role)
    return None if version is None else version.ref.version


def test_a_move_by_hand_is_followed_and_recorded(fleet: Fleet, filled: Path) -> None:
    move_by_hand(filled, 2)
    fleet.look()
    assert serving(fleet) == 2 and not fleet.problems()
    last = Registry(filled, NAME).promotions()[-1]
    assert (last.kind, last.champion) == ("adopt", 2)


@pytest.mark.parametrize(
    ("number", "why"),
    [(3, "not passed the gate .too weak"), (5, "lacks the git commit"), (6, "nothing vouches")],
)
def test_a_version_that_is_not_good_is_kept_out_and_told_of(
    number: int, why: str, fleet: Fleet, filled: Path
) -> None:
    move_by_hand(filled, number)
    fleet.look()
    assert serving(fleet) == 1
    assert f"version {number} may not serve" in fleet.problems()[0]
    tag = Registry(filled, NAME).version(number).tags[REFUSED_TAG]
    assert re.search(why, tag)
    move_by_hand(filled, 2)
    fleet.look()
    assert serving(fleet) == 2 and not fleet.problems(), "what has gone is told of no more"


def test_a_forced_promotion_is_followed(fleet: Fleet, filled: Path) -> None:
    move_by_hand(filled, 4)
    fleet.look()
    assert serving(fleet) == 4


def test_a_version_that_is_forced_after_it_was_refused_is_taken_on(
    fleet: Fleet, filled: Path
) -> None:
    """By somebody who moves the alias first, and then says why on the version."""
    version, _ = register(filled, 21, tags={VERDICT_TAG: "challenger"})
    move_by_hand(filled, version.number)
    registry = Registry(filled, NAME)
    for _ in range(2):
        move_by_hand(filled, version.number)
        fleet.look()
        assert serving(fleet) == 1 and fleet.problems()
        assert REFUSED_TAG in registry.version(version.number).tags
        registry.tag(version, {FORCED_TAG: "a person's reason"})
        fleet.look()
        assert serving(fleet) == version.number and not fleet.problems()
        assert REFUSED_TAG not in registry.version(version.number).tags, "it serves"
        registry.untag(registry.version(version.number), FORCED_TAG)  # and all of it once more
        move_by_hand(filled, 1)
        fleet.look()


def test_a_registry_that_is_away_in_the_middle_is_asked_again(fleet: Fleet, filled: Path) -> None:
    """It names a version and is gone before the version is downloaded."""
    whole, calls = fleet.source.fetch, []

    class Shaky(RegistrySource):
        def fetch(self, ref: ModelRef, target: Path, signed_by: Path | None = None) -> Bundle:
            calls.append(ref)
            if len(calls) == 1:
                raise RegistryError("the registry does not answer.")
            return whole(ref, target)

    fleet.source = Shaky(filled, NAME)
    move_by_hand(filled, 2)
    fleet.look()
    assert serving(fleet) == 1 and fleet.problems() == ["the registry does not answer."]
    fleet.look()
    assert serving(fleet) == 2 and not fleet.problems()


def test_the_challenger_need_not_have_passed_the_gate(fleet: Fleet, filled: Path) -> None:
    move_by_hand(filled, 3, "challenger")
    fleet.look()
    assert (serving(fleet), serving(fleet, "challenger")) == (1, 3)


def test_a_challenger_may_go_while_it_is_put_out(fleet: Fleet, filled: Path) -> None:
    """A look, in its own thread, finds no challenger any more just as its budget is spent."""
    move_by_hand(filled, 3, "challenger")
    fleet.look()
    challenger = fleet.serving("challenger")
    assert challenger is not None

    class Meanwhile(ModelRef):
        """When it has been found to be the one that serves, the look comes."""

        def __eq__(self, other: object) -> bool:
            same = isinstance(other, ModelRef) and other.version == self.version
            if same:
                Registry(filled, NAME)._champions.drop("challenger")
                fleet.look()
            return same

        __hash__ = None  # type: ignore[assignment]

    fleet.withdraw(Meanwhile(**challenger.ref.model_dump()), "its error budget is spent")
    assert fleet.serving("challenger") is None and serving(fleet) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "add", "remove"])
def test_files_that_are_not_those_registered_are_kept_out(
    damage: str, filled: Path, tmp_path: Path, fleet: Fleet
) -> None:
    """In the registry's own artefact store, behind MLflow's back."""
    version, _ = register(filled, {"flip": 11, "truncate": 12, "add": 13, "remove": 14}[damage])
    registry = Registry(filled, NAME)
    base = registry._client.get_model_version_download_uri(NAME, str(version.number))
    bundle = Path(base.removeprefix("file://")) / "artifacts" / "bundle"
    weights = bundle / WEIGHTS
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "truncate":
        weights.write_bytes(content[:-1])
    elif damage == "add":
        (bundle / "more.py").write_text("print('hello')")
    else:
        (bundle / CARD).unlink()
    move_by_hand(filled, version.number)
    fleet.look()
    assert serving(fleet) == 1 and f"version {version.number}" in fleet.problems()[0]


def test_what_served_last_serves_at_once_without_a_registry(fleet: Fleet, filled: Path) -> None:
    class Away(RegistrySource):
        def look(self):  # type: ignore[no-untyped-def]
            raise ArtefactError("the registry does not answer.")

    again = Fleet(Away(filled, NAME), fleet.cache, 16, poll_seconds=3600)
    again._from_cache()
    assert serving(again) == 1
    again.look()
    assert serving(again) == 1 and again.problems() == ["the registry does not answer."]


def test_an_altered_cache_is_not_served(fleet: Fleet, filled: Path) -> None:
    """It is fetched anew."""
    current = fleet.serving()
    assert current is not None
    weights = fleet.cache / current.ref.bundle / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    again = Fleet(RegistrySource(filled, NAME), fleet.cache, 16, poll_seconds=3600)
    again._from_cache()
    assert serving(again) is None
    again.look()
    assert serving(again) == 1
    load_bundle(fleet.cache / current.ref.bundle, digest=current.ref.bundle)


def _rebuilt(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A bundle with other weights, sealed as if it were whole."""
    target.mkdir()
    for name in (WEIGHTS, DESCRIPTION, EVIDENCE, CARD):
        shutil.copyfile(folder / name, target / name)
    tensors = safetensors.torch.load_file(target / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, target / WEIGHTS)
    return target


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    for value in tensors.values():
        value.fill_(torch.nan)


def _dead(tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if name.startswith("params/"):
            value.zero_()


def _lost(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(name for name in tensors if name.startswith("params/")))


def _other_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.startswith("params/") and tensors[name].dim() == 2)
    tensors[name] = tensors[name][:, :-1].contiguous()


@pytest.mark.parametrize("change", [_nan, _dead, _lost, _other_shape])
def test_a_whole_bundle_that_cannot_answer_fails_its_trial(
    change: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    good = tiny_bundle(tmp_path, 0)
    header = {"kind": "metaloom bundle", "format_version": 2}
    folder = _rebuilt(good.folder, tmp_path / "bad", change)
    seal(folder, **header)
    ref = ModelRef(name="bad", version=1, bundle="0" * 64)
    with pytest.raises(ArtefactError):
        try_out(Version(ref, load_bundle(folder), 16))
    try_out(Version(ref, good, 16))


def test_a_folder_is_served_as_it_is(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, 0)
    fleet = Fleet(FolderSource(bundle.folder), tmp_path / "cache", 16, poll_seconds=3600)
    fleet._from_cache()
    fleet.look()
    version = fleet.serving()
    assert version is not None and version.ref.bundle == bundle.digest
    assert version.ref.version is None and np.isfinite(version.bundle.temperature)


@pytest.mark.parametrize("tag", [*LINEAGE, SMOKE_TAG, VERDICT_TAG])
def test_each_thing_that_a_version_must_have_is_named_where_it_lacks(tag: str) -> None:
    tags = {**GOOD, "metaloom.bundle": "there"}
    assert refusal(tags) is None
    del tags[tag]
    told = refusal(tags)
    assert told is not None and LINEAGE.get(tag, "not passed") in told
