"""What the live table and the table at the end show."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from peerlora.cli import progress
from peerlora.cli.progress import Progress, print_summary
from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.metrics import summarise


def events(metric, higher):
    start = RunStarted("", "dec-lora", 2, 4, metric, higher, 0, 1, {}, {}, {}, 5, [])
    done = RoundDone(0, [1.0, 3.0], *[0.0] * 6, [[0, 1]], 1, 10, 20, *[0.0] * 3)
    return [start, done, Evaluated(1, 20, [1.0, 3.0], 2.0, [1.0, 3.0], 2.0, 0.1, True)]


def test_the_worst_client_is_the_one_with_the_largest_loss(capsys):
    for metric, higher, worst in (("loss", False, "3.000"), ("accuracy", True, "1.000"), ("error", False, "3.000")):
        shown = Progress()
        start, done, score = events(metric, higher)
        for event in (start, score, done):
            shown(event)
        assert shown._facts(done)["worst"] == worst and shown._facts(done)["mean client"] == "2.000"
        print_summary([("run", summarise(events(metric, higher)) | {"run": "here"})])
        row = next(line for line in capsys.readouterr().out.splitlines() if "│ run" in line)
        assert row.split("│")[3].strip() == worst, metric


def test_a_summary_says_where_links_were_not_written_down(capsys):
    start, done, score = events("accuracy", True)
    unlisted = [replace(done, round=t, edges=None, contacts=5050, bytes_sent=1_010_000) for t in range(3)]
    for rounds in (unlisted, [done, unlisted[1]]):
        print_summary([("run", summarise([start, *rounds, score]) | {"run": "here"})])
        out = capsys.readouterr().out
        assert "run: the links of each round were not written down" in out
        assert "no client had contact" not in out and "last contact" not in out and "never" not in out


@pytest.fixture
def terminal(monkeypatch):
    """What is written to a terminal."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda *words, **options: console)
    return out


def test_on_a_terminal_every_evaluation_stays_and_a_bar_grows(terminal):
    start, done, score = events("loss", False)
    with Progress() as shown:
        for event in (start, score, done, replace(score, round=2, own=[0.5, 1.5])):
            shown(event)
        bar = shown._shown(done).renderables[1]
        assert (bar.completed, bar.total) == (1, 4)
        shown.live.refresh()
        assert "━" in terminal.getvalue()
    lines = [line.strip() for line in terminal.getvalue().splitlines()]
    assert any(line.endswith("after 1 rounds, loss on 20 rows: mean client 2.000, worst 3.000") for line in lines)
    assert any(line.endswith("after 2 rounds, loss on 20 rows: mean client 1.000, worst 1.500") for line in lines)


def test_without_the_start_of_the_run_no_client_is_called_the_worst():
    _, done, score = events("loss", False)
    shown = Progress()
    shown(replace(score, relayed=[1.0, 2.0]))
    assert shown._facts(done)["mean client"] == "2.000"
    assert not {"worst", "relayed mean/worst", "left"} & set(shown._facts(done))
