"""The harness of the stacked client axis runs, and both sides of it do the same work."""

import pytest
import torch

import flow_speed
from flow_runs import TINY
from peerlora.config.loading import load_config
from peerlora.runtime.compose import compose
from peerlora.runtime.policy import load_policy
from peerlora.train.base import LocalPlan

pytestmark = pytest.mark.usefixtures("cache")


def test_it_measures_both_sides_and_their_ratio():
    found = flow_speed.measure(load_config(TINY), repeats=2)
    seconds = found["seconds"]
    assert found["clients"] == 3 and min(seconds.values()) > 0
    assert found["ratio"] == pytest.approx(seconds["one by one"] / seconds["together"])
    found |= {"seconds": {"together": 0.2, "one by one": 1.0}, "ratio": 5.0}
    assert "| 3 | 8 | 200 ms | 1000 ms | 5.0 |" in flow_speed.table([found])


def test_resources_are_shared_without_being_changed():
    config = load_config(TINY)
    resources = load_policy(config)
    before = {name: value.clone() for name, value in resources.base.policy.state_dict().items()}
    federations = [compose(config, resources=resources, clients=[client]) for client in (0, 1)]
    for federation in federations:
        federation.learner.fit(federation.start, LocalPlan("AB"))
    assert federations[0].model.base is not federations[1].model.base
    after = resources.base.policy.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
