"""Limit cases: settings in which a method must be another one, written plainly here."""

from dataclasses import replace

import pytest
import torch

from peerlora.algorithms import build_algorithm
from peerlora.data.batches import Shards
from peerlora.exchange.schema import encoded_bytes
from peerlora.lora.adapters import Adapters
from peerlora.lora.diagnostics import agreement
from peerlora.runtime.compose import compose

ROUNDS = 4
ALONE = ["topology.kind=edges", "topology.edges=[]", "topology.allow_disconnected=true"]
COMPLETE = ["topology.kind=complete"]  # of 4 clients: every weight is exactly 1/4
METHODS = {"local": {}, "dec-lora": {}, "adf-lora": {"interval": 2}}


def words(method, **settings):
    return [f"algorithm.name={method}", *(f"algorithm.{key}={value}" for key, value in settings.items())]


def run(federation, rounds=ROUNDS, x=None):
    """The state after every round."""
    states = [federation.algorithm.start(federation.start if x is None else x, federation.exchange)]
    for t in range(rounds):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            states.append(federation.algorithm.round(t, states[-1], federation.learner, federation.exchange))
    return states[1:]


def trained_and_averaged(federation, active, averaged, rounds=ROUNDS):
    """A server's loop: all train ``active(t)``, then the blocks of ``averaged(t)`` become their mean."""
    x, states = federation.start, []
    for t in range(rounds):
        with federation.learner.round(t):
            x = federation.learner.fit(x, active(t))
        flat = x.flat.clone()
        for block in averaged(t):
            columns = x.spec.columns(block)
            flat[:, columns] = flat[:, columns].mean(0)
        x = replace(x, flat=flat)
        states.append(x)
    return states


def assert_same(found, expected, tolerance=1e-12):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.flat - theirs.flat).abs().max() <= tolerance


def noisy(x, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return replace(x, flat=x.flat + 0.1 * torch.randn(x.flat.shape, generator=generator, dtype=torch.float64))


def test_dec_lora_on_the_complete_graph_is_fedit(config):
    chosen = config("bert", *words("dec-lora"), *COMPLETE)
    plain = trained_and_averaged(compose(chosen), lambda t: "AB", lambda t: ("A", "B", "head"))
    assert_same(run(compose(chosen)), plain)


def test_adf_lora_that_never_switches_on_the_complete_graph_is_ffa_lora(config):
    chosen = config("bert", *words("adf-lora", interval=ROUNDS), *COMPLETE)
    federation = compose(chosen)
    found = run(federation)
    assert_same(found, trained_and_averaged(compose(chosen), lambda t: "B", lambda t: ("B", "head")))
    for x in found:
        assert torch.equal(x.select("A").flat, federation.start.select("A").flat), (
            "A is neither trained nor moved by mixing"
        )
        assert agreement(x).cross_term == 0


def test_a_common_frozen_factor_stays_common_on_any_graph_up_to_rounding(config):
    federation = compose(config("bert", *words("adf-lora", interval=20)))
    for x in run(federation, 20):
        assert (x.select("A").flat - federation.start.select("A").flat).abs().max() < 1e-14
        assert agreement(x).cross_term < 1e-14
    assert agreement(x).consensus_B > 1e-6


def test_adf_lora_every_round_on_the_complete_graph_is_rolora(config):
    chosen = config("bert", *words("adf-lora", interval=1), *COMPLETE)
    plain = trained_and_averaged(compose(chosen), lambda t: "BA"[t % 2], lambda t: ("BA"[t % 2], "head"))
    assert_same(run(compose(chosen)), plain)


def test_the_complete_graph_leaves_no_disagreement(config):
    for x in run(compose(config("bert", *words("adf-lora", interval=2), *COMPLETE))):
        assert agreement(x).consensus_A + agreement(x).consensus_B < 1e-28


def test_without_links_dec_lora_is_local(config):
    found = run(compose(config("bert", *words("dec-lora"), *ALONE)))
    local = run(compose(config("bert", *words("local"), *ALONE)))
    assert all(torch.equal(ours.flat, theirs.flat) for ours, theirs in zip(found, local, strict=True))


def test_without_links_adf_lora_is_its_schedule_alone(config):
    chosen = config("bert", *words("adf-lora", interval=2), *ALONE)
    found = run(compose(chosen))
    alone = trained_and_averaged(compose(chosen), lambda t: "BBAA"[t], lambda t: ())
    assert all(torch.equal(ours.flat, theirs.flat) for ours, theirs in zip(found, alone, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_one_client_is_the_same_schedule_alone(config, method):
    chosen = config("bert", *words(method, **METHODS[method]), *ALONE, "clients=1")
    found = run(compose(chosen))
    schedule = "BBAA" if method == "adf-lora" else ["AB"] * 4
    alone = trained_and_averaged(compose(chosen), lambda t: schedule[t], lambda t: ())
    assert found[-1].clients == 1
    assert all(torch.equal(ours.flat, theirs.flat) for ours, theirs in zip(found, alone, strict=True))
    assert agreement(found[-1]).cross_term == 0


def test_local_knows_nothing_of_the_topology(config):
    ring, complete = (
        run(compose(config("bert", *words("local"), f"topology.kind={kind}"))) for kind in ("ring", "complete")
    )
    assert torch.equal(ring[-1].flat, complete[-1].flat)


@pytest.mark.parametrize("method", METHODS)
def test_clients_with_the_same_data_order_and_seed_stay_one_client(config, method):
    federation = compose(config("bert", *words(method, **METHODS[method])))
    old = federation.learner.shards
    federation.learner.shards = Shards(old.data, [old.shards[0]] * 4, old.batches, [0] * 4, old.seed)
    found = run(federation)
    alone = compose(config("bert", *words(method, **METHODS[method]), *ALONE, "clients=1"))
    alone.learner.shards = Shards(old.data, [old.shards[0]], old.batches[:1], [0], old.seed)
    for x, one in zip(found, run(alone), strict=True):
        assert (x.flat - one.flat).abs().max() < 1e-11
        assert agreement(x).cross_term < 1e-20 and agreement(x).consensus_product < 1e-20


# --- what sets ADF-LoRA apart


def test_the_active_factor_starts_with_B_and_switches_every_interval():
    def active(**settings):
        return "".join(build_algorithm("adf-lora", settings).active(t) for t in range(12))

    assert active(interval=1) == "BABABABABABA"
    assert active(interval=3) == "BBBAAABBBAAA"
    assert active() == "BBBBBAAAAABB"


def test_only_the_active_factor_trains(config):
    federation = compose(config("bert", *words("adf-lora", interval=2), *ALONE))
    before = noisy(federation.start)
    for t, x in enumerate(run(federation, x=before)):
        frozen = "AABB"[t]
        assert torch.equal(x.select(frozen).flat, before.select(frozen).flat)
        assert not torch.equal(x.select("BBAA"[t]).flat, before.select("BBAA"[t]).flat)
        before = x


def test_no_cross_term_in_the_first_phase_and_one_after_it(config):
    federation = compose(config("bert", *words("adf-lora", interval=2)))
    lost = [agreement(x).cross_term for x in run(federation)]
    assert max(lost[:2]) < 1e-15
    assert lost[2] > 1e-8


def test_mixing_the_frozen_factor_shrinks_its_consensus_by_rho_squared(config):
    # On a ring of 4 every mode of disagreement has an eigenvalue of +-1/3, so any start decays by exactly 1/9.
    federation = compose(config("bert", *words("adf-lora", interval=10)))
    assert federation.topology.rho() == pytest.approx(1 / 3)
    start = noisy(federation.start)
    distances = [agreement(x).consensus_A for x in (start, *run(federation, x=start))]
    for before, after in zip(distances, distances[1:], strict=False):
        assert after == pytest.approx(before / 9, rel=1e-9)


def test_the_frozen_factor_of_clients_without_links_keeps_its_consensus(config):
    federation = compose(config("bert", *words("adf-lora", interval=10), *ALONE))
    start = noisy(federation.start)
    expected = agreement(start).consensus_A
    assert [agreement(x).consensus_A for x in run(federation, x=start)] == [expected] * ROUNDS


@pytest.mark.parametrize("method", METHODS)
def test_a_round_leaves_the_state_it_got_alone(config, method):
    federation = compose(config("bert", *words(method, **METHODS[method])))
    x = noisy(federation.start)
    before = x.flat.clone()
    federation.algorithm.round(0, x, federation.learner, federation.exchange)
    assert torch.equal(x.flat, before) and torch.equal(federation.algorithm.model(x).flat, before)


@pytest.mark.parametrize("method", ["dec-lora", "adf-lora"])
@pytest.mark.parametrize("head", ["mixed", "private", "frozen"])
def test_the_message_is_what_is_sent(config, method, head):
    federation = compose(config("bert", *words(method), f"adapter.head={head}"))
    message = federation.algorithm.message(federation.start)
    assert any(name.startswith("head:") for name in message) == (head == "mixed")
    run(federation, 1)
    assert federation.exchange.stats.bytes_per_edge == encoded_bytes(message)


def test_local_sends_nothing(config):
    federation = compose(config("bert", *words("local")))
    run(federation, 1)
    assert federation.algorithm.message(federation.start) == {}
    assert (federation.exchange.stats.bytes_sent, federation.exchange.stats.sent) == (0, None)


@pytest.mark.parametrize("head", ["private", "frozen"])
def test_a_head_that_is_not_mixed_stays_where_training_left_it(config, head):
    federation = compose(config("bert", *words("dec-lora"), f"adapter.head={head}", *COMPLETE))
    x = run(federation, 1)[0]
    trained = compose(config("bert", *words("local"), f"adapter.head={head}")).learner.fit(federation.start, "AB")
    assert isinstance(x, Adapters) and torch.equal(x.select("head").flat, trained.select("head").flat)
    assert (x.select("head").flat.shape[1] == 0) == (head == "frozen")
    assert agreement(x).consensus_B < 1e-28
