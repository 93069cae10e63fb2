"""What HetLoRA promises: weights by norm, zero-padding, and ranks that go when training no longer needs them."""

from dataclasses import replace

import pytest
import torch
from plain_products import Drift
from test_product_methods import GRAPHS, UNEQUAL, exchange, run, start

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.hetlora import norm_weighted_average, shrink_tail, tail_norm
from peerlora.exchange.schema import encoded_bytes
from peerlora.lora.adapters import mask_ranks
from peerlora.runtime.compose import compose

GRAPH_IDS = [graph.kind for graph in GRAPHS]


def trained(ranks=(4, 4, 4, 4), size=0.3):
    return Drift(range(4), size).fit(start(ranks), "AB")


def sizes(x):
    total = sum((x.B[n] @ A).square().sum((1, 2)) for n, A in x.A.items())
    return x.scaling * total.sqrt()


def with_equal_norms(x):
    x = replace(x, flat=x.flat.clone())
    x.flat[:, x.spec.columns("B")] /= sizes(x)[:, None]
    return x


@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
def test_equal_ranks_and_norms_average_plainly(graph):
    x, peers = with_equal_norms(trained()), exchange(graph)
    assert torch.allclose(peers.combine(x, norm_weighted_average).flat, peers.mix(x).flat, rtol=0, atol=1e-13)


def test_untrained_adapters_average_plainly_padding_included():
    x, peers = start(UNEQUAL), exchange(GRAPHS[0])
    expected = mask_ranks(replace(x, flat=peers.mix(x).flat))
    assert torch.allclose(peers.combine(x, norm_weighted_average).flat, expected.flat, rtol=0, atol=1e-14)
    assert not torch.allclose(expected.flat, x.flat), "the zeros of smaller clients count"


def test_without_tail_or_penalty_only_the_weights_differ_from_fedit():
    found = run(build_algorithm("hetlora", {"gamma": 1.0}), start(), exchange(GRAPHS[2]), 1)[0]
    x = Drift(range(4)).fit(start(), "AB")
    v = sizes(x) / sizes(x).sum()
    assert torch.allclose(found.flat, (v @ x.flat).expand(4, -1), rtol=0, atol=1e-13) and v.std() > 0.003


def test_by_hand_two_numbers_of_different_rank():
    # alpha 6, ranks 1 and 2: s = 6 and 3.  B A = 1 * 1 and 2 * 3, so norms 6 and 18, weights 1/4 and 3/4.
    x = start((1, 2, 2, 2))
    x = replace(x, flat=torch.zeros_like(x.flat))
    x.B["q"][0, 0, 0], x.A["q"][0, 0, 0], x.B["q"][1, 0, 0], x.A["q"][1, 0, 0] = 1, 1, 2, 3
    found = exchange(GRAPHS[2]).combine(x, norm_weighted_average)
    assert found.A["q"][:, 0, 0].tolist() == pytest.approx([2.5] * 4)
    # B in units of each receiver: (6 * 1 / 4 + 3 * 2 * 3 / 4) / s
    assert found.B["q"][:, 0, 0].tolist() == pytest.approx([6 / 6, 6 / 3, 6 / 3, 6 / 3])


def test_a_head_follows_the_same_weights():
    x = trained(UNEQUAL)
    found = exchange(GRAPHS[2]).combine(x, norm_weighted_average)
    v = sizes(x) / sizes(x).sum()
    assert torch.allclose(found.select("head").flat, (v @ x.select("head").flat).expand(4, -1), rtol=0, atol=1e-13)


# --- the tail


def test_the_ranks_without_tail():
    kept = build_algorithm("hetlora", {}).kept(torch.tensor([1, 2, 8, 100, 101]))
    assert kept.tolist() == [1, 1, 7, 99, 99]
    assert build_algorithm("hetlora", {"gamma": 0.58}).kept(torch.tensor([50])).tolist() == [29]
    assert build_algorithm("hetlora", {"smallest": 4}).kept(torch.tensor([2, 4, 5])).tolist() == [2, 4, 4]
    assert build_algorithm("hetlora", {"gamma": 1}).kept(torch.tensor([3])).tolist() == [3]


def test_by_hand_the_penalty_is_one_gradient_step_that_stops_at_zero():
    x = start()
    x = replace(x, flat=torch.zeros_like(x.flat))
    kept = torch.full((4,), 3)
    x.B["q"][:, :2, 3] = torch.tensor([3.0, 4.0], dtype=torch.float64)  # norm 5
    x.A["q"][:, 3, 0] = 2.0
    assert tail_norm(x, kept).tolist() == pytest.approx([10] * 4)
    found = shrink_tail(x, kept, 0.5)
    assert found.B["q"][0, :2, 3].tolist() == pytest.approx([3 * 0.8, 4 * 0.8])  # 5 - 0.5 * 2 = 4
    assert float(found.A["q"][0, 3, 0]) == 0  # 2 - 0.5 * 5 < 0


def test_the_penalty_is_the_gradient_of_the_tail_s_norm():
    x, kept, step = trained(), torch.tensor([3, 2, 1, 3]), 1e-3
    flat = x.flat.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tail_norm(replace(x, flat=flat), kept).sum(), flat)
    assert torch.allclose(shrink_tail(x, kept, step).flat, x.flat - step * gradient, rtol=0, atol=1e-12)
    assert torch.equal(shrink_tail(x, torch.full((4,), 4), step).flat, x.flat)


def test_only_a_tail_that_training_made_smaller_is_cut_and_the_rest_of_the_product_stays():
    before = trained()
    after = replace(before, flat=before.flat.clone())
    for B in after.B.values():
        B[:2, :, 2:] *= 0.9
        B[2:, :, 2:] *= 1.1
    cut = build_algorithm("hetlora", {"gamma": 0.6}).prune(before, after)
    assert cut.ranks.tolist() == [2, 2, 4, 4] and after.ranks.tolist() == [4] * 4
    assert torch.equal(cut.flat[2:], after.flat[2:])
    for layer, A in after.A.items():
        kept = 1.5 * after.B[layer][:2, :, :2] @ A[:2, :2]
        assert torch.allclose(3 * cut.B[layer][:2] @ cut.A[layer][:2], kept, rtol=0, atol=1e-13)
        assert not cut.A[layer][:2, 2:].any() and not cut.B[layer][:2, :, 2:].any()
    assert encoded_bytes(cut.message(0)) < encoded_bytes(cut.message(2))


def test_equal_tails_are_kept():
    x = trained()
    assert build_algorithm("hetlora", {}).prune(x, x).ranks.tolist() == [4] * 4


class Fading(Drift):
    """Everything shrinks in every round."""

    def fit(self, x, train):
        return replace(x, flat=0.9 * x.flat)


def test_ranks_fall_to_the_smallest_and_messages_with_them():
    peers = exchange(GRAPHS[0])
    states = run(build_algorithm("hetlora", {"smallest": 2}), trained((2, 3, 4, 4)), peers, 4, Fading(range(4)))
    assert [state.ranks.tolist() for state in states] == [[2, 2, 3, 3], [2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2]]
    assert peers.stats.bytes_per_edge == encoded_bytes(states[-1].message())


def test_ranks_that_fell_still_train_on_a_real_model(config):
    words = ["algorithm.name=hetlora", "algorithm.penalty=10.0", "adapter.rank=[3, 2, 3, 1]", "train.lr=0.02"]
    federation = compose(config("bert", *words))
    state = run(federation.algorithm, federation.start, federation.exchange, 4, federation.learner)[-1]
    assert state.ranks.sum() < 9 and state.flat.isfinite().all()
