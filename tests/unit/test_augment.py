"""Moved pictures: those of a plain second implementation, whoever computes them and in what order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.algorithms.table import AlgorithmConfig
from pipeline.core.errors import ConfigError
from pipeline.core.files import read_json
from pipeline.core.seeding import random_words
from pipeline.core.types import Task
from pipeline.engine.meta_gradient import Engine
from pipeline.engine.runner import Runner
from pipeline.runtime.collectives import share
from pipeline.runtime.context import SINGLE
from pipeline.store.reader import Store
from pipeline.tasks import sampler
from pipeline.training import meta_train, pretrain, programs
from pipeline.training.augment import (
    EPISODE_MOVES,
    EXAMPLE_MOVES,
    OFF,
    AugmentConfig,
    draw_moves,
    moved,
)
from pipeline.training.episodes import episode_feed
from pipeline.training.meta_train import MetaTrainConfig, MetaTrainJob
from pipeline.training.pictures import FromStore, resident_pictures, to_device
from pipeline.training.pretrain import PretrainConfig, PretrainJob, initial_learner
from pipeline.training.programs import MetaTraining, Supervised
from tests.distributed.small_run import digest, make_job
from tests.unit.test_feed import CPU, NUM_GROUPS, aheads, directly, same, scaling_of, stream_of

BOTH = AugmentConfig(max_shift=3, flip=True)
configs = st.one_of(
    st.builds(AugmentConfig, max_shift=st.integers(1, 5), flip=st.booleans()),
    st.just(AugmentConfig(flip=True)),
)


def move_of(config: AugmentConfig, seed: int, stream: int, index: int, place: int) -> list[int]:
    """One picture's move in Python's integers: digits of a word in a mixed base, highest first."""
    word = int(random_words(seed, stream, np.array([index]), place + 1)[0, place])
    bases, move = [2 * config.max_shift + 1] * 2 + [1 + config.flip], []
    for base in bases:
        digit, word = divmod(word * base, 2**32)
        move.append(digit)
    return [move[0] - config.max_shift, move[1] - config.max_shift, move[2]]


def moved_plainly(picture: np.ndarray[Any, Any], move: list[int]) -> np.ndarray[Any, Any]:
    """One picture [C, H, W]: mirrored, its border repeated, and a window cut out of that."""
    down, right, mirrored = move
    _, height, width = picture.shape
    most = max(abs(down), abs(right))
    seen = picture[..., ::-1] if mirrored else picture
    wide = np.pad(seen, ((0, 0), (most, most), (most, most)), mode="edge")
    return wide[:, most - down : most - down + height, most - right : most - right + width].copy()


def moved_directly(store: Store, config: AugmentConfig, position: int, group: int) -> list[Task]:
    """A group's tasks without moves, moved picture by picture; scaling a pixel does not see where."""
    tasks = []
    for i, task in enumerate(directly(store, position, group)):
        index = (position * NUM_GROUPS + group) * 2 + i
        pictures = torch.cat([task.support_x, task.query_x]).numpy()
        whole = [
            torch.from_numpy(moved_plainly(x, move_of(config, 5, EPISODE_MOVES, index, place)))
            for place, x in enumerate(pictures)
        ]
        support, query = whole[: len(task.support_x)], whole[len(task.support_x) :]
        tasks.append(task._replace(support_x=torch.stack(support), query_x=torch.stack(query)))
    return tasks


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    leading=st.lists(st.integers(1, 3), max_size=2),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    most=st.integers(0, 9),
)
def test_pictures_move_as_by_mirror_pad_and_window(
    seed: int, leading: list[int], shape: tuple[int, int, int], most: int
) -> None:
    """Also farther than the picture is wide: then nothing but its border is left."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (*leading, *shape), dtype=np.uint8)
    moves = np.stack([
        rng.integers(-most, most, leading, endpoint=True),
        rng.integers(-most, most, leading, endpoint=True),
        rng.integers(0, 2, leading),
    ], axis=-1)  # fmt: skip
    before = pictures.copy()
    found = moved(torch.from_numpy(pictures), torch.from_numpy(moves)).numpy()
    assert found.dtype == np.uint8 and found.shape == pictures.shape
    flat = zip(pictures.reshape(-1, *shape), moves.reshape(-1, 3).tolist(), strict=True)
    for one, (picture, move) in zip(found.reshape(-1, *shape), flat, strict=True):
        assert np.array_equal(one, moved_plainly(picture, move))
    assert np.array_equal(pictures, before)


@settings(deadline=None)
@given(
    config=configs,
    seed=st.integers(0, 2**63 - 1),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    first=st.integers(0, 2**60),
)
def test_moves_are_digits_of_the_word_of_an_index_and_a_place(
    config: AugmentConfig, seed: int, sizes: list[int], first: int
) -> None:
    """Groups of any sizes that are drawn together are those drawn alone, one picture at a time."""
    indices = first + np.arange(2 * len(sizes)).reshape(-1, 2)
    together = draw_moves(config, seed=seed, stream=9, indices=indices, sizes=sizes)
    for moves, own, size in zip(together, indices, sizes, strict=True):
        assert moves is not None and moves.is_contiguous()
        assert moves.tolist() == [
            [move_of(config, seed, 9, int(index), place) for place in range(size)] for index in own
        ]


@pytest.mark.parametrize("config", [BOTH, AugmentConfig(max_shift=1), AugmentConfig(flip=True)])
def test_every_move_is_as_likely_as_any_other(config: AugmentConfig) -> None:
    """Counts of n draws lie within six deviations, sqrt(n p), of n p; no move is left out."""
    (moves,) = draw_moves(config, seed=1, stream=9, indices=[np.arange(4000)], sizes=[25])
    assert moves is not None
    shifts, coins = range(-config.max_shift, config.max_shift + 1), range(1 + config.flip)
    found, counts = moves.reshape(-1, 3).unique(dim=0, return_counts=True)
    assert found.tolist() == [
        [down, right, m] for down in shifts for right in shifts for m in coins
    ]
    expected = 100_000 / len(found)
    assert (counts - expected).abs().max() < 6 * expected**0.5


def test_off_draws_nothing_and_hands_on_what_it_gets() -> None:
    def indices() -> Iterator[Any]:
        raise AssertionError("nothing is to be drawn")
        yield

    assert draw_moves(OFF, seed=0, stream=9, indices=indices(), sizes=[3, 4]) == [None, None]
    pictures = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert moved(pictures, None) is pictures
    assert MetaTrainConfig().augment == PretrainConfig().augment == OFF


@settings(deadline=None, max_examples=25)
@given(
    config=configs,
    start=st.integers(0, 10**9),
    world=st.integers(1, NUM_GROUPS),
    rank=st.integers(0, NUM_GROUPS - 1),
    ahead=aheads,
    resident=st.booleans(),
)
def test_every_worker_of_every_world_gets_the_same_moved_pictures(
    blob_store: Store,
    config: AugmentConfig,
    start: int,
    world: int,
    rank: int,
    ahead: int,
    resident: bool,
) -> None:
    """From the store or from resident rows, and wherever the feed starts."""
    groups = share(NUM_GROUPS, rank % world, world)
    source = resident_pictures(blob_store, CPU) if resident else FromStore(blob_store)
    stream, scaling = stream_of(blob_store), scaling_of(blob_store)
    with episode_feed(stream, source, scaling, groups, CPU, ahead=ahead, augment=config) as feed:
        for position in (start, start + 1, start):
            for group in groups:
                expected = moved_directly(blob_store, config, position, group)
                assert same(feed.take(position, group), expected)


@pytest.mark.parametrize("config", [OFF, BOTH])
def test_meta_training_moves_support_and_query(blob_store: Store, config: AugmentConfig) -> None:
    spec = PretrainConfig().backbone("mlp", blob_store.image_shape)
    learner = initial_learner(spec, blob_store, 0, SINGLE)
    program = MetaTraining(
        learner, blob_store, stream_of(blob_store), SINGLE, Runner(Engine()), config
    )
    with program.feed(range(2, 4)) as feed:
        found, still = feed.take(6, 3), directly(blob_store, 6, 3)
    assert same(found, moved_directly(blob_store, config, 6, 3))
    for task, plain in zip(found, still, strict=True):
        assert torch.equal(task.support_x, plain.support_x) == (not config.on)
        assert torch.equal(task.query_x, plain.query_x) == (not config.on)


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("resident", [False, True])
def test_supervised_examples_move_by_their_own_indices(
    blob_store: Store, ahead: int, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "num_ahead", lambda groups, device: ahead)
    if resident:
        monkeypatch.setattr(programs, "training_pictures", resident_pictures)
    spec = PretrainConfig().backbone("mlp", blob_store.image_shape)
    learner = initial_learner(spec, blob_store, 0, SINGLE)
    still = Supervised(learner, blob_store, 3, NUM_GROUPS, 16, SINGLE)
    program = replace(still, augment=BOTH)
    with still.feed(range(NUM_GROUPS)) as plain, program.feed(range(2, 4)) as feed:
        for position, group in ((7, 2), (7, 3), (8, 2), (7, 3)):
            inputs, labels = plain.take(position, group)
            found = feed.take(position, group)
            first = (position * NUM_GROUPS + group) * 16
            expected = [
                moved_plainly(x, move_of(BOTH, 3, EXAMPLE_MOVES, first + i, 0))
                for i, x in enumerate(inputs.numpy())
            ]
            assert np.array_equal(found.inputs.numpy(), np.stack(expected))
            assert torch.equal(found.labels, labels)
            assert not torch.equal(found.inputs, inputs)


def test_no_two_uses_share_a_stream_of_random_words() -> None:
    streams = [
        sampler.TRAIN_STREAM, sampler.VAL_STREAM, sampler.TEST_STREAM, sampler.SHAPE_STREAM,
        programs._SUPERVISED_STREAM, EPISODE_MOVES, EXAMPLE_MOVES,
    ]  # fmt: skip
    assert len(set(streams)) == len(streams)


def meta_job(folder: Path, store: Store, tasks: Path, name: Any, max_shift: int) -> MetaTrainJob:
    algorithm, augment = AlgorithmConfig(name=name), AugmentConfig(max_shift=max_shift)
    return make_job(folder, store, tasks, algorithm=algorithm, augment=augment, num_steps=3)


def test_a_run_trains_on_moved_pictures_and_says_so(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    digests = []
    for name, most in (("off", 0), ("on", 2)):
        job = meta_job(tmp_path / name, blob_store, blob_tasks, "protonet", max_shift=most)
        meta_train.run(job, SINGLE)
        digests.append(digest(job)[0])
        origin = read_json(job.target / "learner.json")["origin"]
        assert origin["augment"] == {"max_shift": most, "flip": False}
    assert digests[0] != digests[1]


def test_validation_pictures_stay_as_they_are(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """A learner that is only validated has the same accuracy, whatever training pictures do."""
    accuracy = []
    for name, most in (("off", 0), ("on", 9)):
        job = meta_job(tmp_path / name, blob_store, blob_tasks, "nearest_centroid", max_shift=most)
        accuracy.append(meta_train.run(job, SINGLE)["val_accuracy"])
    assert accuracy[0] == accuracy[1]


def test_a_shift_as_large_as_the_picture_is_refused(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    AugmentConfig(max_shift=15).check_fits(blob_store.image_shape, where="here")
    AugmentConfig(max_shift=7).check_fits((1, 8, 20), where="here")
    with pytest.raises(ConfigError, match=r"here\.max_shift is 8, .* have 8 pixels .* below 8"):
        AugmentConfig(max_shift=8).check_fits((1, 20, 8), where="here")
    job = meta_job(tmp_path, blob_store, blob_tasks, "protonet", 16)
    with pytest.raises(ConfigError, match=r"meta_train\.augment\.max_shift is 16"):
        meta_train.run(job, SINGLE)
    config = PretrainConfig(candidates=["mlp"], augment=AugmentConfig(max_shift=16))
    places = {key: tmp_path / key for key in ("target", "checkpoints", "journal")}
    pretraining = PretrainJob(
        config=config, candidate="mlp", store=blob_store.folder, tasks=blob_tasks, **places
    )
    with pytest.raises(ConfigError, match=r"pretrain\.augment\.max_shift is 16"):
        pretrain.run(pretraining, SINGLE)


def test_pretraining_moves_its_pictures(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    weights = []
    for name, augment in (("off", OFF), ("on", BOTH)):
        config = PretrainConfig.model_validate({
            "candidates": ["mlp"], "augment": augment, "mlp": {"hidden": (8,)},
            "outer": {"num_steps": 3, "warmup_steps": 1},
        })  # fmt: skip
        places = {key: tmp_path / name / key for key in ("target", "checkpoints", "journal")}
        job = PretrainJob(
            config=config, candidate="mlp", store=blob_store.folder, tasks=blob_tasks, **places
        )
        pretrain.run(job, SINGLE)
        weights.append((job.target / "weights.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_it_is_no_backbone(blob_store: Store) -> None:
    with pytest.raises(ConfigError, match="no backbone 'augment'"):
        PretrainConfig(candidates=["augment"]).backbone("augment", blob_store.image_shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_moves_to_the_same_bits_without_being_waited_for(blob_store: Store) -> None:
    device = torch.device("cuda", 0)
    source = resident_pictures(blob_store, device)
    fetched = to_device(source.fetch(np.arange(60).reshape(3, 20)), device)
    (moves,) = draw_moves(BOTH, seed=1, stream=9, indices=[np.arange(3)], sizes=[20])
    torch.cuda.set_sync_debug_mode("error")
    torch.use_deterministic_algorithms(True)
    try:
        found = moved(source.pictures(fetched), moves)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_sync_debug_mode("default")
    here = resident_pictures(blob_store, CPU)
    assert torch.equal(found.cpu(), moved(here.pictures(fetched.cpu()), moves))
