"""Writers killed anywhere, readers looking on: whatever is visible is whole (F5, D2)."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.errors import ArtefactError
from pipeline.core.files import MANIFEST, new_folder, read_json
from pipeline.deploy.bundle import load_bundle, make_bundle
from pipeline.engine.learner import WEIGHTS, Learner, Preprocessing, save_learner
from pipeline.runtime.checkpoint import load_checkpoint, save_checkpoint, tidy_checkpoints
from pipeline.store.reader import open_store
from tests.chaos.campaign import Campaign, Try, tries
from tests.unit.test_store_integrity import small_store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

# Writers are forked from a process that has imported all this: a kill costs milliseconds.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])
_VALUES = 300_000
_WEIGHTS = 4
"""Different learners that bundles are made of, in turn."""


@dataclass(frozen=True)
class Artefact:
    """One kind of folder; level n of it holds n in each of its files."""

    write: Callable[[Path, int], None]
    level: Callable[[Path], int]
    """Read the newest through its public door and check every value."""
    visible: str
    """Pattern of what a reader may pick up"""


def _write_checkpoint(folder: Path, level: int) -> None:
    tensors = {"vector": torch.full((_VALUES,), float(level)), "first": torch.arange(9.0) * level}
    save_checkpoint(folder, level, tensors, {"level": level, "history": [level] * 2000})


def _checkpoint_level(folder: Path) -> int:
    saved = load_checkpoint(folder)
    if saved is None:
        raise ArtefactError("none yet")
    level = int(saved.state["level"])
    assert saved.state["history"] == [level] * 2000
    assert bool((saved.tensors["vector"] == level).all())
    assert torch.equal(saved.tensors["first"], torch.arange(9.0) * level)
    return level


def _write_store(folder: Path, level: int) -> None:
    small_store(folder / "it", level=level % 256, num_shards=8, size=48)


def _store_level(folder: Path) -> int:
    store = open_store(folder / "it")
    pixels = store.gather(np.arange(store.num_rows))[:, 0, 0, 0].astype(int)
    assert np.array_equal(pixels, (pixels[0] + np.arange(store.num_rows)) % 256), "rows of two"
    return int(pixels[0])


def _write_bundle(folder: Path, level: int) -> None:
    source = folder.parent / f"learner-{level % _WEIGHTS}"
    make_bundle(folder / "it", source, {"5w1s": {"accuracy": level}}, domain="x", card=str(level))


def _bundle_level(folder: Path) -> int:
    bundle = load_bundle(folder / "it")
    level = int(bundle.card)
    assert bundle.evaluation == {"5w1s": {"accuracy": level}}, "evidence of another bundle"
    for values in bundle.learner.params.values():
        assert bool((values == level % _WEIGHTS).all()), "weights of another bundle"
    return level


ARTEFACTS: Mapping[str, Artefact] = {
    "checkpoint": Artefact(_write_checkpoint, _checkpoint_level, "step-*"),
    "store": Artefact(_write_store, _store_level, "it"),
    "bundle": Artefact(_write_bundle, _bundle_level, "it"),
}


def write_learners(folder: Path) -> None:
    """What bundles are made of: learners whose weights are all 0, all 1, ..."""
    shape = (1, 28, 28)
    spec = BackboneSpec(name="conv4", settings={"width": 32}, image_shape=shape)
    algorithm = ProtoNet()
    scaling = Preprocessing(image_shape=shape, mean=[0.5], std=[0.25])
    model = build_model(spec, algorithm.batch_norm)
    for value in range(_WEIGHTS):
        params = {n: torch.full_like(v, value) for n, v in init_params(spec, 0).items()}
        with new_folder(folder / f"learner-{value}", kind="learner") as building:
            save_learner(building, Learner(algorithm, model, params, scaling, spec, {}))


def writer(kind: str, folder: Path, level: int, told: Connection) -> None:
    """Write level after level for ever, telling when each begins and ends."""
    while True:
        level += 1
        told.send(("begin", level))
        ARTEFACTS[kind].write(folder, level)
        told.send(("end", level))


def looker(kind: str, folder: Path, stop: Event, told: Connection) -> None:
    """Read as fast as possible; tell how often, and everything that was wrong."""
    seen, torn = 0, []
    while not stop.is_set():
        before = _newest(kind, folder)
        try:
            ARTEFACTS[kind].level(folder)
            seen += 1
        except AssertionError as error:
            torn.append(repr(error))  # it was read, and is not whole
        except Exception as error:
            if before is not None and _newest(kind, folder) == before:
                torn.append(repr(error))  # it was refused, and not because it had been replaced
    told.send((seen, torn))


def _newest(kind: str, folder: Path) -> tuple[str, int, int] | None:
    """Which folder is visible: inodes are used again, but not at the same moment."""
    found = sorted(folder.glob(ARTEFACTS[kind].visible))
    try:
        about = found[-1].stat() if found else None
    except FileNotFoundError:
        return None
    return about and (found[-1].name, about.st_ino, about.st_ctime_ns)


def hidden(folder: Path) -> tuple[str, int]:
    """What a killed writer left unseen: its phase, and how many bytes it had written."""
    files = [p for p in folder.rglob("*") if p.is_file() and _is_hidden(p, folder)]
    num_bytes = sum(p.stat().st_size for p in files)
    building = list(folder.glob(".*building-*"))
    if any(p.name.endswith(".old") or ".old-" in p.name for p in folder.glob(".*")):
        return "the old one goes", num_bytes
    if not building:
        return "between two", num_bytes
    names = {p.name for p in files}
    if MANIFEST in names:
        return "sealed, not yet in place", num_bytes
    if any(name.startswith(f".{MANIFEST}") for name in names):
        return "in the manifest", num_bytes
    return "in the files", num_bytes


def _is_hidden(path: Path, folder: Path) -> bool:
    return path.relative_to(folder).parts[0].startswith(".")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that writers write into, with learners for bundles beside it."""
    write_learners(tmp_path)
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def looking(place: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[], list[str]]]:
    """A reader beside the writers; call to end it and get what it saw that was not whole."""
    stop, (ours, theirs) = _FORKS.Event(), _FORKS.Pipe()
    kind = request.getfixturevalue("kind")
    reader = _FORKS.Process(target=looker, args=(kind, place, stop, theirs))
    reader.start()

    def end() -> list[str]:
        stop.set()
        assert ours.poll(60), "the reader died"
        seen, torn = ours.recv()
        assert seen > 0, "the reader never read anything"
        return list(torn)

    yield end
    stop.set()
    reader.join(30)


def _start(kind: str, folder: Path, level: int) -> tuple[ForkServerProcess, Connection]:
    ours, theirs = _FORKS.Pipe()
    process = _FORKS.Process(target=writer, args=(kind, folder, level, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _drain(told: Connection, last: int) -> int:
    """The last level that was said to be finished before the pipe broke."""
    try:
        while True:
            what, level = told.recv()
            last = level if what == "end" else last
    except EOFError:
        return last


def _found(kind: str, folder: Path) -> int | None:
    """The visible level, whole; None if none is visible. Anything in between is an error."""
    if kind == "checkpoint":
        tidy_checkpoints(folder)
        assert not list(folder.glob("damaged-*")), "a visible checkpoint was damaged"
    return ARTEFACTS[kind].level(folder) if _newest(kind, folder) else None


@pytest.mark.parametrize("kind", ["bundle", "checkpoint", "store"])
def test_kills_while_a_folder_is_written(
    kind: str, place: Path, looking: Callable[[], list[str]], campaign: Callable[[str], Campaign]
) -> None:
    """Each kill comes at a random moment of a write; the next writer starts on what is left."""
    record = campaign(f"kill -9 while writing a {kind}")
    rng, phases, moments = random.Random(3), Counter[str](), []
    level = size = 0
    for _ in range(tries(30, 150)):
        process, told = _start(kind, place, level)
        begun = {}
        for _ in range(3):  # one undisturbed write tells how long one takes
            assert told.poll(60), "the writer died"
            begun[told.recv()] = time.perf_counter()
        duration = begun["end", level + 1] - begun["begin", level + 1]
        size = size or sum(
            p.stat().st_size for p in sorted(place.glob(ARTEFACTS[kind].visible))[-1].iterdir()
        )
        moments.append(rng.uniform(0, 1))
        time.sleep(moments[-1] * duration)
        start = time.perf_counter()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        finished = _drain(told, level + 1)
        phase, written = hidden(place)
        phases[phase] += 1
        found = _found(kind, place)
        newer = {n % 256 if kind == "store" else n for n in (finished, finished + 1)}
        whole = found in newer or (found is None and phase == "the old one goes")
        seconds = time.perf_counter() - start
        same = found is None or found in newer  # absent is no other bits
        record.add(Try(size * (finished - level) + written, whole, same, None, seconds))
        level = finished + 1  # a level in doubt is never written again: it would be there already
    record.notes |= {"phases": dict(phases), "spread": [round(m, 2) for m in sorted(moments)]}
    torn = looking()
    record.notes["partial_or_false"] = len(torn)
    assert not torn, torn[:5]
    assert len(phases) >= 2 and "in the files" in phases, phases
    ARTEFACTS[kind].write(place, level + 1)
    assert not list(place.glob(".*")), "what a killed writer left was not removed"


def _dies_at(kind: str, folder: Path, operation: int) -> None:
    """Write one level, and be killed before the n-th operation on files."""
    done = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        if event in _OPERATIONS and any(str(folder) in str(a) for a in arguments):
            done += 1
            if done == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    ARTEFACTS[kind].write(folder, 1000)


_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}


@pytest.mark.parametrize("kind", sorted(ARTEFACTS))
def test_a_kill_before_every_single_operation_on_files(
    kind: str, place: Path, campaign: Callable[[str], Campaign]
) -> None:
    """Between any two of them: making the folder, each file, the manifest, each rename, removal."""
    record = campaign(f"kill -9 before each file operation of writing a {kind}")
    phases = Counter[str]()
    for level in (97, 98, 99):
        ARTEFACTS[kind].write(place, level)
    clean = place.with_name("clean")
    shutil.copytree(place, clean)
    for operation in range(2, 1000):  # the first one is at the very start and proves nothing
        process = _FORKS.Process(target=_dies_at, args=(kind, place, operation))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        phase, _ = hidden(place)
        phases[phase] += 1
        found = _found(kind, place)
        new = 1000 % 256 if kind == "store" else 1000
        whole = found in (99, new) or (found is None and phase == "the old one goes")
        record.add(Try(operation - 1, whole, found is None or found in (99, new)))
        ARTEFACTS[kind].write(place, 1001)  # the next writer is not in its way
        assert not list(place.glob(".*")), phase
        shutil.rmtree(place)
        shutil.copytree(clean, place)
    assert process.exitcode == 0, "a write has more operations than were tried"
    record.notes["phases"] = dict(phases)
    assert {"in the files", "in the manifest", "sealed, not yet in place"} <= set(phases), phases


@pytest.mark.parametrize("kind", sorted(ARTEFACTS))
def test_the_lookers_see_a_writer_that_does_not_hide_its_work(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: files written one after another where they are read is seen as torn."""
    ARTEFACTS[kind].write(place, 5)
    target = sorted(place.glob(ARTEFACTS[kind].visible))[-1]
    victim = max(
        (p for p in target.iterdir() if p.name != MANIFEST), key=lambda p: p.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(ArtefactError):
        ARTEFACTS[kind].level(place)
    assert read_json(target / MANIFEST)["files"], "the manifest still says that it is whole"
    if kind == "bundle":
        weights = safetensors.torch.load_file(place.parent / "learner-1" / WEIGHTS)
        assert all(bool((v == 1).all()) for v in weights.values())
