"""Plain loops that join over the memory transport end with the adapters of the simulation."""

import math

import pytest
import torch
from loop_rigs import plain_loops, read, require_equal

from cases import others_slow
from peerlora.runs.events import Evaluated
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
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


@pytest.mark.parametrize("deploy", others_slow(["own", "relayed"], ["relayed"]))
def test_loops_relay_what_the_simulation_relays_and_end(config, tmp_path, deploy):
    relay = [f"exchange.relay.deploy={deploy}", "topology=path"]
    chosen = config("bert", "algorithm.name=dec-lora", *TRAIN, *relay)
    whole = simulate(chosen, tmp_path / "whole")
    results, models = plain_loops(chosen, tmp_path)
    require_equal(whole.adapters, [each.adapters for each in results])
    require_equal(whole.relayed, [each.relayed for each in results])
    for result, model in zip(results, models, strict=True):
        assert torch.equal(read(model), result.adapters.flat[0]), "the loop goes on with the own adapters"
        assert not torch.equal(result.relayed.flat, result.adapters.flat)
        (last,) = [each for each in select_events(read_events(result.run), Evaluated) if each.final]
        assert all(math.isnan(each) for each in (*last.relayed, *last.relayed_loss)), "no loop evaluates them"


def test_loops_add_up_what_the_simulation_adds_up(config, tmp_path):
    """With secure sums a loop of one's own learns the sum of its neighbours, too."""
    chosen = config("bert", "algorithm.name=dec-lora", *TRAIN, "exchange.secure=true")
    whole = simulate(chosen, tmp_path / "whole")
    results, _ = plain_loops(chosen, tmp_path)
    require_equal(whole.adapters, [each.adapters for each in results])
    for result in results:
        assert result.summary["secure_sums"] == {"given_up": 0}
