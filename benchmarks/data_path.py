"""The way of the data alone, without any training: `python -m benchmarks.data_path`.

Index sampling; gathering against memcpy; the whole path (sample, gather, normalise, cut into
tasks); and, against stores of growing size (case 10), opening, sampling, the whole path and
training by it, with the memory that it takes. One core,
5-way 1-shot 15-query episodes of 28x28 grey pictures. Prints a table and writes
benchmarks/results/data_path.json. Contestants of a case take turns, round by round.

A store of 10^7 rows takes 8 GB of disk (and as much page cache, or it measures the disk) and some
two minutes: `--sizes 1000,10000` leaves it out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.record import this_machine
from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.config import Section
from pipeline.core.errors import MachineError
from pipeline.core.files import write_json
from pipeline.core.types import Task
from pipeline.engine.learner import Preprocessing
from pipeline.engine.meta_gradient import meta_gradient
from pipeline.runtime.logs import run_main
from pipeline.store.reader import Store, StoredClass, open_store
from pipeline.store.writer import StoreContent, write_store
from pipeline.tasks.sampler import TRAIN_STREAM, class_table, examples_needed, sample
from pipeline.tasks.spec import EpisodeSpec, bounds
from pipeline.tasks.stream import train_stream
from pipeline.training.episodes import HostEpisodes, episode_feed
from pipeline.training.feed import Feed
from pipeline.training.pictures import FromStore

RECORD = Path("benchmarks/results/data_path.json")
SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)
_SIDE, _EXAMPLES, _ROWS_PER_SHARD = 28, 20, 20_000
_EPISODE = EpisodeSpec(ways=5, shots=1, queries=15)
_ROWS = 5 * (1 + 15)
_OUT_OF_CACHE = 256 * 2**20
"""Bytes that no processor's cache holds."""
_GROUPS, _TASKS_PER_GROUP = 8, 4
_DRAWN_AT_ONCE = 256
_GROWTH_STEPS = 40
_CPU = torch.device("cpu")


class Row(Section):
    """One contestant in one case."""

    case: str
    engine: str
    peer: bool
    """What ours is compared with"""
    device: str = "cpu"
    dtype: str
    tasks_per_second: float
    """Episodes per second, median over rounds"""
    minimum: float
    maximum: float
    rounds: int
    bytes_per_second: float | None = None
    """Read plus written, where the case moves pictures unchanged"""
    store_rows: int | None = None
    open_seconds: float | None = None
    """To open the store; up to 1 GiB that verifies every byte"""
    verify_seconds: float | None = None
    """To verify every shard that was not yet, as the first meta-batches do"""
    open_bytes: int | None = None
    """Memory of its own that the process took to open it; a map of a file is none"""
    growth_bytes: int | None = None
    """The same, for some thousand episodes by the whole path after the first"""


class Effort(NamedTuple):
    """How long to measure."""

    rounds: int
    seconds: float
    """Of one round"""


Work = Callable[[], int]
"""Does some work and returns how many episodes that was."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_path", description=__doc__)
    parser.add_argument("--store", type=Path, help="for all but case 10; default: 10^6 rows")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="of case 10, in rows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one round")
    parser.add_argument("--out", type=Path, default=RECORD)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    effort = Effort(arguments.rounds, arguments.seconds)
    sizes = [int(size) for size in arguments.sizes.split(",") if size]
    with nullcontext(arguments.store) if arguments.store else synthetic_store(10**6) as folder:
        store = open_store(folder)
        rows = sampling(store, effort) + gathering(store, effort) + whole_path(store, effort)
    rows += store_sizes(sizes, effort)
    for row in rows:
        if row.open_seconds is not None and row.case.startswith("store size, sampling"):
            print(
                f"{row.store_rows:>12,} rows: open {row.open_seconds:.3f} s, "
                f"{(row.open_bytes or 0) / 1e6:.0f} MB; verify all {row.verify_seconds:.2f} s; "
                f"growth {(row.growth_bytes or 0) / 1e6:.1f} MB"
            )
    for row in rows:
        moved = f"{row.bytes_per_second / 1e9:8.2f} GB/s" if row.bytes_per_second else ""
        rate = f"{row.tasks_per_second:>12,.0f} ({row.minimum:,.0f} to {row.maximum:,.0f})"
        print(f"{row.case:46} {row.engine:26} {rate:36} {moved}")
    machine = this_machine("cpu").name
    document = {"machine": machine, "rows": [row.model_dump(mode="json") for row in rows]}
    write_json(arguments.out, document)


def sampling(store: Store, effort: Effort) -> list[Row]:
    """Episodes as row numbers, 256 at a time."""
    rows = []
    for ways in (5, 20):
        contestants = {"metaloom": _sampler(store, _EPISODE.model_copy(update={"ways": ways}))}
        rows += _contest(f"sampling {ways}w1s15q", contestants, effort, dtype="int64")
    return rows


def _sampler(store: Store, spec: EpisodeSpec) -> Work:
    table = class_table(store, "train", min_examples=examples_needed(spec))
    ways, shots = bounds(spec.ways)[0], bounds(spec.shots)[0]
    first = itertools.count(step=_DRAWN_AT_ONCE)

    def work() -> int:
        indices = next(first) + np.arange(_DRAWN_AT_ONCE)
        sample(table, spec, ways=ways, shots=shots, seed=0, stream=TRAIN_STREAM, indices=indices)
        return _DRAWN_AT_ONCE

    return work


def gathering(store: Store, effort: Effort) -> list[Row]:
    """Pictures of some episodes at once, against memcpy of as many bytes from all over the store.

    memcpy runs twice: from memory to memory, and from memory to a target that stays in the cache.
    """
    rows = []
    for at_once in (1, 8, 32):
        num_bytes = at_once * _ROWS * math.prod(store.image_shape)
        contestants = {
            "metaloom": _gatherer(store, at_once),
            "memcpy": _copier(store, at_once, _OUT_OF_CACHE),
            "memcpy into the cache": _copier(store, at_once, num_bytes),
        }
        found = _contest(f"gathering 5w1s15q x {at_once}", contestants, effort, dtype="uint8")
        moved = 2 * num_bytes / at_once  # read and written, for each episode
        rows += [
            row.model_copy(update={"bytes_per_second": row.tasks_per_second * moved})
            for row in found
        ]
    return rows


def _gatherer(store: Store, at_once: int) -> Work:
    stream = train_stream(store, _EPISODE, seed=0, num_groups=1, tasks_per_group=at_once)
    num_calls = max(2, 2 * _OUT_OF_CACHE // (at_once * _ROWS * math.prod(store.image_shape)))
    drawn = stream.groups([(position, 0) for position in range(num_calls)])
    rows = itertools.cycle([np.concatenate([e.support_rows, e.query_rows], 1) for e in drawn])

    def work() -> int:
        store.gather(next(rows))
        return at_once

    return work


def _copier(store: Store, at_once: int, target_bytes: int) -> Work:
    """memcpy of so many rows that lie together, each time from elsewhere, to a target in turn."""
    count = at_once * _ROWS
    shards = [shard for shard in store._images if len(shard) >= count]
    num_bytes = count * math.prod(store.image_shape)
    target = np.zeros((target_bytes // num_bytes, count, *store.image_shape), np.uint8)
    rng, sources = np.random.default_rng(0), []
    for _ in range(2 * _OUT_OF_CACHE // num_bytes):
        shard = shards[rng.integers(len(shards))]
        place = rng.integers(len(shard) - count + 1)
        sources.append(shard[place : place + count])
    endless = zip(itertools.cycle(target), itertools.cycle(sources), strict=False)

    def work() -> int:
        into, source = next(endless)
        np.copyto(into, source)
        return at_once

    return work


def whole_path(store: Store, effort: Effort) -> list[Row]:
    """Sample, gather, normalise, cut into tasks: all that a worker does to get its tasks."""
    return _contest("whole path 5w1s15q", {"metaloom": _feeder(store)}, effort, dtype="fp32")


def _feeder(store: Store) -> Work:
    feed, positions = _feed(store), itertools.count()

    def work() -> int:
        position = next(positions)
        return sum(len(feed.take(position, group)) for group in feed.groups)

    return work


def _feed(store: Store) -> Feed[HostEpisodes, list[Task]]:
    stream = train_stream(
        store, _EPISODE, seed=0, num_groups=_GROUPS, tasks_per_group=_TASKS_PER_GROUP
    )
    scaling = Preprocessing(image_shape=store.image_shape, mean=store.mean, std=store.std)
    return episode_feed(stream, FromStore(store), scaling, range(_GROUPS), _CPU, ahead=0)


def store_sizes(sizes: Sequence[int], effort: Effort) -> list[Row]:
    """The whole path, and training by it, against stores of growing size: all open, in turn."""
    with ExitStack() as stack:
        stores, known = [], []
        for size in sizes:
            store, facts = _opened(stack.enter_context(synthetic_store(size)))
            stores.append(store)
            known.append({"store_rows": size, **facts})
        rows = []
        for case, work in (
            ("store size, sampling 5w1s15q", _episode_sampler),
            ("store size, whole path 5w1s15q", _feeder),
            ("store size, training ProtoNet Conv4-64 5w1s15q", _trainer),
        ):
            named = zip(sizes, stores, strict=True)
            contestants = {f"metaloom, {size:,} rows": work(store) for size, store in named}
            found = _contest(case, contestants, effort, dtype="fp32")
            facts = zip(found, known, strict=True)
            rows += [row.model_copy(update=about) for row, about in facts]
    return rows


def _opened(folder: Path) -> tuple[Store, dict[str, float]]:
    """Open a store; what that took in time and memory, and what using it does."""
    gc.collect()
    memory, start = _own_memory(), time.perf_counter()
    store = open_store(folder)
    opening, opened = time.perf_counter() - start, _own_memory()
    start = time.perf_counter()
    store.gather(np.arange(0, store.num_rows, _ROWS_PER_SHARD))
    verifying = time.perf_counter() - start
    work = _feeder(store)
    _rate(work, 0.2)
    before = _own_memory()
    for _ in range(_GROWTH_STEPS):
        work()
    facts = {"open_seconds": opening, "verify_seconds": verifying, "open_bytes": opened - memory}
    return store, {**facts, "growth_bytes": _own_memory() - before}


def _own_memory() -> int:
    """Bytes of this process that are no map of a file."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def _episode_sampler(store: Store) -> Work:
    return _sampler(store, _EPISODE)


def _trainer(store: Store) -> Work:
    algorithm = ProtoNet()
    spec = BackboneSpec(name="conv4", settings={"width": 64}, image_shape=store.image_shape)
    model, params = build_model(spec, algorithm.batch_norm), init_params(spec, 0)
    feed = _feed(store)
    keys = ((position, group) for position in itertools.count() for group in feed.groups)

    def work() -> int:
        tasks = feed.take(*next(keys))
        meta_gradient(algorithm, model, params, tasks)
        return len(tasks)

    return work


def _contest(case: str, contestants: Mapping[str, Work], effort: Effort, dtype: str) -> list[Row]:
    """Rounds of all contestants in turn; the first round warms up and is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(1 + effort.rounds):
        for name, work in contestants.items():
            rates[name].append(_rate(work, effort.seconds))
    return [
        Row(
            case=case,
            engine=name,
            peer=not name.startswith("metaloom"),
            dtype=dtype,
            tasks_per_second=statistics.median(found[1:]),
            minimum=min(found[1:]),
            maximum=max(found[1:]),
            rounds=effort.rounds,
        )
        for name, found in rates.items()
    ]


def _rate(work: Work, seconds: float) -> float:
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        done += work()
    return done / spent


@contextmanager
def synthetic_store(num_rows: int) -> Iterator[Path]:
    """A store of random 28x28 pictures in a temporary folder; 20 of them make a class.

    Raises:
        MachineError: the disk has no room for it.
    """
    picture = _SIDE * _SIDE
    with tempfile.TemporaryDirectory(prefix="metaloom-data-path-") as name:
        free, need = shutil.disk_usage(name).free, 2 * num_rows * picture
        if free < need:
            raise MachineError(
                f"a store of {num_rows:,} rows needs {need / 1e9:.0f} GB in {name}, there are "
                f"{free / 1e9:.0f}. Set TMPDIR to a larger disk, or leave it out with --sizes."
            )
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (min(num_rows, _ROWS_PER_SHARD), 1, _SIDE, _SIDE), np.uint8)
        classes = tuple(
            StoredClass(f"class {first}", "all", "train", first, _EXAMPLES)
            for first in range(0, num_rows, _EXAMPLES)
        )
        order = np.arange(num_rows) % len(pixels)
        content = StoreContent("synthetic", classes, pixels, order, [""] * num_rows)
        write_store(Path(name) / "store", content, rows_per_shard=_ROWS_PER_SHARD, report={})
        yield Path(name) / "store"


if __name__ == "__main__":
    run_main(main)
