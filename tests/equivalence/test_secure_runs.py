"""Runs with secure sums: real peers and a simulation add the same whole numbers, and plain mixing is a step away."""

import math

import pytest
import torch
from in_memory import federation

from cases import ROW_METHODS, others_slow
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import find_start, select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.peer.message_bounds import largest_message
from peerlora.runtime.simulate import simulate
from peerlora.train import accounting

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


@pytest.mark.skipif(not accounting.has_accountants(), reason="opacus is missing; install the extra privacy")
def test_with_differential_privacy_they_do_too(config, tmp_path):
    """Noise is added before anything is summed; what was spent does not depend on how it crosses."""
    chosen = config("bert", *words("dec-lora"), SECURE, "privacy.noise=0.4", "privacy.generator=seeded")
    whole, parts = simulate(chosen, tmp_path / "whole"), federation(chosen, tmp_path)
    for client, part in enumerate(parts):
        assert torch.allclose(part.adapters.flat, whole.adapters.flat[client : client + 1], rtol=0, atol=1e-9)
        assert part.summary["privacy"]["spent"]["epsilon"] == [whole.summary["privacy"]["spent"]["epsilon"][client]]
    plain = simulate(config("bert", *words("dec-lora"), "privacy.noise=0.4"), tmp_path / "plain")
    assert plain.summary["privacy"]["spent"] == whole.summary["privacy"]["spent"]


def test_a_run_says_that_its_sums_are_secure(config, tmp_path):
    chosen = config("bert", *words("dec-lora"), SECURE)
    whole, (part, *_) = simulate(chosen, tmp_path / "whole"), federation(chosen, tmp_path)
    for result in (whole, part):
        start = find_start(read_events(result.run))
        assert start.secure_sums and any("exchange.secure" in note for note in start.notes)
        assert result.summary["secure_sums"] == {"given_up": 0}
    plain = simulate(config("bert", *words("dec-lora")), tmp_path / "plain")
    assert "secure_sums" not in plain.summary and not find_start(read_events(plain.run)).secure_sums


@pytest.mark.parametrize("method", ["dec-lora", "rolora"])
def test_a_message_is_refused_by_its_header_where_it_is_larger_than_a_sum_can_be(config, method):
    federation = compose(config("bert", *words(method), SECURE), clients=[0])
    x, sends = federation.start, {}
    for t in range(3):
        sends |= federation.algorithm.message(x, t)
    scalars = sum(math.prod(shape) for shape, _ in sends.values())
    assert 8 * scalars < largest_message(federation, sends) <= 8 * scalars + 1024


@pytest.mark.parametrize("method", others_slow(METHODS, ["adf-lora", "fedsa-lora"]))
def test_plain_mixing_is_a_few_steps_away(config, tmp_path, method):
    secure = simulate(config("bert", *words(method), SECURE), tmp_path / "secure").adapters
    plain = simulate(config("bert", *words(method)), tmp_path / "plain").adapters
    apart = float((secure.flat - plain.flat).abs().max())
    assert 0 < apart < 1e-6, "values are rounded three times to steps of 1e-12, and methods divide by small norms"
