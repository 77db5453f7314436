"""The feed brings what a direct computation gives: in any order, with and without its thread."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import ArtefactError, TaskError, TrainingError
from pipeline.core.types import Task
from pipeline.engine.learner import Preprocessing
from pipeline.runtime.collectives import share
from pipeline.runtime.context import SINGLE
from pipeline.store.reader import Store
from pipeline.tasks.sampler import TRAIN_STREAM, Episodes, class_table, examples_needed, sample
from pipeline.tasks.spec import EpisodeSpec
from pipeline.tasks.stream import TrainStream, train_stream
from pipeline.training import feed as feed_module
from pipeline.training.episodes import HostEpisodes, blocks, episode_feed, num_ahead
from pipeline.training.feed import Feed, Key
from pipeline.training.pictures import (
    FromStore,
    OnDevice,
    Pictures,
    resident_pictures,
    to_device,
    training_pictures,
)
from pipeline.training.pretrain import PretrainConfig, initial_learner
from pipeline.training.programs import Supervised
from tests.conftest import REPOSITORY
from tests.unit.test_loop_guards import Quadratic, train

CPU = torch.device("cpu")
NUM_GROUPS = 6
SPEC = EpisodeSpec(ways=[2, 4], shots=[1, 3], queries=3)
aheads = st.sampled_from([0, 1, 2, 7])


def stream_of(store: Store, seed: int = 5) -> TrainStream:
    return train_stream(store, SPEC, seed=seed, num_groups=NUM_GROUPS, tasks_per_group=2)


def scaling_of(store: Store) -> Preprocessing:
    return Preprocessing(image_shape=store.image_shape, mean=store.mean, std=store.std)


def feed_of(
    store: Store, groups: range, ahead: int, source: Pictures | None = None
) -> Feed[HostEpisodes, list[Task]]:
    source = source or FromStore(store)
    return episode_feed(stream_of(store), source, scaling_of(store), groups, CPU, ahead=ahead)


def directly(store: Store, position: int, group: int) -> list[Task]:
    """One group's tasks, straight from the sampler and the mapped shards, one task at a time."""
    stream = stream_of(store)
    ways, shots = stream.shape(position, group)
    first = (position * NUM_GROUPS + group) * stream.tasks_per_group
    table = class_table(store, "train", min_examples=examples_needed(SPEC))
    everything, tasks = np.concatenate(store._images), []
    for index in range(first, first + stream.tasks_per_group):
        one = sample(
            table, SPEC, ways=ways, shots=shots, seed=5, stream=TRAIN_STREAM,
            indices=np.array([index]),
        )  # fmt: skip
        support, query = (
            scaling_of(store)(everything[rows[0]]) for rows in (one.support_rows, one.query_rows)
        )
        labels = [torch.tensor(y[0].tolist()) for y in (one.support_labels, one.query_labels)]
        tasks.append(Task(support, labels[0], query, labels[1], ways))
    return tasks


def same(found: list[Task], expected: list[Task]) -> bool:
    return len(found) == len(expected) and all(
        a.num_ways == b.num_ways
        and all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
        for a, b in zip(found, expected, strict=True)
    )


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


@settings(deadline=None, max_examples=25)
@given(
    start=st.integers(0, 10**9),
    world=st.integers(1, NUM_GROUPS),
    rank=st.integers(0, NUM_GROUPS - 1),
    ahead=aheads,
    resident=st.booleans(),
)
def test_every_worker_of_every_world_gets_what_a_direct_computation_gives(
    blob_store: Store, start: int, world: int, rank: int, ahead: int, resident: bool
) -> None:
    groups = share(NUM_GROUPS, rank % world, world)
    source = resident_pictures(blob_store, CPU) if resident else None
    with feed_of(blob_store, groups, ahead, source) as feed:
        for position in (start, start + 1, start + 2):
            for group in groups:
                found = feed.take(position, group)
                assert same(found, directly(blob_store, position, group))
    assert not feed_threads()


def test_a_hundred_thousand_episodes_come_in_one_order_however_the_world_changes(
    blob_store: Store,
) -> None:
    """A world of another size, 1 to 16, at every restart; against one call that draws them all."""
    spec = EpisodeSpec(ways=3, shots=1, queries=2)
    stream = train_stream(blob_store, spec, seed=5, num_groups=16, tasks_per_group=25)
    positions, rng, found, sizes = 250, random.Random(3), list[Episodes](), set[int]()

    def load(keys: Iterator[Key]) -> Iterator[Episodes]:
        for block in blocks(keys):
            yield from stream.groups(block)

    start = 0
    while start < positions:
        world, end = rng.randint(1, 16), min(positions, start + rng.randint(1, 8))
        sizes.add(world)
        owned = [share(16, rank, world) for rank in range(world)]
        feeds = [Feed(load, lambda drawn: drawn, groups, ahead=0) for groups in owned]
        for position in range(start, end):
            for feed in feeds:
                found.extend(feed.take(position, group) for group in feed.groups)
        start = end
    assert sizes >= {1, 2, 3, 4, 16}
    expected = sample(
        stream.table, spec, ways=3, shots=1, seed=5, stream=TRAIN_STREAM,
        indices=np.arange(100_000),
    )  # fmt: skip
    for drawn, wanted in zip(zip(*found, strict=True), expected, strict=True):
        assert np.array_equal(np.concatenate(drawn), wanted)


def test_the_comparison_can_fail(blob_store: Store) -> None:
    assert same(directly(blob_store, 3, 1), directly(blob_store, 3, 1))
    assert not same(directly(blob_store, 3, 1), directly(blob_store, 3, 2))


def test_labels_of_a_group_are_not_shared_between_tasks(blob_store: Store) -> None:
    with feed_of(blob_store, range(NUM_GROUPS), 0) as feed:
        first, second = feed.take(0, 0)
        first.query_y.add_(1)
        assert same([second], directly(blob_store, 0, 0)[1:])


@settings(deadline=None)
@given(keys=st.lists(st.tuples(st.integers(0, 5), st.integers(0, NUM_GROUPS - 1)), max_size=12))
def test_groups_drawn_together_are_those_drawn_alone(
    blob_store: Store, keys: list[tuple[int, int]]
) -> None:
    stream = stream_of(blob_store)
    for key, together in zip(keys, stream.groups(keys), strict=True):
        alone = stream.group(*key)
        assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def echo(ahead: int, groups: range = range(2, 5)) -> Feed[Key, Key]:
    return Feed(lambda keys: keys, lambda key: key, groups, ahead=ahead)


@settings(deadline=None)
@given(
    jumps=st.lists(
        st.tuples(st.integers(0, 99), st.integers(2, 4), st.integers(1, 9)), min_size=1, max_size=6
    ),
    ahead=aheads,
)
def test_wherever_it_is_asked_it_goes_on_from_there(
    jumps: list[tuple[int, int, int]], ahead: int
) -> None:
    """Rollbacks, skips and resumed runs are jumps; between them the order is the worker's own."""
    with echo(ahead) as feed:
        for position, group, count in jumps:
            for place in range(3 * position + group - 2, 3 * position + group - 2 + count):
                key = (place // 3, 2 + place % 3)
                assert feed.take(*key) == key
        assert len(feed_threads()) == (ahead > 0)
    assert not feed_threads()


def test_a_group_of_another_worker_is_refused() -> None:
    with echo(2) as feed, pytest.raises(ValueError, match="5 is not in range"):
        feed.take(0, 5)


@pytest.mark.parametrize("ahead", [1, 3])
def test_the_thread_loads_as_far_ahead_as_it_may_and_no_farther(ahead: int) -> None:
    loaded: list[Key] = []

    def load(keys: Iterator[Key]) -> Iterator[Key]:
        for key in keys:
            loaded.append(key)
            yield key

    with Feed(load, lambda key: key, range(2), ahead=ahead) as feed:
        assert not feed_threads()
        for taken in range(1, 6):
            feed.take(*divmod(taken - 1, 2))
            deadline = time.monotonic() + 20
            while len(loaded) < taken + ahead and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert loaded == [divmod(i, 2) for i in range(taken + ahead)]


def refusing(at: Key, error: Exception, ahead: int) -> Feed[Key, Key]:
    def load(keys: Iterator[Key]) -> Iterator[Key]:
        for key in keys:
            if key == at:
                raise error
            yield key

    return Feed(load, lambda key: key, range(3), ahead=ahead)


@pytest.mark.parametrize("ahead", [0, 1, 8])
def test_an_error_is_raised_whole_where_the_batch_would_have_come(ahead: int) -> None:
    error = TaskError("the class ran out of examples")
    with refusing((1, 1), error, ahead) as feed:
        for key in [(0, 0), (0, 1), (0, 2), (1, 0)]:
            assert feed.take(*key) == key
        for _ in range(2):  # asked again, it is met again
            with pytest.raises(TaskError) as caught:
                feed.take(1, 1)
            assert caught.value is error
            assert "raise error" in "".join(traceback.format_exception(caught.value))
            assert not feed_threads()
        assert feed.take(2, 0) == (2, 0)
    assert not feed_threads()


@pytest.mark.parametrize("ahead", [0, 3])
def test_training_ends_the_thread_also_when_it_fails(tmp_path: Path, ahead: int) -> None:
    poisoned = Quadratic({(33, 1): float("nan")}, ahead=ahead)
    with pytest.raises(TrainingError, match="non-finite"):
        train(tmp_path / "a", poisoned)
    assert not feed_threads()
    resumed = train(tmp_path / "a", replace(poisoned, scales={}))
    straight = train(tmp_path / "b", Quadratic())
    assert torch.equal(resumed.vector, straight.vector)
    assert resumed.progress == straight.progress
    assert not feed_threads()


def test_a_rollback_is_the_same_with_a_thread(tmp_path: Path) -> None:
    """Noise makes every position's gradient its own, so a batch of a wrong one would show."""
    program = Quadratic({(43, 1): 1e5}, noise=0.3)
    inline = train(tmp_path / "a", program)
    background = train(tmp_path / "b", replace(program, ahead=5))
    assert inline.progress.skipped == [[43, 1]]
    assert torch.equal(inline.vector, background.vector)
    assert inline.progress == background.progress


def test_close_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_CLOSE_SECONDS", 0.05)
    stuck, release = threading.Event(), threading.Event()

    def load(keys: Iterator[Key]) -> Iterator[Key]:
        yield next(keys)
        stuck.set()
        release.wait()
        yield next(keys)

    with Feed(load, lambda key: key, range(1), ahead=1) as feed:
        feed.take(0, 0)
        assert stuck.wait(20)
    (thread,) = feed_threads()
    assert thread.daemon
    release.set()
    thread.join(20)
    assert not thread.is_alive()


HUNG = """
import threading
from pipeline.training.feed import Feed
hangs = threading.Event()
def load(keys):
    yield next(keys)
    hangs.set()
    threading.Event().wait()
feed = Feed(load, lambda key: key, range(1), ahead=2)
feed.take(0, 0)
print(hangs.wait(60))
"""


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUNG], cwd=REPOSITORY, timeout=60, capture_output=True, check=True
    )
    assert done.stdout == b"True\n"


def test_only_training_rows_are_resident(blob_store: Store) -> None:
    num_training = sum(c.count for c in blob_store.classes if c.split == "train")
    source = resident_pictures(blob_store, CPU)
    rows = np.arange(num_training).reshape(2, -1)
    assert source.resident.dtype == torch.uint8
    assert len(source.resident) == num_training
    everything = np.concatenate(blob_store._images)
    assert np.array_equal(source.pictures(source.fetch(rows)).numpy(), everything[rows])
    with pytest.raises(ValueError, match="not of the training split"):
        source.fetch(np.array([num_training]))
    with pytest.raises(ArtefactError, match="row -1 was asked for"):
        source.fetch(np.array([-1]))


def test_a_cpu_reads_the_mapped_store_without_a_thread(blob_store: Store) -> None:
    assert isinstance(training_pictures(blob_store, CPU), FromStore)
    assert num_ahead(range(8), CPU) == 0
    assert num_ahead(range(8), torch.device("cuda")) == 8


@pytest.mark.parametrize("ahead", [0, 3])
def test_supervised_examples_are_those_of_their_own_positions(
    blob_store: Store, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is drawn together: a group's examples are the same, and labelled by their class."""
    monkeypatch.setattr("pipeline.training.programs.num_ahead", lambda groups, device: ahead)
    spec = PretrainConfig().backbone("mlp", blob_store.image_shape)
    learner = initial_learner(spec, blob_store, 0, SINGLE)
    program = Supervised(learner, blob_store, 3, NUM_GROUPS, 16, SINGLE)
    everything = scaling_of(blob_store)(np.concatenate(blob_store._images))
    classes = torch.from_numpy(blob_store.labels())
    with program.feed(range(NUM_GROUPS)) as feed, program.feed(range(2, 4)) as other:
        inputs, labels = feed.take(7, 2)
        for again in (other.take(7, 2), (feed.take(0, 0), feed.take(7, 2))[1]):
            assert torch.equal(again.inputs, inputs) and torch.equal(again.labels, labels)
        next_inputs, next_labels = feed.take(7, 3)
        assert not torch.equal(next_inputs, inputs)
        for x, y in zip(torch.cat([inputs, next_inputs]), [*labels, *next_labels], strict=True):
            matches = (everything == x).flatten(1).all(1).nonzero().flatten()
            assert classes[matches].tolist() == [int(y)] * len(matches) and len(matches) > 0


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("resident", [False, True])
def test_a_gpu_gets_the_same_tasks_without_being_waited_for(
    blob_store: Store, resident: bool
) -> None:
    device = torch.device("cuda", 0)
    source = training_pictures(blob_store, device) if resident else FromStore(blob_store)
    assert isinstance(source, OnDevice if resident else FromStore)
    rows = np.arange(60).reshape(3, 20)
    pictures = source.pictures(to_device(source.fetch(rows), device))
    assert np.array_equal(pictures.cpu().numpy(), np.concatenate(blob_store._images)[rows])
    stream, scaling = stream_of(blob_store), scaling_of(blob_store)
    with episode_feed(stream, source, scaling, range(NUM_GROUPS), device, ahead=4) as feed:
        feed.take(0, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [feed.take(0, group) for group in range(1, NUM_GROUPS)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for group, tasks in enumerate(found, start=1):
            for task, expected in zip(tasks, directly(blob_store, 0, group), strict=True):
                torch.testing.assert_close(task.support_x.cpu(), expected.support_x)
                torch.testing.assert_close(task.query_x.cpu(), expected.query_x)
                assert torch.equal(task.query_y.cpu(), expected.query_y)
