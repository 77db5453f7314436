"""The page before the real service: what it shows is what the service says and keeps."""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from tests.e2e.browser import MISSING, Page, chromium
from tests.serve.registered import NAME, move_by_hand, register
from tests.serve.service_process import ServiceProcess

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Of a registry with a champion and a challenger."""
    root = tmp_path_factory.mktemp("registry")
    for seed, alias in enumerate(("champion", "challenger")):
        version, _ = register(root, seed)
        move_by_hand(root, version.number, alias)
    one = ServiceProcess(tmp_path_factory.mktemp("service"), NAME)
    one.start(environment={"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"})
    yield one
    one.stop()


@pytest.fixture
def page(service: ServiceProcess, tmp_path: Path) -> Iterator[Page]:
    with chromium(tmp_path / "profile") as driver:
        tab = Page(driver)
        tab.screen(1280)
        tab.media()
        yield tab
        assert tab.complaints() == []
        assert tab.hosts() <= {service.url.removeprefix("http://")}


def test_a_learner_is_made_asked_compared_exported_and_deleted(
    page: Page, service: ServiceProcess, tmp_path: Path
) -> None:
    key = service.key()
    client = service.client(key)
    page.open(service.url, None)
    page.press("not-a-key", Keys.ENTER)
    page.wait(lambda: "key is not accepted" in page.id("key-problem").text)
    page.press(key, Keys.ENTER)
    page.wait(lambda: page.id("workshop").is_displayed())
    assert NAME in page.id("model").text and "protonet" in page.id("model").text

    page.id("learner-name").send_keys("five letters")
    page.all("#alphabet-form button")[0].click()
    page.wait_for("#classes .card", 5)
    page.id("make").click()
    page.wait(lambda: page.id("learner-facts").is_displayed())
    (kept,) = client.learners()
    assert kept.name == "five letters" and kept.examples == 15
    assert kept.id in page.id("learner-facts").text
    shown = [text.split()[0] for text in page.texts("#learner-classes li")]
    assert shown == [one.label for one in kept.classes]

    page.id("compare").click()
    page.id("ask-letters").click()
    page.wait_for("#results .answer .evidence img", 12)
    by = [answer.text for answer in page.all("#results .result:first-child .by")]
    assert by == ["Champion, version 1", "Challenger, version 2"]

    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    page.id("export").click()
    page.wait(lambda: list(tmp_path.glob("lrn_*.zip")))
    with zipfile.ZipFile(tmp_path / f"{kept.id}.zip") as archive:
        assert json.loads(archive.read("learner.json"))["id"] == kept.id

    page.js("scrollTo(0, 0)")
    page.all("[aria-label='Delete five letters']")[0].click()
    page.all("#confirm .danger")[0].click()
    page.wait(lambda: page.id("learner-empty").is_displayed())
    assert list(client.learners()) == []


def test_the_answers_shown_are_the_answers_given(page: Page, service: ServiceProcess) -> None:
    """The very pictures that the page sent, asked again by the client."""
    key = service.key("somebody else")
    client = service.client(key)
    page.open(service.url, key)
    page.all("#alphabet-form button")[0].click()
    page.wait_for("#classes .card", 5)
    page.id("make").click()
    page.wait(lambda: page.id("learner-facts").is_displayed())
    (kept,) = client.learners()
    page.js(
        "const real = fetch; window.sent = [];"
        "window.fetch = (where, what) => {"
        "  if (where.endsWith('/predict')) sent.push(...JSON.parse(what.body).queries);"
        "  return real(where, what);"
        "}"
    )
    page.id("ask-letters").click()
    page.wait_for("#results .evidence img", 6)
    sent = [base64.b64decode(query["image"].partition(",")[2]) for query in page.js("return sent")]
    given = client.ask(kept.id, sent).predictions
    shown = zip(page.texts("#results .label"), page.texts("#results .number"), strict=True)
    expected = [
        ("Unknown" if one.unknown else str(one.label), _percent(one.confidence)) for one in given
    ]
    assert sorted((label, number[: number.index("%") + 1]) for label, number in shown) == sorted(
        expected
    )


def _percent(share: float) -> str:
    return "over 99 %" if 0.995 < share < 1 else f"{round(100 * share)} %"
