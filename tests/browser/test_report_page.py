"""The report in a real browser: nothing in the console, every plot drawn, nothing cut off, on a desk and on a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from launch.report import report
from pretrain.verdict import AuditResult
from tests.browser.chromium import Chromium
from tests.browser.whole_run import TITLES, write_whole_run

pytestmark = pytest.mark.slow

PLOTS = """[...document.querySelectorAll('svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('.line, rect, circle')].map(mark => mark.getBBox());
  return [svg.getAttribute('aria-label'), box.width, box.height, marks.filter(m => m.width + m.height > 0).length];
})"""
CUT_OFF = """[...document.querySelectorAll('.card')].flatMap(card => {
  const frame = card.getBoundingClientRect();
  return [...card.querySelectorAll('text, span, h3')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left || box.right > frame.right + 0.5 || box.bottom > frame.bottom + 0.5;
  }).map(text => card.querySelector('h3').textContent + ': ' + text.textContent);
})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_whole_run(tmp_path_factory.mktemp("runs") / "whole")
    return report(folder, AuditResult(0, ("audit of step 1200: EXACT", "  614400 clips"), {"clips": 614_400}, {}))


@pytest.mark.parametrize(("width", "is_phone"), [(1280, False), (390, True)])
def test_page_as_a_person_sees_it(browser: Chromium, page: Path, width: int, is_phone: bool, tmp_path: Path) -> None:
    browser.complaints.clear()
    browser.open(page, width, is_phone=is_phone)
    plots = browser.evaluate(PLOTS)
    assert sorted(title for title, *_ in plots) == sorted(TITLES)
    for title, wide, high, num_marks in plots:
        assert wide > 200, title
        assert high > 20, title
        assert num_marks > 0, title
    assert browser.evaluate(CUT_OFF) == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing to the right of the screen
    pictures = "[...document.images].map(image => image.complete && image.naturalWidth)"
    assert browser.evaluate(pictures) == [480] * 3
    browser.photograph(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == width * (2 if is_phone else 1)
        assert len(shot.convert("RGB").getcolors(1 << 24) or ()) > 100  # not an empty sheet
    assert browser.complaints == []


def test_the_console_is_heard(browser: Chromium, tmp_path: Path) -> None:
    """A test of the test: a broken path and what the page's own rules forbid are told."""
    browser.complaints.clear()
    sheet = tmp_path / "broken.html"
    rule = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    sheet.write_text(f"{rule}<svg><path d='M0 nonsense'/></svg><img src='https://127.0.0.1:9/x.png'>")
    browser.open(sheet, 400)
    told = " ".join(browser.complaints)
    assert "attribute d" in told
    assert "Content Security Policy" in told
