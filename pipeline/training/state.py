"""The whole state of a training run, and its way into a checkpoint and back.

V values: all parameters as one vector, in sorted order of their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.core.types import Params, Statistics
from pipeline.runtime.checkpoint import Checkpoint
from pipeline.training.adam import Moments, zero_moments

Cell = tuple[int, int]
"""(position of the meta-batch, group)"""


@dataclass(frozen=True)
class Best:
    """The parameters that validated best so far."""

    step: int
    val_accuracy: float
    vector: Tensor
    """[V]"""
    statistics: Statistics


@dataclass(frozen=True)
class Progress:
    """What has been done, as plain numbers; every list grows by appending only."""

    step: int = 0
    """Outer updates done."""
    position: int = 0
    """Next meta-batch of the stream; ahead of `step` by those of which nothing was left."""
    rollbacks: int = 0
    stopped: str | None = None
    """Why training ended before its last step."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """{"step", "loss", "accuracy", "lr", "gradient_norm", "val_accuracy"?}; about 1,000 of them"""
    ledger: list[list[int]] = field(default_factory=list)
    """[first, last + 1] of meta-batches in the order in which they went into the weights"""
    skipped: list[list[int]] = field(default_factory=list)
    """[position, group] of every group that a guard leaves out"""
    norms: list[float] = field(default_factory=list)
    """The latest gradient norms, by which a spike is told"""
    machines: list[list[int | str]] = field(default_factory=list)
    """[first step, compute fingerprint] of each kind of machines that did a part, in turn"""

    def skipped_cells(self) -> set[Cell]:
        """The groups that are left out."""
        return {(position, group) for position, group in self.skipped}


@dataclass(frozen=True)
class TrainState:
    """Parameters, optimiser, the best so far, and the numbers."""

    vector: Tensor
    """[V]"""
    moments: Moments
    progress: Progress
    best: Best | None = None

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values that restore this state exactly."""
        tensors = {
            "vector": self.vector,
            "first": self.moments.first,
            "second": self.moments.second,
        }
        values: dict[str, Any] = {"progress": asdict(self.progress), "best": None}
        if self.best is not None:
            tensors["best.vector"] = self.best.vector
            tensors |= {f"best.statistics.{n}": v for n, v in self.best.statistics.items()}
            values["best"] = {"step": self.best.step, "val_accuracy": self.best.val_accuracy}
        return tensors, values


def fresh_state(params: Params) -> TrainState:
    """The state before the first step."""
    vector = flatten(params)
    return TrainState(vector, zero_moments(vector), Progress())


def restored_state(saved: Checkpoint, device: torch.device) -> TrainState:
    """The state that a checkpoint holds."""
    tensors = {n: t.to(device) for n, t in saved.tensors.items()}
    best = None
    if (numbers := saved.state["best"]) is not None:
        prefix = "best.statistics."
        statistics = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        best = Best(numbers["step"], numbers["val_accuracy"], tensors["best.vector"], statistics)
    moments = Moments(tensors["first"], tensors["second"])
    return TrainState(tensors["vector"], moments, Progress(**saved.state["progress"]), best)


def on_machines(state: TrainState, kinds: str) -> TrainState:
    """The state from where these machines go on; the same state if they made it."""
    told = state.progress.machines
    if told and told[-1][1] == kinds:
        return state
    machines: list[list[int | str]] = [*told, [state.progress.step, kinds]]
    return replace(state, progress=replace(state.progress, machines=machines))


def rolled_back(snapshot: TrainState, cells: Sequence[Cell]) -> TrainState:
    """The snapshot, to go on from there without some more groups (position, group)."""
    progress = replace(
        snapshot.progress,
        rollbacks=snapshot.progress.rollbacks + 1,
        skipped=[*snapshot.progress.skipped, *(list(cell) for cell in cells)],
    )
    return replace(snapshot, progress=progress)


def past_skipped(state: TrainState, num_groups: int) -> TrainState:
    """The state at the next meta-batch of which any group is left."""
    at, skipped = state.progress, state.progress.skipped_cells()
    position = at.position
    while all((position, group) in skipped for group in range(num_groups)):
        position += 1
    return replace(state, progress=replace(at, position=position))


def flatten(params: Params) -> Tensor:
    """All parameters as one vector [V], in sorted order of their names."""
    return torch.cat([params[name].reshape(-1) for name in sorted(params)])


def unflatten(vector: Tensor, like: Params) -> Params:
    """The parameters in a vector [V], shaped like some others."""
    names = sorted(like)
    pieces = torch.split(vector, [like[name].numel() for name in names])
    return {n: p.view(like[n].shape) for n, p in zip(names, pieces, strict=True)}


def extend_history(
    history: list[dict[str, Any]], entry: dict[str, Any], *, stride: int
) -> list[dict[str, Any]]:
    """The history with one more step; of the earlier ones, every `stride`-th and the validated."""
    if history and history[-1]["step"] % stride and "val_accuracy" not in history[-1]:
        history = history[:-1]
    return [*history, entry]


def extend_ledger(ledger: list[list[int]], position: int) -> list[list[int]]:
    """The ledger with one more meta-batch, kept as runs of consecutive ones."""
    if ledger and ledger[-1][1] == position:
        return [*ledger[:-1], [ledger[-1][0], position + 1]]
    return [*ledger, [position, position + 1]]
