"""report.html of a run and of a comparison with their script, in a real browser."""

import csv
from dataclasses import replace

import pytest

from browser_pages import in_browser, until
from peerlora.config.loading import load_config
from peerlora.experiments.results import write_results
from peerlora.runs.report import write_report
from peerlora.runs.store import RunStore
from seed_outcomes import outcome

pytestmark = [*in_browser, pytest.mark.usefixtures("drawn")]
SHOWN = "[...document.querySelectorAll('.u-legend .u-series:not([hidden]) .u-label')].map((e) => e.innerText)"


@pytest.fixture
def of_run(tmp_path):
    """report.html of a run."""
    with RunStore.create(tmp_path / "run", "clients: 2\n", {}) as store:
        for event in outcome("a", 0, 6, planned=6).events:
            counts = {"names": ["earn", "crude"], "counts": [[1, 2], [3, 0]]}
            store.emit(replace(event, partition=counts) if hasattr(event, "partition") else event)
    return write_report(tmp_path / "run").as_uri()


@pytest.fixture
def of_comparison(tmp_path):
    """report.html of a comparison of two methods over p, three seeds each."""
    cells = [
        replace(each, labels={"method": method, "graph": f"p={p}"}, setting=f"{method}, p={p}", p=p)
        for method in ("a", "c")
        for p in (0.1, 0.5)
        for each in (outcome(method, seed) for seed in (0, 1, 2))
    ]
    configs = dict.fromkeys((each.setting for each in cells), load_config({}))
    write_results(tmp_path, cells, [], {"method": "a"}, "base: {}\n", configs, None)
    return (tmp_path / "report.html").as_uri()


def figure(page, title):
    return page.locator("figure", has=page.locator("figcaption", has_text=title)).first


def downloaded(page, title):
    """The file that the CSV button of a figure gives: (name, rows)."""
    with page.expect_download() as waiting:
        figure(page, title).get_by_role("button", name="CSV").click()
    with open(waiting.value.path(), newline="", encoding="utf-8") as file:
        return waiting.value.suggested_filename, list(csv.reader(file))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_figures_of_a_run_are_drawn_in_its_colours(of_run, opened, scheme):
    page = opened(of_run, scheme=scheme)
    assert page.locator("figure .uplot").count() == 4  # the score, the loss, the distances, the bytes
    assert figure(page, "accuracy of every client").locator("svg").first.is_hidden()
    assert figure(page, "Who exchanged with whom").locator(".scroll > svg").is_visible()
    ink, paper = page.evaluate(
        "['color', 'backgroundColor'].map((n) => +/\\d+/.exec(getComputedStyle(document.body)[n])[0])"
    )
    assert (ink < paper) == (scheme == "light")


def test_the_figures_of_a_run_fit_a_phone(of_run, opened):
    page = opened(of_run, width=390, height=844)
    assert page.locator("figure .uplot").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert max(page.evaluate("[...document.querySelectorAll('.uplot canvas')].map((e) => e.clientWidth)")) <= 390


def test_a_line_is_hidden_by_its_name_and_a_drag_zooms_until_the_whole_range_is_asked_for(of_run, opened):
    page = opened(of_run)
    shown = figure(page, "accuracy of every client")
    row = shown.locator(".u-legend .u-series", has_text="averaged model")
    row.locator(".u-label").click()
    assert "u-off" in row.get_attribute("class")
    row.locator(".u-label").click()
    assert "u-off" not in row.get_attribute("class")
    over = shown.locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    ticks = "[...document.querySelectorAll('figure .uplot')][0].querySelector('.u-legend .u-value').innerText"

    def at_the_left():
        page.mouse.move(box["x"] + 3, box["y"] + box["height"] / 2)
        page.wait_for_timeout(50)
        return page.evaluate(ticks)

    assert at_the_left() == "0"
    page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + 20, steps=5)
    page.mouse.up()
    assert int(at_the_left()) >= 3
    shown.get_by_role("button", name="Whole range").click()
    box = over.bounding_box()
    assert at_the_left() == "0"


def test_the_numbers_of_a_run_are_files(of_run, opened):
    page = opened(of_run)
    name, rows = downloaded(page, "accuracy of every client")
    assert name == "accuracy-of-every-client-s-own-model-and-of-the-averaged-model.csv"
    assert rows[0] == ["round", "client 0", "client 1", "mean over clients", "averaged model"]
    assert rows[1] == ["0", "0.25", "0.5", "0.375", "0.5"] and len(rows) == 8
    assert downloaded(page, "Who holds which labels")[1] == [
        ["client", "earn", "crude"],
        ["0", "1", "2"],
        ["1", "3", "0"],
    ]
    assert downloaded(page, "Who exchanged with whom")[1] == [["client", "with", "rounds"], ["0", "1", "6"]]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_a_comparison_has_its_bands_its_figure_by_p_and_their_numbers(of_comparison, opened, scheme, width):
    page = opened(of_comparison, scheme=scheme, width=width)
    by_p = figure(page, "accuracy of the mean client by p")
    assert by_p.locator(".uplot").count() == 1 and by_p.locator(".scroll > svg").is_hidden()
    assert not [label for label in page.evaluate(SHOWN) if label.endswith(("lowest seed", "highest seed"))]
    curve = figure(page, "accuracy of the mean client by round")
    assert curve.locator(".legend > span:visible").all_inner_texts() == ["lowest to highest seed"]
    assert curve.locator(".u-legend .u-series", has_text="seed 1").count() == 2
    until(page, "document.querySelectorAll('.uplot canvas').length >= 2")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    name, rows = downloaded(page, "accuracy of the mean client by p")
    assert name == "accuracy-of-the-mean-client-by-p-last-evaluation.csv"
    assert rows[0] == [
        "p, log scale",
        *(f"{method}{of}" for method in "ac" for of in (", lowest seed", ", highest seed", "")),
    ]
    assert [row[0] for row in rows[1:]] == ["0.1", "0.5"] and rows[1][1:4] == ["0.625", "0.75", "0.6875"]
    _, rows = downloaded(page, "accuracy of the mean client by round")
    assert rows[0][1:3] == ["a, lowest seed", "a, highest seed"]
