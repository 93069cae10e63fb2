"""``watch``: its words, and its page in a real browser (Debian's Chromium, driven by playwright)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

import peerlora
from browser_pages import in_browser, until
from peerlora.cli.watch import end_process
from peerlora.runs.events import (
    LISTED_CLIENTS,
    SPREAD,
    CheckpointSaved,
    Evaluated,
    NeighbourChanged,
    RoundDone,
    RunFinished,
    RunStarted,
    Warned,
)
from peerlora.runs.events import to_json as line

served = pytest.mark.skipif(find_spec("uvicorn") is None, reason="uvicorn is not installed (pip install '.[watch]')")


def events(clients, rounds, finished=False, **changes):
    facts = {"names": ["earn", "crude"], "counts": [[5, client % 7 + 1] for client in range(clients)]}
    start = ["2026-01-01T00:00:00+00:00", "adf-lora", clients, rounds + 10, "accuracy", True, 7, 2, {}, facts]
    found = [RunStarted(*start, {"kind": "ring"}, 10, [], **changes)]
    held = len(changes.get("held", [])) or clients
    for t in range(rounds):
        if t % 5 == 0:
            own = [0.3 + 0.5 * t / rounds + 0.002 * (client % 50) for client in range(held)]
            found.append(Evaluated(t, 50, own, 0.7, [1.0] * held, 1.0, 0.1, False))
        links = [[client, (client + t + 1) % clients] for client in range(min(clients, 40))]
        loss = [2.0 - t / rounds + 0.01 * (client % 30) for client in range(held)]
        numbers = [0.1, 0.2, 0.3 / (t + 1), 0.02, 0.01, 0.5]
        found.append(RoundDone(t, loss, *numbers, links, len(links), 1000, 2000, 0.5, 0.1, 0.01, absent=[2] * (t % 3)))
        if t % 10 == 9:
            found += [CheckpointSaved(t + 1, "x", "ab"), Warned(f"<b>round</b> {t}")]
    return found + [RunFinished("2026-01-01T00:10:00+00:00", {})] * finished


def write(folder, found, mode="w", held=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("")
    (folder / "run.json").write_text(json.dumps({} if held is None else {"held": held}))
    with open(folder / "events.jsonl", mode) as log:
        log.writelines(line(event) + "\n" for event in found)
    if isinstance(found[-1], RunFinished):
        (folder / "summary.json").write_text("{}")
    return folder


@pytest.fixture
def watching(process):
    """Start ``peerlora watch`` and return the address of its page."""

    def start(folder, *words):
        started = process("watch", folder, *words)
        return re.fullmatch(r"watch: (http://127\.0\.0\.1:\d+/[\w-]{20,}/)\n", started.stderr.readline()).group(1)

    return start


def test_a_folder_without_a_run_is_refused(cli, tmp_path):
    answer = cli("watch", tmp_path)
    assert answer.code == 2 and "holds no run (run.json)" in answer.err


@pytest.mark.slow
@served
def test_train_shows_its_page_until_it_ends(process, yaml_file, tmp_path):
    config = yaml_file("train.dtype=fp32", "train.rounds=40")
    started = process("train", config, "--out", tmp_path / "run", "--watch")
    address = ""
    while not address:
        text = started.stderr.readline()
        assert text, "the run ended without a page"
        address = text.removeprefix("watch: ").strip() if text.startswith("watch: ") else ""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert opener.open(address, timeout=20).status == 200
    started.communicate(timeout=240)
    assert started.returncode == 0
    with pytest.raises(urllib.error.URLError):
        opener.open(address, timeout=20)


PARENT = """
import sys, time
from pathlib import Path
from peerlora.cli.watch import watched
with watched(True, Path(sys.argv[1])):
    time.sleep(600)
"""


@served
def test_the_page_ends_with_a_command_that_is_killed(tmp_path):
    folder = write(tmp_path / "run", events(4, 2))
    environment = os.environ | {"PYTHONPATH": str(Path(peerlora.__file__).parents[1])}
    command = [sys.executable, "-c", PARENT, str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as parent:
        try:
            address = parent.stderr.readline().removeprefix("watch: ").strip()
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            assert opener.open(address, timeout=20).status == 200
        finally:
            parent.kill()
        parent.stderr.read()  # returns when the page's process, which has the same stderr, has ended
    with pytest.raises(urllib.error.URLError):
        opener.open(address, timeout=20)


def test_a_page_that_does_not_end_is_killed():
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        end_process(process, 0.05)
        assert process.returncode == -signal.SIGKILL


class TestInABrowser:
    pytestmark = [*in_browser, served]

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_a_finished_run(self, watching, opened, tmp_path, scheme):
        page = opened(watching(write(tmp_path / "run", events(8, 30, finished=True))), scheme=scheme)
        page.wait_for_selector("#score .uplot")
        page.wait_for_selector("#bytes .uplot")
        assert page.inner_text("#lead") == "finished: 30 of 40 rounds"
        assert page.locator("#graph .node").count() == 8 and page.locator("#graph .link.now").count() == 8
        assert page.locator("#graph .node.s-absent").count() == 1
        ink, paper = page.evaluate(
            "['color', 'backgroundColor'].map((n) => +/\\d+/.exec(getComputedStyle(document.body)[n])[0])"
        )
        assert (ink < paper) == (scheme == "light")

    def test_values_are_shown_where_the_pointer_is_and_a_drag_zooms(self, watching, opened, tmp_path):
        page = opened(watching(write(tmp_path / "run", events(8, 30))))
        page.wait_for_selector("#loss .uplot")
        over = page.locator("#loss .u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        legend = page.locator("#loss .u-legend")
        assert re.search(r"mean:?\s*1\.\d+", legend.inner_text().replace("\n", " "))
        before = page.evaluate("plots.loss.chart.scales.x.max")
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 30, steps=5)
        page.mouse.up()
        assert page.evaluate("plots.loss.chart.scales.x.max") < before

    def test_of_many_clients_the_legend_names_the_one_under_the_pointer_and_the_chosen_one(
        self, watching, opened, tmp_path
    ):
        page = opened(watching(write(tmp_path / "run", events(20, 30))))
        page.wait_for_selector("#loss .uplot")
        shown = "[...document.querySelectorAll('#loss .u-legend .u-series:not([hidden])')].map((e) => e.innerText)"
        names = lambda: " ".join(page.evaluate(shown))  # noqa: E731
        assert "client" not in names() and "mean" in names()
        page.locator("#loss .u-over").scroll_into_view_if_needed()
        box = page.locator("#loss .u-over").bounding_box()
        at = page.evaluate(
            "[15, 19].map((v, i) => i ? plots.loss.chart.valToPos(plots.loss.chart.data[v + 1][15], 'y')"
            " : plots.loss.chart.valToPos(plots.loss.chart.data[0][v], 'x'))"
        )
        page.mouse.move(box["x"] + at[0], box["y"] + at[1] - 2)
        until(page, f"{shown}.some((text) => text.includes('client 19'))")
        assert re.search(r"client 19:?\s*1\.69", names()) and "client 3" not in names()
        page.mouse.move(5, 5)
        until(page, f"!{shown}.some((text) => text.includes('client'))")
        page.select_option("#pick", "3")
        until(page, f"{shown}.some((text) => text.includes('client 3'))")
        assert "client 19" not in names()

    def test_a_client_has_its_bytes_and_its_events(self, watching, opened, tmp_path):
        page = opened(watching(write(tmp_path / "run", events(8, 30))))
        page.wait_for_selector("#graph .node")
        page.select_option("#level", "score")
        until(page, "document.querySelectorAll('#notices li').length === 6")
        assert "accuracy after 25 rounds, on 50 rows: mean" in page.inner_text("#notices li >> nth=0")
        page.select_option("#level", "absence")
        page.select_option("#pick", "2")
        page.wait_for_selector("#one:not([hidden])")
        assert re.search(
            r"sent 30\.0 kB", page.inner_text("#one-facts")
        )  # one link of 1000 bytes in each round, one way
        until(page, "document.querySelectorAll('#notices li').length === 10")
        assert page.inner_text("#notices li >> nth=0") == "round 29client 2: absent"
        page.select_option("#pick", "5")
        until(page, "document.getElementById('notices').innerText === 'No events.'")

    def test_what_a_deadline_does_not_tell_apart_has_one_word(self, watching, opened, tmp_path):
        clock = {"deadline": 2.0, "away": [{"client": 2}]}
        page = opened(watching(write(tmp_path / "run", events(4, 30, clock=clock))))
        page.wait_for_selector("#graph .node.s-absent")
        assert page.get_attribute("#graph .node.s-absent", "aria-label").startswith("client 2: absent or late")
        assert page.inner_text("#key-absent") == "absent or late"

    def test_clients_beyond_those_that_rounds_list_have_a_band(self, watching, opened, tmp_path):
        many = LISTED_CLIENTS + 1
        start, *found = events(many, 6)
        told = {f"loss_{name}": 1.0 + i for i, name in enumerate(("mean", *SPREAD))}
        rounds = [replace(each, loss=[], measures=told) for each in found if isinstance(each, RoundDone)]
        page = opened(watching(write(tmp_path / "run", [start, *rounds])))
        page.wait_for_selector("#loss .uplot")
        until(page, "plots.loss && plots.loss.chart.data[0].length === 6")
        assert page.evaluate("plots.loss.chart.series.map((s) => s.label)") == [
            "round",
            "highest client",
            "lowest client",
            "mean",
            "worst",
        ]
        assert page.evaluate("plots.loss.chart.data.slice(1).map((y) => y[5])") == [6.0, 2.0, 1.0, 6.0]

    def test_the_keyboard_reaches_a_client_and_its_own_curves(self, watching, opened, tmp_path):
        page = opened(watching(write(tmp_path / "run", events(8, 30))))
        page.wait_for_selector("#graph .node")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.getAttribute('aria-label') || ''").startswith("client 0"):
                break
        page.keyboard.press("Enter")
        page.wait_for_selector("#one:not([hidden])")
        assert page.inner_text("#one-title") == "client 0" and "earn: 5, crude: 1" in page.inner_text("#one-labels")
        assert page.get_attribute("#graph .node.chosen", "aria-pressed") == "true"
        labels = page.locator("#graph .node").evaluate_all("all => all.map((e) => e.getAttribute('aria-label'))")
        assert all(re.search(r"loss \d.\d+, accuracy \d.\d+", each) for each in labels)

    def test_everything_has_a_name_for_a_screen_reader(self, watching, opened, tmp_path):
        page = opened(watching(write(tmp_path / "run", events(8, 30))))
        page.wait_for_selector("#bytes .uplot")
        for selector in ("#score", "#loss", "#apart", "#bytes"):
            assert page.get_attribute(selector, "role") == "img" and page.get_attribute(selector, "aria-label")
        assert page.get_attribute("#bar", "aria-valuenow") == "75"
        page.click("#table-box summary")
        page.wait_for_selector("#table tbody tr")
        assert page.locator("#table tbody th[scope=row]").count() == 8
        assert page.locator("#table tbody th").first.inner_text() == "client 0"  # the worst first

    def test_a_phone_needs_no_scrolling_to_the_side(self, watching, opened, tmp_path):
        page = opened(watching(write(tmp_path / "run", events(8, 30))), width=390, height=844)
        page.wait_for_selector("#bytes .uplot")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("plots.loss.chart.axes[0].font[0]").startswith("12px") or "12" in str(
            page.evaluate("plots.loss.chart.axes[0].font")
        )

    def test_what_is_written_appears_and_events_can_be_filtered(self, watching, opened, tmp_path):
        found = events(8, 30)
        folder = write(tmp_path / "run", found[:30])
        page = opened(watching(folder))
        page.wait_for_selector("#loss .uplot")
        write(folder, found[30:], "a")
        until(page, "document.getElementById('lead').textContent.includes('30 of 40')")
        page.wait_for_selector("#notices .warning")
        assert page.locator("#notices b").first.inner_text().startswith("round 30")
        assert "<b>round</b> 29" in page.inner_text("#notices")  # text of a run is no HTML
        page.select_option("#level", "warning")
        page.fill("#filter", "29")
        until(page, "document.querySelectorAll('#notices li').length === 1")

    def test_what_fails_on_the_page_is_shown_and_it_goes_on(self, watching, opened, tmp_path):
        found = events(8, 30)
        folder = write(tmp_path / "run", found[:20])
        page = opened(watching(folder))
        page.wait_for_selector("#loss .uplot")
        assert page.is_hidden("#trouble")
        page.evaluate("window.kept = drawTiles; drawTiles = () => { throw new Error('odd numbers'); }; later()")
        page.wait_for_selector("#trouble:not([hidden])")
        assert "odd numbers" in page.inner_text("#trouble")
        page.evaluate("drawTiles = kept")
        write(folder, found[20:], "a")
        until(page, "document.getElementById('lead').textContent.includes('30 of 40')")
        assert page.is_hidden("#trouble")
        folder.joinpath("events.jsonl").rename(folder / "elsewhere")
        folder.joinpath("events.jsonl").mkdir()
        page.wait_for_selector("#trouble:not([hidden])")
        assert "Is a directory" in page.inner_text("#trouble")
        folder.joinpath("events.jsonl").rmdir()
        folder.joinpath("elsewhere").rename(folder / "events.jsonl")
        page.wait_for_selector("#trouble", state="hidden")

    def test_peers_of_a_launch_are_one_page(self, watching, opened, tmp_path):
        (tmp_path / "launch").mkdir()
        (tmp_path / "launch" / "config.yaml").write_text("")
        names = {"0": "north", "1": "south", "2": "west"}
        for client in range(3):
            found = events(3, 12, held=[client], names=names)
            found.append(NeighbourChanged("", 12, (client + 1) % 3, "down", "no heartbeat"))
            write(tmp_path / "launch" / f"peer-{client:02d}", found, held=[client])
        page = opened(watching(tmp_path / "launch"))
        until(page, "document.querySelectorAll('#graph .node').length === 3")
        until(page, "state.loss.get(12) && state.loss.get(12).all.every((v) => v !== null)")
        assert "north" in page.inner_text("#pick") and "no heartbeat" in page.inner_text("#notices")

    def test_a_comparison_fills_up_and_leads_to_its_trials(self, watching, opened, tmp_path):
        folder = tmp_path / "cmp"
        folder.mkdir()
        axes = "axes: {method: {adf: {algorithm: adf-lora}, dec: {algorithm: dec-lora}}}"
        (folder / "grid.yaml").write_text(f"{axes}\nseeds: [0, 1]\n")
        write(folder / "cells" / "adf__seed-0", events(4, 10, finished=True))
        page = opened(watching(folder))
        page.wait_for_selector("#cells td a")
        assert page.inner_text("#lead").startswith("1 of 4 trials finished")
        write(folder / "cells" / "dec__seed-1", events(4, 10, finished=True))
        until(page, "document.getElementById('lead').textContent.startsWith('2 of 4')")
        page.click("#cells td a >> nth=0")
        page.wait_for_selector("#score .uplot")
        assert "cells/adf__seed-0" in page.inner_text("#title")

    def test_the_runs_of_a_demo_are_a_comparison(self, watching, opened, tmp_path):
        for name in ("dec-lora", "adf-lora"):
            write(tmp_path / "demo" / name, events(4, 10, finished=True))
        page = opened(watching(tmp_path / "demo"))
        page.wait_for_selector("#cells td a")
        assert page.inner_text("#lead").startswith("2 of 2 trials finished")
        page.click("#cells td a >> nth=1")
        page.wait_for_selector("#score .uplot")
        assert page.inner_text("#title").startswith("dec-lora:")

    def test_what_is_not_known_of_a_comparison_is_said(self, watching, opened, tmp_path):
        write(tmp_path / "cmp" / "cells" / "adf__seed-0", events(4, 10, finished=True))
        (tmp_path / "cmp" / "grid.yaml").write_text("axes: [")
        page = opened(watching(tmp_path / "cmp"))
        page.wait_for_selector("#cells td a")
        assert "trials to come, since grid.yaml cannot be read" in page.inner_text("#trouble")

    def test_a_thousand_clients_are_drawn_in_bounded_pieces(self, watching, opened, tmp_path):
        page = opened(watching(write(tmp_path / "run", events(1000, 500))))
        page.wait_for_selector("#graph canvas")
        until(page, "state.rounds.size === 500")
        page.click("#table-box summary")
        page.wait_for_selector("#table tbody tr")
        assert page.locator("#table tbody tr").count() == 200
        assert page.evaluate("document.querySelectorAll('*').length") < 4000
        page.select_option("#pick", "999")
        until(page, "document.getElementById('one-title').textContent === 'client 999'")
        time.sleep(0.1)
        assert page.evaluate("plots.loss.chart.series.length") == 6  # round, band of two, mean, worst, the client


def test_show_lists_the_trials_of_a_comparison(cli, config, tmp_path):
    for name in ("adf__seed-0", "adf__seed-1"):
        folder = write(tmp_path / "cmp" / "cells" / name, events(4, 10))
        (folder / "config.yaml").write_text(config().to_yaml())
    (tmp_path / "cmp" / "grid.yaml").write_text("")
    answer = cli("show", tmp_path / "cmp")
    assert answer.code == 0, answer.err
    assert "adf__seed-0" in answer.out and "adf__seed-1: not finished, 10 of 3 rounds" in answer.out
