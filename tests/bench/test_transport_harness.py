"""The transport harness measures what it says, on a ring of three with small messages."""

import argparse
import importlib
from pathlib import Path

import pytest


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("transport")


@pytest.mark.slow
def test_a_small_run_gives_every_figure(harness):
    options = argparse.Namespace(peers=3, sizes=[0.5], rounds=2, passes=1, kills=1, kill_size=0.5, away=0.2)
    found = harness.measure(options)
    row = found["throughput"][0]
    assert row["tcp"] > 0 < row["grpc"] and found["ratio"] == {"0.5": row["grpc"] / row["tcp"]}
    for what in ("noticed", "receives_after_start", "receives_after_spawn"):
        assert len(found["kills"][what]) == 2 and all(seconds > 0 for seconds in found["kills"][what])


def test_the_ring(harness):
    assert [harness.neighbours(number, 4) for number in range(4)] == [[1, 3], [0, 2], [1, 3], [0, 2]]
    assert harness.neighbours(0, 2) == [1]


def test_the_page_tells_every_figure_with_its_aim(harness):
    from real_peers_page import real_peers

    rows = [{"mb": size, "tcp": 1000.0, "grpc": 500.0, "ratio": 0.5} for size in (4.0, 32.0)]
    known = {"noticed": 0.04, "receives_after_start": 1.2}
    transport = {"command": "x", "peers": 8, "throughput": rows, "ratio": {"4": 0.5, "32": 0.5}, "kills_median": known}
    transport["kills"] = {"receives_after_start": [1.1, 1.3]}
    endurance = {"tiny": False, "rounds": 1000, "clients": 3, "window": 100}
    endurance["peers"] = [{"ratio": 1.02}, {"ratio": 1.06}]
    text = real_peers(transport, {"endurance": endurance, "kills": {"tiny": True}})
    assert "4 MB, 8 processes, 2 neighbours each: 0.50" in text and "aim 0.45, reached" in text
    assert "aim 0.9, not reached" in text and "aim 0.2, reached" in text and "aim 1, not reached" in text
    assert "at most 1.060 times" in text and "aim 1.05, not reached" in text
    assert "kills was not measured" in text and "overhead was not measured" in text
    assert "make bench-transport" in real_peers({}, {})
