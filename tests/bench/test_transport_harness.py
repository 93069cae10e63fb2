"""The transport harness measures what it says, on a ring of three with small messages."""

import argparse
import importlib
from pathlib import Path

import pytest


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("transport")


def test_a_small_run_gives_every_figure(harness):
    options = argparse.Namespace(peers=3, sizes=[0.5], rounds=2, passes=1, kills=1, kill_size=0.5, away=0.2)
    found = harness.measure(options)
    row = found["throughput"][0]
    assert row["tcp"] > 0 < row["grpc"] and found["ratio"] == {"0.5": row["grpc"] / row["tcp"]}
    for what in ("noticed", "receives_after_start", "receives_after_spawn"):
        assert len(found["kills"][what]) == 2 and all(0 < seconds < 30 for seconds in found["kills"][what])


def test_the_ring(harness):
    assert [harness.neighbours(number, 4) for number in range(4)] == [[1, 3], [0, 2], [1, 3], [0, 2]]
    assert harness.neighbours(0, 2) == [1]
