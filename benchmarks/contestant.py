"""One process of a contestant: it builds its problem, then obeys its driver line by line.

Arguments: the case and the contestant as JSON, and a folder of its own. Commands and answers are
JSON lines on stdin and stdout: `ready`, `round`, `gradient`, `memory`. It ends when its stdin does.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import safetensors.torch
import torch

from benchmarks.cases import Case, Contestant, Device, Problem, make_network, make_problem
from benchmarks.networks import meta_gradients
from benchmarks.peers import PEERS
from benchmarks.roofline import Traffic
from pipeline.core.types import Params, Task
from pipeline.engine.choice import EngineConfig, choose_engine
from pipeline.engine.meta_gradient import STRATEGIES, Engine
from pipeline.engine.replay import Compute, computed_by
from pipeline.runtime.collectives import exact_sum, owned_groups
from pipeline.runtime.context import Context, worker_context

_HOARD_BYTES = 2 * 2**30  # on a card that all contestants share


class Runner(NamedTuple):
    """What a contestant can do."""

    work: Callable[[], int]
    """The least that it does at a time; returns the number of tasks, of all workers together"""
    gradient: Callable[[int], Params]
    """Sum over the first tasks of the meta-batch"""
    strategy: Callable[[], str | None] = lambda: None
    """What `auto` has chosen"""
    forget: Callable[[], None] = lambda: None
    """Drop recordings, which keep their memory"""
    data_wait_fraction: Callable[[], float | None] = lambda: None
    """Of the time of a whole training run"""


def main() -> None:
    """Serve until the driver hangs up."""
    case = Case.model_validate_json(sys.argv[1])
    contestant = Contestant.model_validate_json(sys.argv[2])
    answers = _take_stdout()
    with _context(contestant) as context:
        torch.set_num_threads(contestant.threads)
        runner = _runner(case, contestant, context, Path(sys.argv[3]))
        memory, clock = Memory(contestant.device), Clock(runner, contestant.device)
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = _obey(command, runner, memory, clock)
            except Exception as error:  # the driver goes on without this contestant
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            print(json.dumps(answer), file=answers, flush=True)


class Memory:
    """Peak memory above what the process held before its first gradient."""

    def __init__(self, device: Device) -> None:
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        self.exact = _reset_peak()
        status = _status()
        self.before = status.get("VmRSS", _max_rss()) if self.exact else _max_rss()

    def peak_bytes(self) -> int:
        """So far."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() - self.before
        return (_status()["VmHWM"] if self.exact else _max_rss()) - self.before


class Clock:
    """Times a runner; on a card, memory that the others need is given back between rounds."""

    def __init__(self, runner: Runner, device: Device) -> None:
        self.runner, self.on_gpu = runner, device == "cuda"
        self._gave_back = False

    def time(self, quanta: int) -> tuple[float, int]:
        """Seconds and tasks of some quanta."""
        if self._gave_back:
            self.runner.work()  # takes its memory again
        self._wait()
        start = time.perf_counter()
        tasks = sum(self.runner.work() for _ in range(quanta))
        self._wait()
        seconds = time.perf_counter() - start
        self._gave_back = self.on_gpu and torch.cuda.memory_reserved() > _HOARD_BYTES
        if self._gave_back:
            self.runner.forget()
            torch.cuda.empty_cache()
        return seconds, tasks

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def _obey(command: dict[str, Any], runner: Runner, memory: Memory, clock: Clock) -> dict[str, Any]:
    match command["do"]:
        case "ready":
            return {}
        case "round":
            seconds, tasks = clock.time(command["quanta"])
            return {"seconds": seconds, "tasks": tasks}
        case "gradient":
            traffic = Traffic()
            with traffic if command["count"] else nullcontext():
                gradient = runner.gradient(command["tasks"])
            cpu = {n: g.detach().double().cpu().contiguous() for n, g in gradient.items()}
            safetensors.torch.save_file(cpu, command["file"])
            return {"operations": list(traffic.operations.items())}
        case "memory":
            return {
                "bytes": memory.peak_bytes(),
                "strategy": runner.strategy(),
                "data_wait_fraction": runner.data_wait_fraction(),
            }
    raise ValueError(command)


def _runner(case: Case, contestant: Contestant, context: Context, scratch: Path) -> Runner:
    if case.kind == "training":
        from benchmarks.whole_loop import WholeLoop  # the others need none of it

        training = WholeLoop(case, context, scratch)
        return Runner(training.train, _no_gradient, data_wait_fraction=training.data_wait_fraction)
    dtype = torch.float64 if contestant.precision == "fp64" else torch.float32
    problem = make_problem(case, dtype, contestant.device)
    if contestant.is_peer:
        return _peer(case, contestant, problem)
    return _ours(case, contestant, problem, context, scratch)


def _no_gradient(num_tasks: int) -> Params:
    raise ValueError("a whole training run has no one gradient")


def _peer(case: Case, contestant: Contestant, problem: Problem) -> Runner:
    """Gradients add up in `.grad` over a meta-batch, as in a training loop."""
    network = make_network(case, problem.params)
    peer = PEERS[contestant.engine]
    tasks, position = problem.tasks, 0
    size = case.tasks_at_once(contestant.engine, contestant.device)

    def compute(chosen: list[Task]) -> None:
        with _autocast(contestant):
            peer(network, chosen, case.inner)

    def work() -> int:
        nonlocal position
        if position == 0:
            network.zero_grad(set_to_none=True)
        compute(tasks[position : position + size])
        position = (position + size) % len(tasks)
        return size

    def gradient(num_tasks: int) -> Params:
        nonlocal position
        position = 0
        network.zero_grad(set_to_none=True)
        compute(tasks[:num_tasks])
        return meta_gradients(network)

    return Runner(work, gradient)


def _ours(
    case: Case, contestant: Contestant, problem: Problem, context: Context, scratch: Path
) -> Runner:
    """One worker alone takes group after group; several take a meta-batch and add up."""
    if contestant.engine not in (*STRATEGIES, "auto"):
        raise ValueError(f"no strategy {contestant.engine!r}")
    num_groups = case.groups if contestant.device == "cpu" else 1
    size = case.meta_batch // num_groups
    groups = [problem.tasks[i * size : (i + 1) * size] for i in range(num_groups)]
    position = 0

    @cache  # in the first quantum: others stand still then, and a calibration means something
    def engine() -> Engine:
        if contestant.engine != "auto":
            return Engine(
                strategy=contestant.engine,
                precision=contestant.precision,
                cuda_graphs=contestant.device == "cuda",
            )
        return choose_engine(
            EngineConfig(precision=contestant.precision),
            problem.algorithm,
            problem.model,
            problem.params,
            groups[0],
            context,
            memory=scratch / "engines.json",
        )

    @cache
    def computed() -> Compute:
        return computed_by(engine())

    def compute(tasks: list[Task]) -> Params:
        found = computed()(problem.algorithm, problem.model, problem.params, tasks, engine())
        return found.gradient

    def work() -> int:
        nonlocal position
        if context.world_size == 1:
            compute(groups[position])
            position = (position + 1) % num_groups
            return size
        own = [compute(groups[g]) for g in owned_groups(num_groups, context)]
        flat = [torch.cat([value.flatten() for value in part.values()]) for part in own]
        exact_sum(flat, num_groups, context)
        return case.meta_batch

    return Runner(
        work,
        lambda num_tasks: compute(problem.tasks[:num_tasks]),
        lambda: engine().strategy,
        computed.cache_clear,
    )


def _autocast(contestant: Contestant) -> AbstractContextManager[Any]:
    if contestant.precision != "bf16":
        return nullcontext()
    return torch.autocast(contestant.device, dtype=torch.bfloat16)


@contextmanager
def _context(contestant: Contestant) -> Iterator[Context]:
    """Ours join their group as workers do; peers keep PyTorch's own settings."""
    if contestant.is_peer:
        yield Context(0, 1, torch.device(contestant.device))
        return
    with worker_context() as context:
        yield context


def _take_stdout() -> IO[str]:
    """Answers go out by the real stdout; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _reset_peak() -> bool:
    """Forget the peak so far (Linux); False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return "VmHWM" in _status()


def _status() -> dict[str, int]:
    """Bytes by name, of /proc/self/status."""
    rows = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}


def _max_rss() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    main()
