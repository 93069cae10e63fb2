"""Logs of real peers: JSON for programs, and lines with the time."""

import io
import json
import logging
import re
import sys
import threading
import warnings

import pytest

from peerlora.cli.log import LONGEST_LINE, JsonLog, open_log
from peerlora.cli.progress import Progress
from peerlora.errors import ConfigError, NotNow, RunError, Stopped
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


@pytest.mark.parametrize(
    ("error", "code", "level"),
    [
        (RunError("no neighbour goes along"), 2, "error"),
        (NotNow("no neighbour goes along"), 1, "error"),
        (Stopped("no neighbour goes along"), 130, "info"),
        (KeyError("a bug"), 1, "error"),
        (KeyboardInterrupt(), 130, "info"),
    ],
)
def test_the_last_line_is_the_error_which_is_told_once(error, code, level):
    out = io.StringIO()
    with pytest.raises(SystemExit) as ended, JsonLog(out):
        raise error
    assert ended.value.code == code
    (line,) = lines(out)
    assert line["level"] == level and line["event"] == type(error).__name__
    assert line["message"] == {KeyError: "KeyError('a bug')", KeyboardInterrupt: "stopped"}.get(
        type(error), "no neighbour goes along"
    )
    assert ("Traceback" in line.get("traceback", "")) == isinstance(error, KeyError)
    logging.getLogger("peerlora.x").debug("after the block, nothing is written")
    assert len(lines(out)) == 1


def test_all_that_is_written_to_stderr_is_one_object_a_line():
    out = io.StringIO()
    before = sys.stderr

    def fail():
        raise ValueError("in a thread")

    with warnings.catch_warnings(), JsonLog(out):
        warnings.simplefilter("always")
        print("two\nlines, \n", file=sys.stderr)
        print("\r 10%\r 20%\rno end", end="", file=sys.stderr)
        warnings.warn("beware", UserWarning, stacklevel=1)
        try:
            fail()
        except ValueError:
            logging.getLogger("peerlora.x").exception("failed here")
        thread = threading.Thread(target=fail, name="worker")
        thread.start()
        thread.join()
        print("x" * (LONGEST_LINE + 1), end="", file=sys.stderr)
    assert sys.stderr is before
    found = lines(out)
    printed = [line["message"] for line in found if line["event"] == "stderr"]
    assert printed[:4] == ["two", "lines,", "10%", "20%"] and max(map(len, printed)) == LONGEST_LINE
    (warned,) = [line for line in found if line["event"] == "py.warnings"]
    assert warned["level"] == "warning" and "UserWarning: beware" in warned["message"]
    (logged,) = [line for line in found if line["event"] == "peerlora.x"]
    assert (logged["level"], logged["message"]) == ("error", "failed here") and "in a thread" in logged["traceback"]
    (failed,) = [line for line in found if line["event"] == "worker"]
    assert failed["level"] == "error" and "Traceback" in failed["traceback"]


def test_lines_of_several_threads_do_not_mix():
    out = io.StringIO()
    with JsonLog(out) as log:
        threads = [
            threading.Thread(target=lambda: [log.write("info", "x", "y" * 500) for _ in range(50)]),
            threading.Thread(target=lambda: [print("z" * 500, file=sys.stderr) for _ in range(50)]),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(lines(out)) == 100


def test_what_a_signal_handler_prints_while_a_line_is_written_follows_it():
    class Interrupted(io.StringIO):
        pending = True

        def flush(self):
            if self.pending:
                self.pending = False
                print("stopping after this round", file=sys.stderr)
                assert self.getvalue().count("\n") == 1
            super().flush()

    out = Interrupted()
    with JsonLog(out) as log:
        log.write("info", "x", "first")
    assert [line["message"] for line in lines(out)] == ["first", "stopping after this round"]


def test_a_reader_of_the_log_that_is_gone_costs_no_run():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with JsonLog(Gone()) as log:
        log(Warned("nobody hears it"))


def test_plain_lines_of_a_peer_begin_with_the_time(capsys):
    with open_log("plain") as shown:
        assert isinstance(shown, Progress)
    shown(NeighbourChanged("", 1, 0, "down", ""))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00 client 0: down\n", capsys.readouterr().err)


def test_another_form_is_refused():
    with pytest.raises(ConfigError, match="--log xml given; expected plain or json"), open_log("xml"):
        pass
