"""Relayed adapters under every method that allows them, with clients whose local steps can be followed by hand."""

import pytest
import torch
from toys import SPEC, Quadratic, adapters, targets

from cases import ROW_METHODS
from peerlora.algorithms import build_algorithm, describe_algorithms
from peerlora.algorithms.base import prepare
from peerlora.config.exchange import RelayConfig
from peerlora.config.loading import parse_spec
from peerlora.exchange.relay import RelayCaches
from peerlora.exchange.stacked import StackedExchange
from peerlora.runtime.synchronous import SynchronousRounds
from peerlora.topology.schedule import build_topology

CLIENTS = 4
RELAYED = [name for name, kind in ROW_METHODS.items() if kind.traits.refusal("relay") is None]
OWN_RULES = ("decaf", "flexlora", "hetlora", "fedrot-lora", "lora-fair")
"""What these make of the neighbours' adapters is no average of factors."""
OUTER_STEP = ("noloco",)
"""These go a part of the way from their model to the average of what is sent, which is all that is relayed."""


def rounds_of(method, graph, average, rounds):
    """The exchange, the models and what was told, after each round."""
    settings = {"interval": 2} if "interval" in describe_algorithms()[method]["settings"] else {}
    topology = build_topology(parse_spec(graph), CLIENTS, 0)
    algorithm, _ = prepare(build_algorithm(method, settings), topology, 8)
    peers = StackedExchange(topology, range(CLIENTS))
    peers.relayed = RelayCaches(RelayConfig(average=average), SPEC, dict.fromkeys(range(CLIENTS), 1), CLIENTS)
    runner = SynchronousRounds(algorithm, Quadratic(targets(CLIENTS)), peers, None)
    start = torch.randn(1, SPEC.parameters, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = algorithm.start(adapters(start.repeat(CLIENTS, 1)), peers)
    for t in range(rounds):
        state, told = runner.advance(t, state)
        yield peers, algorithm.model(state), told


@pytest.mark.parametrize("method", [name for name in RELAYED if name not in OWN_RULES])
def test_on_a_complete_graph_the_relayed_average_of_factors_is_the_averaged_model(method):
    """What a method sends stands for its client's model where the mean of what is sent is the mean of the models."""
    before = None
    for peers, models, told in rounds_of(method, "complete", "factors", 5):
        assert before is None or not torch.equal(models.flat, before), "nothing was learnt"
        before = models.flat
        found = peers.relayed_models(models).adapters.flat
        averaged = told.sent if method in OUTER_STEP else models
        torch.testing.assert_close(found, averaged.mean().flat.expand(CLIENTS, -1), rtol=0, atol=1e-12)
        assert told.measures["relayed_age_max"] == 0 and told.measures["relayed_entries"] == 0


@pytest.mark.parametrize("method", RELAYED)
def test_products_are_averages_of_what_the_method_sent(method):
    """On a path, where entries are of several rounds, against the dense products of every version that was sent."""
    sent, rounds = {}, list(rounds_of(method, "path", "products", 5))
    for t, (_, models, told) in enumerate(rounds):
        whole, scaling = models.with_blocks(told.sent), told.sent.scaling
        for i in range(CLIENTS):
            sent[i, t + 1] = {name: scaling[i] * whole.B[name][i] @ A[i] for name, A in whole.A.items()}
    peers, models, _ = rounds[-1]
    versions, found = peers.relayed.versions, peers.relayed_models(models).adapters
    assert versions.min() == 3 and torch.equal(found.ranks, models.ranks)
    for i, rank in enumerate(found.ranks.tolist()):
        for name in ("one", "two"):
            mean = sum(sent[j, int(versions[i, j])][name] for j in range(CLIENTS)) / CLIENTS
            U, values, V = torch.linalg.svd(mean, full_matrices=False)
            best = U[:, :rank] * values[:rank] @ V[:rank]
            torch.testing.assert_close(found.scaling[i] * found.B[name][i] @ found.A[name][i], best, rtol=0, atol=1e-10)
