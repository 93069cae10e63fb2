"""Real peers that fine-tune a flow policy end with the adapters that the simulation gives their clients."""

import pytest
import torch
from in_memory import federation
from processes import Processes
from safetensors.torch import load_file

from cases import others_slow
from flow_runs import tiny
from peerlora.runs.events import Evaluated, RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.simulate import simulate

pytestmark = pytest.mark.usefixtures("cache", "no_reports")
WORDS = ["peer.deadline=60", "peer.join=60"]
TOLERANCE = 1e-9  # fp64


def check(expected, found, run, client):
    assert torch.allclose(found, expected.flat[client : client + 1], rtol=0, atol=TOLERANCE), client
    rounds = select_events(read_events(run), RoundDone)
    assert [done.round for done in rounds] == [0, 1, 2, 3] and not any(done.missed for done in rounds)
    assert rounds[0].measures["drift_0"] > 0 == rounds[0].measures["drift_1"]


@pytest.mark.parametrize("head", others_slow(["private", "mixed"], ["private"]))
def test_peers_in_memory_give_what_the_simulation_gives(tmp_path, head):
    config = tiny(*WORDS, f"adapter.head={head}")
    whole, parts = simulate(config, tmp_path / "whole"), federation(config, tmp_path)
    told = select_events(read_events(whole.run), Evaluated)[-1]
    for client, part in enumerate(parts):
        check(whole.adapters, part.adapters.flat, part.run, client)
        own = select_events(read_events(part.run), Evaluated)[-1]
        assert own.personal[0] == pytest.approx(told.personal[client], rel=1e-9)
        assert own.own[0] == pytest.approx(told.own[client], rel=1e-9)


@pytest.mark.slow
@pytest.mark.alone
def test_peers_over_grpc_give_what_the_simulation_gives(tmp_path):
    config = tiny(*WORDS)
    whole = simulate(config, tmp_path / "whole").adapters
    with Processes({"flow": config}, tmp_path) as processes:
        for client in range(config.clients):
            processes.start(client)
        assert processes.wait() == dict.fromkeys(range(config.clients), 0)
        for client in range(config.clients):
            run = processes.run("flow", client)
            check(whole, load_file(run / "adapters" / "all.safetensors")["flat"], run, client)
