"""Codecs, robust rules and attackers around methods: what they are, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from quadratics import adapters, curvatures, exchange
from quadratics import run as quadratic_run

from cases import ROW_METHODS, others_slow
from peerlora.algorithms import REGISTRY
from peerlora.algorithms.traits import REASONS, Traits
from peerlora.config.exchange import CODEC
from peerlora.config.loading import load_config
from peerlora.errors import CompositionError, ConfigError
from peerlora.exchange.codec import build_codec
from peerlora.exchange.compressed_gossip import Compressed
from peerlora.runs.events import Evaluated, RoundDone
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose, opening_state
from peerlora.runtime.simulate import resume, simulate

PLAIN = [name for name, kind in ROW_METHODS.items() if kind.traits.sends == "adapters"]
ATTACKED = [*PLAIN, "decaf", "flexlora", "hetlora", "fedrot-lora", "lora-fair", "rac-lora", "k-gt", "d2", "cached-dfl"]
ATTACK = ["adversary.clients=[2]", "adversary.attack=gaussian", "adversary.scale=50"]


def run(federation, rounds=3):
    algorithm, peers, states = federation.algorithm, federation.exchange, []
    state = opening_state(federation)
    for t in range(rounds):
        with federation.learner.round(t):
            peers.begin(t)
            state = algorithm.round(t, state, federation.learner, peers)
        states.append(algorithm.model(state))
    return states


def words(method):
    return [f"algorithm.name={method}", "adapter.head=mixed"]


def refusal(name, wrapper):
    return REGISTRY[name].traits.refusal(wrapper)


@pytest.mark.parametrize(("wrapper", "goes"), [("codec", PLAIN), ("robust", PLAIN), ("attack", ATTACKED)])
def test_every_method_goes_with_a_wrapper_or_has_a_reason_why_not(wrapper, goes):
    assert len(PLAIN) == 18 and len(set(ATTACKED)) == 27
    for name in ROW_METHODS:
        assert (refusal(name, wrapper) is None) == (name in goes), name
        assert refusal(name, wrapper) != REASONS["other"][wrapper], f"{name} has no reason of its own"


def test_a_method_that_says_nothing_is_refused_all_but_flipped_labels():
    wrappers = ("codec", "robust", "attack", "label-flip")
    told = [Traits(source="new").refusal(wrapper) for wrapper in wrappers]
    assert told == ["its exchange is more than one mixing of adapters a round"] * 3 + [None]
    assert [name for name in REGISTRY if refusal(name, "label-flip")] == ["flood"]
    assert all("traits" in vars(kind) for kind in REGISTRY.values()), "what a class sends is not inherited"


def test_each_wrapper_has_its_own_reason():
    for name in ("k-gt", "d2", "sgp", "choco", "flood", "consensus-admm"):
        assert refusal(name, "codec") != refusal(name, "robust"), name
    assert "sum to zero" in str(refusal("k-gt", "robust")) and "sum to zero" not in str(refusal("k-gt", "codec"))


def test_compressed_gossip_keeps_corrections_summing_to_zero_but_has_no_replicas_of_them():
    """Why k-gt refuses a codec: not for its sums, which CHOCO keeps whatever Q is."""
    x, peers = adapters(6, 4, 4), exchange("ring", 6)
    z = replace(x, flat=torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    settings = CODEC.validate_python({"kind": "top-k", "share": 0.3})
    compressed = Compressed(peers, build_codec(settings, torch.float64), settings.step, x)
    mixed = compressed.mix(z)
    assert (mixed.flat - z.flat).abs().max() > 0.1 and (mixed.flat - z.flat).sum(0).abs().max() < 1e-14
    with pytest.raises(CompositionError, match="works on adapters alone"):
        compressed.mix({"x": x, "z": z.flat})


@pytest.mark.slow
@pytest.mark.parametrize(("method", "grows"), others_slow([("d2", True), ("dsgd", False)], [0]))
def test_what_d2_adds_up_can_grow_without_bound_under_a_codec(method, grows):
    """Why d2 refuses one: with the identity it is exact, with signs and the same rate it runs away."""
    draw, x = np.random.default_rng(0), adapters(8, 8, 8)
    learner, found = curvatures(draw.uniform(0.5, 2, 8), 3 * draw.normal(size=(8, 16))), {}
    for kind in ("identity", "sign"):
        settings = CODEC.validate_python({"kind": kind})
        peers = Compressed(exchange("ring", 8), build_codec(settings, torch.float64), settings.step, x)
        algorithm, states = quadratic_run(method, {}, learner, peers, x, 400)
        found[kind] = float((algorithm.model(states[-1]).flat - learner.solution).abs().max())
    assert found["identity"] < (1e-3 if method == "d2" else 5)
    assert (found["sign"] > 1e3) == grows and (grows or found["sign"] < 5)


@pytest.mark.parametrize(
    "method", others_slow(["dec-lora", "adf-lora", "rolora", "fedsa-lora", "dfedadmm"], ["adf-lora", "dfedadmm"])
)
@pytest.mark.parametrize("wrapper", ["exchange.codec=identity", "exchange.robust={kind: clipped-gossip, radius: 1e9}"])
def test_what_changes_nothing_gives_the_plain_method(config, method, wrapper):
    plain, wrapped = (run(compose(config("bert", *words(method), *more))) for more in ([], [wrapper]))
    for one, other in zip(plain, wrapped, strict=True):
        assert (one.flat - other.flat).abs().max() < 1e-11


@pytest.mark.parametrize("method", others_slow(PLAIN, [0, 3, 6, 9, 12]))
def test_every_plain_method_runs_compressed_with_a_robust_rule_and_under_attack(config, method):
    base = [*words(method), "topology.kind=complete", "train.local_steps=1"]
    base += ["train.optimizer=sgd"] if method in ("dfedavgm",) else []
    for more in (["exchange.codec=top-k"], ["exchange.robust=median", *ATTACK]):
        assert run(compose(config("bert", *base, *more)), 2)[-1].flat[[0, 1, 3]].isfinite().all()


def test_choco_is_dec_lora_with_a_codec(config):
    ours = run(compose(config("bert", "algorithm.name=choco", "algorithm.share=0.3")))
    wrapped = run(compose(config("bert", "algorithm.name=dec-lora", "exchange.codec={kind: top-k, share: 0.3}")))
    assert all(torch.equal(one.flat, other.flat) for one, other in zip(ours, wrapped, strict=True))


def test_a_median_keeps_an_attacker_off_where_the_mean_does_not(config):
    base = [*words("dec-lora"), "topology.kind=complete"]
    alone = run(compose(config("bert", *base)))[-1].flat[0]
    plain, robust = (
        run(compose(config("bert", *base, *ATTACK, *more)))[-1].flat[0] for more in ([], ["exchange.robust=median"])
    )
    assert float((robust - alone).norm()) < 1 < 10 < float((plain - alone).norm())


REFUSALS = [
    (["exchange.codec=sign", "exchange.robust=median"], "exclude each other"),
    (["algorithm.name=k-gt", "exchange.robust=median"], "corrections sum to zero.*use one of dec-lora"),
    (
        ["algorithm.name=k-gt", "exchange.codec=sign"],
        "x and z cross together.*one set of adapters.*use one of",
    ),
    (["algorithm.name=d2", "train.local_steps=1", "exchange.codec=sign"], "can make that grow without bound"),
    (["algorithm.name=d2", "train.local_steps=1", "exchange.robust=median"], "undoes what the last mixing did"),
    (["algorithm.name=choco", "exchange.codec=sign"], "a codec of its own"),
    (["algorithm.name=choco", "exchange.robust=median"], "averages of their neighbours only"),
    (["algorithm.name=sgp", "exchange.codec=sign"], "mass has to arrive"),
    (["algorithm.name=decaf", "exchange.robust=krum"], "a rule of its own"),
    (["algorithm.name=local", "exchange.codec=sign"], "it exchanges nothing"),
    (
        ["algorithm.name=feddyn", "topology.kind=random", "exchange.codec=sign"],
        "static.*one weighted sum.*topology=ring",
    ),
    (["topology.kind=ring", "topology.drop_links=0.1", "exchange.codec=top-k"], "exchange.codec needs.*static"),
    (["topology.weights=pairwise", "exchange.robust=median"], "reaches neighbours only.*topology.weights=metropolis"),
    (["topology.kind=one-peer", "exchange.robust=median"], "links that go both ways"),
    (["exchange.robust={kind: trimmed-mean, drop: 2}"], "needs 4 neighbours, client 0 has 2 on this ring.*complete"),
    (["exchange.robust={kind: krum, drop: 1}"], "needs 3 neighbours, client 0 has 2"),
    (["algorithm.name=flood", "adversary.attack=label-flip"], "a client says itself how much it counts"),
    (["algorithm.name=choco", "adversary.attack=ipm"], "compressed differences.*label-flip"),
    (["algorithm.name=local", "adversary.attack=ipm"], "it exchanges nothing"),
    (["algorithm.name=sgp", "adversary.attack=ipm"], "shares of a sum.*leave their mass alone"),
    (
        ["algorithm.name=consensus-admm", "adversary.attack=gaussian"],
        "how far they are.*attack=label-flip, or dec",
    ),
    (["algorithm.name=flora", "adversary.attack=gaussian"], "merge its own lie for good"),
    (["algorithm.name=ad-psgd", "exchange.codec=sign"], "no common rounds"),
]


@pytest.mark.parametrize(("more", "told"), REFUSALS)
def test_combinations_that_cannot_work_are_refused_with_reason_and_alternative(config, more, told):
    with pytest.raises(CompositionError, match=told):
        compose(config("bert", "algorithm.name=dec-lora", *more))


@pytest.mark.parametrize("method", [name for name in ATTACKED if name not in PLAIN])
def test_an_attacker_hands_on_its_lie_and_goes_on_from_the_truth(config, method):
    base = [*words(method), "train.local_steps=1", "train.optimizer=sgd", "topology.kind=complete"]
    plain, attacked = (run(compose(config("bert", *base, *more)), 1)[-1].flat for more in ([], ATTACK))
    assert float((attacked[[0, 1, 3]] - plain[[0, 1, 3]]).norm(dim=1).min()) > 10
    assert float((attacked[2] - plain[2]).norm()) < 3  # decaf and flexlora: other factors, of nearly the same product


def test_label_flips_need_classes_and_attacks_all_clients(config):
    with pytest.raises(CompositionError, match="label-flip needs classes"):
        compose(config("bert", "task.kind=regression", "data.label=score", "adversary.attack=label-flip"))
    with pytest.raises(CompositionError, match="all clients in one process"):
        compose(config("bert", "algorithm.name=dec-lora", *ATTACK), clients=[0, 1])
    with pytest.raises(ConfigError, match="adversary.clients=4 given"):
        compose(config("bert", "adversary.clients=4"))


def test_label_flips_change_what_attackers_learn_and_nothing_else(config):
    base = [*words("local")]
    plain = compose(config("bert", *base))
    flipped = compose(config("bert", *base, "adversary.clients=[1]", "adversary.attack=label-flip"))
    before, after = plain.learner.shards.data.labels, flipped.learner.shards.data.labels
    rows = plain.partition.shards[1]
    assert (after[rows] == 2 - before[rows]).all() and (before != after).sum() == (before[rows] != 1).sum()
    ours, theirs = run(flipped)[-1].flat, run(plain)[-1].flat
    assert torch.equal(ours[[0, 2, 3]], theirs[[0, 2, 3]]) and not torch.equal(ours[1], theirs[1])


def test_attackers_are_left_out_of_every_figure(config, tmp_path):
    chosen = config("bert", *words("dec-lora"), *ATTACK, "topology.kind=complete", "exchange.robust=median")
    result = simulate(chosen, tmp_path / "run")
    events = read_events(tmp_path / "run")
    for event in events:
        values = event.own if isinstance(event, Evaluated) else event.loss if isinstance(event, RoundDone) else None
        if values is not None:
            told = [value is not None and not math.isnan(value) for value in values]
            assert told == [True, True, False, True]
    assert result.summary["accuracy"]["own_mean"] is not None
    last = [event for event in events if isinstance(event, RoundDone)][-1]
    assert last.consensus_product < 1e-6  # of the honest, who took the same median
    assert any("attackers: 2 (gaussian)" in note for note in events[0].notes)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_compressed_run_goes_on_to_the_bit(config, tmp_path):
    chosen = config("bert", *words("adf-lora"), "exchange.codec=qsgd", "train.rounds=4")
    straight = simulate(chosen, tmp_path / "straight")
    seen = []
    with pytest.raises(Exception, match="stopped after 2"):
        simulate(chosen, tmp_path / "cut", stop=lambda: seen.append(1) or len(seen) == 2)
    assert torch.equal(resume(tmp_path / "cut").adapters.flat, straight.adapters.flat)


def test_bytes_shrink_and_the_label_prior_goes_round_the_wrappers(config):
    pooled = ["train.label_prior=pooled", "exchange.codec={kind: top-k, share: 0.1}"]
    federation = compose(config("bert", *words("dec-lora"), *pooled))
    assert isinstance(federation.exchange, Compressed)
    plain = compose(config("bert", *words("dec-lora")))
    run(federation, 1)
    run(plain, 1)
    assert federation.exchange.stats.bytes_per_edge < plain.exchange.stats.bytes_per_edge / 2


def test_words_are_short_for_kinds():
    chosen = load_config({"exchange": {"codec": "sign"}}, ["exchange.robust=median"])
    assert (chosen.exchange.codec.kind, chosen.exchange.robust.kind) == ("sign", "median")
    with pytest.raises(ConfigError, match="exchange.codec.kind 'sgn' is unknown .*did you mean 'sign'"):
        load_config({}, ["exchange.codec=sgn"])
    with pytest.raises(ConfigError, match="unknown key 'exchange.robust.dorp' .*did you mean 'drop'"):
        load_config({}, ["exchange.robust.kind=krum", "exchange.robust.dorp=2"])
