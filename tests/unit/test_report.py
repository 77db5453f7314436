from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.evaluation.markup import join, tag, visible
from pipeline.evaluation.pictures import MAX_SIDE, encode
from pipeline.evaluation.plots import episode_columns, plot_records
from pipeline.evaluation.report import render
from pipeline.evaluation.results import MODEL, Evaluation, hardest_pairs, measure, metrics
from pipeline.evaluation.scoring import EpisodeScores
from pipeline.evaluation.svg import line_chart, ticks
from pipeline.store.reader import Store, StoredClass, open_store
from pipeline.store.writer import StoreContent, write_store
from pipeline.tasks.frozen import read_episodes
from pipeline.tasks.plan import SampleTasksConfig, sample_tasks
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style><h1>",
    "tab\tand\x00null\x1b[31m",
    "a & b 'c' \u202egpj",
    "\U0001f600" * 40,
)


def make_store(folder: Path, shape: tuple[int, int, int]) -> Store:
    rng = np.random.default_rng(0)
    splits = ("train", "val", "test")
    names = [
        (s, f"group {i % 2} <b>", f"{name} {s}") for s in splits for i, name in enumerate(HOSTILE)
    ]
    ordered = sorted(names, key=lambda n: (splits.index(n[0]), n[1], n[2]))
    classes = tuple(StoredClass(n, g, s, 8 * i, 8) for i, (s, g, n) in enumerate(ordered))
    pixels = rng.integers(0, 256, (8 * len(classes), *shape), dtype=np.uint8)
    order = np.arange(len(pixels))
    content = StoreContent("made", classes, pixels, order, [f"example {i}" for i in order])
    report = {"dropped_pictures": {"not a picture": {"count": 2, "first": ["<b>x</b>"]}}}
    write_store(folder, content, rows_per_shard=1000, report=report)
    return open_store(folder)


def random_scores(episodes: Any, accuracy: float, seed: int) -> EpisodeScores:
    rng = np.random.default_rng(seed)
    labels, N = episodes.query_labels, episodes.num_ways
    said = np.where(rng.random(labels.shape) < accuracy, labels, rng.integers(0, N, labels.shape))
    return EpisodeScores(
        correct=said == labels,
        confidence=rng.uniform(1 / N, 1, labels.shape).astype(np.float32),
        query_class=np.take_along_axis(episodes.classes, labels, axis=1),
        predicted_class=np.take_along_axis(episodes.classes, said, axis=1),
    )


def make_evaluation(folder: Path, shape: tuple[int, int, int] = (1, 12, 12)) -> Evaluation:
    store = make_store(folder / "store", shape)
    frozen = FrozenSpec(ways=[2, 5], shots=[1, 2], queries=3, episodes=30)
    stream = EpisodeSpec(ways=5, shots=1, queries=3)
    sample_tasks(SampleTasksConfig(train=stream, val=frozen, test=frozen), store, folder / "tasks")
    groups = [c.group for c in store.classes]
    settings = {}
    for name, episodes in read_episodes(folder / "tasks", "test").items():
        scores = {
            learner: random_scores(episodes, accuracy, seed)
            for seed, (learner, accuracy) in enumerate(
                ((MODEL, 0.8), ("pretrained", 0.6), ("untrained", 0.5), ("pixels", 0.4))
            )
        }
        settings[name] = measure(episodes, scores, groups, num_bins=10, batch_norm="running")
    hardest, setting = hardest_pairs(settings, 4)
    return Evaluation(
        title="A <title> & more",
        store=store,
        settings=settings,
        hardest=hardest,
        hardest_setting=setting,
        facts={"algorithm": "protonet", "origin": {"stopped": None, "note": "</td><script>"}},
        history=[
            {"step": i, "loss": 1 / i, "val_accuracy": i / 9 if i % 4 == 0 else None}
            for i in range(1, 9)
        ],
        store_report={"dropped_pictures": {"not <b>": {"count": 2, "first": ["<i>x</i>"]}}},
        num_examples=3,
    )


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return make_evaluation(tmp_path_factory.mktemp("evaluation"))


class Page(HTMLParser):
    """Every element of a page with its attributes and text, and the nesting checked."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(evaluation: Evaluation) -> Page:
    return Page(render(evaluation))


def test_nothing_runs_and_nothing_is_fetched(page: Page) -> None:
    """No script, no handler, no address but data URIs, and a policy that says so to the browser."""
    names = {name for name, _ in page.elements}
    assert names.isdisjoint({"script", "iframe", "object", "embed", "link", "base", "form", "a"})
    for _, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "data", "action", "srcset", "xlink:href"):
            assert (attributes.get(key) or "data:image/").startswith("data:image/")
    policy = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0]["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(" not in "".join(page.texts) and "@import" not in "".join(page.texts)


def test_hostile_names_are_shown_as_text(page: Page, evaluation: Evaluation) -> None:
    shown = {name for name in page.texts if name.strip()} | {
        str(a.get("title")) for _, a in page.elements
    }
    in_test = {
        visible(evaluation.store.classes[i].name) for i in evaluation.store.class_ids("test")
    }
    everything = "\n".join(shown)
    assert sum(name in everything for name in in_test) >= 4
    assert "group 0 <b>" in everything
    assert "A <title> & more" in everything
    assert "\x00" not in everything and "\x1b" not in everything and "\u202e" not in everything


@given(text=st.text(), value=st.text())
def test_markup_carries_any_text_unchanged_but_for_what_cannot_be_seen(
    text: str, value: str
) -> None:
    page = Page(tag("p", text, title=value))
    assert [name for name, _ in page.elements] == ["p"]
    assert "".join(page.texts) == visible(text)
    assert page.elements[0][1] == {"title": visible(value)}
    assert join(join(text)) == join(text)


def test_what_cannot_be_seen_is_replaced_and_what_joins_is_not() -> None:
    joined = "a\N{ZERO WIDTH JOINER}b\N{NO-BREAK SPACE}c\N{IDEOGRAPHIC SPACE}d"
    assert visible(joined) == joined
    hidden = "\x00\x1b\N{RIGHT-TO-LEFT OVERRIDE}\N{ZERO WIDTH SPACE}"
    assert visible(hidden) == "\N{REPLACEMENT CHARACTER}" * 4


def test_a_screen_reader_gets_every_picture_chart_and_table(page: Page) -> None:
    assert all((image.get("alt") or "").strip() for image in page.all("img"))
    charts = [s for s in page.all("svg") if s.get("role") == "img"]
    assert charts and all(len(s.get("aria-label") or "") > 30 for s in charts)
    assert all(s.get("role") == "img" or s.get("aria-hidden") == "true" for s in page.all("svg"))
    assert page.all("table") and all(h.get("scope") in ("row", "col") for h in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    assert any(m.get("name") == "viewport" for m in page.all("meta"))
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_right_and_wrong_differ_in_more_than_colour(page: Page, evaluation: Evaluation) -> None:
    """Marks, frames and alternative texts, one for each query of the episodes that are shown."""
    scores = evaluation.headline.scores[MODEL]
    hardest = int(scores.accuracy.argmin())
    shown = [e for e in range(2) if e != hardest] + [hardest]
    wrong = int((~scores.correct[shown]).sum())
    assert wrong > 0
    items = [li.get("class") for li in page.all("li")]
    assert items.count("wrong") == wrong == sum(t.startswith("✗ ") for t in page.texts)
    assert items.count("right") == scores.correct[shown].sum() == page.texts.count("✓")
    alts = [image.get("alt") or "" for image in page.all("img")]
    assert sum(": wrong, taken for " in alt for alt in alts) == wrong


def test_the_pictures_are_the_stored_ones(page: Page, evaluation: Evaluation) -> None:
    episodes = evaluation.headline.episodes
    shown = [image["src"] or "" for image in page.all("img")]
    first = int(episodes.support_rows[0][episodes.support_labels[0] == 0][0])
    expected = evaluation.store.gather(np.array([first]))[0, 0]
    content = base64.b64decode(shown[0].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), expected)


def test_the_page_states_the_numbers_of_metrics_json(page: Page, evaluation: Evaluation) -> None:
    text = " ".join(page.texts).replace("\N{NO-BREAK SPACE}", " ")
    numbers = metrics(evaluation)["made"]
    assert list(numbers) == ["2w1s", "2w2s", "5w1s", "5w2s"]
    for setting, found in numbers.items():
        accuracy = evaluation.settings[setting].scores[MODEL].correct.mean()
        assert found["accuracy"] == pytest.approx(accuracy, abs=1e-5)
        assert f"{found['accuracy'] * 100:.2f} %" in text
        for baseline in found["baselines"].values():
            assert f"{baseline['accuracy'] * 100:.2f} %" in text
        assert found["protocol"]["store_digest"] == evaluation.store.digest
    assert evaluation.store.digest[:16] in text


def test_a_number_names_its_whole_protocol(evaluation: Evaluation) -> None:
    needed = {
        *("split", "split_hash", "ways", "shots", "queries", "rotation", "batch_norm", "episodes"),
        *("interval", "seed", "store_digest", "episodes_digest", "within_group"),
    }
    for found in metrics(evaluation)["made"].values():
        assert needed <= set(found["protocol"])
        assert {"accuracy", "ci95", "episodes", "ece", "per_group", "baselines"} <= set(found)


def test_the_same_evaluation_gives_the_same_bytes(evaluation: Evaluation, tmp_path: Path) -> None:
    assert render(evaluation) == render(make_evaluation(tmp_path))


@pytest.mark.parametrize("shape", [(3, 90, 90), (2, 12, 12), (4, 12, 12)])
def test_pictures_of_any_shape_can_be_shown(shape: tuple[int, int, int], tmp_path: Path) -> None:
    page = Page(render(make_evaluation(tmp_path, shape)))
    content = base64.b64decode((page.all("img")[0]["src"] or "").partition(",")[2])
    image = Image.open(io.BytesIO(content))
    assert image.mode == "RGB" and max(image.size) == min(shape[1], MAX_SIDE)


def test_line_art_is_kept_exactly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, MAX_SIDE, MAX_SIDE), dtype=np.uint8)
    mime, content = encode(pixels)
    assert mime == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels[0])


def test_parts_without_data_are_left_out(evaluation: Evaluation) -> None:
    from dataclasses import replace

    bare = replace(evaluation, history=[], hardest=[], store_report={}, num_examples=0)
    text = " ".join(Page(render(bare)).texts)
    for heading in ("How it got there", "What it mixes up", "What it is asked", "Data"):
        assert (heading in text) is (heading == "Data" and "Data" in bare.title)


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside_the_range(low: float, width: float) -> None:
    found = ticks(low, low + width)
    slack = 1e-6 * (abs(low) + width)
    assert 2 <= len(found) <= 7
    assert all(low - slack <= t <= low + width + slack for t in found)
    step = found[1] - found[0]
    mantissa = step / 10 ** np.floor(np.log10(step * (1 + 1e-6)))
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3 * (1 + abs(low) / width)


def test_a_long_curve_is_averaged_not_cut() -> None:
    """A straight line stays one: its stretches' means lie on it, from end to end."""
    chart = line_chart([(i, 2.0 * i) for i in range(10_000)], title="t", x_label="step")
    points = re.search(r'points="([^"]+)"', chart)
    assert points
    xy = np.array([[float(v) for v in p.split(",")] for p in points[1].split()])
    assert len(xy) <= 170
    slopes = np.diff(xy[:, 1]) / np.diff(xy[:, 0])
    assert np.ptp(slopes) < 0.2 * abs(slopes.mean())


def test_plot_files_are_tables_that_agree_with_the_metrics(evaluation: Evaluation) -> None:
    records = plot_records(evaluation)
    for rows in records.values():
        assert rows and all(set(row) == set(rows[0]) for row in rows)
    numbers = metrics(evaluation)["made"]
    accuracy = {row["learner"]: row["accuracy"] for row in records["accuracy.json"]}
    assert accuracy["5w1s model"] == numbers["5w1s"]["accuracy"]
    assert accuracy["5w2s pixels"] == numbers["5w2s"]["baselines"]["pixels"]["accuracy"]
    assert [r["step"] for r in records["validation_accuracy.json"]] == [4, 8]
    assert len(records["training_loss.json"]) == 8
    total = evaluation.headline.scores[MODEL].correct.size
    assert sum(r["queries"] for r in records["reliability.json"]) == total


def test_the_episode_table_holds_every_episode_of_every_learner(evaluation: Evaluation) -> None:
    columns = episode_columns(evaluation)
    assert {len(values) for values in columns.values()} == {4 * 4 * 30}
    rows = list(zip(*columns.values(), strict=True))
    mine = [r[3] for r in rows if r[0] == "5w1s" and r[2] == MODEL]
    assert np.mean(mine) == pytest.approx(evaluation.settings["5w1s"].accuracy[MODEL].mean)
