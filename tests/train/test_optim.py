"""The stacked optimisers against torch's own, one per client, step by step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlora.config.sections import TrainConfig
from peerlora.train.optim import Moments, block_rate, clip, step

CLIENTS = 3
COLUMNS = {"A": slice(0, 4), "B": slice(4, 7), "head": slice(7, 9)}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients_at(k, blocks="A B head"):
    """A gradient for every client and block, of very different sizes, some exactly zero."""
    g = random(CLIENTS, 9, seed=100 + k) * torch.tensor([1e-4, 1.0, 1e3], dtype=torch.float64)[:, None]
    g[:, 8] = 0
    return {block: g[:, COLUMNS[block]].clone() for block in blocks.split()}


def active(blocks):
    return {block: COLUMNS[block] for block in blocks.split()}


def torch_optimizer(train, parameters):
    """The last of several parameters is the head."""
    groups = [{"params": parameters[:-1]}, {"params": parameters[-1:], "lr": train.lr * train.head_rate}]
    groups = groups if len(parameters) > 1 else parameters
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay)
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)


SETTINGS = {
    "adamw": dict(optimizer="adamw", lr=0.01),
    "adamw-decay": dict(optimizer="adamw", lr=0.1, weight_decay=0.3),
    "adamw-clip": dict(optimizer="adamw", lr=0.01, weight_decay=0.1, clip=0.5),
    "adamw-plain": dict(optimizer="adamw", lr=0.1, weight_decay=0.3, fast=False),
    "sgd": dict(optimizer="sgd", lr=0.01),
    "sgd-decay": dict(optimizer="sgd", lr=0.01, weight_decay=0.3),
    "sgd-momentum": dict(optimizer="sgd", lr=0.01, momentum=0.9),
    "adamw-head": dict(optimizer="adamw", lr=0.1, weight_decay=0.3, head_rate=0.25),
    "adamw-head-plain": dict(optimizer="adamw", lr=0.1, weight_decay=0.3, head_rate=4.0, fast=False),
    "sgd-head": dict(optimizer="sgd", lr=0.01, momentum=0.8, weight_decay=0.2, head_rate=0.25),
    "sgd-all": dict(optimizer="sgd", lr=0.01, momentum=0.8, weight_decay=0.2, clip=1.5),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_steps_equal_torchs_optimiser_of_every_client(name):
    train = TrainConfig(**SETTINGS[name])
    values = random(CLIENTS, 9)
    start = values.clone()
    theirs = [[torch.nn.Parameter(row[columns].clone()) for columns in COLUMNS.values()] for row in values]
    optimizers = [torch_optimizer(train, parameters) for parameters in theirs]
    moments = Moments.fresh(values, tuple(COLUMNS))
    for k in range(20):
        gradients = gradients_at(k)
        for i, (parameters, optimizer) in enumerate(zip(theirs, optimizers, strict=True)):
            for parameter, g in zip(parameters, gradients.values(), strict=True):
                parameter.grad = g[i].clone()
            if train.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, train.clip)
            optimizer.step()
        step(train, train.lr, values, gradients, moments, COLUMNS)
        expected = torch.stack([torch.cat(parameters).detach() for parameters in theirs])
        assert torch.allclose(values, expected, rtol=1e-12, atol=1e-12), k
    assert (values - start).abs().max() > 1e-3


def test_a_heads_layers_have_its_rate():
    train = TrainConfig(lr=0.1, head_rate=0.25)
    found = [block_rate(train, 0.2, block) for block in ("A", "B:2", "head", "head:1")]
    assert found == pytest.approx([0.2, 0.2, 0.05, 0.05])


def test_single_precision_stays_as_near_as_rounding_allows():
    train = TrainConfig(optimizer="adamw", lr=0.01, weight_decay=0.1)
    values = random(CLIENTS, 9, dtype=torch.float32)
    parameter = torch.nn.Parameter(values.clone())
    optimizer, moments = torch_optimizer(train, [parameter]), Moments.fresh(values, ("A",))
    for k in range(20):
        parameter.grad = torch.cat(list(gradients_at(k).values()), 1).float()
        optimizer.step()
        step(train, train.lr, values, {"A": parameter.grad.clone()}, moments, {"A": slice(0, 9)})
    assert values.dtype == torch.float32 and (values - parameter).abs().max() < 1e-6


@settings(max_examples=40)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_clipping_is_torchs_per_client(seed, largest):
    found = {"A": random(CLIENTS, 5, seed=seed), "head": random(CLIENTS, 2, seed=seed + 1) * 30}
    theirs = [
        [torch.nn.Parameter(torch.zeros(g.shape[1], dtype=g.dtype)) for g in found.values()] for _ in range(CLIENTS)
    ]
    for i, parameters in enumerate(theirs):
        for parameter, g in zip(parameters, found.values(), strict=True):
            parameter.grad = g[i].clone()
        torch.nn.utils.clip_grad_norm_(parameters, largest)
    clip(found, largest)
    for i, parameters in enumerate(theirs):
        for parameter, g in zip(parameters, found.values(), strict=True):
            assert torch.allclose(g[i], parameter.grad, rtol=1e-12, atol=0)
    assert (torch.cat(list(found.values()), 1).norm(dim=1) <= largest).all()


def test_clipping_by_hand():
    found = {"A": torch.tensor([[3.0], [0.3], [0.0]]).double(), "B": torch.tensor([[4.0], [0.4], [0.0]]).double()}
    clip(found, 1.0)
    assert torch.cat(list(found.values()), 1).flatten().tolist() == pytest.approx([0.6, 0.8, 0.3, 0.4, 0, 0], rel=1e-6)


@pytest.mark.parametrize("name", ["adamw-decay", "sgd-all"])
def test_a_block_that_is_not_active_is_held_bit_for_bit(name):
    train = TrainConfig(**SETTINGS[name])
    values = random(CLIENTS, 9)
    moments = Moments.fresh(values, tuple(COLUMNS))
    for k in range(3):  # builds up momentum in all blocks
        step(train, train.lr, values, gradients_at(k), moments, COLUMNS)
    A = values[:, COLUMNS["A"]].clone()
    old = moments.first[:, COLUMNS["A"]].clone(), moments.second[:, COLUMNS["A"]].clone()
    assert old[0].any()
    for k in range(5):
        step(train, train.lr, values, gradients_at(k, "B head"), moments, active("B head"))
    assert torch.equal(values[:, COLUMNS["A"]], A)
    assert torch.equal(moments.first[:, COLUMNS["A"]], old[0]) and torch.equal(moments.second[:, COLUMNS["A"]], old[1])
    assert {block: count.tolist() for block, count in moments.steps.items()} == {
        "A": [3] * 3,
        "B": [8] * 3,
        "head": [8] * 3,
    }


@pytest.mark.parametrize("name", ["adamw-decay", "sgd-momentum"])
def test_a_held_block_goes_on_as_if_there_had_been_no_pause(name):
    train = TrainConfig(**SETTINGS[name])
    paused, through = random(CLIENTS, 9), random(CLIENTS, 9)
    memories = [Moments.fresh(values, tuple(COLUMNS)) for values in (paused, through)]
    for k in range(6):
        step(train, train.lr, paused, gradients_at(k, "A"), memories[0], active("A"))
        step(train, train.lr, paused, gradients_at(k + 50, "B"), memories[0], active("B"))
        step(train, train.lr, through, gradients_at(k, "A"), memories[1], active("A"))
    assert torch.equal(paused[:, :4], through[:, :4])
    assert not torch.equal(paused[:, 4:7], through[:, 4:7])


def test_rows_of_the_memory_are_copies_until_they_are_put_back():
    moments = Moments.fresh(torch.zeros(CLIENTS, 9), ("A", "B", "head"))
    some = moments.rows([1])
    some.first.add_(1)
    some.steps["B"].add_(2)
    assert not moments.first.any() and not moments.steps["B"].any()
    moments.put([1], some)
    assert moments.first.sum(1).tolist() == [0, 9, 0] and moments.steps["B"].tolist() == [0, 2, 0]


@pytest.mark.parametrize("name", ["adamw-clip", "sgd-all"])
def test_clients_in_parts_equal_clients_together(name):
    train = TrainConfig(**SETTINGS[name])
    together, parts = random(CLIENTS, 9), random(CLIENTS, 9)
    memories = [Moments.fresh(values, tuple(COLUMNS)) for values in (together, parts)]
    for k in range(4):
        step(train, train.lr, together, gradients_at(k), memories[0], COLUMNS)
        for own in ([0], [1, 2]):
            gradients = {block: g[own] for block, g in gradients_at(k).items()}
            values, memory = parts[own], memories[1].rows(own)
            step(train, train.lr, values, gradients, memory, COLUMNS)
            parts[own] = values
            memories[1].put(own, memory)
    assert torch.equal(together, parts) and torch.equal(memories[0].first, memories[1].first)
