"""Clipped sums of row gradients equal those of one row after another, through autograd on the ordinary model."""

import numpy as np
import pytest
import torch
from test_learner import CAUSAL, loss_of, noisy

from cases import others_slow
from peerlora.config.privacy import PrivacyConfig
from peerlora.lora.adapters import Adapters, mask_ranks
from peerlora.lora.row_gradients import RowGradients
from peerlora.runtime.compose import compose
from peerlora.train.base import LocalPlan
from peerlora.train.privacy import Guarantee, PrivateTraining, clip_factor
from peerlora.train.private_draws import SeededDraws

MOST = 1e-9  # of fp64: sums of the same numbers in another order
SGD = ["train.optimizer=sgd", "train.lr=1", "train.local_steps=1"]
REGRESSION = ("task.kind=regression", "data.label=score")
MODELS = {
    "bert": ("bert",),
    "bert plain": ("bert", "train.fast=false"),
    "roberta": ("roberta",),
    "every linear layer": ("bert", "adapter.targets=all-linear", "train.fast=false"),
    "gpt2": ("gpt2",),
    "causal llama": ("llama", *CAUSAL),
    "regression": ("bert", *REGRESSION),
    "pairs": ("roberta", "data.text=[text, other]"),
    "a layer in full": ("bert", "adapter.modules_to_save=[key]"),
    "ranks of their own": ("bert", "adapter.rank=[1, 2, 3, 3]", "algorithm.name=local"),
    "multi-label": ("bert", "task.kind=multi-label", "data.label=several"),
    "tags": ("bert", "task.kind=token-classification", "data.label=null", "data.train=jsonl:{tagged}"),
    "chat": ("llama", "task.kind=chat", "data.label=null", "data.max_length=32", "data.train=jsonl:{chats}"),
    "t5": ("t5", "task.kind=sequence-to-sequence", "data.label=null", "data.train=jsonl:{pairs}"),
}


@pytest.mark.parametrize("mean", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("size", [384, 40], ids=["Gram matrices", "products"])
def test_a_clipped_row_is_no_longer_than_it_may_be_where_its_tokens_cancel(size, mean):
    """In fp32: gradients that sum to 0 over the tokens, and inputs with a common mean."""
    clip, rows, tokens = 1.0, 4, 64
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, rows, tokens, size, generator=generator)
    left = left - left.mean(1, keepdim=True)
    weight, found = torch.zeros(rows, size, size), RowGradients(rows, rows)
    found.add(id(weight), left, right + mean)
    factors = clip_factor(found.squared_norms().sqrt(), clip)
    (clipped,) = found.weighted_sums(factors[:, None], [weight])
    lengths = clipped.double().flatten(1).norm(dim=1)
    assert (lengths <= clip * (1 + 1e-6)).all() and (lengths > clip * (1 - 1e-5)).all()


def private(federation, clip=1e9, noise=0.0, unit="row", steps=1, draws=None, epsilon=None, releases=10**6):
    """Give a learner what makes it private, with each client's rate as its config has it."""
    shards = federation.learner.shards
    batches = [size * federation.config.train.accumulate for size in shards.batches]
    settings = (
        PrivacyConfig(noise=noise, clip=clip, unit=unit)
        if epsilon is None
        else PrivacyConfig(epsilon=epsilon, clip=clip, unit=unit)
    )
    guarantees = [
        Guarantee(len(rows), min(1.0, size / len(rows)), noise, 1e-3, releases)
        for rows, size in zip(shards.shards, batches, strict=True)
    ]
    draws = draws or SeededDraws(shards.seed)
    federation.learner.privacy = PrivateTraining(settings, shards.clients, guarantees, draws, steps)
    return federation.learner.privacy


def row_gradients(federation, x, client, rows, blocks):
    """[row, parameter] of one client, zero in other blocks, one backward pass for each row."""
    found = []
    for row in rows:
        flat = x.flat[client : client + 1].clone().requires_grad_()
        loss = loss_of(federation, Adapters(x.spec, flat, x.ranks[client : client + 1]), client, np.array([row]))
        (gradient,) = torch.autograd.grad(loss, flat)
        kept = torch.zeros_like(gradient)
        for block in x.spec.trained(blocks):
            columns = x.spec.columns(block)
            kept[:, columns] = gradient[:, columns]
        found.append(kept[0].detach())
    return torch.stack(found) if found else x.flat.new_zeros(0, x.flat.shape[1])


def drawn_rows(federation, client, job=0, steps=1):
    learner = federation.learner
    return learner.privacy.sample(client, job, learner.shards.shards[client], steps, 1)


@pytest.fixture
def files(tagged, chats, pairs):
    """The rows of tasks that read others than texts with a label."""
    return {"tagged": tagged, "chats": chats, "pairs": pairs}


@pytest.mark.parametrize("blocks", others_slow(["AB", "A", "B"], [0]))
@pytest.mark.parametrize("model", others_slow(MODELS, ["bert", "bert plain", "causal llama", "ranks of their own"]))
def test_a_private_step_is_the_clipped_mean_of_row_gradients(config, files, model, blocks):
    words = [word.format(**files) for word in MODELS[model]]
    federation = compose(config(*words, *SGD))
    x = mask_ranks(noisy(federation.start))
    seen = []
    for clips in (False, True):
        clip = float(torch.cat(seen).median()) if clips else 1e9
        privacy = private(federation, clip)
        moved = x.flat - federation.learner.fit(x, LocalPlan(blocks)).flat
        for client, guarantee in enumerate(privacy.guarantees):
            rows = drawn_rows(federation, client)[0]
            found = row_gradients(federation, x, client, rows, tuple(blocks))
            seen.append(found.norm(dim=1))
            clipped = found * (clip / (found.norm(dim=1, keepdim=True) + 1e-6)).clamp_max(1)
            expected = clipped.sum(0) / guarantee.expected_rows
            assert (moved[client] - expected).abs().max() < MOST
    assert bool((torch.cat(seen) > clip).any()) and moved.abs().max() > 1e-4


@pytest.mark.parametrize("kind", others_slow(["vit", "deit", "swin"], ["vit", "swin"]))
def test_a_private_step_of_images_is_the_clipped_mean_of_row_gradients(config, pictures, kind):
    task = ["task.kind=image-classification", f"data.train={pictures}"]
    federation = compose(config(kind, *task, *SGD, "adapter.targets=all-linear"))
    x = noisy(federation.start)
    privacy = private(federation, clip=0.5)
    moved = x.flat - federation.learner.fit(x, "AB").flat
    for client, guarantee in enumerate(privacy.guarantees):
        found = row_gradients(federation, x, client, drawn_rows(federation, client)[0], ("A", "B"))
        clipped = found * (0.5 / (found.norm(dim=1, keepdim=True) + 1e-6)).clamp_max(1)
        assert (moved[client] - clipped.sum(0) / guarantee.expected_rows).abs().max() < MOST
        assert not len(found) or found.norm(dim=1).max() > 0.5


def test_shared_graphs_packed_tokens_and_pieces_change_nothing(config):
    """Clients alone or together, packed or not, in one piece or in three."""
    found = []
    for words in (
        ["train.batch=6"],
        ["train.batch=6", "train.block=1"],
        ["train.batch=6", "train.fast=false"],
        ["train.batch=2", "train.accumulate=3"],
    ):
        federation = compose(config("bert", *SGD, *words))
        private(federation, 0.5)
        found.append(federation.learner.fit(noisy(federation.start), "AB").flat)
    for other in found[1:]:
        assert (found[0] - other).abs().max() < MOST


@pytest.mark.parametrize("fast", ["true", "false"])
def test_dropout_is_drawn_as_without_privacy(config, fast):
    """All rows in every step and no clipping to speak of: the ordinary gradient of these rows, the shortest first."""
    words = [*SGD, f"train.fast={fast}", "adapter.dropout=0.3", "train.batch=15", "clients=4"]
    federation = compose(config("bert", *words))
    x = noisy(federation.start)
    lengths = federation.train_data.lengths
    rows = [own[lengths[own].argsort(kind="stable")] for own in federation.learner.shards.shards]
    federation.learner.shards.rows = lambda client, t, steps: [rows[client]]
    usual = federation.learner.fit(x, "AB").flat
    private(federation)
    assert all(each.rate == 1 for each in federation.learner.privacy.guarantees)
    assert (federation.learner.fit(x, "AB").flat - usual).abs().max() < MOST


def test_a_client_whose_draw_is_empty_moves_by_noise_alone(config):
    federation = compose(config("bert", *SGD))
    x = noisy(federation.start)
    private(federation)
    federation.learner.privacy.sample = lambda i, job, shard, steps, parts: [shard[: 2 * (i % 2)]]
    moved = (federation.learner.fit(x, "AB").flat - x.flat).abs().amax(1)
    assert moved[[0, 2]].max() == 0 and moved[[1, 3]].min() > 1e-4
    assert federation.learner._round.stats.losses[0] == 0


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_gram_matrices_and_products_give_the_same_norms_and_sums(tokens):
    """Of both forms, at sizes where one or the other is chosen; a layer that runs twice has the sum."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, twice = torch.empty(2, 4, 9), torch.empty(2, 4, 9)
    left, right, more = draw(6, tokens, 4), draw(6, tokens, 9), draw(6, tokens, 9)
    found = RowGradients(2, 6)
    found.add(id(weight), left, right)
    found.add(id(twice), left, right)
    found.add(id(twice), left, more)
    expected = torch.einsum("rtm,rtn->rmn", left, right), torch.einsum("rtm,rtn->rmn", left, right + more)
    norms = sum(each.square().sum((1, 2)) for each in expected)
    assert torch.allclose(found.squared_norms(), norms, rtol=1e-12)
    weights = draw(2, 3)
    for sums, each in zip(found.weighted_sums(weights, [weight, twice]), expected, strict=True):
        wanted = torch.einsum("crmn,cr->cmn", each.view(2, 3, 4, 9), weights)
        assert torch.allclose(sums, wanted, rtol=1e-10)
    (unused,) = found.weighted_sums(weights, [torch.empty(2, 5)])
    assert not unused.any()
