"""A group's gradient recorded once for each shape, and replayed: one launch instead of thousands.

A gradient through an inner loop is some thousand small kernels, and a GPU finishes each before
Python has launched the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.algorithms.base import Algorithm
from pipeline.core.functional import Model
from pipeline.core.types import Params, Task
from pipeline.engine.memory import is_out_of_memory
from pipeline.engine.meta_gradient import Engine, GroupGradient, meta_gradient
from pipeline.runtime.logs import say

_MOST_SHAPES = 8  # each recording keeps its memory
_WARM_UP = 2  # libraries choose kernels and take workspaces in the first calls
_TOLERANCE = 1e-4

Compute = Callable[[Algorithm, Model, Params, Sequence[Task], Engine], GroupGradient]


class Recording(NamedTuple):
    """A computation whose inputs and result stay where they are."""

    replay: Callable[[], None]
    """Computes again, from what the inputs hold by now"""
    result: GroupGradient
    """Where it leaves the result"""


Capture = Callable[[Callable[[], GroupGradient]], Recording]


class CudaCapture:
    """Records the kernels of computations as CUDA graphs that share one pool of memory.

    They may share it because they run one after the other, on one stream, and what one leaves is
    copied before the next runs.

    References:
        PyTorch, CUDA semantics, "Whole-network capture" and "Graph memory management":
        https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """

    def __init__(self) -> None:
        self._pool: Any = None  # PyTorch has no public name for its type

    def __call__(self, compute: Callable[[], GroupGradient]) -> Recording:
        """Warm up and record.

        Raises:
            RuntimeError: it waits for the device, or does something else that no graph holds.
        """
        here, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                compute()
            with _refusing_to_wait():  # a capture that fails halfway leaves the allocator in it
                compute()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The outer one, because a capture that fails leaves its own stream current.
        with torch.cuda.stream(here), torch.cuda.graph(graph, pool=self._pool, stream=side):
            result = compute()
        self._pool = graph.pool()
        return Recording(graph.replay, result)


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def computed_by(engine: Engine) -> Compute:
    """`meta_gradient`, recorded and replayed where the engine says so."""
    return Replayed(CudaCapture()) if engine.cuda_graphs else meta_gradient


class _Held(NamedTuple):
    recording: Recording
    inputs: tuple[list[Tensor], list[Tensor]]
    model: Model
    """Kept so that its identity stays its own"""


class Replayed:
    """`meta_gradient` by recordings. The first call with a shape records, later ones replay.

    Inputs are copied to where the recording reads them and results from where it leaves them, so
    that callers own what they get. A recording that fails, or that gives other numbers than the
    computation itself, is not used: it is said, and all further groups are computed as they come.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._held: dict[object, _Held] = {}
        self._refused = False

    def __call__(
        self,
        algorithm: Algorithm,
        model: Model,
        params: Params,
        tasks: Sequence[Task],
        engine: Engine,
    ) -> GroupGradient:
        """As `meta_gradient`; the model's statistics must not change between calls."""
        shapes = [(t.num_ways, *(tuple(v.shape) for v in t[:4])) for t in tasks]
        key = (algorithm, id(model), engine, tuple(params), tuple(shapes))
        if key not in self._held and not self._refused and len(self._held) < _MOST_SHAPES:
            self._record(key, algorithm, model, params, tasks, engine)
        if key not in self._held:
            return meta_gradient(algorithm, model, params, tasks, engine)
        held = self._held[key]
        for mine, theirs in zip(held.inputs, _tensors(params, tasks), strict=True):
            torch._foreach_copy_(mine, theirs)
        held.recording.replay()
        return _copy(held.recording.result)

    def _record(
        self,
        key: object,
        algorithm: Algorithm,
        model: Model,
        params: Params,
        tasks: Sequence[Task],
        engine: Engine,
    ) -> None:
        own = {n: p.detach().clone() for n, p in params.items()}
        copies = [Task(*_clones(t), t.num_ways) for t in tasks]

        def compute() -> GroupGradient:
            return meta_gradient(algorithm, model, own, copies, engine)

        expected = compute()
        try:
            recording = self._capture(compute)
            torch._foreach_zero_(list(recording.result.gradient.values()))  # as if it did nothing
            recording.replay()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._refuse(str(error).splitlines()[0])
            return
        off = _difference(recording.result, expected)
        if off < _TOLERANCE:
            self._held[key] = _Held(recording, _tensors(own, copies), model)
        else:
            self._refuse(f"its gradient is off by {off:.1e}")

    def _refuse(self, why: str) -> None:
        self._refused = True
        self._held.clear()
        say("engine", cuda_graph="not used", why=why)


def _tensors(params: Params, tasks: Sequence[Task]) -> tuple[list[Tensor], list[Tensor]]:
    """Numbers and labels, each of one type, so that each list is copied by one launch."""
    numbers = [*params.values(), *(x for task in tasks for x in (task.support_x, task.query_x))]
    return numbers, [y for task in tasks for y in (task.support_y, task.query_y)]


def _clones(task: Task) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        task.support_x.clone(),
        task.support_y.clone(),
        task.query_x.clone(),
        task.query_y.clone(),
    )


def _copy(found: GroupGradient) -> GroupGradient:
    return GroupGradient(*({n: v.clone() for n, v in part.items()} for part in found))


def _difference(found: GroupGradient, wanted: GroupGradient) -> float:
    """|g - g'| / |g'| over all parameters together."""
    one, other = (
        torch.cat([value.double().flatten() for value in result.gradient.values()])
        for result in (found, wanted)
    )
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(torch.float64).tiny))
