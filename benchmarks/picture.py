"""The record as a picture: a panel a case, a bar a contestant, ratios to the best peer; memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.cases import CASES
from benchmarks.record import Machine, Record, Row
from benchmarks.report import best_peer, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PEER, _OURS, _BF16 = "#9aa0a6", "#1a6fb5", "#5bb1e8"
_INK, _PAPER = "#202124", "#ffffff"
_WIDTH, _BAR, _FRAME = 6.6, 0.26, 0.95  # inches
_MEMORY_BARS = 9  # height of the memory panel, in bars


class _Panel(NamedTuple):
    bars: int
    draw: Callable[[Axes], None]


def draw(record: Record, target: Path) -> None:
    """Write the picture; without rows there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [panel for machine in record.machines.values() for panel in _panels(record, machine)]
    if not panels:
        return
    lines = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    heights = [_BAR * max(panel.bars for panel in line) + _FRAME for line in lines]
    figure, grid = plt.subplots(
        len(lines),
        2,
        figsize=(2 * _WIDTH, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
        facecolor=_PAPER,
    )
    for axes, line in zip(grid, lines, strict=True):
        for place, panel in zip(axes, line, strict=False):
            panel.draw(place)
        for unused in axes[len(line) :]:
            unused.set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _panels(record: Record, machine: Machine) -> list[_Panel]:
    """Cases with a peer to compare with, and the memory of the inner loop."""
    place = machine.gpu or f"{machine.cores} CPU cores"
    rows = [row for row in record.rows if row.machine == machine.name]
    panels = []
    for case in CASES:
        own = [row for row in rows if row.case == case.name and row.tasks_per_second]
        if best_peer(own):
            title = f"{case.number}. {case.title}\n{place}"
            panels.append(_Panel(len(own), partial(_speed, title=title, rows=own)))
    steps = {case.name: case.inner_steps for case in CASES if case.kind == "memory"}
    memory = [(steps[row.case], row) for row in rows if row.case in steps]
    if memory:
        title = f"6. Peak memory of one meta-gradient, Conv4-64, 84x84x3, 5w5s\n{place}"
        panels.append(_Panel(_MEMORY_BARS, partial(_memory, title=title, points=memory)))
    return panels


def _speed(axes: Axes, *, title: str, rows: list[Row]) -> None:
    """Bars from the fastest down; thin lines from the slowest round to the quickest."""
    peer = best_peer(rows)
    rows = sorted(rows, key=lambda row: row.tasks_per_second or 0.0, reverse=True)
    widest = max(row.maximum or 0.0 for row in rows)
    for place, row in enumerate(rows):
        rate, low, high = row.tasks_per_second or 0.0, row.minimum or 0.0, row.maximum or 0.0
        axes.barh(place, rate, color=_colour(row), height=0.72)
        axes.plot([low, high], [place, place], color=_INK, linewidth=1.1, solid_capstyle="butt")
        text = f"{rate:,.3g}" if rate < 100 else f"{rate:,.0f}"
        text += "   best peer" if row is peer else f"   {ratio(row, peer):.2f}x"
        axes.text(high + 0.015 * widest, place, text, va="center", fontsize=8, color=_INK)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, widest * 1.28)
    axes.set_xlabel("tasks per second", fontsize=8)
    axes.tick_params(axis="y", length=0)
    _finish(axes, title, hidden=["top", "right", "left"])


def _memory(axes: Axes, *, title: str, points: list[tuple[int, Row]]) -> None:
    """One line an engine over inner steps; hollow marks where memory was extrapolated."""
    for label in dict.fromkeys(row.label for _, row in points):
        own = sorted((s, row) for s, row in points if row.label == label and row.peak_memory_bytes)
        xs = [steps for steps, _ in own]
        ys = [(row.peak_memory_bytes or 0) / 2**20 for _, row in own]
        colour = _colour(own[0][1])
        axes.plot(xs, ys, color=colour, linewidth=1.8)
        for x, y, (_, row) in zip(xs, ys, own, strict=True):
            fill = _PAPER if row.memory_extrapolated else colour
            axes.plot([x], [y], "o", color=colour, markerfacecolor=fill, markersize=5)
        axes.annotate(
            f"{label}: {ys[-1]:,.0f} MiB",
            (xs[-1], ys[-1]),
            (-4, 7),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=_INK,
        )
    axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.set_xlabel("inner steps", fontsize=8)
    axes.set_ylabel("MiB", fontsize=8)
    _finish(axes, title, hidden=["top", "right"])


def _colour(row: Row) -> str:
    if row.peer:
        return _PEER
    return _BF16 if row.dtype == "bf16" else _OURS


def _finish(axes: Axes, title: str, *, hidden: list[str]) -> None:
    axes.set_title(title, fontsize=9, loc="left", color=_INK)
    axes.tick_params(axis="both", labelsize=8)
    axes.spines[hidden].set_visible(False)
