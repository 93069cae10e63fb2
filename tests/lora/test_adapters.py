from dataclasses import replace

import pytest
import torch

from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec, initial_adapters, mask_ranks
from peerlora.runtime.compose import compose

LAYERS = (LayerSpec("q", 4, 6), LayerSpec("v", 5, 3))
SPEC = AdapterSpec(LAYERS, rank=2, alpha=6.0, head=(("out.weight", (3, 2)), ("out.bias", (3,))))
# A: 2*4 + 2*5 = 18, B: 6*2 + 3*2 = 18, head: 6 + 3 = 9


def counted(spec=SPEC, clients=3):
    """Every number tells its place: client 0 holds 0, 1, 2, ..., client 1 goes on."""
    flat = torch.arange(clients * spec.parameters, dtype=torch.float64).view(clients, -1)
    return Adapters(spec, flat, torch.full((clients,), spec.rank))


def head_of(spec):
    return {name: torch.full(shape, 7.0) for name, shape in spec.head}


def begin(ranks, spec=SPEC, seed=0):
    return initial_adapters(spec, ranks, head_of(spec), torch.Generator().manual_seed(seed), torch.float64)


def test_the_buffer_holds_every_A_then_every_B_then_the_head():
    assert SPEC.parameters == 45
    assert [(slot.block, slot.name, slot.start, slot.stop) for slot in SPEC.slots] == [
        ("A", "q", 0, 8),
        ("A", "v", 8, 18),
        ("B", "q", 18, 30),
        ("B", "v", 30, 36),
        ("head", "out.weight", 36, 42),
        ("head", "out.bias", 42, 45),
    ]
    assert [SPEC.columns(block) for block in ("A", "B", "head")] == [slice(0, 18), slice(18, 36), slice(36, 45)]


def test_views_have_the_shapes_of_the_factors_in_row_major_order():
    x = counted()
    assert x.A["v"].shape == (3, 2, 5) and x.B["v"].shape == (3, 3, 2) and x.head["out.bias"].shape == (3, 3)
    assert x.A["v"][1].tolist() == [[53, 54, 55, 56, 57], [58, 59, 60, 61, 62]]
    assert x.B["v"][0].tolist() == [[30, 31], [32, 33], [34, 35]]
    assert x.head["out.bias"][2].tolist() == [132, 133, 134]


def test_views_share_the_memory_of_the_buffer():
    x = counted()
    for views in (x.A, x.B, x.head):
        for view in views.values():
            view.zero_()
    assert not x.flat.any()


def test_only_takes_a_copy_of_some_blocks():
    x = counted()
    part = x.select("B")
    assert torch.equal(part.flat, x.flat[:, 18:36]) and set(part.B) == {"q", "v"} and not part.A and not part.head
    part.flat.zero_()
    assert torch.equal(x.flat, counted().flat)
    assert torch.equal(x.select("A", "B").flat, x.flat[:, :36]) and torch.equal(
        x.select("head").head["out.bias"], x.head["out.bias"]
    )


@pytest.mark.parametrize("blocks", [("A",), ("B",), ("A", "B"), ("head",)])
def test_select_and_with_blocks_are_each_others_inverse(blocks):
    x, other = counted(), replace(counted(), flat=-1 - counted().flat)
    merged = x.with_blocks(other.select(*blocks))
    for name in ("A", "B", "head"):
        source = other if name in blocks else x
        assert torch.equal(merged.select(name).flat, source.select(name).flat)
    assert torch.equal(merged.with_blocks(x.select(*blocks)).flat, x.flat)
    assert torch.equal(x.flat, counted().flat), "with_blocks changed its own object"


def test_a_private_head_is_not_shared():
    private = replace(SPEC, private_head=True)
    assert SPEC.shared == slice(0, 45) and private.shared == slice(0, 36)
    assert replace(SPEC, head=(), private_head=True).shared == slice(0, 36)


def test_factors_taken_alone_are_still_shared_where_the_head_is_private():
    private = replace(SPEC, private_head=True)
    assert private.select("A", "B").shared == slice(0, 36)
    assert private.select("A").shared == slice(0, 18)
    assert private.select("head").shared == slice(0, 0)


def test_row_shapes_are_those_of_the_clients_own_rank():
    shapes = replace(SPEC, private_head=True).row_shapes(1)
    assert shapes == {"A:q": (1, 4), "A:v": (1, 5), "B:q": (6, 1), "B:v": (3, 1)}
    assert SPEC.row_shapes(2)["head:out.weight"] == (3, 2) and SPEC.row_shapes(2)["B:q"] == (6, 2)


def test_all_clients_start_with_the_same_A_with_B_zero_and_the_given_head():
    x = begin([2, 2, 2, 2])
    assert all(torch.equal(A, A[:1].expand_as(A)) and A.any() for A in x.A.values())
    assert not any(B.any() for B in x.B.values())
    assert all((head == 7).all() for head in x.head.values())


def test_A_is_drawn_from_the_seed_and_differs_between_layers():
    same = LAYERS[0], LayerSpec("k", 4, 6)
    x = begin([2], AdapterSpec(same, 2, 6.0))
    assert torch.equal(x.flat, begin([2], AdapterSpec(same, 2, 6.0)).flat)
    assert not torch.equal(x.flat, begin([2], AdapterSpec(same, 2, 6.0), seed=1).flat)
    assert not torch.equal(x.A["q"], x.A["k"])


def test_A_is_uniform_within_the_kaiming_bound_of_pefts_initialisation():
    # kaiming_uniform_(a=sqrt(5)): bound = sqrt(2 / (1 + 5)) * sqrt(3 / d_in) = 1 / sqrt(d_in)
    spec = AdapterSpec((LayerSpec("q", 100, 1),), rank=200, alpha=1.0)
    A = begin([200], spec).A["q"]
    assert A.abs().max() <= 0.1 and A.abs().max() > 0.0999
    assert float(A.var(correction=0)) == pytest.approx(0.01 / 3, rel=0.03) and abs(float(A.mean())) < 0.002


def test_a_smaller_rank_takes_the_first_rows_of_the_common_A_and_zeros_after_them():
    x, full = begin([1, 2]), begin([2, 2])
    assert torch.equal(x.A["q"][0, :1], full.A["q"][0, :1]) and not x.A["q"][0, 1:].any()
    assert torch.equal(x.flat[1], full.flat[1])
    assert x.scaling.tolist() == [6, 3] and not x.equal_ranks


def test_mask_ranks_zeroes_the_padding_of_both_factors_and_nothing_else():
    x = replace(counted(), flat=counted().flat + 1, ranks=torch.tensor([2, 1, 2]))
    masked = mask_ranks(x)
    assert torch.equal(masked.flat[0], x.flat[0]) and torch.equal(masked.flat[2], x.flat[2])
    assert not masked.A["v"][1, 1].any() and torch.equal(masked.A["v"][1, 0], x.A["v"][1, 0])
    assert not masked.B["v"][1, :, 1].any() and torch.equal(masked.B["v"][1, :, 0], x.B["v"][1, :, 0])
    assert torch.equal(masked.head["out.weight"], x.head["out.weight"])
    assert (x.flat > 0).all(), "mask_ranks changed its input"


def test_mean_is_the_average_over_clients_and_asks_for_equal_ranks():
    mean = counted().mean()
    assert mean.clients == 1 and torch.equal(mean.flat[0], counted().flat[1])
    with pytest.raises(AssertionError, match="no mean"):
        begin([1, 2]).mean()


def test_rows_keep_clients_and_their_ranks():
    x = begin([1, 2, 1])
    assert torch.equal(x.rows([2, 1]).flat, x.flat[[2, 1]]) and x.rows([2, 1]).ranks.tolist() == [1, 2]
    assert x.rows(slice(1, 2)).ranks.tolist() == [2]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_padding_stays_exactly_zero_through_training(config, optimizer):
    words = [
        "adapter.rank=[1, 3, 2, 3]",
        "train.weight_decay=0.1",
        f"train.optimizer={optimizer}",
        "train.momentum=0.9",
    ]
    federation = compose(config("bert", "algorithm.name=local", *words, "train.lr=0.3", "train.clip=1.0"))
    x = federation.start
    for t in range(3):
        with federation.learner.round(t):
            x = federation.learner.fit(x, "AB")
    assert torch.equal(mask_ranks(x).flat, x.flat)
    assert all((x.B[layer][1] != 0).any() for layer in x.B), "nothing was trained"
