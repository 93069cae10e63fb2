import errno
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from peerlora.errors import RunError
from peerlora.experiments.demo_report import ComparisonRow, write_comparison
from peerlora.experiments.results import write_results
from peerlora.runs import client_figures, figures
from peerlora.runs.chart import MOST_CELLS, Sheet
from peerlora.runs.client_table import client_rows, describe_outcome
from peerlora.runs.events import Evaluated, Generated, PolicyShown, RoundDone, RunStarted, Warned
from peerlora.runs.figures import clients_figure, runs_figure
from peerlora.runs.metrics import summarise
from peerlora.runs.page import picture_html
from peerlora.runs.pictures import epsilon_picture
from peerlora.runs.policy_pictures import policy_pictures
from peerlora.runs.report import metric_curves, write_report
from peerlora.runs.store import RunStore

pytestmark = pytest.mark.usefixtures("drawn")  # reports are the subject

EMPTY = {"meta", "br", "link", "img", "input", "hr"}
NASTY = "</style><script>alert('x')</script> & $x_1$ 利益"


class Page(HTMLParser):
    """Checks that elements close in order, and collects what matters."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.words, self.scripts = [], [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)


def report(folder, events, config="clients: 3\n") -> Page:
    with RunStore.create(folder, config, {}) as store:
        for event in events:
            store.emit(event)
    return Page(write_report(folder))


def test_answers_and_names_of_labels_are_shown_as_text(tmp_path, run):
    *before, last, end = run()
    told = {NASTY: {"true": 12.0, "own": 0.25, "averaged": 0.5}, "B": {"true": 3.0, "own": 1.0}, "damaged": {}}
    answers = Generated(4, 1, [{"prompt": NASTY, "expected": NASTY, "own": "so"}], {"own": {"rouge-l": 0.5}})
    page = report(tmp_path / "run", [*before, replace(last, by_name=told), answers, end])
    assert not any("alert('x')" in script for script in page.scripts)
    assert page.text.count("<script>alert('x')</script>") == 3
    assert "12 0.25 0.5" in page.text and "client 1: rouge-l 0.5" in page.text


def test_the_report_is_self_contained_and_well_formed(tmp_path, run):
    page = report(tmp_path / "run", run())
    assert page.links and all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert not {"img", "link", "iframe", "object", "form", "base"} & set(page.tags)
    source = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "@import" not in source and set(re.findall(r"url\((.)", source)) <= {"#"}
    asks = r"fetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts|import\(|\.src\b|serviceWorker"
    assert not re.search(asks, source)
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[\w./-]*", source))
    known = ("http://www.w3.org/", "https://github.com/leeoniya/uPlot")  # names of formats, and the library's own page
    assert all(each.startswith(known) for each in addresses), addresses
    assert page.tags.count("figure") == 6


def test_the_headline_has_the_numbers(tmp_path, run):
    text = report(tmp_path / "run", run(clients=3)).text
    assert "adf-lora, 3 clients" in text and "4 rounds, seed 7; finished" in text
    assert "mean over clients' own models after round 4, on 50 rows 0.5001" in text
    assert "accuracy, worst client 0.5 " in text and "accuracy, averaged model 0.9" in text
    assert "sent by all clients together 800 bytes" in text and "higher is better" in text
    assert "0: 4 1: 4 2: never" in text


def test_the_evaluation_on_all_rows_is_no_point_of_the_curve_on_a_sample(run):
    events = [*run(rounds=8), Evaluated(4, 20, [0.3] * 3, 0.3, [1.0] * 3, 1.0, 0.1, False)]
    found = metric_curves(events)  # rounds 0 and 4 on 20 rows, round 8 on 50
    assert found.rounds == [0, 4] and found.rows == 20 and len(found.clients) == 2
    assert found.end.rounds == [8] and found.end.rows == 50 and found.end.clients.shape == (1, 3)
    note = clients_figure("metric", "title", found).note
    assert "20 of the 50 evaluation rows" in note and runs_figure("metric", "title", {"a": found}).note == note
    whole = metric_curves([replace(each, rows=50) if isinstance(each, Evaluated) else each for each in events])
    assert whole.rounds == [0, 4, 8] and whole.end is None and not clients_figure("metric", "title", whole).note


def test_by_epsilon_too_the_evaluation_on_all_rows_is_a_point_of_its_own(made):
    scores = [made.evaluated(t, [own], rows=100) for t, own in ((1, 0.5), (2, 0.6))]
    scores.append(made.evaluated(3, [0.9], final=True, rows=1000))
    scores = [replace(each, privacy={"epsilon": [float(each.round)]}) for each in scores]
    start = made.started(1)
    found = epsilon_picture(start, [start, made.evaluated(0, [0.1], rows=100), *scores])  # nothing counted at round 0
    chart = found.chart.as_json()
    assert chart["x"] == [1, 2, 3]
    assert [(each["style"], each["y"]) for each in chart["series"]] == [
        ("thick", [0.5, 0.6, None]),
        ("points", [None, None, 0.9]),
    ]
    assert "100 of the 1,000 evaluation rows" in found.note and "averaged" not in found.note
    same = epsilon_picture(start, [start, *(replace(each, rows=100) for each in scores)])
    assert same.chart.as_json()["series"][0]["y"] == [0.5, 0.6, 0.9] and same.note == ""
    assert epsilon_picture(start, [start, made.evaluated(1, [0.5])]) is None


def test_the_worst_client_of_a_loss_is_the_highest(tmp_path, run):
    text = report(tmp_path / "run", run(metric="loss", higher_is_better=False)).text
    assert "loss, worst client 0.5002" in text and "lower is better" in text


def test_what_users_write_is_escaped(tmp_path, run):
    partition = {"names": [NASTY, "other"], "counts": [[1, 2]] * 3}
    events = run(method=NASTY, metric=NASTY, partition=partition, topology={"kind": NASTY}, warnings=[NASTY])
    page = report(
        tmp_path / "run", [*events, Warned(NASTY + "!"), Warned("undecodable \udc80")], config=f"source: {NASTY}\n"
    )
    source = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in source and source.count("<script") == page.tags.count("script")
    assert page.text.count(NASTY) >= 6


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_run_that_stopped_half_way_has_a_report(tmp_path, run, stop):
    text = report(tmp_path / "run", run(stop=stop)).text
    assert f"not finished: {stop} of 4 rounds so far" in text


def test_a_run_without_any_event_has_a_report(tmp_path):
    assert "has not started" in report(tmp_path / "run", []).text


def test_no_report_outside_a_run_folder(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        write_report(tmp_path)


def test_one_client_has_no_graph(tmp_path, run):
    text = report(tmp_path / "run", run(clients=1)).text
    assert "Who exchanged" not in text and "Training loss" in text


def test_a_thousand_clients_are_summed_up(tmp_path, run):
    page = report(tmp_path / "run", run(clients=1000, rounds=2))
    assert "The first 60 of 1000 clients." in page.text and "middle 90 %" in page.text
    assert "Without any contact (hollow): 998." in page.text
    assert (tmp_path / "run" / "report.html").stat().st_size < 1_000_000


def test_a_partition_without_counts_has_no_label_figure(tmp_path, run):
    assert "holds which labels" not in report(tmp_path / "run", run(partition={"rows": 3})).text


def test_the_numbers_behind_the_figures_are_in_the_page(tmp_path, run):
    page = report(tmp_path / "run", run(rounds=4))
    data = [json.loads(each) for each in page.scripts if each.startswith("{")]
    labels, links = (each for each in data if "rows" in each)  # drawings that the page's script leaves as they are
    data = [each for each in data if "rows" not in each]
    assert labels == {"head": ["client", "earn", "crude"], "rows": [[0, 1, 2], [1, 2, 2], [2, 3, 2]]}
    assert links == {"head": ["client", "with", "rounds"], "rows": [[0, 1, 4]]}
    assert len(data) == 4  # the score, the loss, the distances, the bytes
    loss = next(each for each in data if each["x"] == [1, 2, 3, 4] and len(each["series"]) == 4)
    assert [each["label"] for each in loss["series"]] == ["client 0", "client 1", "client 2", "mean over clients"]
    assert loss["series"][1]["y"] == [0.1, 1.1, 2.1, 3.1] and loss["series"][3]["style"] == "thick"
    apart = next(each for each in data if each["log"])
    assert apart["series"][0]["y"] == [0.1] * 4 and apart["series"][3]["y"] == [None] * 4  # zeros have no place
    score = data[0]
    assert [each["style"] for each in score["series"][-2:]] == ["points", "points"] and score["x"] == [0, 4]
    assert score["series"][-2]["y"] == [None, 0.5001] and "on all 50 rows" in score["series"][-2]["label"]


def test_many_clients_and_gaps_become_a_band_and_nulls():
    values = np.full((2, 60), 0.5)
    values[1, :] = np.nan
    chart = clients_figure("metric", "title", figures.Curves([0, 1], values)).chart.as_json()
    assert [each["style"] for each in chart["series"]] == [*["edge"] * 4, "thick"]
    assert [each["label"] for each in chart["series"][:2]] == ["5 % of clients", "95 % of clients"]
    assert chart["series"][4]["y"] == [0.5, None]


def test_the_band_of_several_runs_is_in_their_numbers():
    values = np.array([[0.25, 0.5, 0.75], [0.5, 0.5, 1.0]])
    chart = runs_figure("metric", "title", {"a": figures.Curves([0, 1], values)}).chart.as_json()
    found = {each["label"]: (each["style"], each["y"]) for each in chart["series"]}
    assert found["a, lowest client"] == ("edge", [0.25, 0.5]) and found["a, highest client"] == ("edge", [0.75, 1.0])
    assert found["a"] == ("thick", [0.5, 0.666667])


def test_the_figures_of_a_policy_have_their_numbers():
    shown = PolicyShown(4, "averaged", [[[0.0, 1.0, 0.5, -0.5]], [[1.0, 0.0, 0.25, 0.75]]], "angle", {"0": [0.1, 0.2]})
    fields, traces = (picture.chart.as_json() for picture in policy_pictures([shown]))
    assert fields["head"] == ["block", "x", "y", "action x", "action y"]
    assert fields["rows"] == [[0, 0.0, 1.0, 0.5, -0.5], [1, 1.0, 0.0, 0.25, 0.75]]
    assert traces["x"] == [0, 1] and traces["series"][0]["label"] == "client 0"
    assert traces["series"][0]["y"] == [0.1, 0.2] and traces["ylabel"] == "angle"


def test_a_sheet_of_many_rows_is_bounded():
    sheet = Sheet(["client", "rows"], [[client, 1] for client in range(MOST_CELLS)]).as_json()
    assert len(sheet["rows"]) == MOST_CELLS // 2 and sheet["rows"][-1] == [MOST_CELLS // 2 - 1, 1]


def test_a_label_of_a_user_cannot_end_the_script(tmp_path):
    picture = figures.lines_figure("a", "t", {NASTY: ([1, 2], [1.0, 2.0])}, "unit")
    html = picture_html(picture)
    assert (
        html.count("</script>") == 1
        and NASTY in json.loads(html[html.index("{") : html.index("</script>")])["series"][0]["label"]
    )


def test_every_client_has_a_row_the_worst_first(tmp_path, run):
    text = report(tmp_path / "run", run(clients=3)).text
    head = "client rows accuracy training loss last exchange"
    assert f"{head} client 0 3 0.500 3.000 round 4 client 1 4 0.500 3.100 round 4 client 2 5 0.500 3.200 never" in text
    told = "accuracy of the mean client: 0.500 after round 4, 0.260 after round 0 (then on 20 rows, now on 50)"
    assert f"{told}; worst is client 0 with 0.500; the averaged model has 0.900." in text


def test_the_worst_of_a_loss_comes_first(made):
    start = made.started(3, metric="loss", higher_is_better=False)
    events = [start, made.evaluated(2, [0.5, 2.0, float("nan")])]
    head, rows = client_rows(start, events)
    assert [row[0] for row in rows] == ["client 1", "client 0", "client 2"]
    assert "worst is client 1 with 2.000" in describe_outcome(start, events)[0]
    assert describe_outcome(start, [start]) == []


@pytest.mark.parametrize("unlisted", [{0, 1, 2}, {1}], ids=["no round", "all rounds but one"])
def test_where_rounds_lack_their_links_the_report_gives_no_last_exchange(tmp_path, made, unlisted):
    many = {"edges": None, "contacts": 5050, "bytes_sent": 1_010_000}
    listed = [made.round_done(t, 101, [[0, 1]]) for t in range(3)]
    rounds = [replace(done, **many) if done.round in unlisted else done for done in listed]
    start = made.started(101, 3)
    events = [start, *rounds, made.evaluated(3, [0.5] * 101, final=True)]
    head, rows = client_rows(start, events)
    assert head == ["client", "rows", "accuracy", "training loss"] and len(rows) == 101
    text = report(tmp_path / "run", events).text
    assert "never" not in text and text.count("The links of each round were not written down.") == 1


@pytest.mark.slow
def test_the_same_events_give_the_same_bytes(tmp_path, run):
    for name in ("one", "two"):
        report(tmp_path / name, run())
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()


def test_zeros_on_the_log_scale_are_left_out_and_said():
    rounds = [1, 2, 3]
    assert figures.log_figure("a", "t", {"x": (rounds, [1.0, 0.1, 0.01])}).note == ""
    assert "Zeros" in figures.log_figure("a", "t", {"x": (rounds, [1.0, 0.0, 0.01])}).note
    assert "Zeros" in figures.log_figure("a", "t", {"x": (rounds, [0.0, 0.0, 0.0])}).note
    figures.log_figure("a", "t", {"x": (rounds, [float("nan")] * 3)})


def test_rare_labels_are_put_together():
    counts = [[label + 1 for label in range(14)]] * 2
    legend = client_figures.labels_figure("a", "t", [f"l{label}" for label in range(14)], counts).legend
    assert [key.label for key in legend] == [f"l{label}" for label in range(4, 14)] + ["4 other labels"]


def test_a_comparison_shows_every_run_and_links_to_its_report(tmp_path, run):
    one, two = run(rounds=4), run(rounds=2, seed=8)
    rows = [
        ComparisonRow("mix", "one <i>", one, {**summarise(one), "run": str(tmp_path / "runs" / "a b")}),
        ComparisonRow("mix", "two", two, {**summarise(two), "run": "two"}),
        ComparisonRow("pooled", "all data in one place", None, {"accuracy": {"averaged": 0.95}}),
    ]
    page = Page(write_comparison(tmp_path / "demo", rows))
    outside = [link for link in page.links if not link.startswith("#")]
    assert outside == ["../runs/a%20b/report.html", "two/report.html"]
    assert "i" not in page.tags and "one <i>" in page.text
    assert "mix (row 2)" in page.text and "pooled all data in one place – – – 0.95" in page.text
    assert "The runs differ in seed" in page.text
    assert page.tags.count("figure") == 5


def test_a_comparison_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written .Not a directory.; compare again"):
        write_comparison(tmp_path / "file" / "out", [])

    def full(*words):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr("peerlora.files.settle", full)
    with pytest.raises(RunError, match="no room left in .*; make room, then compare again"):
        write_comparison(tmp_path, [])
    with pytest.raises(RunError, match="no room left in .*; make room, then go on: peerlora compare --resume"):
        write_results(tmp_path, [], [], {}, "", {}, None)


def test_a_comparison_of_nothing_is_a_page(tmp_path):
    assert "0 runs compared" in Page(write_comparison(tmp_path, [])).text


CLOCK = {"step": 0.5, "speed": [1.0, 0.1], "bandwidth": [1e6, None], "delay": 0.25, "deadline": 3.0, "away": []}


def timed(events):
    """The same run on a clock: round t ends at second 2.5 (t + 1)."""
    told = []
    for event in events:
        if isinstance(event, RunStarted):
            event = replace(event, clock={**CLOCK, "trace": None})
        elif isinstance(event, RoundDone):
            event = replace(event, virtual_seconds=2.5 * (event.round + 1), absent=[1])
        elif isinstance(event, Evaluated):
            event = replace(event, virtual_seconds=2.5 * event.round)
        told.append(event)
    return told


def test_a_run_on_a_clock_shows_its_results_by_virtual_seconds(tmp_path, run):
    page, plain = report(tmp_path / "run", timed(run())), report(tmp_path / "plain", run())
    assert "accuracy of every client's own model and of the averaged model, by virtual seconds" in page.text
    assert "virtual seconds 10 " in page.text
    told = "0.5 s per local step, speeds 0.1 to 1, uplinks 1 MB/s to 1 MB/s, delay 0.25 s, deadline 3 s"
    assert told in page.text
    assert "virtual" not in plain.text


@pytest.mark.slow
def test_runs_on_clocks_are_compared_by_virtual_seconds(tmp_path, run):
    rows = [ComparisonRow(name, "", events, summarise(events)) for name, events in (("a", timed(run())), ("b", run()))]
    assert "own models, by virtual seconds" in Page(write_comparison(tmp_path / "two", rows)).text
    assert "virtual" not in Page(write_comparison(tmp_path / "one", rows[1:])).text
