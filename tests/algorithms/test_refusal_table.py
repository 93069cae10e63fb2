"""What planning a run says to every method with every demand, as it was before methods declared their traits.

``refusals.json``: the distinct outcomes, and per method and place the number of each demand's outcome.
"""

import json
from pathlib import Path

import pytest

from cases import ROW_METHODS
from peerlora.algorithms import ALIASES, build_algorithm, describe_algorithms
from peerlora.algorithms.base import prepare
from peerlora.config.loading import load_config
from peerlora.config.train import TrainConfig
from peerlora.errors import PeerloraError
from peerlora.runtime.peer.checks import plan_peer
from peerlora.runtime.peer.site import Site
from peerlora.runtime.plan import plan
from peerlora.topology.schedule import Topology

STORED = json.loads((Path(__file__).parent / "refusals.json").read_text(encoding="utf-8"))
CLIENTS = 6
SITE = Site(0, {i: f"s{i}" for i in range(CLIENTS)}, "l/run")
DEMANDS = [
    ["topology=ring"],
    ["topology=ring", "exchange.codec=top-k"],
    ["topology=complete", "exchange.robust=median"],
    ["topology=complete", "adversary.attack=sign-flip"],
    ["topology=complete", "adversary.attack=label-flip"],
    ["topology.kind=random", "topology.p=0.3"],
    ["topology.kind=exponential", "topology.weights=push-sum"],
    ["topology.kind=ring", "topology.weights=row-average"],
    ["topology=ring", "train.local_steps=2"],
    ["topology=ring", "train.optimizer=adamw"],
    ["topology=ring", "train.optimizer=sgd"],
    ["topology=ring", "train.optimizer_state=keep"],
    ["topology=ring", "train.optimizer_state=phase"],
    ["topology=ring", "adapter.rank=[2,2,2,2,4,4]"],
    ["topology=ring", "clock.speed=1.0"],
    ["topology=ring", "clock.deadline=30"],
    ["topology=ring", "clock.away=[{client: 1, leave: 2}]"],
    ["topology=ring", "clock.away=[{client: 1, leave: 2, unit: seconds}]"],
    ["topology=ring", "task.kind=causal-lm"],
    ["topology=ring", "task.kind=regression"],
    ["topology=ring", "train.label_prior=pooled"],
    ["topology=ring", "train.rounds=3"],
    ["topology.kind=star", "topology.weights=laplacian"],
]


def planned(config, peer):
    """What a run's plan says, in a simulation or at a peer, before any data is read."""
    found = plan_peer(config, SITE) if peer else plan(config)
    algorithm = build_algorithm(config.algorithm.name, config.algorithm.parameters)
    _, notes = prepare(algorithm, found.topology, config.train.rounds)
    assert found.notes[: len(notes)] == notes, "those of attackers and label counts come after the method's own"
    return {"warnings": list(found.warnings), "notes": list(notes), "train": config.train.model_dump(mode="json")}


def outcome(method, demand, peer):
    try:
        return planned(load_config({"clients": CLIENTS}, [f"algorithm.name={method}", *demand]), peer)
    except PeerloraError as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module", autouse=True)
def rho_once():
    """Estimates of rho, which are most of a plan's time, are drawn once per topology."""
    known, estimate = {}, Topology.rho

    def rho(topology, rounds=None):
        key = (topology.config.model_dump_json(), topology.clients, topology.seed, topology.interrupted, rounds)
        if key not in known:
            known[key] = estimate(topology, rounds)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Topology, "rho", rho)
        yield


@pytest.mark.parametrize("method", [*ROW_METHODS, *ALIASES])
def test_every_demand_has_the_outcome_that_it_always_had(method):
    for place, numbers in STORED["table"][method].items():
        for demand, number in zip(DEMANDS, numbers, strict=True):
            expected = STORED["outcomes"][number]
            if isinstance(expected, dict):  # settings of train that came later have their defaults
                expected = expected | {"train": TrainConfig().model_dump(mode="json") | expected["train"]}
            assert outcome(method, demand, place == "peer") == expected, (demand, place)


def test_descriptions_keep_what_they_said():
    described = describe_algorithms()
    assert [name for name in described if name != "swfp"] == list(STORED["described"]), "swfp is younger"
    for method, told in STORED["described"].items():
        refusals = told.pop("not_with")
        assert told.items() <= described[method].items(), method
        assert refusals.items() <= described[method]["not_with"].items(), method
