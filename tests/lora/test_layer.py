from dataclasses import replace

import pytest
import torch
from torch import nn

from peerlora.data.batches import collate
from peerlora.lora.adapters import mask_ranks
from peerlora.lora.layer import ClientDropout, Layout, StackedHead, StackedLinear, Step
from peerlora.runtime.compose import compose

CLIENTS, RANK, D_IN, D_OUT, ROWS, TOKENS = 3, 2, 5, 4, 2, 6
DOUBLE = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def stacked_linear(p=0.0, step=None):
    step = step or Step(CLIENTS, torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)[:, None, None])
    layer = StackedLinear(nn.Linear(D_IN, D_OUT, dtype=DOUBLE).requires_grad_(False), D_IN, D_OUT, p, step)
    layer.A = random(CLIENTS, RANK, D_IN, seed=1).requires_grad_()
    layer.B = random(CLIENTS, D_OUT, RANK, seed=2).requires_grad_()
    return layer


def in_training(p, rows, tokens, seed=0, clients=CLIENTS):
    """A Step as the Learner makes it: own extents and own streams."""
    streams = [torch.Generator().manual_seed(seed + i) for i in range(clients)]
    return Step(clients, torch.ones(clients, 1, 1, dtype=DOUBLE), list(zip(rows, tokens, strict=True)), streams)


@pytest.mark.parametrize("shape", [(CLIENTS * ROWS, D_IN), (CLIENTS * ROWS, TOKENS, D_IN)])
def test_a_stacked_linear_is_each_clients_own_formula(shape):
    layer, x = stacked_linear(), random(*shape)
    y = layer(x)
    for i in range(CLIENTS):
        own = slice(i * ROWS, (i + 1) * ROWS)
        update = layer.step.scaling[i] * layer.B[i] @ layer.A[i]
        expected = x[own] @ (layer.base.weight + update).T + layer.base.bias
        assert torch.allclose(y[own], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(CLIENTS * ROWS, D_IN), (CLIENTS * ROWS, TOKENS, D_IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_stacked_head_is_each_clients_own_linear(shape, bias):
    head = StackedHead(nn.Linear(D_IN, D_OUT, bias=bias, dtype=DOUBLE), Step(CLIENTS))
    head.weight = random(CLIENTS, D_OUT, D_IN, seed=1)
    head.bias = random(CLIENTS, D_OUT, seed=2) if bias else None
    x = random(*shape)
    y = head(x)
    for i in range(CLIENTS):
        own = slice(i * ROWS, (i + 1) * ROWS)
        assert torch.allclose(y[own], nn.functional.linear(x[own], head.weight[i], head.bias[i] if bias else None))


def test_a_loss_of_one_client_has_no_gradient_for_another():
    layer = stacked_linear()
    y = layer(random(CLIENTS * ROWS, TOKENS, D_IN))
    A, B = torch.autograd.grad(y[ROWS : 2 * ROWS].square().sum(), [layer.A, layer.B])
    assert A[1].any() and B[1].any()
    assert not A[[0, 2]].any() and not B[[0, 2]].any()


def test_dropout_leaves_evaluation_alone():
    layer, x = stacked_linear(p=0.5), random(CLIENTS * ROWS, D_IN)
    y = layer(x)
    layer.p = 0.0
    assert torch.equal(y, layer(x))


def test_adapter_dropout_touches_the_update_and_not_the_base():
    step = in_training(0.5, [ROWS] * CLIENTS, [TOKENS] * CLIENTS)
    layer, x = stacked_linear(p=0.5, step=step), random(CLIENTS * ROWS, TOKENS, D_IN)
    with torch.no_grad():
        layer.A.zero_()
    assert torch.equal(layer(x), layer.base(x))


def test_dropout_keeps_the_stated_share_and_scales_what_it_keeps():
    step = in_training(0.25, [100] * CLIENTS, [20] * CLIENTS)
    y = ClientDropout(0.25, step)(torch.ones(CLIENTS * 100, 20, 10, dtype=DOUBLE))
    kept = y != 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.75))
    assert kept.double().mean() == pytest.approx(0.75, abs=0.01)  # 60,000 draws: 5.6 standard deviations
    assert not torch.equal(kept[:100], kept[100:200]), "clients share a stream"


def test_a_clients_mask_depends_neither_on_padding_nor_on_who_shares_the_graph():
    x = random(1, 2, 3, D_IN)  # one client: 2 rows of 3 tokens
    alone = ClientDropout(0.5, in_training(0.5, [2], [3], clients=1))(x[0])
    padded = torch.zeros(2, 4, 7, D_IN, dtype=DOUBLE)
    padded[0, :2, :3] = x[0]
    padded[1] = 1
    together = ClientDropout(0.5, in_training(0.5, [2, 4], [3, 7], clients=2))(padded.view(8, 7, D_IN))
    assert torch.equal(together[:2, :3], alone)
    assert not together[:4].view(4, 7, -1)[2:].any(), "filler rows must stay out"


# --- the same, through a whole model and the Learner


def fit_twice(config, *words, rounds=(0, 0), kind="bert"):
    found = []
    for t in rounds:
        federation = compose(config(kind, "train.local_steps=2", *words))
        with federation.learner.round(t):
            found.append(federation.learner.fit(warm(federation.start), "AB"))
    return found


def warm(x):
    """A start with B away from zero, so that every factor has a gradient; padding stays zero."""
    noise = random(*x.flat.shape, seed=3) * 0.1
    return mask_ranks(replace(x, flat=x.flat + noise))


DROPS = ("adapter.dropout=0.3", "model.dropout=0.2")


@pytest.mark.parametrize("words", [(), DROPS])
def test_changing_the_data_of_one_client_leaves_the_others_as_they_were(config, words):
    federations = [compose(config("bert", *words)) for _ in range(2)]
    shards = federations[1].learner.shards
    shards.shards = [shards.shards[0], shards.shards[1][::-1].copy(), *shards.shards[2:]]
    found = [federation.learner.fit(warm(federation.start), "AB").flat for federation in federations]
    assert not torch.equal(found[0][1], found[1][1])
    # A longest row that changes re-pads the others' rows, which may move the last bits.
    assert (found[0] - found[1])[[0, 2, 3]].abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_dropout_results_do_not_depend_on_how_many_clients_share_a_graph(config, kind, block):
    words = [*DROPS, "train.batch=[1, 4, 2, 3]"]
    whole = fit_twice(config, *words, "train.block=4", rounds=(2,), kind=kind)[0]
    parts = fit_twice(config, *words, f"train.block={block}", rounds=(2,), kind=kind)[0]
    assert (whole.flat - parts.flat).abs().max() < 1e-12


def test_dropout_repeats_for_the_same_round_and_differs_between_rounds(config):
    one, same, other = fit_twice(config, *DROPS, rounds=(0, 0, 1))
    assert torch.equal(one.flat, same.flat) and not torch.equal(one.flat, other.flat)
    federation = compose(config("bert", *DROPS))
    federation.learner.shards.rows = lambda client, t, steps: [federation.learner.shards.shards[client][:4]] * steps
    found = []
    for t in (0, 1):
        with federation.learner.round(t):
            found.append(federation.learner.fit(federation.start, "AB").flat)
    assert not torch.equal(found[0], found[1]), "two rounds of the same rows drew the same masks"


def test_both_kinds_of_dropout_change_the_result(config):
    plain, adapter, base = (fit_twice(config, *words, rounds=(0,))[0].flat for words in ((), DROPS[:1], DROPS[1:]))
    assert (plain - adapter).abs().max() > 1e-4 and (plain - base).abs().max() > 1e-4


def test_filler_rows_give_no_gradient(config):
    federation = compose(config("bert", "train.batch=[1, 4, 2, 3]"))
    learner, x = federation.learner, warm(federation.start)
    rows = [learner.shards.rows(i, 0, 1)[0] for i in range(4)]
    batch = collate(federation.train_data, rows, 0, DOUBLE)
    flat = x.flat.clone().requires_grad_()
    learner.model.bind_adapters(replace(x, flat=flat))
    (together,) = torch.autograd.grad(learner.task.losses(learner.model(batch.inputs), batch).sum(), flat)
    for i in range(4):
        own = x.rows([i])
        single = collate(federation.train_data, [rows[i]], 0, DOUBLE)
        leaf = own.flat.clone().requires_grad_()
        learner.model.bind_adapters(replace(own, flat=leaf))
        (alone,) = torch.autograd.grad(learner.task.losses(learner.model(single.inputs), single).sum(), leaf)
        assert alone.abs().max() > 1e-3 and torch.allclose(together[i], alone[0], rtol=0, atol=1e-12)


def test_padding_beyond_the_own_rank_gets_no_gradient(config):
    federation = compose(config("bert", "algorithm.name=local", "adapter.rank=[1, 3, 2, 3]"))
    learner, x = federation.learner, warm(federation.start)
    rows = [learner.shards.rows(i, 0, 1)[0] for i in range(4)]
    batch = collate(federation.train_data, rows, 0, DOUBLE)
    flat = x.flat.clone().requires_grad_()
    learner.model.bind_adapters(replace(x, flat=flat))
    (gradient,) = torch.autograd.grad(learner.task.losses(learner.model(batch.inputs), batch).sum(), flat)
    g = replace(x, flat=gradient)
    for layer in g.A:
        assert not g.A[layer][0, 1:].any() and not g.B[layer][0, :, 1:].any() and not g.A[layer][2, 2:].any()
        assert g.A[layer][0, :1].any() and g.B[layer][0, :, :1].any()


def dropped(x, shape, **layout):
    step = in_training(0.5, [ROWS] * CLIENTS, [TOKENS - 2] * CLIENTS)
    step.shape, step.layout = shape, Layout(**layout)
    return ClientDropout(0.5, step)(x)


def test_tokens_one_after_another_get_the_mask_of_their_rows():
    x = random(CLIENTS * ROWS, TOKENS, D_IN)
    rows = dropped(x, x.shape[:2])
    assert torch.equal(dropped(x.flatten(0, 1), x.shape[:2]), rows.flatten(0, 1))
    assert (rows[:, : TOKENS - 2] != 0).any((1, 2)).all() and not rows[:, TOKENS - 2 :].any()


def test_padding_on_the_left_moves_the_mask_to_the_right():
    x = random(CLIENTS * ROWS, TOKENS, D_IN).abs()
    left, right = dropped(x, x.shape[:2], padding="left"), dropped(x, x.shape[:2])
    assert not left[:, :2].any() and torch.equal(left[:, 2:] != 0, right[:, :-2] != 0)


def test_a_client_alone_drops_over_all_that_a_layer_sees():
    # Tokens first, or positions that all rows share: there are no rows to cut.
    x = random(TOKENS, ROWS, D_IN).abs()
    step = in_training(0.5, [ROWS], [TOKENS], clients=1)
    step.shape, step.layout = (ROWS, TOKENS), Layout(rows_first=False)
    kept = ClientDropout(0.5, step)(x) != 0
    assert 0.2 < kept.double().mean() < 0.8 and kept[ROWS:].any()
