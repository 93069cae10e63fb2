"""A backward pass that is cut short: what it still trains, what it leaves alone, and what it saves."""

from dataclasses import replace

import pytest
import torch

from peerlora.lora.layer_order import by_column, depth_of, reached_layers
from peerlora.runtime.compose import compose
from peerlora.train.backward_depth import BackwardDepth
from peerlora.train.base import LocalPlan
from peerlora.train.kernels.packed_encoder import PackedEncoder

SGD = ("train.optimizer=sgd", "train.lr=0.1", "train.local_steps=1")
PATHS = pytest.mark.parametrize("fast", ["true", "false"])


def built(config, *words, kind="bert"):
    federation = compose(config(kind, *words))
    x = federation.start
    generator = torch.Generator().manual_seed(5)
    noise = 0.1 * torch.randn(x.flat.shape, generator=generator, dtype=x.flat.dtype)
    return federation, replace(x, flat=x.flat + noise)


def reach(depth, layers=3, factor=None, last_only=False):
    depth = torch.tensor(depth)
    ones = torch.ones(len(depth), layers, dtype=torch.float64)
    return BackwardDepth(depth, ones if factor is None else factor.expand(len(depth), -1), last_only)


@PATHS
@pytest.mark.parametrize("kept", ["round", "phase", "keep"])
def test_reaching_everything_is_no_cut_to_the_bit(config, fast, kept):
    words = (f"train.fast={fast}", f"train.optimizer_state={kept}", "train.weight_decay=0.1")
    plain, x = built(config, *words)
    cut, _ = built(config, *words)
    assert depth_of(x.spec) == 3
    for t, train in enumerate(("AB", "B", "A")):
        with plain.learner.round(t) as fully, cut.learner.round(t) as deeply:
            expected, found = plain.learner.fit(x, train), cut.learner.fit(x, LocalPlan(train, depth=reach([3] * 4)))
        assert torch.equal(found.flat, expected.flat) and torch.equal(deeply.losses, fully.losses)
        x = expected


@PATHS
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_reached_layers_get_the_full_passes_step_and_the_rest_is_held_to_the_bit(config, fast, kind):
    federation, x = built(config, *SGD, f"train.fast={fast}", kind=kind)
    full = federation.learner.fit(x, "AB").flat
    depth = torch.tensor([0, 1, 2, 3])
    with federation.learner.round(0) as trained:
        found = federation.learner.fit(x, LocalPlan("AB", depth=reach(depth.tolist()))).flat
    reached = by_column(x.spec, reached_layers(depth, 3))
    assert torch.equal(found[~reached], x.flat[~reached])
    assert float((found - full)[reached].abs().max()) < 1e-12
    assert float((full - x.flat)[2:].abs().max()) > 1e-5
    assert trained.losses.isnan().tolist() == [True, False, False, False]


def test_the_active_factor_and_the_reached_layers_intersect(config):
    federation, x = built(config, *SGD)
    found = federation.learner.fit(x, LocalPlan("B", depth=reach([2] * 4)))
    assert torch.equal(found.select("A").flat, x.select("A").flat)
    changed = {name for name, B in found.B.items() if not torch.equal(B, x.B[name])}
    assert changed and all(".layer.1." in name for name in changed)


@pytest.mark.parametrize("block", ["null", "1", "3"])
def test_neither_other_depths_nor_graphs_change_a_client(config, block):
    federation, x = built(config, f"train.block={block}", "train.local_steps=3", "adapter.dropout=0.2")
    mixed = federation.learner.fit(x, LocalPlan("AB", depth=reach([2, 3, 2, 1]))).flat
    for client, depth in enumerate([2, 3, 2, 1]):
        alone = federation.learner.fit(x, LocalPlan("AB", depth=reach([depth] * 4))).flat
        assert float((alone[client] - mixed[client]).abs().max()) < 1e-12


def test_absent_clients_stay_out_of_every_group(config):
    federation, x = built(config)
    with federation.learner.round(0, clients=[1, 3]):
        found = federation.learner.fit(x, LocalPlan("AB", depth=reach([3, 3, 3, 1]))).flat
    assert [torch.equal(a, b) for a, b in zip(found, x.flat, strict=True)] == [True, False, True, False]


def test_moments_of_what_was_not_reached_are_held(config):
    words = ("train.optimizer_state=keep", "train.weight_decay=0.1")
    federation, x = built(config, *words)
    learner = federation.learner
    x = learner.fit(x, LocalPlan("AB", depth=reach([3] * 4)))
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    assert {"steps.A:2", "steps.B:3", "steps.head:1"} < set(before)
    with learner.round(1):
        found = learner.fit(x, LocalPlan("AB", depth=reach([2] * 4)))
    lowest = ~by_column(x.spec, reached_layers(torch.tensor([2]), 3))[0]
    after = learner.state_dict()
    for name in ("first", "second"):
        assert torch.equal(after[name][:, lowest], before[name][:, lowest])
        assert not torch.equal(after[name][:, ~lowest], before[name][:, ~lowest])
    assert torch.equal(found.flat[:, lowest], x.flat[:, lowest])
    assert after["steps.A:3"].tolist() == [2] * 4 and after["steps.A:2"].tolist() == [4] * 4


def test_a_layers_own_step_count_corrects_its_bias(config):
    """A layer that is reached for the first time takes AdamW's first step, whatever others did before."""
    words = ("train.optimizer_state=keep", "train.local_steps=1", "adapter.head=frozen")
    federation, x = built(config, *words)
    x = federation.learner.fit(x, LocalPlan("AB", depth=reach([1] * 4, 2)))
    with federation.learner.round(1):
        moved = federation.learner.fit(x, LocalPlan("AB", depth=reach([2] * 4, 2))).flat - x.flat
    lowest = ~by_column(x.spec, reached_layers(torch.tensor([1]), 2))[0]
    assert moved[:, lowest].abs().median() == pytest.approx(0.01, rel=1e-3)


def test_the_last_step_only_is_cut(config):
    federation, x = built(config, "train.local_steps=3", "adapter.dropout=0.2")
    with federation.learner.round(0) as uncut:
        full = federation.learner.fit(x, "AB").flat
    before_last = federation.learner.fit(x, LocalPlan("AB", depth=reach([0] * 4, last_only=True))).flat
    depth = torch.tensor([0, 1, 2, 3])
    with federation.learner.round(0) as trained:
        found = federation.learner.fit(x, LocalPlan("AB", depth=reach(depth.tolist(), last_only=True))).flat
    reached = by_column(x.spec, reached_layers(depth, 3))
    assert float((found - torch.where(reached, full, before_last)).abs().max()) < 1e-12
    assert float((before_last - full).abs().max()) > 1e-4
    assert float((trained.losses - uncut.losses)[1:].abs().max()) < 1e-12


@pytest.mark.parametrize("last", [False, True])
def test_the_factor_scales_what_the_cut_steps_moved(config, last):
    federation, x = built(config, "train.local_steps=3")
    depth, factor = [3, 2, 3, 1], torch.tensor([[1.0, 2.0, 4.0]]).double()
    plainly = federation.learner.fit(x, LocalPlan("AB", depth=reach(depth, last_only=last))).flat
    start = federation.learner.fit(x, LocalPlan("AB", depth=reach([0] * 4, last_only=last))).flat
    found = federation.learner.fit(x, LocalPlan("AB", depth=reach(depth, factor=factor, last_only=last))).flat
    expected = start + by_column(x.spec, factor) * (plainly - start)
    assert float((found - expected).abs().max()) < 1e-12
    ones = by_column(x.spec, factor)[0] == 1
    assert torch.equal(found[:, ones], plainly[:, ones])


@PATHS
def test_what_is_not_reached_is_not_in_the_graph(config, fast):
    """Tensors that autograd keeps for the backward pass: fewer with every layer that is cut."""
    federation, x = built(config, *SGD, f"train.fast={fast}")
    assert isinstance(federation.model.forward, PackedEncoder) == (fast == "true")
    kept = []
    for depth in (1, 2, 3):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            federation.learner.fit(x, LocalPlan("AB", depth=reach([depth] * 4)))
        kept.append(len(sizes))
    assert 0 < kept[0] < kept[1] / 3 and kept[1] < kept[2] / 1.3
