"""The service's page in a real browser: by keyboard, by pointer, on a phone, in the dark."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.e2e.browser import FAULTS, FOCUS, MISSING, Page, chromium
from tests.e2e.page_service import Shelf, running

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
GREEK = "αβδλω"


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    """What the service keeps; tests read from it what the browser really sent."""
    return Shelf(challenger=False)


@pytest.fixture(scope="module")
def service_url(shelf: Shelf) -> Iterator[str]:
    with running(shelf) as url:
        yield url


@pytest.fixture(scope="module")
def challenged_url() -> Iterator[str]:
    """A service that has a challenger beside its champion."""
    with running(Shelf(challenger=True)) as url:
        yield url


@pytest.fixture(scope="module")
def service_key() -> str:
    return "test-key"


@pytest.fixture(scope="module")
def reader_key() -> str:
    """A key that may not make learners."""
    return "reader-key"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(driver: webdriver.Chrome, service_url: str, challenged_url: str) -> Iterator[Page]:
    """A fresh tab: no key, no errors on its console, nobody asked but the service."""
    before = driver.current_window_handle
    driver.switch_to.new_window("tab")
    after = driver.current_window_handle
    driver.switch_to.window(before)
    driver.close()
    driver.switch_to.window(after)
    tab = Page(driver)
    tab.screen(1280)
    tab.media()
    tab.complaints(), tab.hosts()
    yield tab
    assert tab.complaints() == []
    assert tab.hosts() <= {urlsplit(url).netloc for url in (service_url, challenged_url)}


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: METALOOM_SHOTS, for someone to look at."""
    wanted = os.environ.get("METALOOM_SHOTS")
    folder = Path(wanted) if wanted else tmp_path_factory.mktemp("shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def teach_letters(page: Page) -> None:
    """Steps 1 and 2 by pointer."""
    page.all("#alphabet-form button")[0].click()
    page.wait_for("#classes .card", 5)
    page.id("make").click()
    page.wait(lambda: page.id("learner-facts").is_displayed())


def picture_file(folder: Path, name: str, size: tuple[int, int], seed: int = 0) -> str:
    """A picture like no letter: blocks of noise."""
    noise = random.Random(seed)
    small = Image.new("L", (6, 6))
    small.putdata([noise.choice((0, 255)) for _ in range(36)])
    small.resize(size, Image.Resampling.NEAREST).convert("RGB").save(folder / name)
    return str(folder / name)


def last_answer(page: Page) -> WebElement:
    return page.all("#results .result")[0]


def test_it_asks_for_the_key_when_there_is_none(
    page: Page, service_url: str, service_key: str
) -> None:
    page.open(service_url, key=None)
    assert not page.id("workshop").is_displayed()
    page.press("wrong", Keys.ENTER)
    page.wait(lambda: "key is not accepted" in page.id("key-problem").text)
    assert "req-17" in page.id("key-problem").text
    page.press(service_key, Keys.ENTER)
    page.wait(lambda: page.id("workshop").is_displayed())
    assert page.js("return sessionStorage.getItem('metaloom-key')") == service_key
    page.driver.refresh()
    page.wait(lambda: page.id("workshop").is_displayed())
    page.id("forget-key").click()
    assert page.id("door").is_displayed()
    assert page.js("return sessionStorage.length") == 0


def test_the_key_leaves_the_address_bar(page: Page, service_url: str, service_key: str) -> None:
    page.open(service_url, service_key)
    assert "key" not in page.driver.current_url
    assert "key" not in page.js(
        "return location.href + document.documentElement.outerHTML.match(/test-key/)"
    )


def test_the_whole_way_by_keyboard(page: Page, service_url: str, service_key: str) -> None:
    """Letters in, a learner, answers with their evidence, an own character: no pointer at all."""
    page.open(service_url, service_key)
    page.tab_to("#alphabet")
    page.tab_to("#alphabet-form button")
    page.press(Keys.ENTER)
    page.wait_for("#classes .card", 5)
    assert (
        page.js("return [...document.querySelectorAll('.name')].map(e => e.value).join('')")
        == GREEK
    )
    page.tab_to("#learner-name")
    page.press("five letters", Keys.ENTER)
    page.wait(lambda: page.id("learner-facts").is_displayed())
    assert page.js("return document.activeElement.id") == "learner"
    facts = page.id("learner-facts").text
    assert "five letters" in facts and "lrn_" in facts and "metaloom-glyphs, version 3" in facts
    assert [t.split() for t in page.texts("#learner-classes li")] == [
        [c, "3", "examples"] for c in GREEK
    ]
    page.tab_to("#ask-letters")
    page.press(Keys.ENTER)
    page.wait_for("#results .evidence img", 6)
    assert "sure" in page.texts("#results .number")[-1]
    assert "decided by example" in page.id("status").text
    page.tab_to("#ask-draw")
    page.press(Keys.ENTER)
    page.press("ω", Keys.ENTER)
    page.wait_for("#results .result", 7)
    assert last_answer(page).find_element("css selector", ".label").text == "ω"


def test_letters_are_dark_on_white_as_the_stored_ones(
    page: Page, service_url: str, service_key: str, shelf: Shelf
) -> None:
    page.open(service_url, service_key)
    teach_letters(page)
    pictures = page.js("return [...document.querySelectorAll('.pictures img')].map(e => e.src)")
    assert len(pictures) == len(set(pictures)) == 15
    for content in next(reversed(shelf.pictures.values())):
        with Image.open(io.BytesIO(content)) as picture:
            grey = picture.convert("L")
            assert grey.getpixel((0, 0)) == 255 and grey.getextrema()[0] < 60


def test_drawing_with_a_pointer(page: Page, service_url: str, service_key: str) -> None:
    page.open(service_url, service_key)
    for card, (name, stroke) in enumerate([("bar", (0, 160)), ("dash", (160, 0))]):
        page.all(".card .name")[card].send_keys(name)
        page.all(".card .draw")[card].click()
        draw(page, stroke)
        page.id("pad-add").click()
        assert "Added" in page.id("pad-status").text
        page.id("pad-add").click()
        assert "Nothing is drawn" in page.id("pad-status").text
        draw(page, stroke)
        page.id("pad-undo").click()
        page.id("pad-done").click()
    page.id("make").click()
    page.wait(lambda: page.id("learner-facts").is_displayed())
    page.id("ask-draw").click()
    draw(page, (150, 8))
    page.id("pad-add").click()
    page.wait_for("#results .evidence img")
    assert last_answer(page).find_element("css selector", ".label").text == "dash"
    assert "Decided by" in last_answer(page).text


def draw(page: Page, stroke: tuple[int, int]) -> None:
    """One line through the middle of the pad."""
    canvas = page.id("pad-canvas")
    start = [-way // 2 for way in stroke]
    actions = ActionChains(page.driver).move_to_element_with_offset(canvas, *start).click_and_hold()
    actions.move_by_offset(*stroke).release().perform()


def test_files_are_made_small_and_unknown_ones_are_called_so(
    page: Page, service_url: str, service_key: str, shelf: Shelf, tmp_path: Path
) -> None:
    page.open(service_url, service_key)
    teach_letters(page)
    big = picture_file(tmp_path, "big.jpg", (1600, 1200))
    page.id("ask-files").send_keys(big)
    page.wait_for("#results .unknown .evidence img")
    text = last_answer(page).text
    assert "Unknown" in text and "Too little like any example" in text and "Closest" in text
    assert max(shelf.asked[-1]) <= 512
    assert shelf.asked[-1][0] * 3 == shelf.asked[-1][1] * 4
    assert "unknown" in page.id("status").text


def test_files_chosen_and_dropped_become_examples(
    page: Page, service_url: str, service_key: str, tmp_path: Path
) -> None:
    page.open(service_url, service_key)
    chosen = [picture_file(tmp_path, f"{i}.png", (64, 64), seed=i) for i in range(2)]
    page.all(".card input[type=file]")[0].send_keys("\n".join(chosen))
    page.wait_for(".card:first-child .pictures img", 2)
    assert drop_on(page, ".card:nth-child(2)", "image/png")
    page.wait_for(".card:nth-child(2) .pictures img")
    drop_on(page, ".card:nth-child(2)", "text/plain")
    page.wait(lambda: "Not a picture" in page.all(".card:nth-child(2) .problem")[0].text)
    page.all(".cross")[0].click()
    assert len(page.all(".card:first-child .pictures img")) == 1
    assert page.js("return document.activeElement.ariaLabel") == "Remove example 1 of class 1"


def drop_on(page: Page, selector: str, kind: str) -> bool:
    """Let a file fall on an element; true if the browser was kept from opening it."""
    return bool(
        page.driver.execute_async_script(
            """
            const [selector, kind, done] = arguments;
            const canvas = document.createElement("canvas");
            canvas.toBlob((blob) => {
              const transfer = new DataTransfer();
              transfer.items.add(new File([kind === "image/png" ? blob : "words"], "a", { type: kind }));
              const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
              done(!document.querySelector(selector).dispatchEvent(event));
            });
            """,
            selector,
            kind,
        )
    )


def test_classes_come_and_go(page: Page, service_url: str, service_key: str) -> None:
    page.open(service_url, service_key)
    page.id("add-class").click()
    page.press("third")
    assert len(page.all(".card")) == 3
    page.all(".card .remove")[1].click()
    assert [e.get_property("value") for e in page.all(".card .name")] == ["", "third"]
    for _ in range(20):
        page.id("add-class").click()
    assert len(page.all(".card")) == 20
    assert "at most 20 classes" in page.id("teach-problem").text


def test_mistakes_are_told_where_they_are_made(
    page: Page, service_url: str, service_key: str
) -> None:
    page.open(service_url, service_key)
    page.id("make").click()
    page.wait(lambda: "at least two classes" in page.id("teach-problem").text)
    page.all(".card .name")[0].send_keys("oak")
    page.all(".card .name")[1].send_keys("oak")
    page.id("make").click()
    page.wait(lambda: "no examples yet" in page.all(".card .problem")[0].text)
    drop_on(page, ".card:nth-child(1)", "image/png")
    page.wait_for(".card:nth-child(1) img")
    page.id("make").click()
    page.wait(lambda: "called “oak” already" in page.all(".card .problem")[1].text)
    assert page.js("return document.activeElement.matches('.card:nth-child(2) .name')")


def test_refusals_by_the_service_are_shown_in_place(
    page: Page, service_url: str, reader_key: str
) -> None:
    page.open(service_url, reader_key)
    page.all("#alphabet-form button")[0].click()
    page.id("make").click()
    page.wait(lambda: "may only read" in page.id("teach-problem").text)
    assert "This key does not allow that." in page.id("teach-problem").text
    assert "Reference: req-17" in page.id("teach-problem").text


def test_a_service_that_has_gone_is_told_in_plain_words(page: Page, service_key: str) -> None:
    with running(Shelf(challenger=False)) as url:
        page.open(url, service_key)
    page.hosts()
    page.all("#alphabet-form button")[0].click()
    page.id("make").click()
    page.wait(lambda: "cannot be reached" in page.id("teach-problem").text)
    page.hosts()


def test_no_challenger_is_said_plainly(page: Page, service_url: str, service_key: str) -> None:
    page.open(service_url, service_key)
    teach_letters(page)
    assert "There is no challenger at the moment" in page.id("compare-note").text
    assert not page.id("compare").is_enabled()


def test_champion_and_challenger_answer_side_by_side(
    page: Page, challenged_url: str, service_key: str, shots: Path
) -> None:
    page.open(challenged_url, service_key)
    teach_letters(page)
    page.id("compare").click()
    page.id("ask-letters").click()
    page.wait_for("#results .answer .evidence img", 12)
    answers = page.all("#results .result:first-child .answer")
    assert [a.find_element("css selector", ".by").text for a in answers] == [
        "Champion, version 3",
        "Challenger, version 4",
    ]
    first, second = (a.rect for a in answers)
    assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"] + 1
    assert "champion: " in page.id("status").text and "challenger: " in page.id("status").text
    for scheme in ("light", "dark"):
        page.media(scheme=scheme)
        page.shoot(shots / f"compare-{scheme}.png")
    page.screen(360)
    assert page.js(FAULTS) == []
    page.shoot(shots / "compare-phone.png")


def test_kept_learners_are_listed_opened_and_deleted(
    page: Page, service_url: str, service_key: str
) -> None:
    page.open(service_url, service_key)
    page.id("learner-name").send_keys("to be deleted")
    page.all("#alphabet-shots option")[0].click()
    teach_letters(page)
    opener = "#shelf [aria-label='Open to be deleted']"
    page.wait_for(opener)
    page.driver.refresh()
    page.wait_for(opener)[0].click()
    page.wait(lambda: "to be deleted" in page.id("learner-facts").text)
    page.js("scrollTo(0, 0)")
    page.all("[aria-label='Delete to be deleted']")[0].click()
    page.press(Keys.ESCAPE)
    assert page.all(opener)
    page.all("[aria-label='Delete to be deleted']")[0].click()
    page.all("#confirm .danger")[0].click()
    page.wait(lambda: not page.all(opener))
    assert page.id("learner-empty").is_displayed() and page.id("ask-empty").is_displayed()


def test_the_export_is_a_zip_file(
    page: Page, service_url: str, service_key: str, tmp_path: Path
) -> None:
    page.open(service_url, service_key)
    teach_letters(page)
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    page.id("export").click()
    page.wait(lambda: list(tmp_path.glob("lrn_*.zip")))
    with zipfile.ZipFile(next(tmp_path.glob("lrn_*.zip"))) as archive:
        assert "learner.json" in archive.namelist()


def test_the_model_card_gives_accuracy_with_its_interval(
    page: Page, service_url: str, service_key: str
) -> None:
    page.open(service_url, service_key)
    card = page.id("model").text
    for fact in (
        "protonet",
        "5 classes, 1 example each 95.1 ± 0.2 %",
        "28 × 28 pixels, grey",
        "up to 20 a class",
        "version 5: tensors.safetensors is not what its manifest says",
    ):
        assert fact in card


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_state_is_accessible_and_fits(
    page: Page, service_url: str, service_key: str, shots: Path, width: int, scheme: str
) -> None:
    """Own cheap checks: labels, names, alternatives, ids, headings, contrast, sizes, no overflow."""
    page.screen(width)
    page.media(scheme=scheme)
    page.open(service_url, key=None)
    check(page, shots / f"key-{width}-{scheme}.png")
    page.open(service_url, service_key)
    check(page, shots / f"empty-{width}-{scheme}.png")
    page.id("make").click()
    page.wait(lambda: page.id("teach-problem").text)
    check(page, shots / f"problem-{width}-{scheme}.png")
    page.all(".draw")[0].click()
    page.tab_to("#pad-letter", most=8)
    page.press("ж")
    check(page, shots / f"pad-{width}-{scheme}.png")
    page.press(Keys.ESCAPE)
    teach_letters(page)
    page.id("ask-letters").click()
    page.wait_for("#results .evidence img", 6)
    page.all("#results summary")[0].click()
    check(page, shots / f"results-{width}-{scheme}.png")


def check(page: Page, shot: Path) -> None:
    page.shoot(shot)
    assert page.js(FAULTS) == []


def test_the_keyboard_reaches_everything_and_is_always_seen(
    page: Page, service_url: str, service_key: str
) -> None:
    page.open(service_url, service_key)
    teach_letters(page)
    page.id("ask-letters").click()
    page.wait_for("#results .evidence img", 6)
    page.wait_for("#shelf li")
    page.js("document.querySelector('.skip').focus()")
    stops = {page.js(FOCUS)[0]}
    for _ in range(200):
        page.press(Keys.TAB)
        found = page.js(FOCUS)
        if found is None or found[0] in stops:
            break  # past the last one: nothing held the keyboard back
        stops.add(found[0])
        assert found[1], f"no visible focus: {found[2]}"
    else:
        raise AssertionError("the keyboard goes round in a circle that never closes")
    expected = page.js(
        "return [...document.querySelectorAll('a[href], button, input, select, summary')]"
        ".filter(e => e.checkVisibility() && !e.disabled && !e.dataset.stop).map(e => e.outerHTML)"
    )
    assert expected == []
