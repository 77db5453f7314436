"""Inline charts: plain SVG that takes its colours from the page, light or dark.

They are drawn narrow (a phone's width), so that their text stays readable where they shrink least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.evaluation.markup import Markup, tag

WIDTH, HEIGHT = 380.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 20.0, 12.0, 38.0
_MAX_POINTS = 160
_ENOUGH_QUERIES = 20  # the gap of a smaller bin shows luck
_OFFSETS = (0.0, -7.0, 7.0, 0.0)  # near values stay apart


@dataclass(frozen=True)
class Frame:
    """The plotting area: maps values to the picture's coordinates."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    height: float = HEIGHT

    def x(self, value: float) -> float:
        """Horizontal place of a value."""
        low, high = self.x_range
        return _LEFT + (value - low) / ((high - low) or 1) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Vertical place of a value."""
        low, high = self.y_range
        return (
            self.height
            - _BOTTOM
            - (value - low) / ((high - low) or 1) * (self.height - _TOP - _BOTTOM)
        )


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    title: str,
    x_label: str,
    percent: bool = False,
    dots: bool = False,
) -> Markup:
    """One curve. Long ones are averaged in equal stretches: noise must not bury the trend."""
    thinned = _thin(points)
    xs, ys = [x for x, _ in thinned], [y for _, y in thinned]
    low, high = min(ys), max(ys)
    room = (high - low) * 0.08 or 0.01
    top = min(high + room, 1.0) if percent and high <= 1 else high + room
    frame = Frame((min(xs), max(xs)), (max(low - room, 0.0), top))
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in thinned)
    marks = [tag("circle", cx=frame.x(x), cy=frame.y(y), r=2.4, class_="dot") for x, y in thinned]
    label = _percent if percent else _plain
    summary = f"{title}. From {label(ys[0])} at {xs[0]:,.0f} to {label(ys[-1])} at {xs[-1]:,.0f}."
    body = [
        _axes(frame, x_label, "", x_format=lambda v: f"{v:,.0f}", y_format=label),
        tag("polyline", points=path, class_="curve"),
        marks if dots else None,
    ]
    return figure(title, summary, *body)


def reliability_chart(
    confidence: Sequence[float], accuracy: Sequence[float], counts: Sequence[int], *, title: str
) -> Markup:
    """Accuracy over confidence, one circle a bin (area: its share of queries), against y = x."""
    frame = Frame((0.0, 1.0), (0.0, 1.0))
    total = max(sum(counts), 1)
    marks = []
    for c, a, n in zip(confidence, accuracy, counts, strict=True):
        if n:
            x, y = frame.x(c), frame.y(a)
            radius = 2.2 + 9 * math.sqrt(n / total)
            about = f"confidence {c:.0%}, right {a:.0%}, {n:,} queries"
            if n >= _ENOUGH_QUERIES:
                marks.append(tag("line", x1=x, y1=frame.y(c), x2=x, y2=y, class_="gap"))
            marks.append(tag("circle", tag("title", about), cx=x, cy=y, r=radius, class_="bubble"))
    body = [
        _axes(frame, "confidence", "share right", x_format=_percent, y_format=_percent),
        tag("line", x1=frame.x(0), y1=frame.y(0), x2=frame.x(1), y2=frame.y(1), class_="diagonal"),
        marks,
    ]
    listed = [
        f"{c:.0%}: {a:.0%}" for c, a, n in zip(confidence, accuracy, counts, strict=True) if n
    ]
    summary = f"{title}. Share right by confidence: {', '.join(listed)}."
    return figure(title, summary, *body)


@dataclass(frozen=True)
class Dot:
    """One measured value with its interval, in a row of a dot chart."""

    name: str
    value: float
    half_width: float
    style: str
    """CSS class."""


def dot_chart(
    rows: Sequence[tuple[str, Sequence[Dot]]], *, title: str, chance: Sequence[float]
) -> Markup:
    """Rows of accuracies on one axis; a short upright line marks the chance level of each row."""
    height = _TOP + _BOTTOM + 40.0 * len(rows)
    lowest = min([*chance, *(d.value - d.half_width for _, dots in rows for d in dots)])
    frame = Frame((max(0.0, math.floor(lowest * 10) / 10), 1.0), (float(len(rows)), 0.0), height)
    body = [_axes(frame, "accuracy", "", x_format=_percent, y_format=None)]
    spoken = []
    for i, ((label, dots), floor) in enumerate(zip(rows, chance, strict=True)):
        y = frame.y(i + 0.5)
        body.append(tag("text", label, x=_LEFT - 8, y=y + 4, class_="row-label"))
        body.append(
            tag("line", x1=frame.x(frame.x_range[0]), y1=y, x2=frame.x(1.0), y2=y, class_="grid")
        )
        body.append(
            tag("line", x1=frame.x(floor), y1=y - 8, x2=frame.x(floor), y2=y + 8, class_="chance")
        )
        body += [_dot(frame, y + _OFFSETS[j % 4], d) for j, d in reversed(list(enumerate(dots)))]
        spoken.append(f"{label}: " + ", ".join(f"{d.name} {d.value:.1%}" for d in dots))
    return figure(title, f"{title}. " + "; ".join(spoken) + ".", *body, height=height)


def figure(title: str, summary: str, *body: object, height: float = HEIGHT) -> Markup:
    """An <svg> that a screen reader reads as one picture."""
    children = [child for child in body if child is not None]
    return tag(
        "svg",
        tag("title", title),
        tag("desc", summary),
        children,  # type: ignore[arg-type]
        viewbox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
        aria_label=summary,
        class_="chart",
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) inside a range, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _dot(frame: Frame, y: float, dot: Dot) -> Markup:
    low, high = (frame.x(min(1.0, dot.value + s * dot.half_width)) for s in (-1, 1))
    about = f"{dot.name}: {dot.value:.2%} ± {dot.half_width:.2%}"
    x = frame.x(dot.value)
    whisker = tag("line", x1=low, y1=y, x2=high, y2=y, class_="whisker")
    if dot.style == "model":
        mark = tag("circle", cx=x, cy=y, r=6.5)
    elif dot.style == "pretrained":
        mark = tag("rect", x=x - 5, y=y - 5, width=10.0, height=10.0, rx=1.5)
    elif dot.style == "untrained":
        mark = tag("path", d=f"M{x:.1f} {y - 6:.1f}l6 11h-12z")
    else:
        mark = tag("path", d=f"M{x:.1f} {y - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5z")
    return tag("g", tag("title", about), whisker, mark, class_=f"mark {dot.style}")


def _axes(
    frame: Frame,
    x_label: str,
    y_label: str,
    *,
    x_format: Callable[[float], str],
    y_format: Callable[[float], str] | None,
) -> Markup:
    bottom = frame.height - _BOTTOM
    parts = []
    for value in ticks(*frame.x_range):
        x = frame.x(value)
        parts.append(tag("line", x1=x, y1=_TOP, x2=x, y2=bottom, class_="grid"))
        parts.append(tag("text", x_format(value), x=x, y=bottom + 16, class_="x-tick"))
    for value in ticks(*frame.y_range) if y_format else []:
        assert y_format is not None
        y = frame.y(value)
        parts.append(tag("line", x1=_LEFT, y1=y, x2=WIDTH - _RIGHT, y2=y, class_="grid"))
        parts.append(tag("text", y_format(value), x=_LEFT - 6, y=y + 4, class_="y-tick"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(tag("text", x_label, x=middle, y=frame.height - 5, class_="axis-label"))
    if y_label:
        place = f"translate(10 {(_TOP + bottom) / 2:.0f}) rotate(-90)"
        parts.append(tag("text", y_label, transform=place, class_="axis-label"))
    return tag("g", parts)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about _MAX_POINTS means over equal stretches."""
    size = math.ceil(len(points) / _MAX_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _percent(value: float) -> str:
    text = f"{value * 100:.1f}".removesuffix(".0")
    return f"{text}%"


def _plain(value: float) -> str:
    return f"{value:.3g}"
