"""The parts of docs/results.md about clusters: launchers, preprocessing, scale; from their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.files import read_json

FAULTS, TELEMETRY, PREPROCESS, SCALE = (
    Path(f"benchmarks/results/{name}.json")
    for name in ("faults", "telemetry", "preprocess", "scale")
)
PICTURE = Path("docs/images/scale.png")

_FAULTS = """\
## Launchers, and what fault tolerance costs

From `{record}`, made by `python -m benchmarks.faults --steps {steps}`: MAML's Conv4 with
{workers} workers, the launchers in turn, medians over {rounds} rounds. The shares are of a run's
whole time on its main worker, with a checkpoint every 20 steps: writing it; comparing the workers
before it; looking for incidents and stragglers in each step.
"""
_TELEMETRY = """\
## What a tracking server that is gone costs

From `{record}`, made by `python -m benchmarks.telemetry`: a stage writes ten points a second for
{seconds:.0f} seconds. The time of a point is all that the stage itself waits; the processor time is
that of the recorder beside it, once it has started.
"""
_PREPROCESS = """\
## Preprocessing over nodes

From `{record}`, made by `python -m benchmarks.preprocess` on {machine}: JPEGs decoded and resized,
the same bytes from each way.
"""
_SCALE = """\
## Steps on more workers

From `{record}`, made by `python -m benchmarks.scale`: a model of the step time from parts that
are measured alone, against whole runs that it has not seen, on {cores} cores; the rest is
extrapolated (grey in the picture) for cores of this kind and the network that is named.
"""


def render_faults(document: dict[str, Any], record: Path) -> str:
    """Markdown: one row a launcher."""
    rows = document["launchers"]
    parts = list(next(iter(rows.values()))["share_of_the_run"])
    rounds = next(iter(rows.values()))["rounds"]
    base = rows["local"]["tasks_per_second"]
    lines = [
        _FAULTS.format(record=record, rounds=rounds, **document),
        f"| launcher | tasks/s | of local | third step after | {' | '.join(parts)} |",
        f"|---|---:|---:|---:|{'---:|' * len(parts)}",
    ]
    for name, row in rows.items():
        rate, start = row["tasks_per_second"], row["seconds_to_the_third_step"]
        shares = " | ".join(f"{row['share_of_the_run'][part]:.3%}" for part in parts)
        lines.append(f"| {name} | {rate:.1f} | {rate / base:.2f} | {start:.1f} s | {shares} |")
    return "\n".join(lines)


def render_telemetry(document: dict[str, Any], record: Path) -> str:
    """Markdown: one row a kind of server."""
    lines = [
        _TELEMETRY.format(record=record, **document),
        "| the server | microseconds a point | recorder, of one core |",
        "|---|---:|---:|",
    ]
    for kind, row in document["servers"].items():
        point, share = 1e6 * row["seconds_a_point"], row["recorder_share_of_a_core"]
        lines.append(f"| {kind} | {point:.0f} | {share:.2%} |")
    return "\n".join(lines)


def render_preprocess(document: dict[str, Any], record: Path) -> str:
    """Markdown: one row a way."""
    lines = [
        _PREPROCESS.format(record=record, machine=document["machine"]),
        "| way | pictures/s | least to most |",
        "|---|---:|---:|",
    ]
    for row in document["rows"]:
        spread = f"{row['minimum']:,.0f} to {row['maximum']:,.0f}"
        lines.append(f"| {row['way']} | {row['pictures_per_second']:,.0f} | {spread} |")
    return "\n".join(lines)


def render_scale(document: dict[str, Any], record: Path, picture: Path) -> str:
    """Markdown: the model beside whole runs, and where each term begins to dominate."""
    lines = [
        _SCALE.format(record=record, cores=document["cores"]),
        "| workers | ms a step, measured | by the model | error |",
        "|---:|---:|---:|---:|",
    ]
    for one in document["checks"]:
        measured, modelled = 1e3 * one["measured_seconds"], 1e3 * one["modelled_seconds"]
        shared = " (sharing cores)" if one["oversubscribed"] else ""
        told = f"{measured:,.0f} | {modelled:,.0f} | {one['error']:+.1%}"
        lines.append(f"| {one['workers']}{shared} | {told} |")
    lines += ["", "| groups, network | largest term, from so many workers | best speed-up |"]
    lines.append("|---|---|---:|")
    for name, curve in document["curves"].items():
        terms = ", ".join(f"{term} from {first}" for term, first in curve["takes_over"].items())
        best = max(curve["points"], key=lambda point: float(point["speedup"]))
        speedup = f"{best['speedup']:,.0f}x on {best['workers']:,}"
        lines.append(f"| {name} | {terms} | {speedup} |")
    return "\n".join([*lines, "", f"![Seconds of each term over workers]({picture})"])


def cluster_sections(page: Path) -> list[str]:
    """Those whose record is there."""
    parts = []
    if FAULTS.exists():
        parts.append(render_faults(read_json(FAULTS), FAULTS))
    if TELEMETRY.exists():
        parts.append(render_telemetry(read_json(TELEMETRY), TELEMETRY))
    if PREPROCESS.exists():
        parts.append(render_preprocess(read_json(PREPROCESS), PREPROCESS))
    if SCALE.exists():
        parts.append(render_scale(read_json(SCALE), SCALE, PICTURE.relative_to(page.parent)))
    return parts
