"""Limits and invariants of the methods that mix one factor, or both at a chosen time; names, aliases and bytes."""

from dataclasses import replace

import pytest
import torch
from test_limits import ALONE, COMPLETE, ROUNDS, assert_same, noisy, run, trained_and_averaged, words

from peerlora.algorithms import ALIASES, REGISTRY, build_algorithm, describe_algorithms
from peerlora.algorithms.base import Configurable, prepare
from peerlora.config.loading import parse_spec
from peerlora.data.batches import Shards
from peerlora.errors import CompositionError, ConfigError
from peerlora.exchange.schema import encoded_bytes
from peerlora.lora.diagnostics import agreement, diagnose
from peerlora.runtime.compose import compose
from peerlora.topology.schedule import build_topology
from peerlora.tree import leaves

METHODS = {"rolora": "BA", "ffa-lora": "B", "fedsa-lora": "A"}  # what is mixed in round t
TRAINED = {"rolora": ["B", "A"], "ffa-lora": ["B"], "fedsa-lora": ["AB"]}


def trained(method, t):
    return TRAINED[method][t % len(TRAINED[method])]


def sent(method, t):
    return METHODS[method][t % len(METHODS[method])]


# --- limit cases


@pytest.mark.parametrize("method", METHODS)
def test_on_the_complete_graph_they_are_the_server_s_methods(config, method):
    chosen = config("bert", *words(method), *COMPLETE)
    plain = trained_and_averaged(compose(chosen), lambda t: trained(method, t), lambda t: (sent(method, t), "head"))
    assert_same(run(compose(chosen)), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clients", [1, 4])
def test_without_links_they_are_the_same_schedule_alone(config, method, clients):
    chosen = config("bert", *words(method), *ALONE, f"clients={clients}")
    found = run(compose(chosen))
    alone = trained_and_averaged(compose(chosen), lambda t: trained(method, t), lambda t: ())
    assert all(torch.equal(ours.flat, theirs.flat) for ours, theirs in zip(found, alone, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_clients_with_the_same_data_order_and_seed_stay_one_client(config, method):
    federation = compose(config("bert", *words(method)))
    old = federation.learner.shards
    federation.learner.shards = Shards(old.data, [old.shards[0]] * 4, old.batches, [0] * 4, old.seed)
    alone = compose(config("bert", *words(method), *ALONE, "clients=1"))
    alone.learner.shards = Shards(old.data, [old.shards[0]], old.batches[:1], [0], old.seed)
    for x, one in zip(run(federation), run(alone), strict=True):
        assert (x.flat - one.flat).abs().max() < 1e-11
        assert agreement(x).cross_term < 1e-20 and agreement(x).consensus_product < 1e-20


@pytest.mark.parametrize("graph", [COMPLETE, ["topology.kind=path"]])
def test_fedit_is_dec_lora(config, graph):
    ours = run(compose(config("bert", *words("fedit"), *graph)))
    theirs = run(compose(config("bert", *words("dec-lora"), *graph)))
    assert all(torch.equal(x.flat, y.flat) for x, y in zip(ours, theirs, strict=True))


def test_rolora_on_the_complete_graph_is_adf_lora_every_round(config):
    assert_same(
        run(compose(config("bert", *words("rolora"), *COMPLETE))),
        run(compose(config("bert", *words("adf-lora", interval=1), *COMPLETE))),
    )


def test_rolora_and_adf_lora_that_never_switch_are_ffa_lora_on_any_graph(config):
    ffa = run(compose(config("bert", *words("ffa-lora"))))
    assert_same(run(compose(config("bert", *words("rolora", interval=ROUNDS)))), ffa, tolerance=0)
    assert_same(run(compose(config("bert", *words("adf-lora", interval=ROUNDS)))), ffa)


# --- what is trained, mixed and kept


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_sent_stays_at_home(config, method):
    federation = compose(config("bert", *words(method)))
    x = noisy(federation.start)
    for t in range(2):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            fitted = federation.learner.fit(x, trained(method, t))
            x = federation.algorithm.round(t, x, federation.learner, federation.exchange)
        kept = "A" if sent(method, t) == "B" else "B"
        assert torch.equal(x.select(kept).flat, fitted.select(kept).flat)
        mixed = federation.exchange.mix(fitted.select(sent(method, t), "head"))
        assert torch.equal(x.select(sent(method, t), "head").flat, mixed.flat)


def test_ffa_lora_has_no_cross_term_in_any_round_and_mixes_products_exactly(config):
    federation = compose(config("bert", *words("ffa-lora")))
    x = federation.start
    for t in range(ROUNDS):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            fitted = federation.learner.fit(x, "B")
            x = federation.algorithm.round(t, x, federation.learner, federation.exchange)
        found = diagnose(x, federation.exchange.stats.sent, federation.exchange.graph.W)
        assert found.cross_term == 0 and found.local_cross_term < 1e-15
        assert torch.equal(x.select("A").flat, federation.start.select("A").flat)
        W = torch.from_numpy(federation.exchange.graph.W)
        for layer in x.A:
            products = torch.tensordot(W, fitted.B[layer] @ fitted.A[layer], 1)
            assert (x.B[layer] @ x.A[layer] - products).abs().max() < 1e-15


def test_active_only_mixing_loses_products_once_frozen_factors_differ(config):
    federation = compose(config("bert", *words("rolora", interval=2), "topology.kind=path"))
    state, lost = federation.start, []
    for t in range(6):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            state = federation.algorithm.round(t, state, federation.learner, federation.exchange)
        found = diagnose(state, federation.exchange.stats.sent, federation.exchange.graph.W)
        lost.append(found.local_cross_term)
    assert max(lost[:2]) < 1e-15  # A is common
    assert min(lost[2:]) > 1e-6


@pytest.mark.parametrize("method", ["rolora", "ffa-lora", "fedsa-lora", "fedit"])
def test_a_round_leaves_the_state_it_got_alone(config, method):
    federation = compose(config("bert", *words(method)))
    x = noisy(federation.start)
    before = x.flat.clone()
    federation.algorithm.round(0, x, federation.learner, federation.exchange)
    assert torch.equal(x.flat, before) and torch.equal(federation.algorithm.model(x).flat, before)


def test_mixing_keeps_the_mean_of_what_is_sent(config):
    for method in METHODS:
        federation = compose(config("bert", *words(method), "topology.kind=path"))
        x = noisy(federation.start)
        fitted = federation.learner.fit(x, trained(method, 0))
        after = federation.algorithm.round(0, x, federation.learner, federation.exchange)
        assert (fitted.flat.mean(0) - after.flat.mean(0)).abs().max() < 1e-14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", ["private", "frozen"])
def test_a_head_that_is_not_mixed_stays_where_training_left_it(config, method, head):
    federation = compose(config("bert", *words(method), f"adapter.head={head}", *COMPLETE))
    fitted = federation.learner.fit(federation.start, trained(method, 0))
    x = federation.algorithm.round(0, federation.start, federation.learner, federation.exchange)
    assert torch.equal(x.select("head").flat, fitted.select("head").flat)


# --- bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", ["mixed", "private", "frozen"])
def test_the_bytes_are_those_of_the_factor_that_is_sent(config, method, head):
    oblong = 'adapter.targets=["intermediate.dense"]'
    federation = compose(config("bert", *words(method), f"adapter.head={head}", oblong))
    spec, state = federation.start.spec, federation.start
    scalars = {"A": sum(spec.rank * layer.d_in for layer in spec.layers)}
    scalars["B"] = sum(spec.rank * layer.d_out for layer in spec.layers)
    assert scalars["A"] != scalars["B"]
    for t in range(2):
        federation.exchange.begin(t)
        state = federation.algorithm.round(t, state, federation.learner, federation.exchange)
        message = federation.algorithm.message(state, t)
        block = sent(method, t)
        expected = {f"{block}:{layer.name}" for layer in spec.layers}
        assert {name for name in message if not name.startswith("head:")} == expected
        assert any(name.startswith("head:") for name in message) == (head == "mixed")
        size = federation.exchange.stats.bytes_per_edge
        assert size == encoded_bytes(message)
        heads = sum(torch.Size(shape).numel() for name, (shape, _) in message.items() if name.startswith("head:"))
        header = size - 8 * (scalars[block] + heads)
        assert 0 < header < 200 * len(message)
        assert federation.exchange.stats.bytes_sent == 8 * size  # four clients on a ring


def test_one_factor_of_square_layers_is_half_of_both(config):
    def numbers(method):
        federation = compose(config("bert", *words(method), "adapter.head=frozen"))
        message = federation.algorithm.message(federation.start)
        return sum(torch.Size(shape).numel() for shape, _ in message.values())

    assert 2 * numbers("rolora") == 2 * numbers("ffa-lora") == 2 * numbers("fedsa-lora") == numbers("fedit")


# --- names


def test_a_part_is_a_copy_of_some_blocks(config):
    x = noisy(compose(config("bert", "algorithm.name=local")).start)
    both = x.select("B", "head")
    assert torch.equal(both.select("B").flat, x.select("B").flat)
    assert torch.equal(both.select("head").flat, x.select("head").flat)
    before = x.flat.clone()
    both.flat.zero_()
    assert torch.equal(x.flat, before)
    assert torch.equal(x.with_blocks(replace(x, flat=-x.flat).select("A")).select("A").flat, -x.select("A").flat)


@pytest.mark.parametrize(("alias", "meant"), ALIASES.items())
def test_an_alias_is_the_method_it_means(config, alias, meant):
    assert alias not in REGISTRY
    assert build_algorithm(alias, {}) == build_algorithm(meant, {})
    one_step = "train.local_steps=1"
    ours, theirs = (leaves(run(compose(config("bert", *words(name), one_step)), 1)[0]) for name in (alias, meant))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert alias in describe_algorithms()[meant]["aliases"]


@pytest.mark.parametrize(
    ("wrong", "near"), [("con-lora", "conlora"), ("dlora_fa", "dlora-fa"), ("rolorra", "rolora"), ("tad", "tad-lora")]
)
def test_a_misspelled_name_is_helped_by_the_nearest_one(wrong, near):
    with pytest.raises(ConfigError, match=rf"did you mean '{near}'\?\); expected one of local.*rolora.*conlora"):
        build_algorithm(wrong, {})


def test_an_alias_has_the_settings_of_its_method():
    with pytest.raises(ConfigError, match=r"unknown key 'algorithm.interval'; conlora has no settings"):
        build_algorithm("conlora", {"interval": 2})


def test_every_method_here_says_what_its_exchange_averages():
    told = {name: facts["operator"] for name, facts in describe_algorithms().items()}
    assert (told["ffa-lora"], told["rolora"]) == ("both", "product-sum")
    assert {told[name] for name in ("tad-lora", "fedit", "fedsa-lora")} == {"product-sum"}


@pytest.mark.parametrize("method", ["tad-lora", "rolora", "ffa-lora", "fedit", "fedsa-lora"])
def test_different_ranks_are_refused_with_the_reason(config, method):
    with pytest.raises(CompositionError, match=rf"{method} cannot work with different ranks.*entry by entry"):
        compose(config("bert", *words(method), "adapter.rank=[1, 2, 2, 2]"))


@pytest.mark.parametrize("interval", [0, -1])
def test_rolora_needs_an_interval(interval):
    with pytest.raises(ConfigError, match="at least 1 round"):
        build_algorithm("rolora", {"interval": interval})


@pytest.mark.parametrize(
    ("graph", "clients", "told"),
    [("complete", 5, 0), ("ring", 3, 0), ("ring", 5, 1), ("random p=1.0", 5, 1), ("complete drop_links=0.1", 5, 1)],
)
def test_fedit_says_where_it_is_dec_lora(graph, clients, told):
    fedit = build_algorithm("fedit", {})
    assert isinstance(fedit, Configurable)
    algorithm, notes = prepare(fedit, build_topology(parse_spec(graph), clients, 0), 10)
    assert algorithm == fedit and len(notes) == told
    assert all("dec-lora" in note and "topology=complete" in note for note in notes)
