"""Logs of real peers: JSON for programs, and lines with the time."""

import io
import json
import logging
import re

import pytest

from peerlora.cli.log import JsonLog, open_log
from peerlora.cli.progress import Progress
from peerlora.errors import ConfigError, RunError
from peerlora.runs.events import NeighbourChanged, RoundDone, RunStarted, Warned


def lines(out):
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_every_event_is_one_object_with_time_level_and_numbers():
    out = io.StringIO()
    with JsonLog(out) as log:
        log(RunStarted("", "dec-lora", 2, 4, "loss", False, 0, 1, {}, {}, {}, 5, [], held=[1], names={"0": "north"}))
        log(Warned("two\nlines"))
        log(NeighbourChanged("", 1, 0, "down", "no heartbeat"))
        log(RoundDone(0, [float("nan")], *[0.0] * 6, [[0, 1]], 1, 10, 20, *[0.0] * 3, missed={"0": "late"}))
        logging.getLogger("peerlora.x").warning("not taken up: %s", "it")
    start, warned, down, done, record = lines(out)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", line["time"]) for line in lines(out))
    assert start["event"] == "RunStarted" and start["level"] == "info"
    assert (warned["level"], warned["message"]) == ("warning", "two\nlines")
    assert down["level"] == "warning" and down["message"] == "north: down (no heartbeat)" and down["client"] == 0
    assert done["round"] == 1 and done["loss"] == [None] and done["missed"] == {"0": "late"}
    assert record["level"] == "warning" and record["message"] == "not taken up: it"


def test_the_last_line_is_the_error():
    out = io.StringIO()
    with pytest.raises(RunError), JsonLog(out):
        raise RunError("no neighbour goes along")
    assert lines(out)[-1]["level"] == "error" and lines(out)[-1]["message"] == "no neighbour goes along"
    logging.getLogger("peerlora.x").debug("after the block, nothing is written")
    assert len(lines(out)) == 1


def test_plain_lines_of_a_peer_begin_with_the_time(capsys):
    shown = open_log("plain")
    assert isinstance(shown, Progress)
    shown(NeighbourChanged("", 1, 0, "down", ""))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00 client 0: down\n", capsys.readouterr().err)


def test_another_form_is_refused():
    with pytest.raises(ConfigError, match="--log xml given; expected plain or json"):
        open_log("xml")
