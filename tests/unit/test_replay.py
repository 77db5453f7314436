"""Recordings of a gradient: on a CPU by a twin that computes again in place of a CUDA graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
import torch

from pipeline.algorithms.maml import MAML
from pipeline.core.types import Params, Task
from pipeline.engine.choice import example_group
from pipeline.engine.meta_gradient import Engine, GroupGradient, meta_gradient
from pipeline.engine.replay import Capture, Recording, Replayed
from pipeline.tasks.spec import EpisodeSpec
from tests.unit.test_engine import SHAPE, model_of

ALGORITHM = MAML(num_inner_steps=2)
MODEL, FEATURES = model_of(ALGORITHM.batch_norm)
PARAMS = {**FEATURES, **ALGORITHM.init(MODEL.feature_dim, torch.Generator().manual_seed(0))}
ENGINE = Engine(strategy="vmap")
CPU = torch.device("cpu")


def group(shots: int, seed: int = 0) -> list[Task]:
    """Two tasks, the same but for noise that depends on the seed."""
    tasks = example_group(EpisodeSpec(ways=3, shots=shots, queries=2), SHAPE, 2, CPU)
    return [t._replace(support_x=t.support_x + seed, query_x=t.query_x * (1 + seed)) for t in tasks]


def moved(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in PARAMS.items()}


class Twin:
    """Computes again and writes the result where the first one lies, as a graph does."""

    def __init__(self, spoil: float = 0.0) -> None:
        self.captures = self.replays = 0
        self._spoil = spoil

    def __call__(self, compute: Callable[[], GroupGradient]) -> Recording:
        self.captures += 1
        result = compute()

        def replay() -> None:
            self.replays += 1
            again = compute()
            for mine, theirs in zip(result, again, strict=True):
                for name, value in mine.items():
                    value.copy_(theirs[name] + self._spoil)

        return Recording(replay, result)


def call(
    replayed: Replayed, params: Params, tasks: Sequence[Task], engine: Engine = ENGINE
) -> GroupGradient:
    return replayed(ALGORITHM, MODEL, params, tasks, engine)


def plain(params: Params, tasks: Sequence[Task]) -> GroupGradient:
    return meta_gradient(ALGORITHM, MODEL, params, tasks, ENGINE)


def assert_same(found: GroupGradient, wanted: GroupGradient) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_replays_see_new_inputs_and_leave_earlier_results_alone() -> None:
    twin = Twin()
    replayed = Replayed(twin)
    inputs = [(moved(seed), group(1 + seed % 2, seed)) for seed in range(6)]
    found = [call(replayed, *each) for each in inputs]
    for one, each in zip(found, inputs, strict=True):
        assert_same(one, plain(*each))
    assert twin.captures == 2, "one for each shape"
    assert twin.replays == 6 + 2, "one more each, to compare"
    assert not torch.equal(found[0].metrics["loss"], found[2].metrics["loss"])


def test_other_engines_and_models_are_recorded_on_their_own() -> None:
    twin = Twin()
    replayed = Replayed(twin)
    tasks = group(1)
    call(replayed, PARAMS, tasks)
    call(replayed, PARAMS, tasks, Engine(strategy="loop"))
    other, _ = model_of("transductive")
    found = replayed(ALGORITHM, other, PARAMS, tasks, ENGINE)
    assert twin.captures == 3
    assert_same(found, meta_gradient(ALGORITHM, other, PARAMS, tasks, ENGINE))


def test_more_shapes_than_there_is_room_for_are_computed_as_they_come() -> None:
    twin = Twin()
    replayed = Replayed(twin)
    for shots in range(1, 11):
        tasks = group(shots)
        assert_same(call(replayed, PARAMS, tasks), plain(PARAMS, tasks))
    assert twin.captures == 8


def refusing(compute: Callable[[], GroupGradient]) -> Recording:
    raise RuntimeError("operation not permitted when stream is capturing\nand more lines")


@pytest.mark.parametrize(
    ("capture", "why"),
    [
        (refusing, "operation not permitted when stream is capturing"),
        (lambda compute: Recording(lambda: None, compute()), "its gradient is off by 1.0e+00"),
        (Twin(spoil=1.0), "its gradient is off by"),
        (Twin(spoil=float("nan")), "its gradient is off by nan"),
    ],
)
def test_a_recording_that_fails_or_errs_is_said_and_not_used(
    capture: Capture, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replayed = Replayed(capture)
    for shots in (1, 2, 1):
        tasks = group(shots)
        assert_same(call(replayed, PARAMS, tasks), plain(PARAMS, tasks))
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["cuda_graph"] == "not used"
    assert line["why"].startswith(why)
