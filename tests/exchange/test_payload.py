"""What one client sends of a payload, and what a receiver makes of it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from peerlora.exchange.payload import LEAVES, expected, message, stack_with_own, vectors, widest
from peerlora.exchange.schema import encoded_bytes
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec, mask_ranks
from peerlora.network.protocol.state_transfer import adopt, exportable, largest_state, state_schema
from peerlora.tree import leaves

SPEC = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 4, 3)), rank=3, alpha=4.0, head=(("out.weight", (3, 2)),))


def adapters(ranks=(3, 1, 2), spec=SPEC, seed=0):
    flat = torch.randn(len(ranks), spec.parameters, generator=torch.Generator().manual_seed(seed))
    return mask_ranks(Adapters(spec, flat, torch.tensor(ranks)))


def merged(x, columns=2):
    sums = {
        layer.name: (torch.randn(x.clients, layer.d_out, columns), torch.randn(x.clients, columns, layer.d_in))
        for layer in x.spec.layers
    }
    x = x.with_empty_merges()
    return replace(x, merged=x.merged.plus(sums))


def shapes(found):
    return {name: tuple(value.shape) for name, value in found.items()}


def test_values_have_the_names_shapes_and_bytes_of_the_message():
    payload = (merged(adapters()), {"z": torch.randn(3, 4), "n": torch.arange(3)})
    for row in range(3):
        found = vectors(payload, row)
        assert {name: (tuple(v.shape), v.dtype) for name, v in found.items()} == message(payload, row)
        body = save({name: value.contiguous() for name, value in found.items()})
        assert len(body) == encoded_bytes(message(payload, row))
    assert torch.equal(vectors(payload, 2)["A:q"], payload[0].A["q"][2, :2])


@pytest.mark.parametrize("private", [True, False])
def test_what_all_sent_comes_together_padded(private):
    x = adapters(spec=replace(SPEC, private_head=private))
    own = (x.rows([0]),)
    (found,) = stack_with_own(own, [vectors((x,), row) for row in range(3)])
    assert torch.equal(found.ranks, x.ranks)
    assert torch.equal(found.flat[:, x.spec.shared], x.flat[:, x.spec.shared])
    if private:
        assert (found.select("head").flat == x.select("head").flat[:1]).all()


def test_merged_parts_come_together_with_their_own_columns():
    x = merged(adapters((3, 3, 3)))
    left = x.merged.layers["q"].left
    left[1, :, 1] = 0
    payload = (x, x.merged)
    sent = [vectors(payload, row) for row in range(3)]
    assert sent[1]["left:q"].shape == (6, 1) and sent[0]["left:q"].shape == (6, 2)
    _, found = stack_with_own((x.rows([0]), x.merged.rows([0])), sent)
    assert torch.equal(found.layers["q"].weight()[2], x.merged.layers["q"].weight()[2])
    assert torch.allclose(found.layers["q"].weight()[1], left[1] @ x.merged.layers["q"].right[1])


def test_a_neighbour_may_have_another_rank_within_bounds():
    x = adapters()
    own = (x.rows([0]),)
    assert expected(own, shapes(vectors((x,), 1))) == message((x,), 1)
    huge = shapes(vectors((x,), 0)) | {"A:q": (9, 5)}
    assert expected(own, huge)["A:q"][0] == (3, 5)
    assert expected(own, {"A:q": (0, 5)})["A:q"][0] == (1, 5)
    assert expected(own, {})["A:q"][0] == (3, 5)
    assert expected((x.rows([0]), x.ranks[:1]), {})[""] == ((), torch.int64)


@pytest.mark.parametrize("payload", [(merged(adapters()), torch.randn(3, 4)), (adapters(),)])
def test_the_widest_message_is_that_of_the_largest_rank(payload):
    assert widest(payload) == message(payload, 0)
    assert widest(tuple(x[1:2] if isinstance(x, torch.Tensor) else x.rows([1]) for x in payload)) == widest(payload)


def test_named_leaves_have_the_paths_of_a_tree():
    x = adapters()
    assert set(leaves({"a": x, "b": (x.flat, 1)}, LEAVES)) == {".a", ".b.0"}


# --- states


def test_a_state_is_taken_over_but_for_what_the_method_never_exchanges():
    own, other = adapters((3,)), adapters((3,), seed=1)
    found = adopt(own, leaves(other), {"A"})
    assert torch.equal(found.A["q"], other.A["q"])
    assert torch.equal(found.B["q"], own.B["q"]) and torch.equal(found.select("head").flat, own.select("head").flat)
    state, sent = {"x": own, "mass": torch.ones(1)}, leaves({"x": other, "mass": torch.zeros(1)})
    whole = adopt(state, sent, {"A", "B", "head"})
    assert torch.equal(whole["x"].flat, other.flat) and whole["mass"] == 0


@pytest.mark.parametrize(
    ("blocks", "private"), [({"A"}, False), ({"A", "B", "head"}, True), ({"A", "B", "head"}, False)]
)
def test_what_the_method_never_exchanges_is_not_in_what_a_neighbour_may_have(blocks, private):
    x = adapters((3,), replace(SPEC, private_head=private))
    state = {"x": x, "dual": x.flat + 1, "scores": torch.ones(1, 7), "mass": torch.ones(1)}
    found = exportable(state, blocks, ("scores",))
    assert {name: (tuple(v.shape), v.dtype) for name, v in found.items()} == state_schema(state, {}, ("scores",))
    home = [name for name in ("A", "B", "head") if name not in blocks or (private and name == "head")]
    for name, own in ((".x.flat", x.flat), (".dual", x.flat + 1)):
        for block in ("A", "B", "head"):
            columns = x.spec.columns(block)
            assert torch.equal(found[name][:, columns], own[:, columns] * (block not in home))
    assert set(found) == {".x.flat", ".x.ranks", ".dual", ".mass"}
    own = {"x": replace(x, flat=x.flat * 2), "dual": x.flat * 3, "scores": torch.zeros(1, 5), "mass": torch.zeros(1)}
    taken = adopt(own, found, blocks, ("scores",))
    assert torch.equal(taken["scores"], own["scores"]) and taken["mass"] == 1
    for block in ("A", "B", "head"):
        columns, source = x.spec.columns(block), own if block in home else state
        assert torch.equal(taken["dual"][:, columns], source["dual"][:, columns])
        assert torch.equal(taken["x"].flat[:, columns], source["x"].flat[:, columns])


def test_a_private_head_and_another_rank_stay_at_home():
    spec = replace(SPEC, private_head=True)
    own, other = adapters((3,), spec), adapters((3,), spec, seed=1)
    assert torch.equal(adopt(own, leaves(other), {"A", "B", "head"}).select("head").flat, own.select("head").flat)
    assert adopt(own, leaves(adapters((2,), spec)), {"A", "B"}) is None


def test_a_state_may_have_merged_more_within_bounds():
    own, other = merged(adapters((3,)), 1), merged(adapters((3,), seed=1), 2)
    given = leaves(other)
    assert state_schema(own, shapes(given)) == {name: (tuple(v.shape), v.dtype) for name, v in given.items()}
    taken = adopt(own, given, {"A", "B", "head"})
    assert torch.equal(taken.merged.layers["q"].weight(), other.merged.layers["q"].weight())
    assert len(save({name: value.contiguous() for name, value in given.items()})) < largest_state(own)
    wide = {name: (1, 6, 10**6) if name.endswith("q.left") else shape for name, shape in shapes(given).items()}
    assert state_schema(own, wide)[".merged.layers.q.left"][0][2] <= 6
