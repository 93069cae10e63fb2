"""The harness of the cut backward pass at a size of seconds."""

import importlib
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_every_depth_is_timed_on_both_forwards(config, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("salf_backward")
    found = bench.measure(config("bert", "algorithm.name=salf", "train.local_steps=1"), 2)
    for path in ("packed", "padded"):
        assert list(found[path]["seconds"]) == [1, 2, 3] and found[path]["ratio"][3] == 1
        assert all(seconds > 0 for seconds in found[path]["seconds"].values())
    assert bench.render(found).count("\n") == 5
