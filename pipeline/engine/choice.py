"""Which strategy a run uses: planned by memory, chosen by a short calibration, remembered.

T tasks of a group.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Interval
from pydantic import PositiveInt, TypeAdapter, ValidationError

from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.inner_loop import InnerLoop
from pipeline.core.config import Section
from pipeline.core.errors import ConfigError
from pipeline.core.files import canonical_json, read_json, write_json
from pipeline.core.functional import Model, Precision
from pipeline.core.types import Params, Task
from pipeline.engine.memory import bytes_of, free_bytes, planned_bytes
from pipeline.engine.meta_gradient import Engine, Strategy, meta_gradient
from pipeline.runtime.collectives import gather_shares
from pipeline.runtime.context import Context, fingerprint
from pipeline.runtime.logs import say
from pipeline.tasks.spec import EpisodeSpec, bounds

_MARGIN = 1.1
"""A strategy replaces one before it in the order of preference only if it is this much faster:
noise must not change the bits of a run."""
_ROUNDS, _ENOUGH_SECONDS = 3, 2.0


class EngineConfig(Section):
    """How meta-gradients are computed; every strategy gives the same ones, within rounding."""

    strategy: Literal["auto", "loop", "vmap", "split", "vmap_split"] = "auto"
    """auto: the fastest here that fits into memory. loop: one task at a time. vmap: a group's tasks
    as one. split: memory does not grow with the inner steps. vmap_split: both"""
    precision: Precision = "fp32"
    """bf16: queries in bfloat16, inner loop in fp32; faster, other numbers"""
    chunk: PositiveInt | None = None
    """Tasks at once for vmap; null: as many as fit into memory"""
    memory_share: Annotated[float, Gt(0), Interval(le=1)] = 0.5
    """Share of the free memory that gradients may be planned into"""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An engine, and why it was chosen."""

    engine: Engine
    reason: str
    tasks_per_second: dict[str, float]
    """Of each strategy that was tried, by name; empty where there was nothing to try"""


def choose_engine(
    config: EngineConfig,
    algorithm: Algorithm,
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    context: Context,
    *,
    memory: Path,
) -> Engine:
    """The engine for groups like these, the same on every worker; the main one decides and says so.

    Args:
        tasks: one group of the largest shape.
        memory: a JSON file with the choices of earlier runs on this machine, which hold.
    """
    found = Engine()
    if context.is_main:
        found = _remembered_or_new(config, algorithm, model, params, tasks, context, memory)
    return _broadcast(found, context)


def example_group(
    spec: EpisodeSpec, image_shape: tuple[int, int, int], num_tasks: int, device: torch.device
) -> list[Task]:
    """A group of the largest tasks of a spec, with noise for pictures: to plan and calibrate by."""
    ways, shots = bounds(spec.ways)[1], bounds(spec.shots)[1]
    noise = torch.Generator().manual_seed(0)
    sizes = [ways * shots, ways * spec.queries]
    labels = [torch.arange(ways, device=device).repeat_interleave(n // ways) for n in sizes]
    tasks = []
    for _ in range(num_tasks):
        support, query = (torch.randn(n, *image_shape, generator=noise).to(device) for n in sizes)
        tasks.append(Task(support, labels[0], query, labels[1], ways))
    return tasks


def _remembered_or_new(
    config: EngineConfig,
    algorithm: Algorithm,
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    context: Context,
    memory: Path,
) -> Engine:
    key = _key(config, algorithm, model, params, tasks)
    known: dict[str, Any] = read_json(memory) if memory.exists() else {}
    if key in known:
        try:
            choice = _CHOICE.validate_python(known[key])
        except ValidationError:
            raise ConfigError(
                f"{memory} holds a choice that this version cannot read. Remove the file; it is "
                "made again."
            ) from None
        say("engine", strategy=choice.engine.strategy, why=f"remembered: {choice.reason}")
        return choice.engine
    choice = _decide(config, algorithm, model, params, tasks, context)
    rates = {f"{n}_tasks_per_second": rate for n, rate in choice.tasks_per_second.items()}
    say("engine", strategy=choice.engine.strategy, why=choice.reason, **rates)
    if config.strategy == "auto":
        write_json(memory, {**known, key: asdict(choice)})
    return choice.engine


_CHOICE = TypeAdapter(Choice)


def _decide(
    config: EngineConfig,
    algorithm: Algorithm,
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    context: Context,
) -> Choice:
    budget = int(config.memory_share * free_bytes(context.device, context.world_size))
    names = _candidates(config, algorithm, len(tasks), context.device)
    plans = {n: _plan(n, config, algorithm, model, params, tasks, budget) for n in names}
    fitting = [n for n in names if plans[n][1] <= budget]
    if not fitting:
        least = min(names, key=lambda n: plans[n][1])
        reason = f"needs {_mib(plans[least][1])}, more than the {_mib(budget)} planned for"
        return Choice(engine=plans[least][0], reason=reason, tasks_per_second={})
    if len(fitting) == 1:
        (only,) = fitting
        reason = "asked for" if config.strategy != "auto" else "the only one that applies"
        if len(names) > 1:
            reason = f"the only one within {_mib(budget)}"
        reason += f"; plans {_mib(plans[only][1])}"
        return Choice(engine=plans[only][0], reason=reason, tasks_per_second={})
    engines = {n: plans[n][0] for n in fitting}
    rates = _calibrate(engines, algorithm, model, params, tasks, context.device)
    best = fitting[0]
    for name in fitting[1:]:
        if rates[name] > _MARGIN * rates[best]:
            best = name
    reason = f"fastest in a calibration; plans {_mib(plans[best][1])}"
    rounded = {str(n): round(r, 3) for n, r in rates.items()}
    return Choice(engine=engines[best], reason=reason, tasks_per_second=rounded)


def _candidates(
    config: EngineConfig, algorithm: Algorithm, num_tasks: int, device: torch.device
) -> list[Strategy]:
    """Strategies that differ for this algorithm, the usually best one first."""
    if config.strategy != "auto":
        return [config.strategy]
    splits = isinstance(algorithm, InnerLoop) and not algorithm.first_order
    one: list[Strategy] = ["loop", "split"] if splits else ["loop"]
    many: list[Strategy] = ["vmap", "vmap_split"] if splits else ["vmap"]
    if num_tasks == 1:
        return one
    return [*many, *one] if device.type == "cuda" else [*one, *many]


def _plan(
    name: Strategy,
    config: EngineConfig,
    algorithm: Algorithm,
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    budget: int,
) -> tuple[Engine, int]:
    """The engine of a strategy with chunk and stride that fit, and the bytes that it plans."""
    at_once = Engine(strategy=name).at_once
    split = name in ("split", "vmap_split") and isinstance(algorithm, InnerLoop)
    steps = algorithm.num_inner_steps if isinstance(algorithm, InnerLoop) else 1
    copy = bytes_of(params) if split else 0
    stride = 1 if copy * steps <= budget // 4 else math.ceil(math.sqrt(steps))
    alone = Engine(strategy="split" if split else "loop")

    def gradient(algorithm: Algorithm, model: Model, params: Params, task: Task) -> object:
        return meta_gradient(algorithm, model, params, [task], alone)

    each = planned_bytes(gradient, algorithm, model, params, tasks[0])
    each += copy * (steps // stride + stride)
    chunk = None
    if at_once:
        chunk = config.chunk or max(1, min(len(tasks), budget // each))
    engine = Engine(strategy=name, precision=config.precision, chunk=chunk, stride=stride)
    return engine, each * (chunk or 1)


def _calibrate(
    engines: dict[Strategy, Engine],
    algorithm: Algorithm,
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    device: torch.device,
) -> dict[Strategy, float]:
    """Tasks per second of each, taken in turn; a slow case counts its first run."""
    seconds: dict[Strategy, list[float]] = {n: [] for n in engines}
    for turn in range(1 + _ROUNDS):
        for name, engine in engines.items():
            start = time.perf_counter()
            meta_gradient(algorithm, model, params, tasks, engine)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
        if max(max(times) for times in seconds.values()) > _ENOUGH_SECONDS:
            break
        if turn == 0:
            seconds = {n: [] for n in engines}  # the first run warms up
    return {n: len(tasks) / statistics.median(times) for n, times in seconds.items()}


def _broadcast(engine: Engine, context: Context) -> Engine:
    """The main worker's engine on every worker."""
    rows = TypeAdapter(Engine).dump_json(engine)
    text = torch.zeros(1, 1024, dtype=torch.uint8, device=context.device)
    text[0, : len(rows)] = torch.frombuffer(bytearray(rows), dtype=torch.uint8)
    first = gather_shares(text, context.world_size, context)[0].cpu().numpy().tobytes()
    return TypeAdapter(Engine).validate_json(first.rstrip(b"\0"))


def _key(
    config: EngineConfig,
    algorithm: Algorithm,
    model: Model,
    params: Params,
    tasks: Sequence[Task],
) -> str:
    """What the choice depends on: machine, algorithm, network, shapes."""
    facts = {
        "machine": fingerprint(),
        "config": config.model_dump(mode="json"),
        "algorithm": repr(algorithm),
        "model": [model.batch_norm, repr(model.skeleton)],
        "params": {n: list(p.shape) for n, p in sorted(params.items())},
        "tasks": [len(tasks), tasks[0].num_ways, *(list(t.shape) for t in tasks[0][:4])],
    }
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
