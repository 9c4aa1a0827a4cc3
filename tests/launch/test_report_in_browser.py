"""The report in a real browser: it says nothing on the console, fits, answers pointer and keyboard, is readable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from launch.report.build import build_report
from launch.report.run_data import read_run
from tests.helpers.chromium import chromium
from tests.helpers.report_runs import NAMES, write_run

HOSTILE = "</script><script>alert('x')</script>\"'&{{7*7}}\u2028" + "x" * 120
WIDTH = 1280

CONTRASTS = """() => {
  const parts = (text) => {
    const numbers = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
    const scale = text.startsWith("color(") ? 1 : 255;
    return [...numbers.slice(0, 3).map((n) => n / scale), numbers.length > 3 ? numbers[3] : 1];
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [1, 1, 1, 1];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || !e.getClientRects().length) continue;
    const [a, b] = [luminance(parts(getComputedStyle(e).color)), luminance(behind(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)]);
  }
  return found;
}"""

SIDEWAYS = """() => [document.documentElement, ...document.querySelectorAll(".card")]
  .filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.textContent.slice(0, 60))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(write_run(tmp_path_factory.mktemp("reports") / "run").path)


@pytest.fixture(scope="module")
def hostile_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose options, warnings and matrices have hostile, long names."""
    run = write_run(tmp_path_factory.mktemp("reports") / "run")
    run.write_options(f"method: flexlora\nmodel: {json.dumps(HOSTILE)}\nimportance: {json.dumps(HOSTILE)}\n")
    for name in ("ranks.jsonl", "spectra.json", "directions.json", "summary.json"):
        text = (run.path / name).read_text()
        for old in (*NAMES, "collapse <b>"):
            text = text.replace(json.dumps(old), json.dumps(old + HOSTILE, ensure_ascii=False))
        (run.path / name).write_text(text)
    assert len(read_run(run.path).changes) == 3
    return build_report(run.path)


def opened(browser: Any, index: Path, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page in a window of 1,280 pixels, and what it says or asks for."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: said.append(request.url) if request.url[:5] != "data:" else None)
    page.goto(index.as_uri())
    assert said.pop(0) == index.as_uri()
    return page, said


def tip_of(page: Any) -> list[str]:
    return [str(line) for line in page.locator("#tip p").all_text_contents()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_quiet_fits_and_is_readable(
    browser: Any, index: Path, tmp_path: Path, scheme: str
) -> None:
    page, said = opened(browser, index, scheme)
    picture = tmp_path / "page.png"
    page.screenshot(path=picture, full_page=True)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[1] == WIDTH and (pixels[0, 0].mean() > 0.9) == (scheme == "light")
    box = page.locator("canvas").first.bounding_box()
    top, left = int(box["y"]), int(box["x"])
    drawn = pixels[top : top + int(box["height"]), left : left + int(box["width"])]
    assert drawn.std() > 0.05  # cells of several colours
    assert page.evaluate(SIDEWAYS) == []
    low = min(page.evaluate(CONTRASTS))
    assert low[0] >= 4.5, low
    assert page.locator("h1").count() == 1 and page.locator("img:not([alt])").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    assert said == []
    page.close()


def test_pointer_and_keyboard_tell_the_same_of_a_cell(browser: Any, index: Path) -> None:
    page, said = opened(browser, index)
    canvas = page.locator("canvas").first
    canvas.focus()
    page.keyboard.press("Home")
    assert tip_of(page) == [NAMES[0], "at the start", "rank 4"]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    told = tip_of(page)
    assert told == [
        NAMES[0],
        "after the change at step 20",
        "rank 2, −1 since step 10",
        "score before the change: 0.5",
    ]
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] * 0.65, "y": 5})  # the third of four columns, the first row
    assert tip_of(page) == told
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden() and said == []
    page.close()


def test_the_slider_shows_the_ranks_of_any_step(browser: Any, index: Path) -> None:
    page, said = opened(browser, index)
    cells = page.locator("td[data-matrix]")
    assert cells.all_inner_texts() == ["1", "4", "4", "4", "4", "7"]
    slider = page.locator("#layers-step")
    for step, ranks in ((0, ["4"] * 6), (2, ["2", "4", "4", "4", "4", "6"])):
        slider.fill(str(step))
        assert cells.all_inner_texts() == ranks
    assert page.locator("td.sum").all_inner_texts() == ["6", "8", "10"]
    assert page.locator("#layers-said").inner_text() == "20" and said == []
    page.close()


def test_the_colours_follow_the_choice_and_the_theme(browser: Any, index: Path) -> None:
    page, said = opened(browser, index)
    canvas = page.locator("canvas").first
    pictures = [canvas.screenshot()]
    for mode in ("score", "change"):
        page.locator(f"input[value={mode}]").check()
        pictures.append(canvas.screenshot())
    assert page.locator("#scale-low").inner_text() == "−1"
    page.emulate_media(color_scheme="dark")
    pictures.append(canvas.screenshot())
    assert len(set(pictures)) == 4 and said == []
    page.close()


def test_hostile_and_long_names_run_nothing_and_do_not_scroll_sideways(
    browser: Any, hostile_index: Path
) -> None:
    page, said = opened(browser, hostile_index)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.locator("canvas").first.focus()
    page.keyboard.press("Home")
    assert tip_of(page)[0] == NAMES[0] + HOSTILE
    assert page.evaluate(SIDEWAYS) == [] and said == []
    page.close()


def test_without_scripts_the_page_shows_the_heatmap(browser: Any, index: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(index.as_uri())
    assert page.locator("img[alt^=Ranks]").is_visible() and page.locator("#history-controls").is_hidden()
    context.close()
