"""The outer loop: one for pre-training and meta-training, one process or many.

V values: all parameters as one vector. G groups, T items per group.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval
from pydantic import PositiveInt

from pipeline.core.config import Section
from pipeline.core.errors import GuardError, StoppedError
from pipeline.core.types import Params
from pipeline.engine.learner import Learner
from pipeline.engine.runner import Runner
from pipeline.runtime.agreement import check_agreement, kinds_of_machines
from pipeline.runtime.checkpoint import Checkpoint
from pipeline.runtime.collectives import barrier, owned_groups
from pipeline.runtime.context import Context
from pipeline.runtime.journal import Point
from pipeline.runtime.logs import Bar, progress, say
from pipeline.runtime.metric_log import MetricLog
from pipeline.runtime.resume import Keeper
from pipeline.training.adam import adam_step
from pipeline.training.incidents import NON_FINITE, SPIKE, Incident, Incidents, plain
from pipeline.training.pace import Pace
from pipeline.training.programs import Program
from pipeline.training.schedules import warmup_cosine
from pipeline.training.state import (
    Best,
    Cell,
    TrainState,
    extend_history,
    extend_ledger,
    fresh_state,
    on_machines,
    past_skipped,
    restored_state,
    rolled_back,
    unflatten,
)
from pipeline.training.steps import Step, take_step
from pipeline.training.stragglers import Stragglers

_SPIKE_WINDOW = 32
_TOLD = "told"
"""In a checkpoint: the metrics of the steps since the one before"""
_METHOD = "method"
"""In a checkpoint: how the gradients are computed"""


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
    """A gradient this many times the median of the last 32 is a spike, if it is longer than
    max_gradient_norm besides."""
    on_spike: Literal["skip", "stop"] = "skip"
    """skip: back to the last checkpoint, then on without the groups that did it. stop: the end."""
    on_non_finite: Literal["skip", "stop"] = "stop"
    """The same for a loss or gradient that is not a finite number."""
    max_rollbacks: Annotated[int, Ge(0)] = 3
    """More of either stop the run."""
    reduction: Literal["exact", "fast"] = "exact"
    """exact: the same bits for every number of workers. fast: the backend's all-reduce."""


Validate = Callable[[Learner, int], tuple[float, Learner]]
"""(learner, step) -> (accuracy, the learner with the statistics it was validated with)"""


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
    incidents: Incidents | None = None,
    runner: Runner | None = None,
) -> TrainState:
    """Train from `start`, or from the newest good checkpoint, to the end.

    Args:
        runner: the program's, if it has one; it goes on by the checkpoint's method.

    Raises:
        GuardError: non-finite numbers or too many spikes.
        TrainingError: one worker cannot go on; it has too little memory.
        StorageError: a disk that refuses checkpoints.
        StoppedError: a worker was asked to stop; all stopped behind a checkpoint of the same step,
            which may still await its validation.
        DivergenceError: workers hold other parameters than each other, seen before a checkpoint
            and before an incident is blamed on the data; to be started again.
    """
    per_step = program.num_groups * program.items_per_group
    log = context.open_log(journal if context.is_main else None)
    feed = program.feed(owned_groups(program.num_groups, context))
    stragglers = Stragglers(program.num_groups, context)
    stopping = False
    with Keeper(checkpoints, context) as keeper:
        saved = keeper.resume()
        state = fresh_state(start) if saved is None else restored_state(saved, context.device)
        state = _on_these_machines(state, context)
        snapshot, recent, rates = state, list[Point](), dict[str, float]()
        if saved is not None:
            _tell_again(saved, log, context)
            if runner is not None and _METHOD in saved.state:
                runner.go_on_by(saved.state[_METHOD])
        with _show(label, program, config, state, context) as bar, feed:
            pace = Pace(program.unit, lambda: feed.waited_seconds)
            while not stopping and not _is_over(state, config):
                context.at_step(state.progress.step)
                if _awaits_validation(state, config):
                    try:
                        state = _validated(state, program, start, validate, config)
                    except StoppedError:  # of every worker; it is for the next start to do
                        stopping = True
                    pace.restart()
                else:
                    state = past_skipped(state, program.num_groups)
                    params = unflatten(state.vector, start)
                    at, kind = state.progress, config.reduction
                    step = take_step(program, feed, params, at, kind, context)
                    if found := _incident(step, state, program, config):
                        cells = _to_leave_out(found, state, config, incidents, context)
                        bar.advance((snapshot.progress.step - at.step) * per_step)
                        state = snapshot = rolled_back(snapshot, cells)
                        continue
                    state, stopping = _update(state, step, config), step.stop
                    rates = pace.count(per_step) | stragglers.look(step.seconds, step.waited)
                    bar.advance(per_step)
                    if _awaits_validation(state, config) and not stopping:
                        continue  # so that what is told, and a checkpoint, have it
                recent.append(_reported(state, rates, log, bar, context))
                ends = stopping or state.progress.stopped is not None
                if ends or _is_due(state, config, config.checkpoint_every):
                    snapshot = state
                    more: dict[str, Any] = {_TOLD: [asdict(point) for point in recent]}
                    if runner is not None:
                        more[_METHOD] = runner.method()
                    stopping = _checkpointed(state, more, keeper, log, context) or stopping
                    recent = []
    context.wait_for_main("last upload")
    barrier()
    log.close()
    if not _is_over(state, config):
        raise StoppedError(f"stopped behind the checkpoint of step {state.progress.step}")
    return state


def _checkpointed(
    state: TrainState, more: dict[str, Any], keeper: Keeper, log: MetricLog, context: Context
) -> bool:
    """Keep a state that all workers agree on; True if their machines want them to stop."""
    tensors, values = state.checkpoint()
    check_agreement(tensors, state.progress.step, context)
    keeper.save(state.progress.step, tensors, {**values, **more})
    context.wait_for_all("checkpoint")  # one disk may be slower than the timeout of an exchange
    return log.flush(state.progress.step)


def _tell_again(saved: Checkpoint, log: MetricLog, context: Context) -> None:
    """What was told before the checkpoint may have been on its way when the workers ended."""
    if context.is_main:
        for told in saved.state[_TOLD]:
            log.write(Point(**told))
    log.flush(saved.state["progress"]["step"])


def _on_these_machines(state: TrainState, context: Context) -> TrainState:
    """Note what the bits depend on beside code, data and configuration, and say if it changes."""
    kinds = kinds_of_machines(context)
    noted = on_machines(state, kinds)
    if context.is_main and (len(noted.progress.machines) > 1 or "+" in kinds):
        told = ", ".join(f"{kind} from step {step}" for step, kind in noted.progress.machines)
        say(
            "other hardware",
            why=f"not all steps are done by one kind of processor and one torch ({told}): the bits "
            "are not those of a run on one kind",
        )
    return noted


def _incident(
    step: Step, state: TrainState, program: Program, config: OuterConfig
) -> Incident | None:
    """What keeps a step from going into the weights; the same on every worker."""
    at = state.progress
    kind, groups = NON_FINITE, step.bad_groups()
    if not groups:
        recent = at.norms
        median = statistics.median(recent) if recent else 0.0
        # What is not even clipped does no harm: where nearly all is learned, sound tasks differ by
        # more than any factor.
        limit = max(config.spike_factor * median, config.max_gradient_norm)
        if len(recent) < _SPIKE_WINDOW or step.norm <= limit:
            return None
        # No mean is longer than its longest part, so there is one; but for rounding, at the limit.
        own = step.norms
        kind, groups = SPIKE, [g for g, n in enumerate(own) if n > limit] or [own.index(max(own))]
    first = at.position * program.num_groups * program.items_per_group
    size = program.items_per_group
    return Incident(
        kind=kind,
        step=at.step,
        position=at.position,
        groups=groups,
        items=[first + g * size + i for g in groups for i in range(size)],
        losses=[[plain(loss) for loss in step.losses[g]] for g in groups],
        norms=[plain(step.norms[g]) for g in groups],
        norm=plain(step.norm),
        unit=program.unit,
    )


def _to_leave_out(
    found: Incident,
    state: TrainState,
    config: OuterConfig,
    incidents: Incidents | None,
    context: Context,
) -> list[Cell]:
    """The groups to go on without, from now on.

    Raises:
        GuardError: the configuration says to stop, or it has happened too often.
        DivergenceError: a worker errs, not the data.
    """
    check_agreement(state.checkpoint()[0], state.progress.step, context)
    if incidents is not None:
        found = incidents.keep(found, state.vector, context)
    policy = config.on_spike if found.kind == SPIKE else config.on_non_finite
    rollbacks = state.progress.rollbacks
    if policy == "stop" or rollbacks >= config.max_rollbacks:
        often = f", after {rollbacks} rollbacks" if rollbacks else ""
        raise GuardError(
            f"{found.sentence()}{often}. No update was made and the last checkpoint is good. Look "
            "at these examples, lower outer.lr (or the inner learning rate), or go on without them "
            f"(outer.{found.setting}: skip).{found.replay()}"
        )
    if context.is_main:
        say("left out", why=f"{found.sentence()}.{found.replay()}")
    return [(found.position, group) for group in found.groups]


def _update(state: TrainState, step: Step, config: OuterConfig) -> TrainState:
    at = state.progress
    lr = warmup_cosine(
        at.step,
        peak=config.lr,
        num_steps=config.num_steps,
        warmup=config.warmup_steps,
        final=config.final_lr,
    )
    clipped = step.gradient * min(1.0, config.max_gradient_norm / max(step.norm, 1e-12))
    vector, moments = adam_step(
        state.vector,
        clipped,
        state.moments,
        step=at.step + 1,
        lr=lr,
        weight_decay=config.weight_decay,
    )
    entry = {"step": at.step + 1, **step.means, "lr": lr, "gradient_norm": step.norm}
    progressed = replace(
        at,
        step=at.step + 1,
        position=at.position + 1,
        history=extend_history(at.history, entry, stride=max(1, config.num_steps // 1000)),
        ledger=extend_ledger(at.ledger, at.position),
        norms=[*at.norms, step.norm][-_SPIKE_WINDOW:],
    )
    return replace(state, vector=vector, moments=moments, progress=progressed)


def _is_due(state: TrainState, config: OuterConfig, every: int) -> bool:
    step = state.progress.step
    return step % every == 0 or step == config.num_steps


def _awaits_validation(state: TrainState, config: OuterConfig) -> bool:
    """Whether the latest step is one to be validated, and has not been."""
    at = state.progress
    due = at.step > 0 and _is_due(state, config, config.validate_every)
    return due and "val_accuracy" not in at.history[-1]


def _is_over(state: TrainState, config: OuterConfig) -> bool:
    """Whether there is nothing left to do."""
    at = state.progress
    ended = at.step >= config.num_steps or at.stopped is not None
    return ended and not _awaits_validation(state, config)


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


def _reported(
    state: TrainState,
    rates: dict[str, float],
    log: MetricLog,
    bar: Bar,
    context: Context,
) -> Point:
    """Show a step, and record it on the main worker."""
    entry = state.progress.history[-1]
    metrics = {n: float(v) for n, v in entry.items() if n != "step"} | rates
    point = Point(entry["step"], time.time(), metrics)
    if context.is_main:
        log.write(point)
    bar.note(loss=entry["loss"])
    if rates:
        bar.note(data_wait=f"{rates['data_wait_fraction']:.1%}")
    if "val_accuracy" in entry:
        bar.note(val_accuracy=entry["val_accuracy"])
    return point


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
