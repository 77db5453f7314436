"""The parts of the report that show pictures: example episodes, and the pairs that are confused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.markup import Markup, tag
from pipeline.evaluation.pictures import picture
from pipeline.evaluation.results import MODEL, Evaluation, SettingResult
from pipeline.evaluation.statistics import ConfusedPair

_PIXELATED_BELOW = 40
_PICTURES_OF_A_CLASS = 5
_MAX_WAYS = 10
_MAX_QUERIES = 15
_MAX_SUPPORT = 10


def example_episodes(evaluation: Evaluation) -> Markup:
    """Episodes as pictures: the first ones of the list, unpicked, and the hardest of all."""
    result = evaluation.headline
    shown = _chosen(result, evaluation.num_examples)
    many = len(shown) > 1
    if not shown:
        return Markup("")
    return tag(
        "section",
        tag("h2", "What it is asked, and what it answers"),
        tag(
            "p",
            f"Episodes of {result.episodes.name}: the model has just learned each class from the "
            "pictures on the left and then names the pictures on the right. A solid frame and ✓ "
            "mark a right answer, a dashed frame and ✗ a wrong one with the letter of the class "
            "that it named; the number is its confidence in percent. "
            + (
                "These are the first episodes of the list, unpicked, and the hardest of all." * many
            ),
        ),
        (_episode(evaluation, result, e, why) for e, why in shown),
        class_=_pixelated(evaluation),
    )


def hardest_pairs_section(evaluation: Evaluation) -> Markup:
    """Pairs of classes that are taken for each other, with pictures of both."""
    if not evaluation.hardest:
        return Markup("")
    return tag(
        "section",
        tag("h2", "What it mixes up"),
        tag(
            "p",
            f"The pairs that fail most often in {evaluation.hardest_setting}: of the queries of "
            "the first class, in episodes that held both, the share that was taken for the second. "
            "Some pairs are hard for people too; others point at a mislabelled class.",
        ),
        tag("ul", (_pair(evaluation, pair) for pair in evaluation.hardest), class_="pairs"),
        class_=_pixelated(evaluation),
    )


def _chosen(result: SettingResult, count: int) -> list[tuple[int, str]]:
    accuracy = result.scores[MODEL].accuracy
    hardest = int(np.argmin(accuracy))
    firsts = [(e, f"Episode {e}") for e in range(min(count - 1, len(accuracy))) if e != hardest]
    return [*firsts, (hardest, f"Episode {hardest}, the hardest")] if count else []


def _episode(evaluation: Evaluation, result: SettingResult, e: int, title: str) -> Markup:
    correct = result.scores[MODEL].correct[e]
    heading = f"{title}: {int(correct.sum())} of {len(correct)} right"
    ways = range(min(result.episodes.num_ways, _MAX_WAYS))
    return tag(
        "article",
        tag("h3", heading),
        (_class(evaluation, result, e, n) for n in ways),
        tag("p", f"{_MAX_WAYS} of {result.episodes.num_ways} classes are shown.", class_="note")
        if result.episodes.num_ways > _MAX_WAYS
        else None,
        class_="card episode",
    )


def _class(evaluation: Evaluation, result: SettingResult, e: int, label: int) -> Markup:
    episodes, store = result.episodes, evaluation.store
    name = store.classes[int(episodes.classes[e, label])].name
    support = episodes.support_rows[e][episodes.support_labels[e] == label]
    queries = np.flatnonzero(episodes.query_labels[e] == label)[:_MAX_QUERIES]
    learned = _pictures(evaluation, support[:_MAX_SUPPORT], f"support example of {name}")
    return tag(
        "div",
        tag(
            "div",
            tag("div", learned, class_="shots"),
            tag("div", tag("b", _letter(label)), " ", name, class_="name", title=name),
            class_="learned",
        ),
        tag("ul", (_query(evaluation, result, e, int(q)) for q in queries), class_="queries"),
        class_="class",
    )


def _query(evaluation: Evaluation, result: SettingResult, e: int, q: int) -> Markup:
    scores, classes = result.scores[MODEL], evaluation.store.classes
    true = classes[int(scores.query_class[e, q])].name
    answer = int(scores.predicted_class[e, q])
    said, letter = classes[answer].name, _letter(result.episodes.classes[e].tolist().index(answer))
    right, percent = bool(scores.correct[e, q]), f"{scores.confidence[e, q] * 100:.0f}"
    verdict = "right" if right else f"wrong, taken for {letter}, {said}"
    pixels = evaluation.store.gather(result.episodes.query_rows[e, q : q + 1])[0]
    return tag(
        "li",
        tag("span", picture(pixels, f"query of {true}: {verdict}, {percent} %"), class_="frame"),
        tag("b", "✓" if right else f"✗ {letter}"),
        " ",
        percent,
        class_="right" if right else "wrong",
    )


def _letter(label: int) -> str:
    """A short name of a class within one episode."""
    return chr(ord("A") + label) if label < 26 else str(label + 1)


def _pair(evaluation: Evaluation, pair: ConfusedPair) -> Markup:
    classes = evaluation.store.classes
    true, said = classes[pair.true_class], classes[pair.answered_class]
    groups = {true.group, said.group} - {""}
    return tag(
        "li",
        tag("span", f"{pair.rate:.0%}", class_="rate"),
        tag("span", f" of {pair.asked:,} queries", class_="small"),
        tag("span", f" · {', '.join(sorted(groups))}" if groups else "", class_="small"),
        (_side(evaluation, pair_id, word) for pair_id, word in _sides(pair)),
        class_="card",
    )


def _sides(pair: ConfusedPair) -> Iterator[tuple[int, str]]:
    yield pair.true_class, ""
    yield pair.answered_class, "taken for "


def _side(evaluation: Evaluation, class_id: int, word: str) -> Markup:
    stored = evaluation.store.classes[class_id]
    count = min(_PICTURES_OF_A_CLASS, stored.count)
    rows = stored.offset + np.linspace(0, stored.count - 1, count).round().astype(np.int64)
    return tag(
        "div",
        tag("div", tag("span", word, class_="small"), stored.name, class_="name"),
        tag("div", _pictures(evaluation, rows, f"example of {stored.name}"), class_="shots"),
        class_="side",
    )


def _pictures(
    evaluation: Evaluation,
    rows: npt.NDArray[Any],
    alt: str,
) -> list[Markup]:
    return [picture(pixels, alt) for pixels in evaluation.store.gather(rows)]


def _pixelated(evaluation: Evaluation) -> str | None:
    return "pixelated" if max(evaluation.store.image_shape[1:]) < _PIXELATED_BELOW else None
