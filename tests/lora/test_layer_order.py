import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlora.lora.adapters import AdapterSpec, LayerSpec
from peerlora.lora.layer_order import by_column, columns_reached, depth_of, layer_numbers, reached_layers

HEAD = (("classifier.weight", (2, 3)), ("classifier.bias", (2,)))


def spec(names, head=HEAD):
    return AdapterSpec(tuple(LayerSpec(name, 3, 2) for name in names), rank=1, alpha=1.0, head=head)


BLOCKS = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in range(3) for part in ("query", "value")]


def test_the_head_is_reached_first_then_the_last_block():
    assert layer_numbers(spec(BLOCKS)) == (4, 4, 3, 3, 2, 2) * 2 + (1, 1)
    assert layer_numbers(spec(BLOCKS, head=())) == (3, 3, 2, 2, 1, 1) * 2


def test_only_blocks_with_adapters_count():
    names = ["h.1.attn.c_attn", "h.11.attn.c_attn"]
    assert layer_numbers(spec(names, head=())) == (2, 1) * 2 and depth_of(spec(names)) == 3


def test_what_lies_outside_the_blocks_counts_with_its_neighbours():
    names = ["embeddings.projection", *BLOCKS, "bert.pooler.dense"]
    assert layer_numbers(spec(names)) == (4, 4, 4, 3, 3, 2, 2, 1) * 2 + (1, 1)
    assert layer_numbers(spec(names, head=())) == (4, 4, 4, 3, 3, 2, 2, 1) * 2


@given(st.integers(0, 5), st.booleans(), st.sampled_from([("A", "B", "head"), ("B", "head"), ("A",)]))
def test_what_is_reached_is_the_end_of_each_block(depth, by_layer, blocks):
    x = spec(BLOCKS)
    found = columns_reached(x, blocks, depth, by_layer)
    own = {column for part in found.values() for column in range(part.start, part.stop)}
    expected = {
        column
        for slot, number in zip(x.slots, layer_numbers(x), strict=True)
        if slot.block in blocks and number <= depth
        for column in range(slot.start, slot.stop)
    }
    assert own == expected and sum(part.stop - part.start for part in found.values()) == len(own)
    if not by_layer:
        assert all(found[block].stop == x.columns(block).stop for block in found)
    if depth >= depth_of(x) and not by_layer:
        assert found == {block: x.columns(block) for block in x.blocks if block in blocks}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_reached_layers_are_always_a_suffix_with_the_head(depths):
    reached = reached_layers(torch.tensor(depths), 4)
    assert reached.sum(1).tolist() == depths
    assert bool((reached[:, :-1] >= reached[:, 1:]).all())


def test_values_by_layer_become_values_by_column():
    x = spec(BLOCKS)
    columns = by_column(x, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))[0]
    for slot, number in zip(x.slots, layer_numbers(x), strict=True):
        assert columns[slot.start : slot.stop].unique().tolist() == [number]
    assert len(columns) == x.parameters


def test_layers_out_of_forward_order_are_a_bug():
    names = ["layer.0.a", "layer.1.a", "layer.0.b"]
    with pytest.raises(AssertionError, match="forward order"):
        columns_reached(spec(names), ("A",), 3, per_layer_moments=True)
