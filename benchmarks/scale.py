"""What a step takes on 1 to 1,024 workers, on paper: `python -m benchmarks.scale`.

A model of the step time. Its parts are measured here: a group's meta-gradient in one thread, its
store reads, the update, validation, a checkpoint, and messages between two processes over loopback
gloo. It is checked against whole runs of 1, 2 and 4 workers, started by the local launcher, which
it has not seen; the error is printed and recorded. Everything beyond the cores of this machine is
extrapolated: it assumes a core of this kind for every worker, and for each pair of them the network
that is given (`--latency-us`, `--gigabytes`; default: loopback as measured, which flatters).

The model, for W workers, G groups and V values:

    compute      ceil(G / W) * group
    store reads  ceil(G / W) * read
    reduction    powers of two: (ceil(G / W) - 1) * add + log2(W) * (message(4 V) + add)
                 otherwise: (W - 1) * message(4 V * ceil(G / W)) + (G - 1) * add   (a gather)
    metrics      (W - 1) * message(bytes of ceil(G / W) groups), a gather
    update       the same on every worker
    validation   ceil(E / W) * episode, over the steps between two
    checkpoint   written by one worker while the others wait, over the steps between two

with message(b) = latency + b / bandwidth. No more workers than groups can work: G is the limit, and
is part of what a run computes, so raising it changes the run.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.cases import num_cores
from benchmarks.record import this_machine
from benchmarks.scale_measure import (
    VALIDATION_EPISODES,
    Compute,
    Network,
    Sizes,
    make_job,
    prepare,
)
from pipeline.core.config import Section
from pipeline.core.files import write_json
from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.runtime.journal import read_points
from pipeline.runtime.logs import run_main
from pipeline.training.loop import OuterConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECORD, PICTURE = Path("benchmarks/results/scale.json"), Path("docs/images/scale.png")
TERMS = ("compute", "store reads", "reduction", "metrics", "update", "validation", "checkpoint")
_NUM_GROUPS, _VALIDATE_EVERY, _CHECKPOINT_EVERY, _NUM_STEPS = 8, 12, 6, 36
_COLOURS = ("#1a6fb5", "#5bb1e8", "#c4622d", "#e0a53a", "#9aa0a6", "#5b8c3a", "#7a4ea3")


class Plan(Section):
    """What is scaled."""

    num_groups: int
    validate_every: int
    validation_episodes: int
    checkpoint_every: int


class Point(Section):
    """The model at one number of workers."""

    workers: int
    seconds: dict[str, float]
    """Of a step, by term"""
    speedup: float
    """Over one worker"""
    extrapolated: bool

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


class Check(Section):
    """A whole run beside the model."""

    workers: int
    oversubscribed: bool
    measured_seconds: float
    """Of a step, mean from the first step's end to the last one's"""
    modelled_seconds: float
    error: float
    """modelled / measured - 1"""


def step_seconds(cost: Compute, network: Network, plan: Plan, workers: int) -> dict[str, float]:
    """Seconds of a step by term."""
    groups, most = plan.num_groups, -(-plan.num_groups // workers)

    def message(num_bytes: float) -> float:
        return network.latency_seconds + num_bytes / network.bytes_per_second

    vector = 4.0 * cost.values
    if workers == 1:
        reduction, metrics = (groups - 1) * cost.add, 0.0
    else:
        metrics = (workers - 1) * message(cost.bytes_gathered * most)
        if _power_of_two(workers) and _power_of_two(groups):
            exchanged = math.log2(workers) * (message(vector) + cost.add)
            reduction = (most - 1) * cost.add + exchanged
        else:
            reduction = (workers - 1) * message(vector * most) + (groups - 1) * cost.add
    episodes = -(-plan.validation_episodes // workers)
    return {
        "compute": most * cost.group,
        "store reads": most * cost.read,
        "reduction": reduction,
        "metrics": metrics,
        "update": cost.update,
        "validation": episodes * cost.validation_episode / plan.validate_every,
        "checkpoint": cost.checkpoint / plan.checkpoint_every,
    }


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def scaled(cost: Compute, factor: float) -> Compute:
    """The same work where a worker has but a part of a core."""
    parts = ("group", "read", "update", "add", "validation_episode", "checkpoint")
    return cost.model_copy(update={part: factor * getattr(cost, part) for part in parts})


def curve(cost: Compute, network: Network, plan: Plan, workers: Sequence[int]) -> list[Point]:
    """The model at each number of workers that has a group for everyone."""
    alone = sum(step_seconds(cost, network, plan, 1).values())
    points = []
    for number in workers:
        if number <= plan.num_groups:
            seconds = step_seconds(cost, network, plan, number)
            speedup = alone / sum(seconds.values())
            beyond = number > num_cores()
            points.append(
                Point(workers=number, seconds=seconds, speedup=speedup, extrapolated=beyond)
            )
    return points


def takes_over(points: Sequence[Point]) -> dict[str, int]:
    """The least number of workers at which each term is the largest."""
    first: dict[str, int] = {}
    for point in points:
        largest = max(point.seconds, key=point.seconds.__getitem__)
        first.setdefault(largest, point.workers)
    return first


def fitted(messages: Sequence[tuple[int, float]], add_seconds_per_byte: float) -> Network:
    """Latency and bandwidth by least squares of the relative error, neither below zero.

    Args:
        messages: (bytes, seconds); the seconds include adding what came to what was there.
    """
    sizes, seconds = np.array(sorted(messages), dtype=np.float64).T
    pure = np.maximum(seconds - sizes * add_seconds_per_byte, 1e-9)
    latency, slope = np.linalg.lstsq(np.stack([1 / pure, sizes / pure], 1), np.ones(len(pure)))[0]
    if slope <= 0 or latency <= 0:  # a message of noise: the bounds by the extremes
        latency, slope = pure[0], pure[-1] / sizes[-1]
    return Network(
        name="loopback gloo",
        latency_seconds=float(latency),
        bytes_per_second=float(1 / slope),
        measured=True,
    )


def measure(folder: Path) -> tuple[Compute, Compute, Network]:
    """Parts of a step on an idle machine and on one whose cores are all busy; the network."""
    outer = OuterConfig(num_steps=1)
    found = []
    for workers in (1, num_cores()):
        job = make_job(folder, f"measure-{workers}", outer, _NUM_GROUPS)
        entry = Job("benchmarks.scale_measure:compute", job, workers)
        found.append(Compute.model_validate(launch_local(entry, folder / f"launch-{workers}")))
    values = found[0].values
    sizes = Sizes(values=[16, values // 4, values, 4 * values, 16 * values])
    entry = Job("benchmarks.scale_measure:exchange", sizes, 2)
    messages = [(int(b), float(t)) for b, t in launch_local(entry, folder / "launch-network")]
    return found[0], found[1], fitted(messages, found[0].add / (4 * values))


def check(folder: Path, workers: int, modelled: float) -> Check:
    """Train with so many workers."""
    outer = OuterConfig(
        num_steps=_NUM_STEPS, validate_every=_VALIDATE_EVERY, checkpoint_every=_CHECKPOINT_EVERY
    )
    job = make_job(folder, f"run-{workers}", outer, _NUM_GROUPS)
    entry = Job("pipeline.training.meta_train:run", job, workers)
    launch_local(entry, folder / f"launch-run-{workers}")
    times = [point.time for point, _ in read_points(job.journal)]
    # from the end of one whole period to that of the last: validations and checkpoints in full
    measured = (times[-1] - times[_VALIDATE_EVERY - 1]) / (len(times) - _VALIDATE_EVERY)
    return Check(
        workers=workers,
        oversubscribed=workers > num_cores(),
        measured_seconds=measured,
        modelled_seconds=modelled,
        error=modelled / measured - 1,
    )


def modelled_here(idle: Compute, busy: Compute, network: Network, plan: Plan, number: int) -> float:
    """The model on this machine, whose cores the workers share."""
    cost = idle if number == 1 else scaled(busy, max(1.0, number / num_cores()))
    return sum(step_seconds(cost, network, plan, number).values())


def main() -> None:
    """Measure, check, print, write, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--num-groups", default="8,64,1024", help="meta-batches to scale")
    parser.add_argument("--latency-us", type=float, help="of a message of the real network")
    parser.add_argument("--gigabytes", type=float, help="a second, of the real network")
    parser.add_argument("--checks", default="1,2,4", help="numbers of workers to really run")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    if (options.latency_us is None) != (options.gigabytes is None):
        parser.error("--latency-us and --gigabytes describe a network together")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    with tempfile.TemporaryDirectory(prefix="metaloom-scale-") as name:
        folder = Path(name)
        prepare(folder)
        idle, busy, network = measure(folder)
        plan = Plan(
            num_groups=_NUM_GROUPS,
            validate_every=_VALIDATE_EVERY,
            validation_episodes=VALIDATION_EPISODES,
            checkpoint_every=_CHECKPOINT_EVERY,
        )
        numbers = [int(n) for n in options.checks.split(",") if n]
        checks = [check(folder, n, modelled_here(idle, busy, network, plan, n)) for n in numbers]
    networks = [network]
    if options.latency_us is not None:
        told = f"{options.latency_us:g} us, {options.gigabytes:g} GB/s, as given"
        given = options.latency_us * 1e-6, options.gigabytes * 1e9
        networks.append(
            Network(name=told, latency_seconds=given[0], bytes_per_second=given[1], measured=False)
        )
    defaults = OuterConfig()
    curves = {}
    for over in networks:
        for groups in (int(g) for g in options.num_groups.split(",")):
            usual = Plan(
                num_groups=groups,
                validate_every=defaults.validate_every,
                validation_episodes=400,
                checkpoint_every=defaults.checkpoint_every,
            )
            curves[f"{groups} groups, {over.name}"] = curve(busy, over, usual, _workers())
    report(idle, busy, network, checks, curves)
    document = {
        "machine": this_machine("cpu").name,
        "cores": num_cores(),
        "compute": {"idle": idle.model_dump(), "busy": busy.model_dump()},
        "networks": [n.model_dump() for n in networks],
        "checks": [c.model_dump() for c in checks],
        "curves": {
            name: {
                "points": [{**p.model_dump(), "total": p.total} for p in points],
                "takes_over": takes_over(points),
            }
            for name, points in curves.items()
        },
    }
    write_json(options.out, document)
    draw(curves, checks, options.picture)
    print(f"wrote {options.out} and {options.picture}")


def _workers() -> list[int]:
    return sorted({*(2**k for k in range(11)), 3, 6, 12, 48, 192, 768})


def report(
    idle: Compute,
    busy: Compute,
    network: Network,
    checks: Sequence[Check],
    curves: dict[str, list[Point]],
) -> None:
    """Print what was measured, how wrong the model is, and where each term takes over."""
    print(f"\nmeasured, one thread, {idle.values:,} values (idle machine / all cores busy):")
    for part in ("group", "read", "update", "add", "validation_episode", "checkpoint"):
        print(f"  {part:20} {1e3 * getattr(idle, part):9.3f} / {1e3 * getattr(busy, part):9.3f} ms")
    rate = network.bytes_per_second / 1e9
    print(f"  {network.name}: {1e6 * network.latency_seconds:.0f} us + bytes / {rate:.2f} GB/s")
    print(f"\nwhole runs of {_NUM_GROUPS} groups on {num_cores()} cores beside the model:")
    for one in checks:
        note = " (more workers than cores)" if one.oversubscribed else ""
        print(
            f"  {one.workers} workers: {1e3 * one.measured_seconds:8.1f} ms a step, "
            f"model {1e3 * one.modelled_seconds:8.1f} ms, {one.error:+.1%}{note}"
        )
    if checks:
        worst = max(abs(one.error) for one in checks)
        mean = statistics.fmean(abs(one.error) for one in checks)
        print(f"  the model is off by {mean:.1%} in the mean, {worst:.1%} at most")
    for name, points in curves.items():
        print(f"\n{name}; * = extrapolated, beyond this machine's cores; ms a step")
        print("workers " + " ".join(f"{term:>11}" for term in TERMS) + "      total  speed-up")
        for point in points:
            cells = " ".join(f"{1e3 * point.seconds[term]:11.3f}" for term in TERMS)
            mark = "*" if point.extrapolated else " "
            print(
                f"{point.workers:6}{mark} {cells} {1e3 * point.total:10.2f} {point.speedup:8.1f}x"
            )
        told = ", ".join(f"{term} from {first}" for term, first in takes_over(points).items())
        limit = points[-1].workers
        print(f"largest term: {told} workers; num_groups allows {limit} of these at most")


def draw(curves: dict[str, list[Point]], checks: Sequence[Check], target: Path) -> None:
    """A panel for each curve: seconds of every term over workers, whole runs as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(
        -(-len(curves) // 3),
        min(3, len(curves)),
        figsize=(4.6 * min(3, len(curves)), 3.6 * -(-len(curves) // 3)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes, (name, points) in zip(grid.flat, curves.items(), strict=False):
        _panel(axes, name, points, checks if points[-1].workers == _NUM_GROUPS else [])
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, ncols=9, loc="outside upper center")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _panel(axes: Axes, name: str, points: Sequence[Point], checks: Sequence[Check]) -> None:
    xs = [point.workers for point in points]
    for term, colour in zip(TERMS, _COLOURS, strict=True):
        axes.plot(xs, [point.seconds[term] for point in points], color=colour, label=term)
    axes.plot(xs, [point.total for point in points], color="#202124", linewidth=2, label="a step")
    real = [one for one in checks if not one.oversubscribed]
    if real:
        seconds = [one.measured_seconds for one in real]
        axes.plot([one.workers for one in real], seconds, "o", color="#202124", label="whole runs")
    axes.axvspan(num_cores(), max(xs[-1], num_cores() + 1), color="#f1f3f4", zorder=-1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(f"{name}\n(grey: extrapolated)", fontsize=8)
    axes.set_xlabel("workers", fontsize=8)
    axes.set_ylabel("seconds of a step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    run_main(main)
