"""Runs with secure sums: real peers and a simulation add the same whole numbers, and plain mixing is a step away."""

import pytest
import torch
from in_memory import federation

from cases import ROW_METHODS, others_slow
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_reports")

SECURE = "exchange.secure=true"
METHODS = [name for name, kind in ROW_METHODS.items() if kind.traits.refusal("secure") is None]
WORDS = ["topology=complete", "train.dtype=fp64", "peer.deadline=60", "peer.join=60"]
OWN = {
    "dsgd": ["train.local_steps=1"],
    "adf-lora": ["algorithm.interval=1"],
    "fedspeed": ["train.lr=0.7"],
    "qg-dsgdm": ["train.lr=0.7"],
}


def words(method):
    return [f"algorithm.name={method}", *WORDS, *OWN.get(method, [])]


def done(result):
    return select_events(read_events(result.run), RoundDone)


@pytest.mark.parametrize("method", others_slow(METHODS, ["adf-lora", "fedsa-lora"]))
def test_peers_give_what_the_simulation_gives(config, tmp_path, method):
    chosen = config("bert", *words(method), SECURE)
    whole, parts = simulate(chosen, tmp_path / "whole"), federation(chosen, tmp_path)
    for client, part in enumerate(parts):
        expected = whole.adapters.flat[client : client + 1]
        assert torch.allclose(part.adapters.flat, expected, rtol=0, atol=1e-9)
        assert not any(each.missed or "sums_given_up" in each.measures for each in done(part))
    for t, told in enumerate(done(whole)):
        assert sum(done(part)[t].bytes_sent for part in parts) == told.bytes_sent > 0


@pytest.mark.parametrize("method", others_slow(METHODS, ["adf-lora", "fedsa-lora"]))
def test_plain_mixing_is_a_few_steps_away(config, tmp_path, method):
    secure = simulate(config("bert", *words(method), SECURE), tmp_path / "secure").adapters
    plain = simulate(config("bert", *words(method)), tmp_path / "plain").adapters
    apart = float((secure.flat - plain.flat).abs().max())
    assert 0 < apart < 1e-6, "values are rounded three times to steps of 1e-12, and methods divide by small norms"
