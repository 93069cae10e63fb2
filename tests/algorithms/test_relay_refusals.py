"""Which methods and settings go with relayed adapters, and what the others are told."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from cases import ROW_METHODS
from peerlora.algorithms import REGISTRY, describe_algorithms
from peerlora.algorithms.compatibility import check_relayed_message
from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits
from peerlora.config.loading import load_config
from peerlora.errors import CompositionError
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.runtime.plan import plan

REASONS = {
    "local": "it exchanges nothing",
    "rolora": "it sends one factor, and the other differs",
    "fedsa-lora": "it sends one factor, and the other differs",
    "rac-lora": "what clients have merged does not travel",
    "flora": "what clients have merged does not travel",
    "fedex-lora": "what clients have merged does not travel",
    "fedhl": "what clients have merged does not travel",
    "sgp": "it sends shares of a sum",
    "push-diging": "it sends shares of a sum",
    "choco": "compressed differences, no models",
    "cached-dfl": "it keeps that cache itself, and its clients' models are the averages of it",
    "salf": "it sends some layers, and which ones they are",
    "flood": "its exchange is more than one mixing of adapters a round",
    "aedfl": "its clients keep no common rounds",
    "ad-psgd": "its clients keep no common rounds",
}
GRAPHS = {"sgp": "exponential", "push-diging": "exponential"}


def planned(method, *words):
    graph = ["topology.kind=exponential", "topology.weights=push-sum"] if method in GRAPHS else ["topology=ring"]
    return plan(load_config({"clients": 6}, [f"algorithm.name={method}", *graph, *words]))


@pytest.mark.parametrize("method", ROW_METHODS)
def test_every_method_relays_or_says_in_one_sentence_why_not(method):
    reason = REASONS.get(method)
    told = describe_algorithms()[method]["not_with"].get("exchange.relay")
    if reason is None:
        assert told is None and planned(method, "exchange.relay={}").warnings == planned(method).warnings
        return
    assert reason in told
    with pytest.raises(CompositionError, match=f"exchange.relay cannot be used with {method}: .*; use one of") as error:
        planned(method, "exchange.relay={}")
    assert reason in str(error.value) and "dec-lora" in str(error.value)
    assert not any(f" {other}," in str(error.value) for other in REASONS), "an alternative that is refused as well"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["algorithm.name=dec-lora", "exchange.codec=top-k"], "exchange.codec and exchange.relay exclude each other"),
        (["algorithm.name=decaf", "exchange.relay.average=factors"], "coordinates of their own"),
        (["algorithm.name=fedrot-lora", "exchange.relay.average=factors"], "coordinates of their own"),
        (["algorithm.name=hetlora", "exchange.relay.average=factors"], "cuts clients' ranks"),
        (["algorithm.name=hetlora", "adapter.rank=[2,2,2,2,4,4]", "exchange.relay.average=factors"], "different ranks"),
    ],
)
def test_settings_that_contradict_each_other(words, reason):
    with pytest.raises(CompositionError, match="exchange.relay") as error:
        plan(load_config({"clients": 6, "topology": "ring"}, ["exchange.relay={}", *words]))
    assert reason in str(error.value) and "; use " in str(error.value)


def test_attackers_and_robust_rules_are_warned_of_in_one_sentence():
    for words in (["adversary.attack=sign-flip"], ["exchange.robust=median"]):
        (told,) = plan(
            load_config({"clients": 6, "topology": "complete", "algorithm": "dec-lora"}, ["exchange.relay={}", *words])
        ).warnings
        assert "protects the mixing and not the relayed models" in told


FACTORS = "exchange.relay.average=factors"


@pytest.mark.parametrize(
    ("method", "words", "warned"),
    [
        ("adf-lora", [FACTORS], True),
        ("adf-lora", [FACTORS, "topology.kind=random"], True),
        ("tad-lora", [FACTORS], True),
        ("dfedavg", [FACTORS, "algorithm.interval=2"], True),
        ("adf-lora", [FACTORS, "topology.kind=complete"], False),
        ("adf-lora", [FACTORS, "topology.kind=complete", "topology.drop_links=0.1"], True),
        ("adf-lora", ["exchange.relay={}"], False),
        ("dec-lora", [FACTORS], False),
        ("dfedavg", [FACTORS], False),
        ("ffa-lora", [FACTORS], False),
    ],
)
def test_averaged_factors_of_different_phases_are_warned_of(method, words, warned):
    told = [each for each in planned(method, *words).warnings if "different phases" in each]
    assert len(told) == warned and all("use exchange.relay.average=products" in each for each in told)


def test_on_the_virtual_clock_the_run_says_that_relaying_takes_no_time():
    (told,) = planned("dec-lora", "exchange.relay={}", "clock.bandwidth=1000").warnings
    assert "take no virtual time" in told
    assert planned("dec-lora", "exchange.relay={}", "clock.speed=2").warnings == ()


@dataclass(frozen=True)
class SendsA(FactorGossip):
    """Of another package: it declares nothing about relaying."""

    traits: ClassVar = Traits(source="a test", sends="adapters")

    def message(self, x, t=0):
        return {f"x.{name}": what for name, what in x.select("A", "head").message().items()}


def test_a_method_of_another_package_that_sends_one_factor_is_found_out():
    spec = AdapterSpec((LayerSpec("q", 3, 4),), rank=2, alpha=2.0)
    x = Adapters(spec, torch.zeros(1, spec.parameters), torch.tensor([2]))
    relaying, plain = load_config({"exchange": {"relay": {}}}), load_config({})
    check_relayed_message(plain, SendsA(), x)
    with pytest.raises(CompositionError, match="exchange.relay cannot be used with"):
        check_relayed_message(relaying, SendsA(), x)
    for whole in ("dec-lora", "k-gt", "ffa-lora"):
        check_relayed_message(relaying, REGISTRY[whole](), x)


@pytest.mark.parametrize(("given", "wanted"), [("true", {}), ("{}", {}), ("{keep: 3}", {"keep": 3})])
def test_relaying_is_turned_on_by_true_or_by_its_settings(given, wanted):
    relay = load_config({}, [f"exchange.relay={given}"]).exchange.relay
    assert relay is not None and relay.model_dump(exclude_unset=True) == wanted
    assert load_config({}).exchange.relay is None and load_config({}, ["exchange.relay=false"]).exchange.relay is None
