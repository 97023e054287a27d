"""The report in a real Chromium; `make test-browser` installs and runs it.

Screenshots stay in .cache/browser.
"""

import functools
from pathlib import Path

import pages
import pytest
from devtools import Page

from brgsa_jax.evals.report import write_report

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / ".cache/browser"
CHECKS = Path(__file__).with_name("checks.js").read_text()
SCREENS = {"desktop": {"width": 1280}, "desktop-dark": {"width": 1280, "dark": True},
           "tablet": {"width": 768}, "phone": {"width": 360, "mobile": True},
           "phone-dark": {"width": 360, "mobile": True, "dark": True}}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page = Page(tmp_path_factory.mktemp("profile"))
    try:
        yield page
    finally:
        page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Makes each report once."""
    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        data = pages.score_file(folder) if name == "score_file" else getattr(pages, name)()
        return write_report(folder / "report.html", data)

    return made


def complaints(browser):
    """What is wrong with the open page, by kind, without the kinds that are in order."""
    found = browser.run(CHECKS)
    strange = [url for url in browser.requests if not url.startswith(("file:", "data:"))]
    return {kind: what for kind, what in {**found, "console": browser.errors,
                                          "network": strange}.items() if what}


@pytest.mark.parametrize("name, screen", [
    *(("hospital", screen) for screen in SCREENS if screen != "phone"),
    ("hostile", "desktop"), ("hostile", "phone"),
    ("score_file", "desktop-dark"), ("score_file", "phone")])
def test_a_report_is_whole_and_legible(browser, report, name, screen):
    path = report(name)
    browser.open(path, **SCREENS[screen])
    browser.screenshot(SHOTS / f"{name}-{screen}.png")
    assert complaints(browser) == {}
    assert [url for url in browser.requests if url.startswith("file:")] == [path.as_uri()]


def test_everything_there_is_to_show_is_shown(browser, report):
    browser.open(report("hospital"))
    assert browser.run("[...document.querySelectorAll('section')].map(s => s.id)") == [
        "findings", "curves", "decisions", "calibration", "modes", "retrieval", "gap", "probe",
        "localisation", "training", "cases", "method"]
    assert browser.run("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))") == (
        browser.run("[...document.querySelectorAll('section')].map(s => s.id)"))
    assert browser.run("document.querySelectorAll('table').length") >= 15
    assert browser.run("document.querySelectorAll('img').length") == 6
    # ROC, precision and reliability of every finding, each with a curve.
    assert browser.run("document.querySelectorAll('.rocs svg path.curve.first').length") >= 3 * 16
    browser.pdf(SHOTS / "hospital.pdf")
    assert (SHOTS / "hospital.pdf").read_bytes().count(b"/Type /Page\n") > 3


def test_what_a_score_file_cannot_tell_is_not_on_its_page(browser, report):
    browser.open(report("score_file"))
    assert browser.run("[...document.querySelectorAll('section')].map(s => s.id)") == [
        "findings", "curves", "method"]


def test_names_are_shown_as_they_are_and_do_nothing(browser, report):
    browser.open(report("hostile"))
    shown = browser.run("[...document.querySelectorAll('#findings tbody th bdi')]"
                        ".map(node => node.textContent)")
    assert set(pages.HOSTILE) <= set(shown)
    assert browser.run("document.title") == pages.HOSTILE[0] + pages.HOSTILE[6]
    assert browser.run("document.querySelectorAll('img[src=x], script, b b').length") == 0


BAD = """<!doctype html><title>bad</title><style>p { color: #aaa; background: #fff }</style>
<p>pale</p><div style="width: 2000px">wide</div><img alt="gone" src="http://192.0.2.1/gone.png">
<svg width="50" height="20"><text x="40" y="10">cut off here</text></svg>
<nav><a href="#no">x</a></nav>
<table><tr><td>1<td>nan<tr><td>2</table><script>console.error("told")</script>"""


def test_the_checks_see_what_they_are_for(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(BAD)
    browser.open(page, **SCREENS["phone"])
    found = complaints(browser)
    assert set(found) >= {"pale", "wide", "cut", "ragged", "pictures", "lost", "active", "broken",
                          "console", "network"}
    assert found["network"] == ["http://192.0.2.1/gone.png"]
    assert any("told" in line for line in found["console"])
