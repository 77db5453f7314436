"""The outer loop: one for pre-training and meta-training, one process or many.

V values: all parameters as one vector. G groups, T items per group.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Interval
from pydantic import PositiveInt
from torch import Tensor

from pipeline.core.config import Section
from pipeline.core.errors import TrainingError
from pipeline.core.types import Params
from pipeline.engine.learner import Learner
from pipeline.runtime.checkpoint import load_checkpoint, save_checkpoint, tidy_checkpoints
from pipeline.runtime.collectives import barrier, exact_sum, fast_sum, gather_shares, owned_groups
from pipeline.runtime.context import Context
from pipeline.runtime.journal import Journal
from pipeline.runtime.logs import Bar, progress
from pipeline.training.adam import adam_step
from pipeline.training.feed import Feed
from pipeline.training.pace import Pace
from pipeline.training.programs import Program
from pipeline.training.schedules import warmup_cosine
from pipeline.training.state import (
    Best,
    TrainState,
    extend_history,
    extend_ledger,
    flatten,
    fresh_state,
    restored_state,
    rolled_back,
    unflatten,
)

_SPIKE_WINDOW = 32


class OuterConfig(Section):
    """The outer loop: optimiser, validation, checkpoints, guards."""

    num_steps: PositiveInt = 400
    """Outer updates."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Adam's peak learning rate."""
    warmup_steps: Annotated[int, Ge(0)] = 10
    """Steps over which the learning rate rises."""
    final_lr: Annotated[float, Interval(ge=0, le=1)] = 0.01
    """Last learning rate as a fraction of the peak (half cosine)."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay."""
    max_gradient_norm: Annotated[float, Gt(0)] = 10.0
    """Longer gradients are scaled down to this norm."""
    validate_every: PositiveInt = 50
    """Steps between validations; the last step is always validated."""
    patience: PositiveInt = 10
    """Validations without a better one after which training stops."""
    checkpoint_every: PositiveInt = 20
    """Steps between checkpoints: the most that a killed run loses."""
    spike_factor: Annotated[float, Gt(1)] = 100.0
    """A gradient this many times the median of the last 32 rolls back and skips the data."""
    max_rollbacks: Annotated[int, Ge(0)] = 3
    """More spikes than this stop the run."""
    reduction: Literal["exact", "fast"] = "exact"
    """exact: the same bits for every number of workers. fast: the backend's all-reduce."""


Validate = Callable[[Learner, int], tuple[float, Learner]]
"""(learner, step) -> (accuracy, the learner with the statistics it was validated with)"""


class _Step(NamedTuple):
    gradient: Tensor
    """[V] mean over all items"""
    items: dict[str, Tensor]
    """[G * T] per metric"""


def optimise(
    program: Program,
    start: Params,
    config: OuterConfig,
    validate: Validate,
    context: Context,
    *,
    checkpoints: Path,
    journal: Path | None,
    label: str,
) -> TrainState:
    """Train from `start`, or from the newest good checkpoint, to the end.

    Raises:
        TrainingError: non-finite numbers, too many spikes, or a disk that refuses checkpoints.
    """
    state = _resume(start, checkpoints, context)
    snapshot = state
    per_step = program.num_groups * program.items_per_group
    log = Journal(journal) if journal is not None and context.is_main else None
    feed = program.feed(owned_groups(program.num_groups, context))
    with _show(label, program, config, state, context) as bar, feed:
        pace = Pace(program.unit, lambda: feed.waited_seconds)
        while state.progress.step < config.num_steps and state.progress.stopped is None:
            params = unflatten(state.vector, start)
            step = _gradient(program, feed, params, state.progress.position, config, context)
            norm, means = _finite_numbers(step, program, state)
            if _is_spike(norm, state, config):
                bar.advance((snapshot.progress.step - state.progress.step) * per_step)
                state = snapshot = rolled_back(snapshot, _check_rollbacks(state, norm, config))
                continue
            state = _update(state, step, norm, means, config)
            rates = pace.count(per_step)
            if _is_due(state, config, config.validate_every):
                state = _validated(state, program, start, validate, config)
                pace.restart()
            if _is_due(state, config, config.checkpoint_every):
                snapshot = state
                if context.is_main:
                    save_checkpoint(checkpoints, state.progress.step, *state.checkpoint())
            _report(state, rates, log, bar, per_step)
    barrier()
    if log is not None:
        log.close()
    return state


def _resume(start: Params, checkpoints: Path, context: Context) -> TrainState:
    if context.is_main:
        tidy_checkpoints(checkpoints)
    barrier()
    saved = load_checkpoint(checkpoints)
    return fresh_state(start) if saved is None else restored_state(saved, context.device)


def _gradient(
    program: Program,
    feed: Feed[Any, Any],
    params: Params,
    position: int,
    config: OuterConfig,
    context: Context,
) -> _Step:
    """Mean gradient over all items of a meta-batch, on every worker, and every item's metrics."""
    results = [program.gradient(params, feed.take(position, group)) for group in feed.groups]
    parts = [flatten(r.gradient) for r in results]
    if config.reduction == "exact":
        total = exact_sum(parts, program.num_groups, context)
    else:
        total = fast_sum(parts)
    names = sorted(results[0].metrics)
    own = torch.stack([torch.stack([r.metrics[n].float() for n in names]) for r in results])
    everyone = gather_shares(own, program.num_groups, context)  # [G, metrics, T]
    items = {n: everyone[:, i].flatten() for i, n in enumerate(names)}
    return _Step(total / (program.num_groups * program.items_per_group), items)


def _finite_numbers(
    step: _Step, program: Program, state: TrainState
) -> tuple[float, dict[str, float]]:
    """The gradient's norm and each metric's mean; the only time in a step that a device is awaited.

    Every worker sees the same numbers, so all stop or none does.

    Raises:
        TrainingError: a loss or the gradient is not finite; names the step and the items.
    """
    finite = torch.isfinite(step.items["loss"])
    numbers = [
        step.gradient.norm(),
        finite.all(),
        *(v.double().mean() for v in step.items.values()),
    ]
    norm, good, *means = torch.stack([number.double() for number in numbers]).tolist()
    if math.isfinite(norm) and good:
        return norm, dict(zip(step.items, means, strict=True))
    bad = (~finite).nonzero().flatten().tolist()
    at = state.progress
    first = at.position * program.num_groups * program.items_per_group
    which = ", ".join(str(first + i) for i in bad[:8]) or "none: only the gradient is not finite"
    raise TrainingError(
        f"non-finite numbers at step {at.step} (meta-batch {at.position}), {program.unit}: "
        f"{which}. No update was made and the last checkpoint is good. Look at "
        "these examples, or lower outer.lr (or the inner learning rate)."
    )


def _is_spike(norm: float, state: TrainState, config: OuterConfig) -> bool:
    recent = state.progress.norms
    full = len(recent) == _SPIKE_WINDOW
    return full and norm > config.spike_factor * statistics.median(recent)


def _check_rollbacks(state: TrainState, norm: float, config: OuterConfig) -> TrainState:
    if state.progress.rollbacks >= config.max_rollbacks:
        raise TrainingError(
            f"the gradient spiked to {norm:.3g} at step {state.progress.step}, after "
            f"{config.max_rollbacks} rollbacks. Lower outer.lr, or look at the data of meta-batch "
            f"{state.progress.position}."
        )
    return state


def _update(
    state: TrainState, step: _Step, norm: float, means: dict[str, float], config: OuterConfig
) -> TrainState:
    at = state.progress
    lr = warmup_cosine(
        at.step,
        peak=config.lr,
        num_steps=config.num_steps,
        warmup=config.warmup_steps,
        final=config.final_lr,
    )
    clipped = step.gradient * min(1.0, config.max_gradient_norm / max(norm, 1e-12))
    vector, moments = adam_step(
        state.vector,
        clipped,
        state.moments,
        step=at.step + 1,
        lr=lr,
        weight_decay=config.weight_decay,
    )
    entry = {"step": at.step + 1, **means, "lr": lr, "gradient_norm": norm}
    progressed = replace(
        at,
        step=at.step + 1,
        position=at.position + 1,
        history=extend_history(at.history, entry, stride=max(1, config.num_steps // 1000)),
        ledger=extend_ledger(at.ledger, at.position),
        norms=[*at.norms, norm][-_SPIKE_WINDOW:],
    )
    return replace(state, vector=vector, moments=moments, progress=progressed)


def _is_due(state: TrainState, config: OuterConfig, every: int) -> bool:
    step = state.progress.step
    return step % every == 0 or step == config.num_steps


def _validated(
    state: TrainState, program: Program, like: Params, validate: Validate, config: OuterConfig
) -> TrainState:
    """Measure, keep the best, and stop when patience is over."""
    at = state.progress
    value, learner = validate(program.learner(unflatten(state.vector, like)), at.step)
    history = [*at.history[:-1], {**at.history[-1], "val_accuracy": value}]
    best = state.best
    if best is None or value > best.val_accuracy:
        best = Best(at.step, value, state.vector, learner.model.statistics or {})
    stopped = at.stopped
    if at.step - best.step >= config.patience * config.validate_every:
        stopped = (
            f"early stop at step {at.step}: no better validation accuracy than "
            f"{best.val_accuracy:.4f} of step {best.step} in {config.patience} validations"
        )
    return replace(state, best=best, progress=replace(at, history=history, stopped=stopped))


def _report(
    state: TrainState, rates: dict[str, float], log: Journal | None, bar: Bar, per_step: int
) -> None:
    entry = state.progress.history[-1]
    if log is not None:
        log.write(entry["step"], {n: float(v) for n, v in entry.items() if n != "step"} | rates)
    bar.note(loss=entry["loss"], data_wait=f"{rates['data_wait_fraction']:.1%}")
    if "val_accuracy" in entry:
        bar.note(val_accuracy=entry["val_accuracy"])
    bar.advance(per_step)


class _Silent:
    """The bar of a worker that shows nothing."""

    def advance(self, count: int = 1) -> None:
        """Nothing."""

    def note(self, **values: float | str) -> None:
        """Nothing."""


def _show(
    label: str, program: Program, config: OuterConfig, state: TrainState, context: Context
) -> AbstractContextManager[Bar]:
    if not context.is_main:
        return nullcontext(_Silent())
    per_step = program.num_groups * program.items_per_group
    return progress(
        label,
        total=config.num_steps * per_step,
        unit=program.unit,
        done=state.progress.step * per_step,
    )
