"""Which strategy a run uses: planned by memory, chosen by a short calibration, remembered.

T tasks of a group.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Gt, Interval
from pydantic import PositiveInt, TypeAdapter, ValidationError

from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.inner_loop import InnerLoop
from pipeline.core.config import Section
from pipeline.core.errors import ConfigError
from pipeline.core.files import canonical_json, read_json, write_json
from pipeline.core.functional import Model
from pipeline.core.types import Params, Task
from pipeline.engine.calibration import Work, calibrate
from pipeline.engine.memory import bytes_for_a_worker, bytes_of, planned_bytes
from pipeline.engine.meta_gradient import Arithmetic, Engine, Strategy, meta_gradient
from pipeline.runtime.collectives import gather_shares, stop_together
from pipeline.runtime.context import Context, fingerprint
from pipeline.runtime.logs import say
from pipeline.tasks.spec import EpisodeSpec, bounds

_MARGIN = 1.1
"""A strategy replaces one before it in the order of preference only if it is this much faster:
noise should seldom change the choice, for with it go a run's last digits."""
_VERSION = 1
"""Of the strategies' code: a faster or slower one makes earlier choices void"""
_WHOLE: dict[str, Strategy] = {"split": "loop", "vmap_split": "vmap"}
_BATCHED = 1.5
"""What many tasks as one take above so many tasks alone, for copies between layouts."""


class EngineConfig(Section):
    """How meta-gradients are computed; every strategy gives the same ones, within rounding."""

    strategy: Literal["auto", "loop", "vmap", "split", "vmap_split"] = "auto"
    """auto: the fastest here that fits into memory. loop: one task at a time. vmap: a group's tasks
    as one. split: memory does not grow with the inner steps. vmap_split: both"""
    precision: Arithmetic = "fp32"
    """bf16: queries (a ProtoNet's support too) in bfloat16, inner loop in fp32, on a GPU in tf32;
    faster, and gradients are some 10 % off (tested to stay below a quarter). tf32: for a GPU's
    tensor cores; inputs of products rounded to 10 bits"""
    chunk: PositiveInt | None = None
    """Tasks at once for vmap; null: as many as fit into memory"""
    memory_share: Annotated[float, Gt(0), Interval(le=1)] = 0.5
    """Share of a worker's memory that gradients may be planned into"""
    cuda_graphs: bool = True
    """On a GPU, record a group's kernels once for each shape and replay them"""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An engine, and why it was chosen."""

    engine: Engine
    reason: str
    tasks_per_second: dict[str, float]
    """Of each strategy that was tried, by name; empty where there was nothing to try"""
    holds: bool = True
    """Whether later runs may take it: not where a strategy failed, which may work another time"""


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

    Raises:
        StoppedError: on every worker, when one was asked to stop.
    """
    found = Engine()
    if context.is_main:
        work = Work(algorithm, model, params, tasks, context)
        found = _remembered_or_new(config, work, memory)
    context.wait_for_main("choosing an engine")
    stop_together(context, "the choice of an engine")
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


def _remembered_or_new(config: EngineConfig, work: Work, memory: Path) -> Engine:
    key = _key(config, work)
    known = _read(memory)
    if key in known:
        choice = known[key]
        say("engine", strategy=choice.engine.strategy, why=f"remembered: {choice.reason}")
        return choice.engine
    if config.precision == "tf32" and work.context.device.type == "cpu":
        say("engine", precision="fp32", why="a CPU knows no tf32")
    choice = _decide(config, work)
    rates = {f"{n}_tasks_per_second": rate for n, rate in choice.tasks_per_second.items()}
    say("engine", strategy=choice.engine.strategy, why=choice.reason, **rates)
    if config.strategy == "auto" and choice.holds:
        write_json(memory, _CHOICES.dump_python({**known, key: choice}, mode="json"))
    return choice.engine


_CHOICES = TypeAdapter(dict[str, Choice])


def _read(memory: Path) -> dict[str, Choice]:
    """Choices of earlier runs.

    Raises:
        ConfigError: the file is none of ours.
    """
    if not memory.exists():
        return {}
    try:
        return _CHOICES.validate_python(read_json(memory))
    except ValidationError:
        raise ConfigError(
            f"{memory} holds choices that this version cannot read. Remove the file; it is made "
            "again."
        ) from None


def _decide(config: EngineConfig, work: Work) -> Choice:
    budget = int(config.memory_share * bytes_for_a_worker(work.context))
    names = _candidates(config, work)
    if names == ["loop"]:  # nothing to weigh; to plan, PyTorch imports its compiler: seconds
        engine = _engine("loop", config, work)
        return Choice(engine=engine, reason=_why_alone("loop", config), tasks_per_second={})
    plans = {n: plan(n, config, work, budget) for n in names}
    fitting = [n for n in names if plans[n].num_bytes <= budget]
    if not fitting:
        least = min(plans.values(), key=lambda plan: plan.num_bytes)
        reason = f"needs {_mib(least.num_bytes)}, more than the {_mib(budget)} planned for"
        return Choice(engine=least.engine, reason=reason, tasks_per_second={})
    if len(fitting) == 1:
        (only,) = fitting
        several = len(names) > 1
        reason = f"the only one within {_mib(budget)}" if several else _why_alone(only, config)
        if plans[only].engine.at_once and len(work.tasks) == 1:
            reason += "; but a group has one task (tasks_per_group), so nothing is batched"
        return Choice(engine=plans[only].engine, reason=reason, tasks_per_second={})
    engines = {n: plans[n].engine for n in fitting}
    rates, any_failed = calibrate(engines, work)
    best = fitting[0]
    for name in fitting[1:]:
        if rates.get(name, 0.0) > _MARGIN * rates.get(best, 0.0):
            best = name
    reason = "fastest in a calibration" if rates else "the usual one, for none could be tried"
    if untried := [n for n in fitting if n not in rates]:
        reason += f"; not measured: {', '.join(untried)}"
    reason += f"; plans {_mib(plans[best].num_bytes)}"
    rounded = {str(n): round(r, 3) for n, r in rates.items()}
    return Choice(
        engine=engines[best], reason=reason, tasks_per_second=rounded, holds=not any_failed
    )


def _why_alone(only: Strategy, config: EngineConfig) -> str:
    if config.strategy == "auto":
        return "the only one that applies"
    if config.strategy != only:
        return f"{config.strategy} was asked for, and there is no second order to split"
    return "asked for"


def _candidates(config: EngineConfig, work: Work) -> list[Strategy]:
    """Strategies that differ for this algorithm, the usually best one first."""
    algorithm = work.algorithm
    splits = isinstance(algorithm, InnerLoop) and not algorithm.first_order
    if config.strategy != "auto":
        return [config.strategy if splits else _WHOLE.get(config.strategy, config.strategy)]
    one: list[Strategy] = ["loop", "split"] if splits else ["loop"]
    many: list[Strategy] = ["vmap", "vmap_split"] if splits else ["vmap"]
    if len(work.tasks) == 1:
        return one
    return [*many, *one] if work.context.device.type == "cuda" else [*one, *many]


class Plan(NamedTuple):
    """A strategy with what fits into memory, and the bytes that it takes."""

    engine: Engine
    num_bytes: int


def plan(name: Strategy, config: EngineConfig, work: Work, budget: int) -> Plan:
    """The engine of a strategy with the chunk and stride that fit into so many bytes."""
    algorithm, model, params, tasks, _ = work
    split = name in ("split", "vmap_split") and isinstance(algorithm, InnerLoop)
    steps = algorithm.num_inner_steps if isinstance(algorithm, InnerLoop) else 1
    copy = bytes_of(params) if split else 0
    stride = 1 if copy * steps <= budget // 4 else math.ceil(math.sqrt(steps))
    alone = Engine(strategy="split" if split else "loop")

    def gradient(model: Model, params: Params, task: Task) -> object:
        return meta_gradient(algorithm, model, params, [task], alone)

    try:
        each = planned_bytes(gradient, model, params, tasks[0])
    except RuntimeError as error:
        say("engine", strategy=name, not_planned=str(error).splitlines()[0])
        each = 1  # it runs all the same; an allocator's refusal halves the chunk
    each += copy * (steps // stride + stride)
    chunk = None
    if Engine(strategy=name).at_once:
        each = int(_BATCHED * each)
        chunk = min(len(tasks), config.chunk or max(1, budget // each))
    return Plan(_engine(name, config, work, chunk, stride), each * (chunk or 1))


def _engine(
    name: Strategy, config: EngineConfig, work: Work, chunk: int | None = None, stride: int = 1
) -> Engine:
    on_gpu = work.context.device.type == "cuda"
    return Engine(
        strategy=name,
        precision=config.precision if on_gpu or config.precision != "tf32" else "fp32",
        chunk=chunk,
        stride=stride,
        cuda_graphs=config.cuda_graphs and on_gpu,
    )


def _broadcast(engine: Engine, context: Context) -> Engine:
    """The main worker's engine on every worker."""
    text = torch.zeros(1, 1024, dtype=torch.uint8, device=context.device)
    if context.is_main:
        rows = TypeAdapter(Engine).dump_json(engine)
        text[0, : len(rows)] = torch.frombuffer(bytearray(rows), dtype=torch.uint8)
    everyone = gather_shares(text, context.world_size, context).cpu().numpy()
    main = next(row.tobytes() for row in everyone if row.any())
    return TypeAdapter(Engine).validate_json(main.rstrip(b"\0"))


def _key(config: EngineConfig, work: Work) -> str:
    """What the choice depends on: code, machine and its memory, algorithm, network, shapes."""
    model, tasks = work.model, work.tasks
    facts = {
        "version": _VERSION,
        "machine": [fingerprint(), bytes_for_a_worker(work.context)],
        "config": config.model_dump(mode="json"),
        "algorithm": repr(work.algorithm),
        "model": [model.batch_norm, repr(model.skeleton)],
        "params": {n: list(p.shape) for n, p in sorted(work.params.items())},
        "tasks": [len(tasks), tasks[0].num_ways, *(list(t.shape) for t in tasks[0][:4])],
    }
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
