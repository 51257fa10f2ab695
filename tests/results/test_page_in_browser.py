"""The page in a real browser: silent, legible at two widths, reachable by keyboard, light and dark, on paper.

Chromium and its driver come with the system: `apt-get install chromium chromium-driver` on Debian. Without them these
tests are skipped, unless QLORA_LOWMEM_BROWSER=required.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from helpers import ROOT
from results.examples import CARD

BROWSERS = ("google-chrome", "chromium", "chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = (1280, 390)
SMALLEST_TEXT = 9  # CSS pixels


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        reason = "no Chromium with its driver on this machine: apt-get install chromium-driver"
        if os.environ.get("QLORA_LOWMEM_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield found
    found.quit()


def show(
    browser: webdriver.Chrome,
    page: Path,
    width: int = 1280,
    scheme: str = "light",
    media: str = "screen",
    height: int = 900,
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())


DRAWINGS = """
return [...document.querySelectorAll('figure')].map(figure => {
  const shown = [...figure.querySelectorAll('svg')].filter(svg => svg.getClientRects().length);
  return shown.map(svg => {
    const frame = svg.getBoundingClientRect(), box = svg.getBBox();
    const scale = frame.width / svg.viewBox.baseVal.width;
    const texts = [...svg.querySelectorAll('text')].map(text => {
      const r = text.getBoundingClientRect();
      return {words: text.textContent, size: parseFloat(getComputedStyle(text).fontSize) * scale,
              left: r.left - frame.left, right: r.right - frame.left,
              top: r.top - frame.top, bottom: r.bottom - frame.top};
    });
    const shapes = [...svg.querySelectorAll('path[style*="--"], use')].filter(shape => {
      const r = shape.getBoundingClientRect();
      return !shape.closest('defs') && r.width + r.height > 0;
    }).length;
    return {name: svg.getAttribute('aria-label'), width: frame.width, height: frame.height,
            box: [box.width, box.height], texts, shapes};
  });
});
"""


@pytest.mark.parametrize("width", WIDTHS)
def test_every_chart_is_drawn_and_legible(browser: webdriver.Chrome, page: Path, width: int) -> None:
    """One of each chart's two drawings shows; its words are large enough, inside of it, and off each other."""
    show(browser, page, width)
    figures: list[list[dict[str, Any]]] = browser.execute_script(DRAWINGS)
    assert len(figures) == 15
    for shown in figures:
        assert len(shown) == 1
        drawing = shown[0]
        assert drawing["width"] > 0.7 * min(width, 900), drawing["name"]
        assert min(drawing["box"]) > 50
        assert drawing["shapes"] > 5
        for text in drawing["texts"]:
            assert text["size"] >= SMALLEST_TEXT, (drawing["name"], text)
            assert min(text["left"], text["top"]) >= -1, (drawing["name"], text)
            assert text["right"] <= drawing["width"] + 1, (drawing["name"], text)
            assert text["bottom"] <= drawing["height"] + 1, (drawing["name"], text)
        overlapping = [
            (one["words"], other["words"])
            for number, one in enumerate(drawing["texts"])
            for other in drawing["texts"][number + 1 :]
            if _overlap(one, other)
        ]
        assert not overlapping, drawing["name"]


def _overlap(one: dict[str, float], other: dict[str, float]) -> bool:
    """By more than the blank edge of a line of text."""
    across = min(one["right"], other["right"]) - max(one["left"], other["left"])
    down = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
    return across > 1 and down > 4


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_first_chart_is_on_the_first_screen(browser: webdriver.Chrome, width: int, height: int) -> None:
    """Whole, of the committed page, a phone's screen among them."""
    show(browser, ROOT / "results" / CARD / "report.html", width, height=height)
    top, bottom = browser.execute_script(
        "const shown = [...document.querySelectorAll('svg')].find(svg => svg.getClientRects().length);"
        "const frame = shown.getBoundingClientRect(); return [frame.top, frame.bottom];"
    )
    assert 0 < top < bottom <= height


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_silent_and_does_not_scroll_sideways(
    browser: webdriver.Chrome, page: Path, width: int, scheme: str
) -> None:
    show(browser, page, width, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(found => { found.open = true; });")
    size = browser.execute_script(
        "const root = document.documentElement; return [root.scrollWidth, root.clientWidth, window.innerWidth];"
    )
    assert size[0] <= size[1]
    assert size[2] == width
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_every_link_is_followed_by_keyboard(browser: webdriver.Chrome, page: Path) -> None:
    """Tab comes to it, Enter follows it, and the focus is where it leads."""
    show(browser, page)
    links = [link.get_attribute("href") for link in browser.find_elements(By.CSS_SELECTOR, "a[href^='#']")]
    assert len(links) > 12
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    first = _focused(browser)
    assert first.get_attribute("class") == "skip"
    assert first.rect["y"] >= 0
    for link in browser.find_elements(By.CSS_SELECTOR, "a[href^='#']"):
        browser.execute_script("arguments[0].focus();", link)
        assert _focused(browser) == link
        # Not by the link's own `send_keys`: the driver takes a closed `details` for hidden where a style shows it, too.
        ActionChains(browser).send_keys(Keys.ENTER).perform()
        target = str(link.get_attribute("href")).rpartition("#")[2]
        assert _focused(browser).get_attribute("id") == target


def test_focus_shows_and_details_open_by_keyboard(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page)
    summary = browser.find_element(By.CSS_SELECTOR, "figure summary")
    browser.execute_script("arguments[0].previousElementSibling;", summary)
    summary.send_keys(Keys.ENTER)
    assert browser.find_element(By.CSS_SELECTOR, "figure details table").is_displayed()
    summary.send_keys(Keys.TAB)
    region = _focused(browser)
    assert region.get_attribute("role") == "region"
    assert region.value_of_css_property("outline-style") == "solid"


def test_dark_and_light_differ_and_both_can_be_read(browser: webdriver.Chrome, page: Path) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        show(browser, page, scheme=scheme)
        colours = browser.execute_script(
            "const style = (name) => getComputedStyle(document.querySelector(name));"
            "return [style('body').backgroundColor, style('body').color, style('figure').backgroundColor,"
            " style('figure svg text').fill];"
        )
        brightness[scheme] = [sum(map(int, colour[4:-1].split(", "))) for colour in colours]
    for ground, ink in ((0, 1), (2, 3)):
        assert brightness["light"][ground] > 600 > 200 > brightness["light"][ink]
        assert brightness["dark"][ground] < 200 < 600 < brightness["dark"][ink]


def test_print_shows_the_charts_and_their_figures_without_the_contents(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, 700, "dark", media="print")
    assert not browser.find_element(By.TAG_NAME, "nav").is_displayed()
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map(c => [c.classList[1], c.getClientRects().length > 0]);"
    )
    assert all(visible == (width == "wide") for width, visible in shown)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('figure details table')].map(t => t.getBoundingClientRect().height);"
    )
    assert min(heights) > 20
    ground = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    assert ground in {"rgb(255, 255, 255)", "rgba(255, 255, 255, 1)"}


def _focused(browser: webdriver.Chrome) -> WebElement:
    return browser.switch_to.active_element
