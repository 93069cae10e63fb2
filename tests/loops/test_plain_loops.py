"""Plain loops that join over the memory transport end with the adapters of the simulation."""

import pytest
from loop_rigs import plain_loops, require_equal

from cases import others_slow
from peerlora.runtime.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_reports")

PINNED = [
    ["dec-lora"],
    ["adf-lora", "algorithm.interval=1"],
    ["adf-lora", "algorithm.interval=2"],
    ["ffa-lora"],
    ["rolora"],
    ["decaf"],
    ["fedrot-lora"],
]
TRAIN = ["train.dtype=fp64", "train.rounds=4", "train.lr=0.0003", "clients=3", "peer.deadline=60", "peer.join=60"]


@pytest.mark.parametrize("method", others_slow(PINNED, [1]))
def test_loops_end_with_the_adapters_of_the_simulation(config, tmp_path, method):
    name, *words = method
    chosen = config("bert", f"algorithm.name={name}", *TRAIN, *words)
    whole = simulate(chosen, tmp_path / "whole")
    results, _ = plain_loops(chosen, tmp_path)
    require_equal(whole.adapters, [each.adapters for each in results])
