"""Losses weighed by class: against torch, for clients that lack classes, and in runs."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_memory import federation
from test_learner import noisy, run
from test_loss_rules import SKEWED

from cases import others_slow
from peerlora.data.batches import Batch, collate
from peerlora.errors import CompositionError, ConfigError, DataError
from peerlora.lora.adapters import Adapters
from peerlora.runtime.compose import compose, opening_state
from peerlora.runtime.plan import plan
from peerlora.runtime.simulate import simulate
from peerlora.train.loss_rules import ClassWeights, balanced_weights
from peerlora.train.tasks import Classification

COUNTS = np.array([[6, 2, 0], [1, 1, 2]])
LABELS = [[0] * 6 + [1] * 2, [0, 1, 2, 2]]


def loss_of(rule, client, labels, logits):
    """The loss of one client's rows as one minibatch."""
    weights = torch.full((1, len(labels)), 1 / len(labels), dtype=torch.float64)
    batch = Batch({}, torch.tensor(labels), weights, [(len(labels), 1)])
    return float(Classification().losses(*rule(logits, batch, [client]))[0])


def drawn(rows):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)


def test_balanced_by_hand():
    found = balanced_weights(torch.from_numpy(COUNTS).double())
    assert found.tolist() == [[8 / (2 * 6), 8 / (2 * 2), 0.0], [4 / 3, 4 / 3, 4 / 6]]


@pytest.mark.parametrize("given", ["balanced", [1.0, 4.0, 2.5], [10.0, 40.0, 25.0]])
@pytest.mark.parametrize("client", [0, 1])
def test_over_all_rows_it_is_torchs_weighted_loss(given, client):
    weights = balanced_weights(torch.from_numpy(COUNTS[[client]]).double())[0] if given == "balanced" else given
    labels, logits = LABELS[client], drawn(len(LABELS[client]))
    expected = F.cross_entropy(logits, torch.tensor(labels), torch.as_tensor(weights, dtype=torch.float64))
    assert loss_of(ClassWeights(COUNTS, given), client, labels, logits) == pytest.approx(float(expected), abs=1e-12)


def test_minibatches_are_unbiased_even_where_each_has_one_class():
    rule, logits = ClassWeights(COUNTS, [1.0, 5.0, 2.0]), drawn(8)
    parts = [loss_of(rule, 0, LABELS[0][i : i + 2], logits[i : i + 2]) for i in range(0, 8, 2)]
    assert np.mean(parts) == pytest.approx(loss_of(rule, 0, LABELS[0], logits), abs=1e-12)


def test_filler_rows_weigh_nothing():
    rule, logits = ClassWeights(COUNTS, "balanced"), drawn(8)
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25] * 4], dtype=torch.float64)
    batch = Batch({}, torch.tensor([0, 1, 1, 1, 0, 1, 2, 2]), weights, [(2, 1), (4, 1)])
    found = Classification().losses(*rule(logits, batch, [0, 1]))
    assert float(found[0]) == pytest.approx(loss_of(rule, 0, [0, 1], logits[:2]), abs=1e-12)


def trained(chosen):
    built = compose(chosen)
    return run(built.learner, noisy(built.start), ["AB", "B"]).flat


def test_a_client_that_lacks_a_class_trains_and_rare_classes_count(config):
    chosen = [config("bert", *SKEWED, *words) for words in ([], ["train.class_weights=balanced"])]
    plain, weighed = map(trained, chosen)
    assert bool(weighed.isfinite().all()) and (plain - weighed).abs().max() > 1e-4
    only = ["partition.kind=shares", "partition.shares=[[1, 0, 0], [0, 0.5, 0.5]]", "partition.counts=[1, 3]"]
    plain, weighed = (trained(config("bert", *only, *words)) for words in ([], ["train.class_weights=balanced"]))
    assert torch.allclose(plain[0], weighed[0], rtol=0, atol=1e-12), "one class: every row weighs 1"
    assert bool(weighed.isfinite().all())


def test_only_the_proportions_of_a_list_count(config):
    one, other = (config("bert", f"train.class_weights={given}") for given in ("[1, 2, 3]", "[10, 20, 30]"))
    assert torch.allclose(trained(one), trained(other), rtol=0, atol=1e-12)


def test_they_accumulate_to_the_loss_of_the_whole_batch(config):
    words = ("bert", *SKEWED, "train.class_weights=balanced")
    halves = trained(config(*words, "train.accumulate=2", "train.batch=2"))
    assert (halves - trained(config(*words, "train.batch=4"))).abs().max() < 1e-10


def test_an_attacker_with_flipped_labels_weighs_those_that_it_learns_from(config):
    flips = ["adversary.attack=label-flip", "adversary.clients=1", "train.class_weights=balanced"]
    assert bool(trained(config("bert", *SKEWED, *flips)).isfinite().all())


def pooled_rule(counts):
    rule = ClassWeights(counts, "pooled")
    rule.agree(lambda own: own.sum(0, keepdim=True).expand_as(own))
    return rule


def test_pooled_the_mean_loss_of_clients_is_the_balanced_loss_of_all_rows_in_one_place():
    rule, together = pooled_rule(COUNTS), ClassWeights(COUNTS.sum(0, keepdims=True), "balanced")
    logits = [drawn(len(own)) for own in LABELS]
    losses = [loss_of(rule, client, own, logits[client]) for client, own in enumerate(LABELS)]
    expected = loss_of(together, 0, LABELS[0] + LABELS[1], torch.cat(logits))
    assert np.average(losses, weights=list(map(len, LABELS))) == pytest.approx(expected, abs=1e-12)


def test_pooled_weights_before_the_sum_are_a_fault():
    with pytest.raises(AssertionError, match="comes first"):
        loss_of(ClassWeights(COUNTS, "pooled"), 0, LABELS[0], drawn(8))


POOLED = [*SKEWED, "train.class_weights=pooled"]


@pytest.mark.parametrize("topology", ["complete", "ring"])
def test_pooled_weights_are_the_balanced_ones_of_all_clients_rows(config, topology):
    federation = compose(config("bert", *POOLED, f"topology={topology}"))
    opening_state(federation)
    (rule,) = federation.learner.loss_rules
    everything = balanced_weights(torch.from_numpy(federation.partition.counts.sum(0, keepdims=True)).double())
    assert torch.equal(rule.weights, everything.expand(4, -1))


def test_pooled_one_step_of_sgd_on_a_complete_graph_is_that_of_one_client_with_all_rows(config):
    even = ["partition.kind=shares", "partition.shares=[[0.7, 0.1, 0.2], [0.2, 0.6, 0.2]]", "partition.counts=[2, 2]"]
    words = [*even, "algorithm.name=dec-lora", "topology=complete", "train.optimizer=sgd", "train.lr=0.5"]
    words += ["train.local_steps=1", "train.class_weights=pooled"]
    sizes = [len(own) for own in compose(config("bert", *words)).partition.shards]
    assert len(set(sizes)) == 1, "each client's mean counts the same"
    federation, x = opened(config("bert", *words, f"train.batch={sizes[0]}"))
    rows = np.concatenate(federation.partition.shards)
    weights = balanced_weights(torch.from_numpy(federation.partition.counts.sum(0, keepdims=True)).double())[0]
    batch = collate(federation.train_data, [rows], 0, torch.float64)
    leaf = federation.start.flat[:1].clone().requires_grad_()
    federation.model.bind_adapters(Adapters(federation.start.spec, leaf, federation.start.ranks[:1]))
    loss = F.cross_entropy(federation.model(batch.inputs), batch.labels, weight=weights)
    expected = leaf - 0.5 * torch.autograd.grad(loss, leaf)[0]
    assert (x.flat - expected).abs().max() < 1e-9 and (x.flat - federation.start.flat).abs().max() > 1e-4


def opened(chosen):
    """Run one round from the opening state on; return the federation and its models."""
    federation = compose(chosen)
    x = opening_state(federation)
    with federation.learner.round(0):
        federation.exchange.begin(0)
        x = federation.algorithm.round(0, x, federation.learner, federation.exchange)
    return federation, federation.algorithm.model(x)


@pytest.mark.parametrize("words", others_slow([["algorithm.name=adf-lora"], ["algorithm.name=local"]], [0]))
def test_real_peers_pool_as_the_simulation_does(config, tmp_path, no_reports, words):
    chosen = config("bert", *POOLED, "peer.deadline=60", "peer.join=60", "train.block=1", *words)
    whole, parts = simulate(chosen, tmp_path / "whole"), federation(chosen, tmp_path)
    for client, part in enumerate(parts):
        assert (part.adapters.flat[0] - whole.adapters.flat[client]).abs().max() < 1e-9
        assert json.loads((part.run / "label_counts.json").read_text())["total"]
    assert "train.class_weights=pooled: clients sum their label counts" in (whole.run / "events.jsonl").read_text()


def test_a_network_in_parts_cannot_pool(config):
    words = ["topology.kind=edges", "topology.edges=[[0, 1], [2, 3]]", "topology.allow_disconnected=true"]
    with pytest.raises(CompositionError, match="no client hears of all; use .*train.class_weights=balanced"):
        plan(config("bert", *POOLED, *words))


def test_real_peers_weigh_as_the_simulation_does(config, tmp_path, no_reports):
    words = ["train.class_weights=balanced", "train.accumulate=2", "train.block=1", "peer.deadline=60", "peer.join=60"]
    chosen = config("bert", *SKEWED, *words, "algorithm.name=adf-lora", "algorithm.interval=1")
    whole, parts = simulate(chosen, tmp_path / "whole"), federation(chosen, tmp_path)
    for client, part in enumerate(parts):
        assert (part.adapters.flat[0] - whole.adapters.flat[client]).abs().max() < 1e-9


REFUSED = {
    "train.class_weights=[1, 0, 1]": "train.class_weights",
    "train.class_weights=even": "train.class_weights",
    "train.class_weights=[2]": "train.class_weights",
}


@pytest.mark.parametrize(("word", "said"), REFUSED.items())
def test_what_is_no_weight_is_refused(config, word, said):
    with pytest.raises(ConfigError, match=said):
        config("bert", word)


def test_what_they_do_not_go_with_is_refused(config):
    with pytest.raises(ConfigError, match="task.kind=regression has none of"):
        config("bert", "task.kind=regression", "data.label=score", "train.class_weights=balanced")
    for weights, prior in (("balanced", "uniform"), ("pooled", "uniform"), ("pooled", "pooled")):
        with pytest.raises(ConfigError, match="use one of them"):
            config("bert", f"train.class_weights={weights}", f"train.label_prior={prior}")
    assert config("bert", "recipe=sparse", "train.class_weights=pooled").train.label_prior == "none"


def test_a_list_has_one_number_per_label(config):
    told = r"lists 2 numbers, the data have 3 labels \(class0, class1, class2\); give one number per label"
    with pytest.raises(DataError, match=told):
        compose(config("bert", "train.class_weights=[1, 2]"))
