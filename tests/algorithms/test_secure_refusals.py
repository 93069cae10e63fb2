"""Which methods, graphs and settings go with secure sums, and what the others are told."""

import pytest

from cases import ROW_METHODS
from peerlora.algorithms import describe_algorithms
from peerlora.algorithms.traits import Traits
from peerlora.config.loading import load_config
from peerlora.errors import CompositionError
from peerlora.runtime.peer.checks import plan_peer
from peerlora.runtime.peer.site import Site
from peerlora.runtime.plan import plan

COMBINES = "it needs what each neighbour sent, and with secure sums receivers know their weighted sum only"
REASONS = {
    **dict.fromkeys(
        ["consensus-admm", "decaf", "fedrot-lora", "hetlora", "lora-fair", "rac-lora", "flora", "fedex-lora", "fedhl"],
        COMBINES,
    ),
    "d2": "over all links, and secure sums may be given up",
    "k-gt": "its corrections sum to zero only where mixing keeps the mean",
    "flexlora": COMBINES,
    "local": "it exchanges nothing",
    "sgp": "would lose the mass of all others",
    "push-diging": "would lose the mass of all others",
    "choco": "its receivers build on what each neighbour sent before",
    "cached-dfl": "which secure sums hide",
    "salf": "it sends some layers, and which ones they are",
    "flood": "which senders do not know of each other",
    "aedfl": "its clients keep no common rounds",
    "ad-psgd": "its clients keep no common rounds",
}
SITE = Site(0, {i: f"s{i}" for i in range(6)}, "l/run")


def config(*words, **settings):
    base = {"clients": 6, "topology": "ring", "algorithm": "dec-lora"} | settings
    return load_config(base, ["exchange.secure=true", *words])


def planned(method, *words):
    graph = []
    if method in ("sgp", "push-diging"):
        graph = ["topology.kind=exponential", "topology.weights=push-sum"]
    return plan(load_config({"clients": 6}, [f"algorithm.name={method}", *(graph or ["topology=ring"]), *words]))


@pytest.mark.parametrize("method", ROW_METHODS)
def test_every_method_has_secure_sums_or_says_in_one_sentence_why_not(method):
    reason, told = REASONS.get(method), describe_algorithms()[method]["not_with"].get("exchange.secure")
    if reason is None:
        assert told is None
        (note,) = set(planned(method, "exchange.secure=true").notes) - set(planned(method).notes)
        assert note.startswith("exchange.secure: clients get the weighted sum of their neighbours' adapters alone")
        return
    assert reason in told
    with pytest.raises(
        CompositionError, match=f"exchange.secure cannot be used with {method}: .*; use one of"
    ) as error:
        planned(method, "exchange.secure=true")
    assert reason in str(error.value) and "dec-lora" in str(error.value) and "swfp" not in str(error.value)
    assert not any(f" {other}," in str(error.value) for other in REASONS), "an alternative that is refused as well"


def test_a_method_that_says_nothing_is_refused():
    assert Traits(source="new").refusal("secure") == "its exchange is more than one mixing of adapters a round"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["exchange.codec=top-k"], "exchange.secure and exchange.codec exclude each other"),
        (["topology=complete", "exchange.robust=median"], "exchange.secure and exchange.robust exclude each other"),
        (["exchange.relay={}"], "exchange.secure and exchange.relay exclude each other"),
        (["train.label_prior=pooled"], "label counts would cross openly"),
        (["train.class_weights=pooled"], "train.class_weights=pooled exclude each other: label counts would cross"),
        (["algorithm=fedit", "adapter.rank=[2,2,2,2,4,4]"], "ranks"),
        (["topology=path"], "client 0 never has as many"),
        (["topology=star"], "client 0 never has as many"),
        (["topology.kind=random", "topology.p=0.6", "topology.weights=pairwise"], "weights of neighbours alone"),
        (["topology.kind=one-peer"], "links that go both ways"),
        (["topology.kind=hypercube", "clients=8"], "client 0 never has as many"),
        (["topology=complete", "clients=2"], "clients=2 given; use at least 3 clients"),
    ],
)
def test_what_secure_sums_do_not_go_with(words, told):
    with pytest.raises(CompositionError, match=told) as error:
        plan(config(*words))
    assert "; use " in str(error.value) or "; give " in str(error.value)


def test_with_peers_it_is_the_same():
    assert plan_peer(config(), SITE).topology.least_degree == 2
    with pytest.raises(CompositionError, match="exchange.secure cannot be used with k-gt"):
        plan_peer(config("algorithm=k-gt"), SITE)


@pytest.mark.parametrize("words", [["topology.kind=random", "topology.p=0.5"], ["topology.drop_links=0.3"]])
def test_in_a_round_in_which_a_client_has_one_neighbour_it_has_none(words):
    """By the graph, so that all clients know it: W stays doubly stochastic."""
    topology, plain = (
        plan(config(*words)).topology,
        plan(load_config({"clients": 6, "topology": "ring"}, words)).topology,
    )
    left_out = 0
    for t in range(40):
        graph = topology.at(t)
        assert not (graph.degrees == 1).any() and (graph.W >= 0).all()
        assert abs(graph.W.sum(0) - 1).max() < 1e-12 and abs(graph.W.sum(1) - 1).max() < 1e-12
        left_out += int((plain.at(t).degrees > 0).sum() - (graph.degrees > 0).sum())
    assert left_out > 0


def test_it_goes_with_privacy_and_with_simulated_attackers():
    assert plan(config("privacy.noise=1")).config.exchange.secure
    assert plan(config("topology=complete", "adversary.attack=sign-flip")).attackers
