"""Entries of workers that meet poison in their data: what the guards are tried on."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import torch

from pipeline.core.config import Section
from pipeline.runtime.collectives import gather_shares
from pipeline.runtime.context import Context
from pipeline.training import loop
from pipeline.training.loop import OuterConfig, optimise
from pipeline.training.state import TrainState
from pipeline.training.steps import Step
from tests.unit.quadratic import Quadratic

_STEPS, _WINDOW = 44, 32
_KINDS = {"nan": float("nan"), "inf": float("inf"), "hundredfold": 100.0}


class Injections(Section):
    """Runs that each meet one poisoned group."""

    folder: Path
    count: int
    seed: int = 0
    kinds: list[str] = sorted(_KINDS)


def inject(plan: Injections, context: Context) -> list[dict[str, Any]]:
    """Poison run after run; what became of each, the same on every worker."""
    return hurt(plan, context)


def hurt(plan: Injections, context: Context) -> list[dict[str, Any]]:
    """One small run for each injection, with a random kind of poison in a random group."""
    rng, rows = random.Random(plan.seed), []
    for place in range(plan.count):
        kind = rng.choice(plan.kinds)
        first = _WINDOW + 1 if kind == "hundredfold" else 0  # a spike is one of a full window
        cell = (rng.randrange(first, _STEPS), rng.randrange(4))
        scales = {cell: _KINDS[kind]}
        program = Quadratic(scales, noise=0.3, spread=0.1, seed=rng.randrange(2**31))
        poisoned, state = _trained(program, cell, plan.folder / str(place), context)
        digest = hashlib.sha256(state.vector.numpy().tobytes()).digest()
        own = torch.tensor([[int.from_bytes(digest[:7]), poisoned, state.progress.step]])
        everyone = gather_shares(own, context.world_size, context).tolist()
        rows.append(
            {
                "kind": kind,
                "cell": list(cell),
                "skipped": state.progress.skipped,
                "poisoned_updates": max(row[1] for row in everyone),
                "agree": all(row == everyone[0] for row in everyone),
                "digest": everyone[0][0],
            }
        )
    return rows


def _trained(
    program: Quadratic, cell: tuple[int, int], folder: Path, context: Context
) -> tuple[int, TrainState]:
    """How many updates the poisoned group has gone into, and the end of the run."""
    update, poisoned = loop._update, 0

    def watched(state: TrainState, step: Step, config: OuterConfig) -> TrainState:
        nonlocal poisoned
        at = state.progress
        poisoned += at.position == cell[0] and cell not in at.skipped_cells()
        return update(state, step, config)

    config = OuterConfig(
        num_steps=_STEPS,
        checkpoint_every=22,
        validate_every=_STEPS,
        warmup_steps=0,
        spike_factor=15.0,
        on_non_finite="skip",
    )
    loop._update = watched
    try:
        state = optimise(
            program,
            {"w": torch.tensor([3.0, 4.0])},
            config,
            lambda learner, step: (0.0, learner),
            context,
            checkpoints=folder,
            journal=None,
            label="poisoned",
        )
    finally:
        loop._update = update
    return poisoned, state
