"""Every method on workers: with the bits of one process, or refused with the reason."""

import pytest

from cases import others_slow
from cluster_runs import assert_same_events, both, on_workers, same_bits
from flow_runs import tiny
from peerlora.algorithms import REGISTRY
from peerlora.algorithms.base import is_asynchronous
from peerlora.errors import CompositionError
from peerlora.runtime.export import export_from_run
from peerlora.runtime.simulate import simulate as simulate_here
from peerlora.topology import storage

DIRECTED = "topology={kind: exponential, weights: push-sum}"
SYNCHRONOUS = [
    name for name, kind in REGISTRY.items() if not is_asynchronous(kind) and not kind.traits.flow_policies_only
]
SIX = ["clients=6", "train.rounds=3", "train.block=2"]


def words_for(name):
    """Settings with which a method runs: its optimiser and steps, and a graph that it can use, incomplete if it may."""
    traits = REGISTRY[name].traits
    directed = traits.requires.column_stochastic and not traits.requires.row_stochastic
    words = [f"algorithm.name={name}", DIRECTED if directed else "topology=ring"]
    words += ["train.optimizer=sgd"] if traits.sgd_only or traits.sgd_preferred else []
    return words + (["train.local_steps=1"] if traits.one_step else [])


@pytest.mark.parametrize("name", others_slow(SYNCHRONOUS, ("consensus-admm", "flora")))
def test_a_method_on_workers_gets_the_bits_of_one_process(config, tmp_path, name):
    there, here = both(config("bert", *SIX, *words_for(name)), tmp_path)
    assert same_bits(here.adapters, there.adapters)
    assert_same_events(tmp_path)


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in SYNCHRONOUS])
def test_other_methods_are_refused_with_the_reason(config, tmp_path, name):
    if REGISTRY[name].traits.flow_policies_only:
        chosen, reason = tiny(f"algorithm={name}"), "task.kind=flow-policy cannot run on a cluster"
    else:
        chosen, reason = config("bert", *SIX, *words_for(name)), f"{name} cannot run on a cluster.*no common round"
    with pytest.raises(CompositionError, match=reason):
        on_workers(chosen, tmp_path / "run")


STARTS = {
    "sums": ["exchange.secure=true", "topology=complete"],
    "orthogonal": ["adapter.init=orthogonal", "adapter.rank=4"],
    "pissa": ["adapter.init=pissa"],
    "sparse": ["topology={kind: random-regular, degree: 3}"],
}


@pytest.mark.parametrize("name", others_slow(list(STARTS), ()))
def test_starts_and_sums_on_workers_have_the_bits_of_one_process(config, tmp_path, monkeypatch, name):
    if name == "sparse":
        monkeypatch.setattr(storage, "LARGE", 2)
    there, here = both(config("bert", *SIX, "algorithm.name=dec-lora", *STARTS[name]), tmp_path, workers=3)
    assert same_bits(here.adapters, there.adapters)
    assert_same_events(tmp_path)


@pytest.mark.slow
def test_a_run_on_workers_may_begin_where_another_one_ended(config, tmp_path):
    simulate_here(config("bert", "train.rounds=1"), tmp_path / "first", report=False)
    adapter = export_from_run(tmp_path / "first", tmp_path / "adapter", None)
    there, here = both(config("bert", *SIX, f"adapter.start={adapter}"), tmp_path)
    assert same_bits(here.adapters, there.adapters)
