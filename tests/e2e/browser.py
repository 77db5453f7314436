"""A real headless Chromium, and what tests ask of every page."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

PROGRAMS = ("chromium", "chromedriver")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--lang=en --window-size=1280,900"
)
_OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
"""The page must need nobody but its own service."""


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*_FLAGS.split(), _OFFLINE, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(str(shutil.which("chromedriver"))))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """One tab on the service's page."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, key: str | None) -> None:
        self.driver.get(f"{url}/" + (f"#key={key}" if key else ""))
        self.wait(lambda: self.id("workshop" if key else "door").is_displayed())

    def id(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [
            str(t)
            for t in self.js(
                f"return [...document.querySelectorAll({selector!r})].map(e => e.textContent)"
            )
        ]

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Any) -> Any:
        return WebDriverWait(self.driver, 20).until(lambda _: condition())

    def wait_for(self, selector: str, number: int = 1) -> list[WebElement]:
        self.wait(lambda: len(self.all(selector)) >= number)
        return self.all(selector)

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, selector: str, *, most: int = 120) -> None:
        """Move the keyboard to an element as people do."""
        for _ in range(most):
            if self.js("return document.activeElement.matches(arguments[0])", selector):
                return
            self.press(Keys.TAB)
        raise AssertionError(f"the keyboard does not reach {selector}")

    def media(self, *, scheme: str = "light") -> None:
        """What the user prefers; without smooth scrolling, so that clicks meet their targets."""
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        listed = [{"name": name, "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": listed})

    def screen(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def shoot(self, target: Path) -> None:
        """The whole page as a picture, from its top."""
        self.js("scrollTo(0, 0)")
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"}
        )
        target.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Errors on the console, apart from refusals by the service, which tests provoke."""
        entries = self.driver.get_log("browser")
        return [
            e["message"] for e in entries if e["level"] == "SEVERE" and e["source"] != "network"
        ]

    def hosts(self) -> set[str]:
        """Every host that was asked for anything since the last call."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [
            e["params"]["request"] for e in events if e["method"] == "Network.requestWillBeSent"
        ]
        addresses = [urlsplit(request["url"]) for request in sent]
        return {a.netloc for a in addresses if a.scheme in ("http", "https", "ws", "wss")}


FAULTS = """
const shown = (e) => e.checkVisibility({ visibilityProperty: true });
const name = (e) => `${e.tagName} #${e.id} .${e.className} ${e.textContent.trim().slice(0, 30)}`;
const faults = [];
const seen = new Set();
for (const e of document.querySelectorAll("[id]")) {
  if (seen.has(e.id)) faults.push(`id ${e.id} occurs twice`);
  seen.add(e.id);
}
for (const e of document.querySelectorAll("img")) {
  if (!e.hasAttribute("alt")) faults.push(`no alt: ${name(e)}`);
  if (e.alt && (!e.complete || !e.naturalWidth)) faults.push(`not loaded: ${e.alt}`);
}
for (const e of document.querySelectorAll("input, select")) {
  if (!e.labels.length && !e.ariaLabel) faults.push(`no label: ${name(e)}`);
}
for (const e of document.querySelectorAll("button, a, summary")) {
  if (!(e.ariaLabel || e.textContent).trim()) faults.push(`no name: ${name(e)}`);
}
for (const e of document.querySelectorAll("button, input, select, summary")) {
  const target = (e.closest("label") ?? e).getBoundingClientRect();
  if (shown(e) && Math.min(target.width, target.height) < 24) faults.push(`small: ${name(e)}`);
}
let level = 0;
for (const e of [...document.querySelectorAll("h1, h2, h3")].filter(shown)) {
  const next = Number(e.tagName[1]);
  if (next > level + 1) faults.push(`heading skips a level: ${name(e)}`);
  level = next;
}
if (document.querySelectorAll("main").length !== 1) faults.push("not one main");
if (!document.documentElement.lang) faults.push("no language");
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
if (wide > 0) faults.push(`scrolls sideways by ${wide} px`);
for (const e of [...document.querySelectorAll("body *")].filter(shown)) {
  const box = e.getBoundingClientRect();
  if (box.right > innerWidth + 1 && box.width > 1) faults.push(`sticks out: ${name(e)}`);
}

const colour = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
const channel = (c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
function ground(e) {
  for (; e; e = e.parentElement) {
    const found = colour(getComputedStyle(e).backgroundColor);
    if (found.length === 3 || found[3] > 0.99) return found;
  }
  return [255, 255, 255];
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !shown(e) || e.closest("option, script, template")) continue;
  const [a, b] = [light(colour(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
  const contrast = (a + 0.05) / (b + 0.05);
  if (contrast < 4.5) faults.push(`contrast ${contrast.toFixed(2)}: ${name(e)}`);
}
return faults;
"""
"""Cheap checks of what people with a keyboard, a screen reader or weak eyes need."""

FOCUS = """
const e = document.activeElement;
if (e === document.body) return null;
const box = (e.closest(".button") ?? e);
const style = getComputedStyle(box);
e.dataset.stop ??= String(document.querySelectorAll("[data-stop]").length + 1);
return [e.dataset.stop, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
        `${e.tagName} #${e.id} ${e.ariaLabel ?? e.textContent.trim().slice(0, 30)}`];
"""
"""Which element has the keyboard, and whether one can see it."""
