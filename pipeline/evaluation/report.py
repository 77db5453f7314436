"""The report: one HTML file that holds all it shows, needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.evaluation.markup import Child, Markup, tag
from pipeline.evaluation.report_pictures import example_episodes, hardest_pairs_section
from pipeline.evaluation.report_style import STYLE
from pipeline.evaluation.results import MODEL, Evaluation, SettingResult, protocol
from pipeline.evaluation.statistics import Interval
from pipeline.evaluation.svg import Dot, dot_chart, line_chart, reliability_chart

LEARNERS = {
    MODEL: ("This model", "meta-trained"),
    "pretrained": ("Pre-trained", "nearest class mean of pre-trained features"),
    "untrained": ("Untrained", "the same algorithm on a fresh backbone"),
    "pixels": ("Pixels", "nearest class mean of raw pixels"),
}
_KEYS = {
    MODEL: tag("circle", cx=7, cy=7, r=6),
    "pretrained": tag("rect", x=2, y=2, width=10, height=10, rx=1.5),
    "untrained": tag("path", d="M7 1l6 11h-12z"),
    "pixels": tag("path", d="M7 .5l6.5 6.5l-6.5 6.5l-6.5 -6.5z"),
}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser itself refuses scripts and the network, whatever a class is called."""


def render(evaluation: Evaluation) -> str:
    """The whole page; the same evaluation gives the same bytes."""
    title = f"{evaluation.title}: {evaluation.store.domain}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        Markup(f"<style>{STYLE}</style>"),
    )
    main = tag(
        "main",
        tag("header", tag("h1", title), _lead(evaluation), _tiles(evaluation)),
        _comparison(evaluation),
        example_episodes(evaluation),
        _groups(evaluation),
        hardest_pairs_section(evaluation),
        _reliability(evaluation),
        _curves(evaluation),
        _protocol(evaluation),
        _data(evaluation),
        _provenance(evaluation),
        tag(
            "footer",
            "Made by Metaloom from frozen test episodes. Raw numbers: metrics.json, "
            "episodes.arrow.",
        ),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", main), lang="en") + "\n"


def _lead(evaluation: Evaluation) -> Markup:
    result = evaluation.headline
    shots, ways = result.episodes.num_shots, result.episodes.num_ways
    num_classes = sum(g.num_classes for g in result.groups)
    examples = "one example" if shots == 1 else f"{shots} examples"
    return tag(
        "p",
        f"Shown {examples} of each of {ways} classes that it never met in training, it names ",
        tag("strong", _percent(result.accuracy[MODEL].mean, 1)),
        f" of new pictures correctly. Guessing gets {_percent(result.chance, 1)}. ",
        f"Measured on {num_classes:,} classes{_from_groups(result)}.",
        class_="lead",
    )


def _from_groups(result: SettingResult) -> str:
    names = [g.group for g in result.groups if g.group]
    return f" ({', '.join(names)})" if 1 <= len(names) <= 6 else ""


def _tiles(evaluation: Evaluation) -> Markup:
    tiles = [
        tag(
            "li",
            tag("span", _words(result), class_="small"),
            tag("b", _percent(result.accuracy[MODEL].mean)),
            tag("span", f"± {_percent(result.accuracy[MODEL].half_width)}", class_="small"),
        )
        for result in evaluation.settings.values()
    ]
    return tag("ul", tiles, class_="tiles")


def _words(result: SettingResult) -> str:
    return f"{result.episodes.num_ways}-way {result.episodes.num_shots}-shot"


def _comparison(evaluation: Evaluation) -> Markup:
    learners = list(evaluation.headline.scores)
    rows = [
        (name, [Dot(_name(n), i.mean, i.half_width, n) for n, i in result.accuracy.items()])
        for name, result in evaluation.settings.items()
    ]
    chance = [result.chance for result in evaluation.settings.values()]
    chart = dot_chart(rows, title="Accuracy by setting and learner", chance=chance)
    return tag(
        "section",
        tag("h2", "Beside what it has to beat"),
        tag(
            "p",
            "Every learner answers the same queries of the same frozen episodes. Differences are "
            "paired episode by episode, so what is hard for all of them cancels.",
        ),
        tag("figure", chart, _legend(learners), class_="card compare"),
        _table(
            "Accuracy and, below it, how much better this model is; intervals are 95 %",
            ["Setting", *(_name(n) for n in learners), "Chance"],
            [_comparison_row(result, learners) for result in evaluation.settings.values()],
        ),
    )


def _legend(learners: Sequence[str]) -> Markup:
    items = [
        tag(
            "li", tag("svg", _KEYS[n], viewbox="0 0 14 14", class_=n, aria_hidden="true"), _about(n)
        )
        for n in learners
    ]
    mark = tag("line", x1=7, y1=0, x2=7, y2=14, class_="chance")
    dashed = tag("svg", mark, viewbox="0 0 14 14", aria_hidden="true")
    return tag("ul", items, tag("li", dashed, "Chance"), class_="key")


def _comparison_row(result: SettingResult, learners: Sequence[str]) -> list[Child]:
    cells: list[Child] = [_words(result)]
    for name in learners:
        better = result.difference.get(name)
        below = tag("span", _signed(better), class_="small") if better else None
        cells.append([_with_interval(result.accuracy[name]), below])
    return [*cells, _percent(result.chance)]


def _groups(evaluation: Evaluation) -> Markup:
    first = sorted(evaluation.headline.groups, key=lambda g: g.accuracy.mean)
    by_group = {
        name: {g.group: g.accuracy for g in result.groups}
        for name, result in evaluation.settings.items()
    }
    rows: list[list[Child]] = [
        [
            g.group or "(no group)",
            str(g.num_classes),
            _bar(g.accuracy.mean),
            *(_with_interval(accuracy.get(g.group)) for accuracy in by_group.values()),
        ]
        for g in first
    ]
    return tag(
        "section",
        tag("h2", "By group of classes"),
        tag("p", "Accuracy on the queries whose class is in the group, the weakest group first."),
        _table(
            f"The bar shows {evaluation.headline.episodes.name}",
            ["Group", "Classes", "", *evaluation.settings],
            rows,
        ),
    )


def _reliability(evaluation: Evaluation) -> Markup:
    figures = []
    for name, result in evaluation.settings.items():
        bins = result.calibration
        chart = reliability_chart(
            bins.confidence.tolist(),
            bins.accuracy.tolist(),
            bins.counts.tolist(),
            title=f"Reliability of {name}",
        )
        heading = tag("h3", f"{_words(result)}: off by {bins.error * 100:.1f} points on average")
        figures.append(tag("figure", heading, chart, class_="card"))
    return tag(
        "section",
        tag("h2", "Whether its confidence can be trusted"),
        tag(
            "p",
            "Queries are sorted by the model's confidence into bins of equal width; a bin's circle "
            "has the area of its share of queries. On the dashed line, 80 % confidence means right "
            "in 80 % of cases; above it the model is too modest, below it too sure. The mean gap "
            "is the expected calibration error.",
        ),
        tag("div", figures, class_="charts"),
    )


def _curves(evaluation: Evaluation) -> Markup:
    wanted = (("val_accuracy", "Validation accuracy", True), ("loss", "Training loss", False))
    figures = []
    for key, title, percent in wanted:
        points = [
            (float(p["step"]), float(p[key])) for p in evaluation.history if p.get(key) is not None
        ]
        if points:
            chart = line_chart(points, title=title, x_label="step", percent=percent, dots=percent)
            figures.append(tag("figure", tag("h3", title), chart, class_="card"))
    if not figures:
        return Markup("")
    return tag(
        "section",
        tag("h2", "How it got there"),
        tag("p", "Validation uses classes that are neither trained on nor tested here."),
        tag("div", figures, class_="charts"),
    )


def _protocol(evaluation: Evaluation) -> Markup:
    protocols = {name: protocol(result) for name, result in evaluation.settings.items()}
    keys = list(dict.fromkeys(key for p in protocols.values() for key in p))
    rows: list[list[Child]] = [
        [_label(key), *(_value(p.get(key)) for p in protocols.values())] for key in keys
    ]
    shared = [row for row in rows if len({str(cell) for cell in row[1:]}) == 1]
    own = [row for row in rows if row not in shared]
    return tag(
        "section",
        tag("h2", "Protocol"),
        tag(
            "p",
            "What a number must name before it can be compared with another one. Hashes are cut "
            "short here; metrics.json has them whole.",
        ),
        _table("Of every setting", ["", "Value"], [row[:2] for row in shared]),
        _table("Of each setting", ["", *protocols], own) if own else None,
    )


def _data(evaluation: Evaluation) -> Markup:
    """What preprocessing did, by reason; the names that it lists are folded away."""
    rows = [
        [_label(path.removesuffix(".count")), _value(value)]
        for path, value in _flatten(evaluation.store_report)
        if not path.endswith(".first")
    ]
    named = [
        [_label(path.removesuffix(".first")), _value(value)]
        for path, value in _flatten(evaluation.store_report)
        if path.endswith(".first")
    ]
    if not rows:
        return Markup("")
    folded = tag(
        "details", tag("summary", "Names, the first of each"), _table("", ["", "Value"], named)
    )
    return tag(
        "section",
        tag("h2", "Data"),
        tag("p", "What preprocessing kept, dropped and converted, by reason."),
        _table("", ["", "Value"], rows),
        folded if named else None,
    )


def _provenance(evaluation: Evaluation) -> Markup:
    rows = [[_label(path), _value(value)] for path, value in _flatten(evaluation.facts)]
    return tag("section", tag("h2", "Where it comes from"), _table("", ["", "Value"], rows))


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with their dotted paths; lists are leaves."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flatten(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Child]]) -> Markup:
    """A table that scrolls sideways on a narrow screen; the first cell of a row is its header."""
    number = ["number" if i and h not in ("", "Value") else None for i, h in enumerate(head)]
    heads = [tag("th", h, scope="col", class_=c) for h, c in zip(head, number, strict=True)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            (tag("td", cell, class_=c) for cell, c in zip(row[1:], number[1:], strict=True)),
        )
        for row in rows
    ]
    table = tag(
        "table",
        tag("caption", tag("span", caption)) if caption else None,
        tag("thead", tag("tr", heads)) if any(head) else None,
        tag("tbody", body),
    )
    return tag(
        "div", table, class_="scroll", tabindex=0, role="region", aria_label=caption or "table"
    )


def _name(learner: str) -> str:
    return LEARNERS[learner][0]


def _about(learner: str) -> str:
    return f"{LEARNERS[learner][0]}: {LEARNERS[learner][1]}"


def _label(path: str) -> str:
    return path.removeprefix("origin.").replace("_", " ").replace(".", " · ")


def _value(value: Any) -> Child:
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, str) and len(value) >= 32 and " " not in value:
        return tag("span", value[:16], class_="hash", title=value)
    return "–" if value is None else str(value)


def _bar(share: float) -> Markup:
    return tag("span", tag("i", style=f"width:{share:.1%}"), class_="bar", aria_hidden="true")


def _with_interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{_percent(interval.mean)} ± {_percent(interval.half_width)}"


def _signed(interval: Interval) -> str:
    return f"{interval.mean * 100:+.2f} ± {interval.half_width * 100:.2f} points"


def _percent(value: float, digits: int = 2) -> str:
    return f"{value * 100:.{digits}f}\N{NO-BREAK SPACE}%"
