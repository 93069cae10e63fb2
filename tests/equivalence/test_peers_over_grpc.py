"""Processes over gRPC end with the adapters that the simulation gives their clients; tolerance as in memory."""

import pytest
import torch
from processes import Processes
from safetensors.torch import load_file
from test_peers_in_memory import METHODS, TOLERANCE, words

from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_reports")

CLIENTS = 3
OTHER = {
    "compressed": [*words("adf-lora"), "exchange.codec=top-k"],
    "one-way": ["algorithm.name=sgp", *words("local")[1:], "topology.kind=random-out", "topology.degree=1"],
    "pooled": [*words("dec-lora"), "partition.kind=dirichlet", "train.label_prior=pooled"],
}
"""Runs that are no method alone: name -> settings."""


def compare(config, folder, methods):
    """``methods``: names of them, or of what is in OTHER."""
    settings = {method: OTHER.get(method) or words(method) for method in methods}
    configs = {method: config("bert", *chosen, f"clients={CLIENTS}") for method, chosen in settings.items()}
    with Processes(configs, folder) as processes:
        for client in range(CLIENTS):
            processes.start(client)
        whole = {}
        for method, chosen in configs.items():
            whole[method] = simulate(chosen, folder / "whole" / method, report=False).adapters
        assert processes.wait() == dict.fromkeys(range(CLIENTS), 0)
        for method in methods:
            for client in range(CLIENTS):
                run = processes.run(method, client)
                found = load_file(run / "adapters" / "all.safetensors")["flat"]
                expected = whole[method].flat[client : client + 1]
                assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE), (method, client)
                rounds = select_events(read_events(run), RoundDone)
                assert [done.round for done in rounds] == [0, 1, 2] and not any(done.missed for done in rounds)
                assert (run / "adapters" / f"client-{client:02d}" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.alone
def test_a_method_and_what_changes_its_messages_give_what_the_simulation_gives(config, tmp_path):
    compare(config, tmp_path, ["adf-lora", "compressed"])


@pytest.mark.slow
@pytest.mark.alone
def test_every_other_method_gives_what_the_simulation_gives(config, tmp_path):
    others = [name for name in (*METHODS, *OTHER) if name not in ("adf-lora", "compressed")]
    compare(config, tmp_path, others)
