"""Steady traffic is seldom called drift, drifted traffic nearly always, by simulation and for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.algorithms.table import AlgorithmConfig
from pipeline.core.errors import ArtefactError
from pipeline.core.files import MANIFEST, new_folder, read_json, write_json
from pipeline.deploy.bundle import REFERENCE, Bundle, load_bundle, make_bundle
from pipeline.deploy.drift import (
    BINS,
    NUM_SIGNS,
    Counts,
    DriftRules,
    DriftTold,
    Reference,
    counts_of,
    drift_in,
    judge,
    nearest_shape,
    no_counts,
    signs_of,
    stability_index,
)
from pipeline.deploy.drift_reference import _spread, make_reference
from pipeline.deploy.serve.drift import Traffic
from pipeline.deploy.serve.learners import Kept, open_database
from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.serve.model import Version
from pipeline.deploy.serve.telling import predictions_of
from pipeline.domains.glyphs import GlyphsConfig
from pipeline.engine.learner import load_learner
from pipeline.evaluation.corruptions import corrupt
from pipeline.runtime.context import SINGLE
from pipeline.store.build import PreprocessConfig, build_store
from pipeline.store.reader import Store, open_store
from pipeline.tasks.frozen import FrozenEpisodes, read_episodes
from pipeline.tasks.plan import SampleTasksConfig, sample_tasks
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec
from pipeline.training.meta_train import run
from tests.distributed.small_run import make_job
from tests.unit.tiny_learner import save, tiny_learner

NOMINAL = 0.05
CHANCE_ALONE = DriftRules(
    false_alarms=NOMINAL, least_distance=0, least_index=0, least_queries=1, least_learners=10
)
"""Without the distance that a shift must have to matter: the limit is luck's."""
WAYS = 5


class Load(NamedTuple):
    """What kind of traffic."""

    learners: int
    queries: int
    """Of a learner, on average"""
    skew: float
    """Of that number: its variance over its squared mean"""


LOADS = [Load(60, 5, 1.0), Load(60, 30, 1.0), Load(150, 20, 2.0), Load(600, 8, 1.0)]


def signals(
    rng: np.random.Generator, classes_n: Any, learners_n: Any, shift: float
) -> npt.NDArray[np.float64]:
    """[2, n] of queries that have much in common with those of their class and their learner."""
    first = classes_n + learners_n + rng.standard_normal(len(classes_n)) + shift
    second = 0.6 * classes_n + 0.8 * learners_n + rng.standard_normal(len(classes_n)) + shift
    return np.stack([np.tanh(first / 3), 1 / (1 + np.exp(-second))])


def made_up_reference(rng: np.random.Generator, num_classes: int = 60) -> Reference:
    """Of 200 validation episodes over these classes."""
    of_class = 0.4 * rng.standard_normal(num_classes)
    classes_n = np.concatenate(
        [np.repeat(rng.choice(num_classes, WAYS, replace=False), 15) for _ in range(200)]
    )
    learners_n = np.repeat(0.4 * rng.standard_normal(200), WAYS * 15)
    found = signals(rng, of_class[classes_n], learners_n, 0.0)
    edges, shares, noise = _spread(found, classes_n)
    return Reference(
        split="val",
        episodes={},
        classes=num_classes,
        shapes=[(WAYS, 1)],
        edges=[edges.tolist()],
        shares=[shares.tolist()],
        noise=noise.tolist(),
    )


def made_up_counts(
    rng: np.random.Generator, reference: Reference, load: Load, shift: float = 0.0
) -> Counts:
    """Every learner has classes of its own that nobody has seen before."""
    sizes_L = 1 + rng.negative_binomial(
        1 / load.skew, 1 / (1 + load.queries * load.skew), load.learners
    )
    owner_n = np.repeat(np.arange(load.learners), sizes_L)
    of_class = 0.4 * rng.standard_normal((load.learners, WAYS))
    classes_n = of_class[owner_n, rng.integers(0, WAYS, len(owner_n))]
    learners_n = 0.4 * rng.standard_normal(load.learners)[owner_n]
    ranks_L2B = np.zeros((load.learners, 2, BINS), np.int64)
    for i, values in enumerate(signals(rng, classes_n, learners_n, shift)):
        places = np.searchsorted(np.array(reference.edges[0][i]), values, side="right")
        np.add.at(ranks_L2B[:, i], (owner_n, places), 1)
    return counted(rng, ranks_L2B)


def counted(rng: np.random.Generator, ranks_L2B: npt.NDArray[np.int64]) -> Counts:
    names = [str(one) for one in rng.integers(0, 2**60, len(ranks_L2B))]
    signed = np.einsum("lk,lsb->ksb", signs_of(names).astype(np.int64), ranks_L2B)
    ranks_2B = ranks_L2B.sum(axis=0)
    return Counts(ranks_2B[0].sum(keepdims=True), ranks_2B, signed)


def windows(load: Load, number: int) -> list[tuple[Reference, Counts]]:
    """Steady traffic, every fifth time against another reference."""
    found = []
    for i in range(number):
        rng = np.random.default_rng([load.learners, load.queries, i])
        if i % 5 == 0:
            reference = made_up_reference(rng)
        found.append((reference, made_up_counts(rng, reference, load)))
    return found


def share_of_drift(pairs: list[tuple[Reference, Counts]], rules: DriftRules) -> float:
    verdicts = [judge(reference, counts, rules, bundle="").verdict for reference, counts in pairs]
    assert not {"too_few", "unknown"} & set(verdicts), "or nothing would be tested"
    return verdicts.count("drift") / len(verdicts)


def test_steady_traffic_is_called_drift_in_the_nominal_share_at_most() -> None:
    """Over light, heavy and lopsided traffic; and limits that know less are wrong far more often."""
    shares, naive = [], []
    for load in LOADS:
        pairs = windows(load, 50)
        told = [judge(reference, counts, CHANCE_ALONE, bundle="") for reference, counts in pairs]
        assert {one.verdict for one in told} <= {"steady", "drift"}, "or nothing would be tested"
        shares.append(np.mean([one.verdict == "drift" for one in told]))
        independent = [largest(one) > 1.36 / np.sqrt(one.queries) for one in told]
        naive.append(np.mean(independent))
    assert np.mean(shares) <= NOMINAL and max(shares) <= 2 * NOMINAL, shares
    assert np.mean(naive) > 0.3, f"queries taken for independent of their learner: {naive}"
    silent = np.zeros((2 * BINS, 2 * BINS)).tolist()
    all_there_are = [(r.model_copy(update={"noise": silent}), c) for r, c in pairs]
    assert share_of_drift(all_there_are, CHANCE_ALONE) > 2 * NOMINAL, "of validation classes"


def largest(told: DriftTold) -> float:
    assert told.similarity is not None and told.confidence is not None
    return max(told.similarity.ks, told.confidence.ks)


@pytest.mark.parametrize("load", LOADS)
def test_the_default_rules_raise_hardly_a_false_alarm_and_find_a_shift(load: Load) -> None:
    pairs = windows(load, 30)
    assert share_of_drift(pairs, DriftRules(least_learners=20)) <= 0.02
    rng = np.random.default_rng(1)
    moved = [(r, made_up_counts(rng, r, load, shift=-0.7)) for r, _ in pairs]
    assert share_of_drift(moved, DriftRules(least_learners=20)) >= 0.9


def test_the_index_of_steady_traffic_hangs_on_how_much_there_is_and_so_does_its_limit() -> None:
    """The usual 0.2 is exceeded by next to nothing but luck; the limit is not."""
    rng = np.random.default_rng(3)
    reference = made_up_reference(rng, num_classes=400)
    found = {}
    for learners in (40, 1200):
        load = Load(learners, 1, 1.0)
        told = []
        for _ in range(25):
            counts = made_up_counts(rng, reference, load)
            one = judge(reference, counts, CHANCE_ALONE, bundle="").similarity
            assert one is not None
            told.append((one.psi, one.psi_limit))
        found[learners] = np.array(told)
    assert np.mean(found[40][:, 0] > 0.2) > 0.3, "by the rule of thumb"
    for told in found.values():
        assert np.mean(told[:, 0] > told[:, 1]) <= 0.05
    assert np.median(found[40][:, 1]) > 8 * np.median(found[1200][:, 1])


def test_the_index_counts_an_empty_bin_as_half_a_query() -> None:
    even = np.full(4, 0.25)
    assert stability_index(even, even, 100) == 0
    gone = np.array([0.0, 0.5, 0.25, 0.25])
    by_hand = (0.005 - 0.25) * np.log(0.005 / 0.25) + 0.25 * np.log(2)
    assert stability_index(gone, even, 100) == pytest.approx(by_hand)


def test_a_small_shift_is_certain_with_much_traffic_and_no_drift_all_the_same() -> None:
    rng = np.random.default_rng(4)
    reference = made_up_reference(rng, num_classes=2000)
    counts = made_up_counts(rng, reference, Load(4000, 10, 1.0), shift=-0.15)
    certain = judge(reference, counts, CHANCE_ALONE, bundle="")
    assert certain.verdict == "drift" and certain.similarity and certain.similarity.ks < 0.1
    assert judge(reference, counts, DriftRules(), bundle="").verdict == "steady"


def test_few_queries_and_few_learners_say_nothing() -> None:
    """However many queries one busy learner asks, it is one learner."""
    rng = np.random.default_rng(5)
    reference = made_up_reference(rng)
    ranks = np.ones((40, 2, BINS), np.int64)
    assert judge(reference, counted(rng, ranks), DriftRules(), bundle="").verdict == "steady"
    few = judge(reference, counted(rng, ranks[:, :, :]), DriftRules(least_queries=801), bundle="")
    assert few.verdict == "too_few" and "800 queries" in few.why
    ranks[0] *= 1000
    told = judge(reference, counted(rng, ranks), DriftRules(), bundle="")
    assert told.verdict == "too_few" and told.learners < 2 and told.queries > 20_000


@pytest.mark.parametrize("shares", [[1] * 200, [1] * 100 + [20] * 10, [50, *[1] * 50]])
def test_how_many_learners_there_are_is_known_without_keeping_any(shares: list[int]) -> None:
    """Also where each of them is counted by several replicas, on several days."""
    truth = sum(shares) ** 2 / sum(one**2 for one in shares)
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        names = [f"{seed}-{i}" for i in range(len(shares))]
        parts = []
        for _ in range(3):
            total = np.zeros((NUM_SIGNS, 2, BINS), np.int64)
            ranks = np.zeros((2, BINS), np.int64)
            for name, size in zip(names, shares, strict=True):
                own = np.stack([np.bincount(rng.integers(0, BINS, size), minlength=BINS)] * 2)
                total += signs_of([name])[0].astype(np.int64)[:, None, None] * own
                ranks += own
            parts.append(Counts(ranks[0].sum(keepdims=True), ranks, total))
        found.append((parts[0] + parts[1] + parts[2]).learners)
    assert np.mean(found) == pytest.approx(truth, rel=0.15)


def test_counts_come_back_from_their_text_and_others_are_refused() -> None:
    rng = np.random.default_rng(6)
    counts = counted(rng, rng.integers(0, 9, (30, 2, BINS)))
    again = counts_of(counts.text(), 1)
    for name, array in vars(counts).items():
        assert np.array_equal(vars(again)[name], array)
    broken = json.loads(counts.text())
    for text in (
        "{}",
        "[]",
        no_counts(2).text(),
        json.dumps({**broken, "ranks": broken["ranks"][:1]}),
        json.dumps({**broken, "signed": None}),
    ):
        with pytest.raises((ValueError, TypeError)):
            counts_of(text, 1)


def test_the_nearest_shape_goes_by_ratios() -> None:
    shapes = [(2, 1), (5, 1), (5, 5), (20, 1)]
    found = [nearest_shape(shapes, *one) for one in ((2, 1), (4, 1.1), (5, 4.0), (15, 1))]
    assert found == [0, 1, 2, 3]
    assert [nearest_shape(shapes, *one) for one in ((20, 5), (10, 1), (5, 9))] == [None] * 3


# A real model of real pictures


class World(NamedTuple):
    store: Store
    folder: Path
    tasks: Path
    ids: list[int]
    """Validation classes with enough pictures"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Letters in two typeface families, and a small network that was trained on half of them."""
    root = tmp_path_factory.mktemp("glyphs")
    known = GlyphsConfig().packages
    packages = {name: known[name] for name in ("font-roboto", "font-lato")}
    glyphs = GlyphsConfig(packages=packages, val_share=0.5)
    config = PreprocessConfig(domain="glyphs", min_examples_per_class=10, glyphs=glyphs)
    build_store(config, root / "store", num_workers=1)
    store = open_store(root / "store")
    tasks = SampleTasksConfig(
        train=EpisodeSpec(ways=20, shots=1, queries=2),
        val=FrozenSpec(ways=[5, 20], shots=[1], queries=12, episodes=60),
        test=FrozenSpec(ways=[2], shots=[1], queries=2, episodes=2),
    )
    sample_tasks(tasks, store, root / "tasks")
    run(make_job(root, store, root / "tasks", num_steps=80, validate_every=40), SINGLE)
    ids = [one for one in store.class_ids("val") if store.classes[one].count >= 18]
    return World(store, root / "meta", root / "tasks", ids)


def validation(world: World, classes: npt.NDArray[Any], seed: int) -> dict[str, FrozenEpisodes]:
    """Frozen episodes of some of the validation classes alone."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, one in read_episodes(world.tasks, "val").items():
        support, query = one.support_rows.copy(), one.query_rows.copy()
        picked = np.stack(
            [rng.choice(classes, one.num_ways, replace=False) for _ in range(len(support))]
        )
        for e, label in np.ndindex(*picked.shape):
            rows = rows_of(world.store, picked[e, label], rng)
            (own,), asked = rows[:1], rows[1 : 1 + one.num_queries]
            support[e][one.support_labels[e] == label] = own
            query[e][one.query_labels[e] == label] = asked
        found[name] = replace(one, support_rows=support, query_rows=query, classes=picked)
    return found


def rows_of(store: Store, class_id: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    one = store.classes[class_id]
    return one.offset + rng.permutation(one.count)


def bundle_of(world: World, target: Path, episodes: dict[str, FrozenEpisodes]) -> Bundle:
    first = make_bundle(target, world.folder, {}, domain="glyphs", card="#")
    reference = make_reference(first, world.store, episodes)
    return make_bundle(target, world.folder, {}, domain="glyphs", card="#", reference=reference)


Change = Callable[[npt.NDArray[np.uint8], npt.NDArray[Any]], npt.NDArray[np.uint8]]


def serve(
    traffic: Traffic,
    version: Version,
    world: World,
    classes: npt.NDArray[Any],
    seed: int,
    change: Change,
    num_learners: int = 110,
) -> None:
    """Answer learners of many shapes, as the service does, and count."""
    rng = np.random.default_rng(seed)
    for number in range(num_learners):
        ways, shots = int(rng.integers(2, 13)), int(rng.integers(1, 7))
        own = [rows_of(world.store, one, rng) for one in rng.choice(classes, ways, replace=False)]
        support = np.concatenate([rows[:shots] for rows in own])
        rest = np.concatenate([rows[shots:] for rows in own])
        queries = rng.choice(rest, min(len(rest), 1 + rng.geometric(0.1)), replace=False)
        labels = np.repeat(np.arange(ways), shots).tolist()
        ready = version.learn(change(world.store.gather(support), support), labels, ways)
        answers = version.answer(ready, change(world.store.gather(queries), queries))
        kept = Kept("", "", None, "", None, "follow", version.ref, tuple(labels), None)
        told = predictions_of(kept, version, ready, answers)
        traffic.answered(version, f"{seed}-{number}", len(labels), told)


CHANGES: dict[str, Change] = {
    "inverted": lambda pictures, rows: 255 - pictures,
    "blurred": lambda pictures, rows: corrupt(pictures, rows, name="blur", severity=3, seed=0),
    "moved": lambda pictures, rows: corrupt(pictures, rows, name="shift", severity=2, seed=0),
}


def as_it_is(pictures: npt.NDArray[np.uint8], rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return pictures


def verdict(
    world: World, bundle: Bundle, classes: npt.NDArray[Any], folder: Path, seed: int, change: Change
) -> str:
    """Of traffic that a replica has counted and written."""
    database = folder / "traffic.db"
    engine = open_database(f"sqlite:///{database}")
    traffic = Traffic(engine, "replica")
    version = Version(ModelRef(name="glyphs", version=1, bundle=bundle.digest), bundle, 16)
    serve(traffic, version, world, classes, seed, change)
    traffic.write(at_once=True)
    told = drift_in(engine, bundle.digest, DriftRules())
    engine.dispose()
    database.unlink()
    return told.verdict


@pytest.mark.slow
def test_real_pictures_of_another_kind_are_found_and_other_letters_are_not(
    world: World, tmp_path: Path
) -> None:
    """Letters that neither training nor the reference knows are steady traffic; three worlds."""
    alarms, found = [], {name: list[str]() for name in CHANGES}
    for seed in range(3):
        ids = np.random.default_rng(seed).permutation(world.ids)
        known, new = ids[: len(ids) // 3], ids[len(ids) // 3 :]
        bundle = bundle_of(world, tmp_path / f"bundle-{seed}", validation(world, known, seed))

        for number in range(3):
            one = verdict(world, bundle, new, tmp_path, 100 * seed + number, as_it_is)
            alarms.append(one)
        for name, change in CHANGES.items():
            found[name] += [
                verdict(world, bundle, new, tmp_path, 100 * seed + number, change)
                for number in range(2)
            ]
    assert set(alarms) <= {"steady", "drift"} and alarms.count("drift") <= 1, alarms
    for name, verdicts in found.items():
        assert verdicts.count("drift") >= 0.9 * len(verdicts), (name, verdicts)


def test_the_shape_of_a_support_set_moves_both_signals_and_no_rank(world: World) -> None:
    """Why queries are ranked among those of a like-shaped support set."""
    first = make_bundle(world.folder.parent / "b", world.folder, {}, domain="glyphs", card="#")
    reference = make_reference(first, world.store, read_episodes(world.tasks, "val"))
    middle = {
        tuple(shape): [edges[BINS // 2 - 1] for edges in both]
        for shape, both in zip(reference.shapes, reference.edges, strict=True)
    }
    assert {(2, 1), (5, 1), (5, 5), (20, 1)} <= set(middle)
    assert middle[5, 5][0] > middle[5, 1][0], "more examples: one of them is nearer"
    assert middle[2, 1][1] > middle[20, 1][1] + 0.1, "fewer classes: the answer is surer"


def test_a_bundle_has_its_reference_and_the_same_learner_the_same_one(
    world: World, tmp_path: Path
) -> None:
    episodes = read_episodes(world.tasks, "val")
    first = bundle_of(world, tmp_path / "first", episodes)
    second = bundle_of(world, tmp_path / "second", episodes)
    assert first.digest == second.digest and first.reference == second.reference is not None
    assert first.reference.episodes == {name: one.digest for name, one in episodes.items()}
    without = make_bundle(tmp_path / "old", world.folder, {}, domain="glyphs", card="#")
    assert without.reference is None
    (first.folder / REFERENCE).unlink()
    with pytest.raises(ArtefactError):
        load_bundle(first.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"split": "test"},
        {"note": 1},
        {"shapes": []},
        {"edges": [[[0.0] * 5] * 2]},
        {"edges": [[list(np.linspace(1, 0, BINS - 1))] * 2]},
        {"shares": [[[1.0] * BINS] * 2]},
        {"noise": [[float("nan")] * 2 * BINS] * 2 * BINS},
        {"noise": "x"},
    ],
)
def test_what_is_no_reference_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    reference = made_up_reference(np.random.default_rng(0))
    learner = save(tmp_path / "learner", tiny_learner())
    target = tmp_path / "bundle"
    broken = reference.model_copy(update=change) if "note" not in change else reference
    told = {**json.loads(broken.model_dump_json(warnings=False)), **change}
    if "noise" in change and isinstance(change["noise"], list):
        told["noise"] = [["NaN"] * 2 * BINS] * 2 * BINS
    bundle = make_bundle(target, learner, {}, domain="toy", card="#", reference=reference)
    assert bundle.reference == reference
    header = {k: v for k, v in read_json(target / MANIFEST).items() if "format" in k or k == "kind"}
    with new_folder(tmp_path / "broken", **header) as folder:
        for path in target.iterdir():
            if path.name != MANIFEST:
                (folder / path.name).write_bytes(path.read_bytes())
        write_json(folder / REFERENCE, told)
    with pytest.raises(ArtefactError, match="sealed and yet no bundle"):
        load_bundle(tmp_path / "broken")


def test_test_episodes_shape_no_reference(world: World, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", world.folder, {}, domain="glyphs", card="#")
    with pytest.raises(ArtefactError, match="not with those of test"):
        make_reference(bundle, world.store, read_episodes(world.tasks, "test"))


def test_a_learner_that_embeds_by_its_support_set_has_a_reference_too(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """MAML: the frozen shapes alone."""

    plain = tiny_learner(shape=blob_store.image_shape)
    maml = AlgorithmConfig(name="maml").chosen()
    slow = plain.with_algorithm(maml)
    own = maml.init(slow.model.feature_dim, torch.Generator().manual_seed(0))
    save(tmp_path / "learner", replace(slow, params={**plain.params, **own}))
    bundle = make_bundle(tmp_path / "bundle", tmp_path / "learner", {}, domain="blobs", card="#")
    assert not Version(ModelRef(name="", version=None, bundle=""), bundle, 16).embeds_alone
    reference = make_reference(bundle, blob_store, read_episodes(blob_tasks, "val"))
    assert reference.shapes == [(4, 1)]
    assert load_learner(bundle.folder).name == "maml"
