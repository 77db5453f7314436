"""One meta-batch: its mean gradient on every worker, and what each group has to tell.

V values: all parameters as one vector. G groups, T items per group, M metrics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.core.types import Params
from pipeline.runtime.collectives import exact_sum, fast_sum, gather_shares
from pipeline.runtime.context import Context
from pipeline.training.feed import Feed
from pipeline.training.programs import Program
from pipeline.training.state import Cell, Progress, flatten

METRICS = ("accuracy", "loss")
"""What every program tells of every item."""
_FACTS = 4


@dataclass(frozen=True)
class Step:
    """What all workers know of a meta-batch, the same on each."""

    gradient: Tensor
    """[V] mean over all items of the groups that count"""
    norm: float
    """Of the gradient."""
    means: dict[str, float]
    """Of each metric, over the items that count"""
    losses: list[list[float]]
    """[G][T]"""
    norms: list[float]
    """[G] of each group's own mean gradient; 0 for one that does not count"""
    seconds: list[float]
    """[G] that its worker has computed it; on a GPU, that it has taken to launch it"""
    waited: list[float]
    """[G] that its worker has waited for its data"""
    stop: bool
    """Whether any worker was asked to stop"""

    def bad_groups(self) -> list[int]:
        """Groups with a loss or a gradient that is not finite; all, where only their sum is not."""
        bad = [
            group
            for group, (losses, norm) in enumerate(zip(self.losses, self.norms, strict=True))
            if not all(map(math.isfinite, [*losses, norm]))
        ]
        return bad if bad or math.isfinite(self.norm) else list(range(len(self.norms)))


def take_step(
    program: Program,
    feed: Feed[Any, Any],
    params: Params,
    at: Progress,
    reduction: Literal["exact", "fast"],
    context: Context,
) -> Step:
    """Compute this worker's groups and exchange with the others; one wait for the device.

    Groups that were skipped are left out of every mean; at least one of the meta-batch has to be
    left.
    """
    position, skipped = at.position, at.skipped_cells()
    parts: list[Tensor] = []
    rows: list[Tensor | None] = []
    size = sum(p.numel() for p in params.values())
    for group in feed.groups:
        begin, waited = time.perf_counter(), feed.waited_seconds
        if (position, group) in skipped:
            like = next(iter(params.values()))
            parts.append(torch.zeros(size, dtype=like.dtype, device=like.device))
            rows.append(None)
            continue
        result = program.gradient(params, feed.take(position, group))
        part = flatten(result.gradient)
        waiting = feed.waited_seconds - waited
        facts = [time.perf_counter() - begin - waiting, waiting, float(context.stopping())]
        own = torch.tensor(facts, device=part.device)
        norm = mean_norm(part, program.items_per_group).reshape(1)
        rows.append(torch.cat([*(result.metrics[n].float() for n in METRICS), norm, own]))
        parts.append(part)
    return _exchanged(program, parts, rows, position, skipped, reduction, context)


def mean_norm(part: Tensor, num_items: int) -> Tensor:
    """Length of a group's mean gradient, of the sum [V] over its items."""
    length: Tensor = (part / num_items).norm()
    return length.float()


def _exchanged(
    program: Program,
    parts: list[Tensor],
    rows: list[Tensor | None],
    position: int,
    skipped: Set[Cell],
    reduction: Literal["exact", "fast"],
    context: Context,
) -> Step:
    num_groups, num_items = program.num_groups, program.items_per_group
    exact = reduction == "exact"
    total = exact_sum(parts, num_groups, context) if exact else fast_sum(parts)
    counting = [g for g in range(num_groups) if (position, g) not in skipped]
    gradient = total / (len(counting) * num_items)
    width = len(METRICS) * num_items + _FACTS
    blank = torch.zeros(width, device=total.device)
    blank[-1] = float(context.stopping())
    own = torch.stack([blank if row is None else row for row in rows])
    everyone = gather_shares(own, num_groups, context)
    table = torch.cat([everyone.double().flatten(), gradient.norm().double().reshape(1)])
    *numbers, norm = table.tolist()  # the only time in a step that a device is awaited
    told = [numbers[g * width : (g + 1) * width] for g in range(num_groups)]
    items = {
        name: [row[i * num_items : (i + 1) * num_items] for row in told]
        for i, name in enumerate(METRICS)
    }
    return Step(
        gradient=gradient,
        norm=norm,
        means={
            name: math.fsum(v for g in counting for v in found[g]) / (len(counting) * num_items)
            for name, found in items.items()
        },
        losses=items["loss"],
        norms=[row[-4] for row in told],
        seconds=[row[-3] for row in told],
        waited=[row[-2] for row in told],
        stop=any(row[-1] for row in told),
    )
