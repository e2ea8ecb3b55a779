"""Pages in a real browser: what they draw, log, ask for and measure on a phone. Skipped where there is no Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import PHONE, Tab, needs_browser, opened
from tests.ltecli.charts.runs import ATTACKS, copied, figures_of, with_evaluations
from tests.ltecli.command import Lte

pytestmark = needs_browser
POINTS = "return document.querySelectorAll('#{} .scatterlayer .point').length"
SHOWN = "return document.getElementById('{}').textContent"
VIEW = "document.querySelectorAll('[name={}-view]')[{}].click()"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A browser that all tests of this file share."""
    with opened(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def page(lte: Lte, trained: Path) -> Path:
    """A page of three runs: the trained one, one of 40 evaluations, one of 2,000."""
    runs = trained, with_evaluations(trained, "some", 40), with_evaluations(trained, "many", 2000)
    assert lte("report", *runs, "--html", "out.html").code == 0
    return Path("out.html")


@pytest.mark.parametrize("width", [PHONE, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_quiet_fits_and_has_its_scheme(tab: Tab, page: Path, scheme: str, width: int) -> None:
    tab.errors(), tab.requests()
    tab.open(page, scheme, width)
    assert tab.errors() == []
    assert tab.requests() == [page.resolve().as_uri()]
    assert tab.run("return document.documentElement.scrollWidth") <= width
    background = tab.run("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    axis = tab.run("return getComputedStyle(document.querySelector('#val-loss .xtick text')).fill")
    assert (axis == "rgb(89, 99, 110)") == (scheme == "light")  # plotly is told the colours of the style sheet


def test_every_point_is_drawn_over_every_axis(tab: Tab, page: Path) -> None:
    tab.open(page)
    figure = figures_of(page)["val-loss"]
    counts = [len(trace["columns"]["val_loss"]) for trace in figure["traces"]]
    assert counts[:2] == [2, 40] and 300 < counts[2] <= 400
    titles = set()
    for number, view in enumerate(figure["views"]):
        tab.run(VIEW.format("val-loss", number))
        assert tab.run(POINTS.format("val-loss")) == sum(counts), view["label"]
        titles.add(tab.run("return document.querySelector('#val-loss .xtitle').textContent"))
    assert len(titles) == 4
    drawn = tab.run("return document.getElementById('train-loss').data.map(trace => trace.x.length)")
    assert drawn == [len(trace["columns"]["train_loss"]) for trace in figures_of(page)["train-loss"]["traces"]]


def test_a_run_is_hidden_by_its_key_and_named_beside_its_curve(tab: Tab, page: Path) -> None:
    tab.open(page)
    assert "many" in tab.run(SHOWN.format("val-loss"))
    tab.run("document.querySelectorAll('.chip')[2].click()")
    assert tab.run(POINTS.format("val-loss")) == 42
    assert "many" not in tab.run(SHOWN.format("val-loss"))
    tab.run("document.querySelectorAll('.chip')[2].click()")
    assert tab.run(POINTS.format("val-loss")) > 300


def test_no_button_sends_a_figure_away(tab: Tab, page: Path) -> None:
    tab.open(page)
    buttons = tab.run(
        "return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title || b.dataset.attr)"
    )
    assert len(set(buttons)) == 6
    assert not [button for button in buttons if "cloud" in button.lower() or "share" in button.lower()]


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_a_name_is_shown_as_it_is(tab: Tab, lte: Lte, trained: Path, number: int) -> None:
    run, other = copied(trained, f"runs/{ATTACKS[number]}"), copied(trained, "runs/other")
    assert lte("report", run, other, "--html", "out.html").code == 0
    tab.errors(), tab.requests()
    tab.open(Path("out.html"))
    assert tab.run("return window.hacked === undefined")
    assert (tab.errors(), len(tab.requests())) == ([], 1)
    label = tab.run("return document.querySelector('.chip').textContent")
    assert ATTACKS[number].endswith(label)
    assert label in tab.run(SHOWN.format("val-loss"))  # as plain text beside the curve, not as a tag


def test_a_plan_draws_every_candidate_and_its_timeline(tab: Tab, lte: Lte, here: Path) -> None:
    assert lte("plan", "--tokens", "400_000", "--profile", "rtx3060_x4_home", "--html", "out.html").code == 0
    figures = figures_of(here / "out.html")
    tab.errors(), tab.requests()
    for width in (PHONE, 1280):
        tab.open(here / "out.html", width=width)
        assert (tab.errors(), len(tab.requests())) == ([], 1)
        assert tab.run("return document.documentElement.scrollWidth") <= width
        candidates = [trace for trace in figures["candidates"]["traces"] if trace["kind"] != "front"]
        assert tab.run(POINTS.format("candidates")) == sum(len(trace["columns"]["time"]) for trace in candidates)
        bars = tab.run("return document.querySelectorAll('#timeline .barlayer .point').length")
        assert bars == sum(len(trace["columns"]["seconds"]) for trace in figures["timeline"]["traces"]) > 0
