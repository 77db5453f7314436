"""The page that every retraining leaves: what changed, what came of it, why, and at what cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.cluster.message import percent
from pipeline.cluster.retrain.policy import State

PAGE = "results/retrain/report.md"
RECORD = "results/retrain/report.json"
_SHOWN = 8
_AGAINST_CHAMPION = ("beats_champion", "no_harm", "group_no_harm")
_TITLES: dict[State, str] = {
    "promoted": "promoted",
    "not_promoted": "not promoted",
    "no_change": "nothing has changed",
    "too_few": "too few new examples",
    "steady": "the served traffic is as it was",
    "over_budget": "stopped, over its budget",
    "failed": "failed",
}


def title(record: dict[str, Any]) -> str:
    """One line: the day, and how it ended."""
    return f"Retraining of {record['date']}: {_TITLES[record['state']]}"


def page(record: dict[str, Any]) -> str:
    """Markdown of one retraining's record."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: dict[str, Any]) -> Iterator[str]:
    yield from (f"# {title(record)}", "", record["reason"], "")
    yield from _table(("", ""), _facts(record))
    if data := record["data"]:
        yield from ("", "## What changed in the data", "")
        yield from _data(data)
    if record["rules"]:
        yield from ("", "## What the candidate gained and lost", "")
        yield from _rules(record["rules"])
    if record["metrics"]:
        yield from ("", "## Accuracy on the frozen test episodes", "")
        rows = [(name, percent(found)) for name, found in record["metrics"].items()]
        yield from _table(("setting", "accuracy, 95 % interval"), rows)


def _facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    model, cost = record["model"], record["cost"]
    aliases = ", ".join(f"@{name}" for name in model["aliases"]) if model else ""
    version = (
        f"{model['model']} version {model['version']} ({aliases or 'no alias'})"
        if model
        else "none"
    )
    attempt = cost["attempt"]
    return [
        ("started by", record["because"]),
        ("commit", record["commit"]),
        ("begun at", record["start"]),
        ("model", version),
        (
            "wall-clock" + (f" of attempt {attempt:.0f}, the last one" if attempt > 1 else ""),
            f"{cost['seconds'] / 60:.1f} min",
        ),
        ("workers", f"{cost['num_workers']}, {cost['worker_hours']:.2f} worker hours"),
        ("processor time here", f"{cost['cpu_seconds'] / 60:.1f} min"),
    ]


def _data(data: dict[str, Any]) -> Iterator[str]:
    if not data["compared"]:
        yield from ("No earlier retraining to compare with: all of it is new.", "")
    rows = []
    for split, sizes in data["splits"].items():
        before, now = sizes["before"], sizes["now"]
        rows.append(
            (
                split,
                f"{before['classes']:,} -> {now['classes']:,}",
                f"{before['examples']:,} -> {now['examples']:,}",
                f"+{data['new_examples'][split]:,}",
            )
        )
    yield from _table(("split", "classes", "examples", "new examples"), rows)
    if data["compared"]:
        told = {
            "New classes": data["new_classes"],
            "Gone": data["lost_classes"],
            "In another split now": data["moved_classes"],
        }
        for what, names in told.items():
            if names:
                yield from ("", f"{what}: {_some(names)}.")


def _rules(rules: list[dict[str, Any]]) -> Iterator[str]:
    rows = [
        (
            rule["rule"].replace("_", " "),
            _plain(rule["setting"] or ""),
            _number(rule["value"]),
            _number(rule["limit"]),
            "passed" if rule["passed"] else "FAILED",
        )
        for rule in rules
    ]
    yield from _table(("rule", "where", "value", "limit", ""), rows)
    told = [r["reason"] for r in rules if r["rule"] in _AGAINST_CHAMPION or not r["passed"]]
    if told:
        yield ""
    yield from (f"- {_plain(reason, 400)}" for reason in told)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(_plain(name) for name in names[:_SHOWN]) + more


def _plain(text: str, most: int = 80) -> str:
    """A name out of somebody's data must not end a table's cell or begin a line."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("|", "\\|")[:most]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
