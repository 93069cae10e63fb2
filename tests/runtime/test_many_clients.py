"""Runs of many clients: sparse matrices, shared starts and summarised events against those of few."""

import json

import numpy as np
import pytest
import torch

from peerlora.algorithms import merging
from peerlora.config.cluster import ClusterConfig
from peerlora.errors import CompositionError
from peerlora.lora import adapters
from peerlora.runs import events
from peerlora.runs.client_spread import spread
from peerlora.runs.events import Evaluated, RoundDone
from peerlora.runs.store import read_events
from peerlora.runtime.cluster.run import compose_driver
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import resume, simulate
from peerlora.topology import storage
from peerlora.tree import leaves

TIMES = {"seconds_train", "seconds_mix", "seconds_diagnostics", "seconds", "edges", "loss", "measures"}
CASES = {
    "ring": ["topology=ring"],
    "clients away": ["topology.drop_clients=0.3", "topology.kind=torus"],
    "target": ["algorithm.name=flood", "topology=ring"],
    "push-sum": ["algorithm.name=sgp", "train.optimizer=sgd", "topology={kind: exponential, weights: push-sum}"],
    "robust": ["topology={kind: random-regular, degree: 4}", "exchange.robust=trimmed-mean"],
    "attacked": ["topology=complete", "adversary={attack: sign-flip, clients: [5]}", "exchange.robust=median"],
    "codec": ["exchange.codec={kind: top-k, share: 0.3}"],
    "clock": ["clock.speed=1.0", "clock.away=[{client: 1, leave: 1, back: 3}]"],
    "late": ["clock.speed=[1,1,1,1,1,1,1,1,0.1]", "clock.deadline=30"],
    "merging": ["algorithm.name=fedex-lora", "topology=complete"],
    "private head": ["adapter.head=private", "train.optimizer_state=keep"],
    "pooled prior": ["train.label_prior=pooled"],
    "relayed": ["exchange.relay={}", "topology=ring"],
}


@pytest.fixture
def many(monkeypatch):
    """Let runs be of many clients from now on, whatever their number."""

    def begin():
        monkeypatch.setattr(storage, "LARGE", 2)
        monkeypatch.setattr(adapters, "MANY", 2)

    return begin


def close(one, other):
    if isinstance(one, float) and isinstance(other, float):
        return np.isclose(one, other, rtol=1e-6, atol=1e-9, equal_nan=True)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)
    return one == other


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in ("ring", "robust") else pytest.mark.slow) for each in CASES]
)
def test_a_run_of_many_clients_is_that_of_few(config, tmp_path, many, name):
    chosen = config("bert", "clients=9", "train.rounds=4", "train.dtype=fp64", *CASES[name])
    expected = simulate(chosen, tmp_path / "few", report=False).adapters
    many()
    found = simulate(chosen, tmp_path / "many", report=False).adapters
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    for leaf, values in found.items():
        assert np.allclose(values.double(), expected[leaf].double(), rtol=0, atol=1e-9), leaf
    for one, other in zip(read_events(tmp_path / "few"), read_events(tmp_path / "many"), strict=True):
        if isinstance(one, RoundDone | Evaluated):
            for field in vars(one).keys() - TIMES:
                assert close(getattr(one, field), getattr(other, field)), field


def test_a_run_of_many_clients_goes_on_with_its_bits(config, tmp_path, many):
    many()
    chosen = config("bert", "clients=9", "train.rounds=4", "topology=torus", "topology.drop_clients=0.3")
    whole = simulate(chosen, tmp_path / "whole", report=False)
    asked = iter([False, True])
    with pytest.raises(Exception, match="stopped after 2 of 4"):
        simulate(chosen, tmp_path / "half", report=False, stop=lambda: next(asked))
    half = resume(tmp_path / "half", report=False)
    assert (half.adapters.flat == whole.adapters.flat).all()
    rho = [[each.rho for each in read_events(run) if isinstance(each, RoundDone)] for run in (whole.run, half.run)]
    assert rho[0] == rho[1]


def test_a_round_of_too_many_clients_to_list_tells_their_spread(config, tmp_path, monkeypatch, drawn):
    chosen = config("bert", "clients=5", "train.rounds=2")
    listed = simulate(chosen, tmp_path / "listed", report=False)
    monkeypatch.setattr(events, "LISTED_CLIENTS", 4)
    monkeypatch.setattr("peerlora.runtime.trainer.LISTED_CLIENTS", 4)
    monkeypatch.setattr("peerlora.runs.report.LISTED_CLIENTS", 4)
    told = simulate(chosen, tmp_path / "told")
    pairs = zip(read_events(listed.run), read_events(told.run), strict=True)
    rounds = [(one, other) for one, other in pairs if isinstance(one, RoundDone)]
    for one, other in rounds:
        assert other.loss == [] and len(one.loss) == 5
        expected = {"loss_least": min(one.loss), "loss_largest": max(one.loss), "loss_median": np.median(one.loss)}
        assert expected.items() <= other.measures.items()
        assert other.mean_loss == pytest.approx(one.mean_loss, rel=1e-12)
    assert "Training loss over all clients" in (told.run / "report.html").read_text()
    assert json.loads((told.run / "summary.json").read_text())["rounds"] == 2


def test_the_spread_leaves_out_who_did_not_train():
    found = spread("loss", [1.0, float("nan"), 3.0, 2.0])
    assert (found["loss_mean"], found["loss_least"], found["loss_median"], found["loss_largest"]) == (2, 1, 2, 3)
    assert np.isnan(spread("loss", [float("nan")])["loss_mean"])


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["topology=complete"], "complete"),
        (["topology.kind=matcha"], "matcha"),
        (["algorithm.name=ad-psgd", "topology=ring"], "ad-psgd"),
        (["exchange.relay={}", "topology=ring"], "exchange.relay"),
    ],
)
def test_what_needs_dense_tables_of_many_clients_is_refused_early(config, tmp_path, words, what):
    chosen = config("bert", "clients=100000", *words)
    with pytest.raises(CompositionError, match=rf"clients=100000 with .*{what}.* GB") as told:
        simulate(chosen, tmp_path / "run")
    assert "ring" in str(told.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("state", "copies"), [("round", 2), ("keep", 4)])
def test_adapters_that_do_not_fit_into_memory_are_refused_with_their_size(config, monkeypatch, state, copies):
    """Of 100,000 clients of 0.3 MB, 60 GB."""
    chosen = config("bert", f"train.optimizer_state={state}", "train.dtype=fp32")
    spec = compose(chosen).start.spec
    needed = chosen.clients * spec.parameters * torch.float32.itemsize * copies
    monkeypatch.setattr(merging, "main_memory", lambda: needed)
    compose(chosen)
    monkeypatch.setattr(merging, "main_memory", lambda: needed - 1)
    told = (
        rf"{chosen.clients} clients with {spec.parameters} trained numbers each need .* GB for two copies, before and"
    )
    with pytest.raises(CompositionError, match=told) as error:
        compose(chosen)
    assert ("train.optimizer_state=keep" in str(error.value)) == (state == "keep")
    on_workers = chosen.model_copy(update={"cluster": ClusterConfig()})
    with pytest.raises(CompositionError, match="which the command collects and joins"):
        compose_driver(on_workers)
