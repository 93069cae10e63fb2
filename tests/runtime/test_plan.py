"""Planning a run: everything that can be refused without data is, and nothing is loaded."""

import pytest

from peerlora.config.loading import load_config
from peerlora.errors import CompositionError, ConfigError, TopologyError
from peerlora.runtime import compose as compose_module
from peerlora.runtime.compose import compose
from peerlora.runtime.peer.checks import plan_peer
from peerlora.runtime.peer.site import Site
from peerlora.runtime.plan import plan

NOWHERE = {"model": {"source": "no/such/model"}, "data": {"train": "csv:nowhere.csv"}, "clients": 4}


def planned(*words):
    return plan(load_config(NOWHERE, words))


def test_a_plan_needs_neither_data_nor_model():
    found = planned("topology=ring", "algorithm.name=salf", "train.rounds=3")
    assert found.topology.clients == 4 and found.clock is None and found.attackers == ()
    assert found.config.algorithm.name == "salf" and type(found.algorithm).__name__ == "SALF"


@pytest.mark.parametrize(
    ("error", "message", "words"),
    [
        (ConfigError, "algorithm.name 'dec' is unknown", ["algorithm.name=dec"]),
        (TopologyError, "ring", ["topology=ring", "clients=2"]),
        (CompositionError, "cannot be used with d2", ["topology=ring", "algorithm.name=d2", "exchange.robust=median"]),
        (CompositionError, "partition.kind=own", ["partition=own", "task.labels=[a, b]"]),
        (ConfigError, "adversary.clients=9", ["topology=ring", "adversary.clients=9"]),
    ],
)
def test_what_needs_no_data_is_refused_before_any_is_read(error, message, words, monkeypatch):
    monkeypatch.setattr(compose_module, "load_resources", lambda config: pytest.fail("data was read"))
    with pytest.raises(error, match=message):
        planned(*words)
    with pytest.raises(error, match=message):
        compose(load_config(NOWHERE, words))


def test_a_federation_is_made_of_its_plan(config):
    words = ["topology=ring", "train.label_prior=pooled", "clock.speed=2", "algorithm.interval=900"]
    federation, found = compose(config("bert", *words)), plan(config("bert", *words))
    assert found.algorithm == federation.algorithm and found.notes == federation.notes
    assert federation.warnings[: len(found.warnings)] == found.warnings and "only B" in found.warnings[0]
    assert (found.topology.at(3).W == federation.topology.at(3).W).all()
    assert found.clock is not None and (found.clock.speeds == 2).all()


def test_an_attack_that_is_none_gets_a_warning():
    def warnings(*words):
        return planned("topology=ring", "clients=10", "adversary.attack=alie", *words).warnings

    (warning,) = warnings("adversary.clients=2")  # the quantile of 1/2: the honest mean itself is sent
    for part in ("2 of 10 clients has z = 0", "adversary.scale", "more adversary.clients"):
        assert part in warning
    assert "z = -" in warnings("adversary.clients=1")[0]
    assert warnings("adversary.clients=3") == warnings("adversary.clients=2", "adversary.scale=1") == ()


def test_a_further_check_comes_before_those_of_the_method():
    words = ["topology.kind=directed-ring", "topology.chords=[[0, 2]]", "topology.weights=push-sum"]
    config = load_config(NOWHERE, [*words, "algorithm.name=dec-lora"])
    with pytest.raises(CompositionError, match="links of real peers fail"):
        plan_peer(config, Site(0, {i: f"site-{i}" for i in range(4)}, "run"))
    with pytest.raises(CompositionError, match="needs a topology whose mixing matrix is"):
        plan(config)


@pytest.mark.parametrize(
    ("client", "words", "message"),
    [(4, [], "is client 4"), (0, ["clock.speed=1"], "virtual time"), (0, ["cluster.workers=2"], "cluster=null")],
)
def test_a_peer_is_refused_what_only_a_simulation_can_do(client, words, message):
    config = load_config(NOWHERE, ["topology=ring", *words])
    with pytest.raises(CompositionError, match=message):
        plan_peer(config, Site(client, {i: f"site-{i}" for i in range(5)}, "run"))


def test_an_unknown_method_of_a_peer_gets_the_message_that_a_simulation_gets():
    with pytest.raises(ConfigError, match="did you mean 'adf-lora'"):
        plan_peer(load_config(NOWHERE, ["algorithm.name=adf-lra"]), Site(0, {0: "a", 1: "b"}, "run"))


@pytest.mark.slow
def test_phases_are_of_the_rounds_that_train():
    """Else a method whose factors take turns could rest one of them in all rounds that train, and say nothing."""
    quiet = ["topology.kind=random", "topology.p=0.01", "train.rounds=10", "train.quiet=0.5"]
    trained = planned(*quiet[:2], "algorithm.name=tad-lora", "train.rounds=5")
    found = planned(*quiet, "algorithm.name=tad-lora")
    assert found.algorithm == trained.algorithm and found.algorithm.interval < 5
    (warning,) = (each for each in planned(*quiet, "algorithm.interval=5").warnings if "interval" in each)
    assert "interval=5 is not shorter than the part of the run that trains, of 5 rounds" in warning
    assert not any("interval" in each for each in planned(*quiet, "algorithm.interval=4").warnings)
