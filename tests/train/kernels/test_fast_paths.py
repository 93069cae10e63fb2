"""Every speed path against its plain twin: the same losses, factors and scores, in fp64 to rounding."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import others_slow
from peerlora.data.batches import Origin, Shards
from peerlora.runtime import resources
from peerlora.runtime.compose import compose
from peerlora.train.graph_size import GraphSize
from peerlora.train.kernels import prefix_cache
from peerlora.train.kernels.attention import attend
from peerlora.train.kernels.image_encoder import ImageEncoder
from peerlora.train.kernels.packed_encoder import PackedEncoder
from peerlora.train.kernels.packing import TokenPacking

EVERY_LINEAR = "adapter.targets=[query, key, value, attention.output.dense, intermediate.dense, output.dense]"
UPPER = "adapter.targets='.*layer.1.attention.self.(query|value)'"


def trained(config, *schedule):
    """Final adapters, losses and scores of a few rounds."""
    federation = compose(config)
    x, losses = federation.start, []
    for t, train in enumerate(schedule or ("AB", "AB")):
        with federation.learner.round(t) as trained:
            x = federation.learner.fit(x, train)
            losses.append(trained.losses)
    scores = federation.learner.evaluate(x, federation.eval_data, 5)
    return federation, x.flat, torch.stack(losses), scores


@pytest.mark.parametrize("kind", others_slow(["bert", "roberta"], ["roberta"]))
@pytest.mark.parametrize(
    "words",
    [
        [],
        [EVERY_LINEAR],
        ["adapter.dropout=0.3"],
        [EVERY_LINEAR, "adapter.dropout=0.3", "model.dropout=0.2"],
        ["adapter.head=frozen"],
        ["train.batch=[1, 3, 4, 2]"],
        ["adapter.rank=[1, 3, 2, 3]", "algorithm.name=local"],
        ["data.max_length=5"],
        ["data.text=[text, other]", "data.max_length=24"],
        ["task.kind=regression", "data.label=score"],
        [UPPER],
        [UPPER, "adapter.dropout=0.3"],
    ],
    ids=lambda words: " ".join(words) or "default",
)
def test_packed_tokens_equal_the_padded_forward(config, kind, words):
    fast, x, losses, scores = trained(config(kind, *words))
    plain, y, expected, others = trained(config(kind, *words, "train.fast=false"))
    assert isinstance(fast.model.forward, PackedEncoder) and plain.model.forward == plain.model.plain
    assert float((y - plain.start.flat).abs().max()) > 1e-3, "nothing was trained"
    assert float((x - y).abs().max()) < 1e-9 and float((losses - expected).abs().max()) < 1e-10
    assert np.abs(scores.loss - others.loss).max() < 1e-10 and (scores.metric == others.metric).all()


@pytest.mark.parametrize("kind", others_slow(["bert", "roberta"], ["bert"]))
@pytest.mark.parametrize(
    "words",
    [[], [EVERY_LINEAR, "adapter.dropout=0.3", "model.dropout=0.2"], [UPPER], ["train.batch=[1, 3, 4, 2]"]],
    ids=lambda words: " ".join(words) or "default",
)
def test_packed_tokens_classify_words_as_the_padded_forward_does(config, tagged, kind, words):
    task = ["task.kind=token-classification", f"data.train=jsonl:{tagged}", "data.label=null"]
    fast, x, losses, scores = trained(config(kind, *task, *words))
    plain, y, expected, others = trained(config(kind, *task, *words, "train.fast=false"))
    assert isinstance(fast.model.forward, PackedEncoder) and plain.model.forward == plain.model.plain
    assert float((y - plain.start.flat).abs().max()) > 1e-3, "nothing was trained"
    assert float((x - y).abs().max()) < 1e-9 and float((losses - expected).abs().max()) < 1e-10
    assert np.abs(scores.loss - others.loss).max() < 1e-10 and (scores.metric == others.metric).all()


UPPER_OF_IMAGES = "adapter.targets=.*layers\\.1\\..*(q_proj|v_proj)"


@pytest.mark.parametrize("kind", others_slow(["vit", "deit"], ["vit"]))
@pytest.mark.parametrize(
    "words",
    [[], ["adapter.dropout=0.3"], ["train.batch=[1, 3, 4, 2]", "adapter.head=private"]],
    ids=lambda words: " ".join(words) or "default",
)
def test_frozen_blocks_computed_once_for_each_image_equal_the_models_own_forward(config, pictures, kind, words):
    task = ["task.kind=image-classification", f"data.train={pictures}", "train.rounds=8", UPPER_OF_IMAGES]
    fast, x, losses, scores = trained(config(kind, *task, *words))
    plain, y, expected, others = trained(config(kind, *task, *words, "train.fast=false"))
    assert isinstance(fast.model.forward, ImageEncoder) and plain.model.forward == plain.model.plain
    kept = list(fast.model.forward.prefix._kept.values())
    assert [each.data for each in kept] == [fast.train_data, fast.eval_data] and any(each.known.all() for each in kept)
    assert float((y - plain.start.flat).abs().max()) > 1e-3, "nothing was trained"
    assert float((x - y).abs().max()) < 1e-9 and float((losses - expected).abs().max()) < 1e-10
    assert np.abs(scores.loss - others.loss).max() < 1e-10 and (scores.metric == others.metric).all()


def test_paths_of_images_say_where_they_are_off(config, pictures):
    task = ["task.kind=image-classification", f"data.train={pictures}"]
    vit = compose(config("vit", *task, "train.dtype=fp32"))
    assert vit.paths["packed tokens"] == "images have no padding"
    assert vit.paths["frozen prefix"] == "the lowest block is adapted"
    assert vit.paths["packed weights"] == compose(config("bert", "train.dtype=fp32")).paths["packed weights"]
    assert "Swin" in str(compose(config("swin", *task)).paths["frozen prefix"])
    assert "model.dropout" in str(compose(config("vit", *task, UPPER_OF_IMAGES, "model.dropout=0.1")).paths)
    assert "modules_to_save" in str(
        compose(config("vit", *task, UPPER_OF_IMAGES, "adapter.modules_to_save=[fc1]")).paths
    )
    assert set(compose(config("vit", *task, "train.fast=false")).paths.values()) == {
        "train.fast is false",
        "images have no padding",
    }


def test_the_packed_weights_of_images_give_the_same_losses(config, pictures):
    task = ["task.kind=image-classification", f"data.train={pictures}", "train.dtype=fp32"]
    task += ["train.optimizer=sgd", "train.lr=0.1", "train.local_steps=1"]
    fast, x, losses, _ = trained(config("vit", *task))
    _, y, expected, _ = trained(config("vit", *task, "train.fast=false"))
    assert float((x - fast.start.flat).abs().max()) > 1e-2, "nothing was trained"
    assert float((losses - expected).abs().max()) < 1e-4 and float((x - y).abs().max()) < 1e-4


@pytest.mark.parametrize("words", [[], [UPPER_OF_IMAGES, "train.rounds=8"]])
def test_images_are_read_in_bf16_as_in_fp32_within_its_rounding(config, pictures, words):
    task = ["task.kind=image-classification", f"data.train={pictures}", *words]
    found = [compose(config("vit", *task, f"train.dtype={dtype}")) for dtype in ("fp32", "bf16")]
    one, other = (each.learner.logits(each.start, each.eval_data, 5) for each in found)
    assert np.abs(one).max() > 0.1 and 0 < np.abs(one - other).max() < 0.02


@pytest.mark.parametrize("schedule", [("B", "A"), ("A",)])
def test_packed_tokens_with_one_active_factor(config, schedule):
    _, x, _, _ = trained(config("bert"), "AB", *schedule)
    _, y, _, _ = trained(config("bert", "train.fast=false"), "AB", *schedule)
    assert float((x - y).abs().max()) < 1e-9


def test_paths_say_where_they_are_off(config):
    bert = compose(config("bert", "train.dtype=fp32")).paths
    assert bert["packed tokens"] is None and "lowest block" in str(bert["frozen prefix"])
    assert "Llama" in str(compose(config("llama")).paths["packed tokens"]), "a classifier"
    assert set(compose(config("bert", "train.fast=false")).paths.values()) == {"train.fast is false"}
    assert "float64" in str(compose(config("bert")).paths["packed weights"])
    assert "model.dropout" in str(compose(config("bert", UPPER, "model.dropout=0.1")).paths["frozen prefix"])


def test_the_frozen_prefix_is_computed_once_per_chunk_of_rows(config):
    federation = compose(config("bert", UPPER))
    encoder = federation.model.forward
    assert federation.paths["frozen prefix"] is None and encoder.prefix is not None and encoder.lowest == 1
    asked, compute = [], encoder.prefix.compute
    encoder.prefix.compute = lambda inputs: asked.append(1) or compute(inputs)
    for t in range(6):
        with federation.learner.round(t):
            federation.learner.fit(federation.start, "AB")
    shards = federation.learner.shards.shards
    assert 0 < len(asked) <= sum(-(-len(own) // prefix_cache._CHUNK) for own in shards)
    federation.learner.evaluate(federation.start, federation.eval_data, 7)
    first = len(asked)
    federation.learner.evaluate(federation.start, federation.eval_data, 3)
    assert len(asked) == first


def test_what_is_kept_does_not_depend_on_which_rows_were_asked_for_first(config):
    """So that a resumed run, whose cache is empty, finds the same bits."""
    one, other = (compose(config("bert", UPPER)).model.forward.prefix for _ in range(2))
    data = compose(config("bert", UPPER)).train_data
    rows = np.arange(len(data))
    whole = one(Origin(data, rows))
    for row in rows[::-1]:
        other(Origin(data, rows[[row]]))
    assert torch.equal(other(Origin(data, rows)), whole)


def test_rows_that_training_sees_once_are_not_kept(config):
    """Computed with their batch they take a quarter of the time that they take alone (docs/log.md)."""
    words = [UPPER, "train.rounds=1", "train.local_steps=1"]
    found = []
    for federation in (compose(config("bert", *words)), compose(config("bert", *words, "train.fast=false"))):
        assert sum(federation.config.batches) < len(federation.train_data)
        if federation.config.train.fast:
            federation.model.forward.prefix.compute = None  # calling it would raise
        with federation.learner.round(0):
            found.append(federation.learner.fit(federation.start, "AB").flat)
    assert float((found[0] - found[1]).abs().max()) < 1e-9


def test_a_peer_keeps_the_rows_that_the_simulation_keeps_of_it_and_no_others(config):
    """To the bit, and where one client's draws are more than its rows and fewer than those of the whole data."""
    words = [UPPER, "train.dtype=fp32"]
    whole = compose(config("bert", *words))
    draws = whole.config.train.rounds * whole.config.train.local_steps * whole.config.batches[0]
    assert len(whole.learner.shards.shards[0]) < draws < len(whole.train_data)
    with whole.learner.round(0):
        whole.learner.fit(whole.start, "AB")
    for client in range(whole.config.clients):
        peer = compose(config("bert", *words), clients=[client])
        with peer.learner.round(0):
            peer.learner.fit(peer.start, "AB")
        (all_kept,), (own_kept,) = (each.model.forward.prefix._kept.values() for each in (whole, peer))
        known = np.flatnonzero(own_kept.known[own_kept.chunk_of])
        own = peer.learner.shards.shards[0]
        assert 0 < len(known) and set(known.tolist()) <= set(own.tolist())
        tokens = prefix_cache._tokens(peer.train_data, known)
        assert all_kept.known[all_kept.chunk_of[known]].all()
        assert torch.equal(all_kept.hidden[tokens], own_kept.hidden[tokens])


def test_runs_that_share_what_is_kept_may_divide_the_rows_otherwise(config, monkeypatch):
    shared = resources.load_resources(config("bert"))
    cache = resources.BaseModelCache()
    shared = resources.RunResources(shared.train_data, shared.eval_data, shared.tokenizer, cache, share_prefix=True)
    found = []
    for words in (["clients=4"], ["clients=3"]):
        federation = compose(config("bert", UPPER, *words), resources=shared)
        with federation.learner.round(0):
            federation.learner.fit(federation.start, "AB")
        (kept,) = federation.model.forward.prefix._kept.values()
        found.append(kept.chunks)
    assert found[0] is found[1] and len(found[0]) == -(-len(shared.train_data) // prefix_cache._CHUNK)


def test_rows_too_many_to_keep_are_computed_anew(config, monkeypatch):
    cached, x, _, _ = trained(config("bert", UPPER))
    federation = compose(config("bert", UPPER))
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert not federation.model.forward.prefix.holds(federation.train_data)
    y = federation.start
    for t in (0, 1):
        with federation.learner.round(t):
            y = federation.learner.fit(y, "AB")
    assert float((x - y.flat).abs().max()) < 1e-9


def ragged(lengths, width):
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 3), st.booleans())
def test_attention_equals_torchs_on_padded_rows(lengths, heads, pooled):
    width, rows, size = 4 * heads, len(lengths), max(lengths)
    mask = ragged(lengths, size)
    packing = TokenPacking.of(mask, 1)
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(rows, size, width, dtype=torch.float64) for _ in range(4))
    leaves = [x.flatten(0, 1)[packing.tokens.padded].clone().requires_grad_() for x in (q, k, v)]
    chosen = packing.first if pooled else torch.arange(len(leaves[0]))
    mine = attend(leaves[0][chosen], leaves[1], leaves[2], packing, heads)
    padded = []
    for leaf in leaves:
        full = torch.zeros(rows * size, width, dtype=torch.float64).index_put((packing.tokens.padded,), leaf)
        padded.append(full.view(rows, size, heads, -1).transpose(1, 2))
    out = torch.nn.functional.scaled_dot_product_attention(*padded, attn_mask=mask[:, None, None].bool())
    plain = out.transpose(1, 2).reshape(rows * size, width)[packing.tokens.padded][chosen]
    assert torch.allclose(mine, plain, atol=1e-12)
    weight = g.flatten(0, 1)[packing.tokens.padded][chosen]
    for found, expected in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (mine, plain)), strict=True):
        assert torch.allclose(found, expected, atol=1e-11)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=6, max_size=6), st.sampled_from([1, 2, 3, 6]))
def test_rectangles_by_client_lose_and_invent_nothing(lengths, clients):
    packing = TokenPacking.of(ragged(lengths, max(lengths)), clients)
    x = torch.arange(1.0, sum(lengths) + 1)[:, None]
    for places, values in ((packing.tokens, x), (packing.pooled, x[packing.first])):
        rectangle = places.only_tokens(places.by_client(values))
        assert torch.equal(places.packed(rectangle), values)
        assert float(rectangle.sum()) == float(values.sum())
        own = places.padded // (len(lengths) // clients * max(lengths))
        for client in range(clients):
            assert set(rectangle[client].flatten().tolist()) - {0.0} == set(values[own == client].flatten().tolist())


def test_a_graph_holds_what_its_tokens_allow():
    lengths = np.array([10] * 8 + [100] * 2)
    assert GraphSize(280, padded=False).clients(2, lengths) == 5  # 28 tokens a row on average
    assert GraphSize(400, padded=True).clients(2, lengths) == 2  # padded to about 100
    assert GraphSize(1, padded=True).clients(64, lengths) == 1
    roomy, tight = (GraphSize.of_gpu(free, 24, 1024, 2) for free in (100 << 30, 50 << 30))
    assert 1.9 < roomy.tokens / tight.tokens < 2.1 and 50_000 < roomy.tokens < 100_000
    assert GraphSize.of_gpu(100 << 30, 24, 1024, 2, vocabulary=50_000).tokens < roomy.tokens / 1.5


def test_batches_by_length_keep_each_rounds_rows(config):
    federation = compose(config("bert", "train.local_steps=3"))
    shuffled = federation.learner.shards
    sorted_ = Shards(shuffled.data, shuffled.shards, shuffled.batches, shuffled.clients, shuffled.seed, by_length=True)
    orders, spread = set(), Counter()
    for t in range(6):
        for client in range(4):
            plain, ours = shuffled.rows(client, t, 3), sorted_.rows(client, t, 3)
            assert Counter(np.concatenate(plain).tolist()) == Counter(np.concatenate(ours).tolist())
            longest = [int(shuffled.data.lengths[rows].max()) for rows in ours]
            spread["plain"] += sum(int(shuffled.data.lengths[rows].max()) for rows in plain)
            spread["ours"] += sum(longest)
            if len(set(longest)) == 3:
                orders.add((t, tuple(np.argsort(longest))))
    assert spread["ours"] < spread["plain"]
    assert len({order for t, order in orders}) > 1, "always in the same order"
    by_round = {t: {order for u, order in orders if u == t} for t, _ in orders}
    assert all(len(found) == 1 for found in by_round.values()), "clients differ in the order of lengths"


def test_batches_by_length_reach_the_run(config):
    assert compose(config("bert", "train.batches=by-length")).learner.shards.by_length


TASKS = {
    "classification": [],
    "regression": ["task.kind=regression", "data.label=score"],
    "causal-lm": ["task.kind=causal-lm", "data.label=null"],
}


@pytest.mark.parametrize(
    ("kind", "task"),
    others_slow(
        [("bert", "classification"), ("roberta", "regression"), ("llama", "causal-lm"), ("llama", "classification")],
        [],
    ),
)
def test_bf16_learns_like_fp32(config, kind, task):
    """Not the same numbers: the same learning curve."""
    curves = {}
    for dtype in ("fp32", "bf16"):
        words = [*TASKS[task], f"train.dtype={dtype}", "train.lr=0.005", "train.local_steps=8"]
        federation, x, losses, _ = trained(config(kind, *words), *["AB"] * 8)
        assert x.dtype == torch.float32 and federation.start.flat.dtype == torch.float32
        curves[dtype] = losses.mean(1)
    fell = float(curves["fp32"][0] - curves["fp32"][-1])
    assert fell > 0.1, "nothing was learned"
    assert float((curves["bf16"] - curves["fp32"]).abs().max()) < 0.15 * fell + 0.02


def test_bf16_keeps_heads_in_fp32(config):
    federation = compose(config("roberta", "train.dtype=bf16", "adapter.head=frozen"))
    kept = {name: value.dtype for name, value in federation.model.base.named_parameters()}
    heads = {dtype for name, dtype in kept.items() if name.startswith("classifier")}
    assert heads == {torch.float32} and kept["roberta.embeddings.word_embeddings.weight"] == torch.bfloat16


class FourBits(torch.nn.Linear):
    """Stands for a linear layer that computes in a way of its own."""


def test_a_model_with_layers_of_another_kind_takes_the_padded_path(config, monkeypatch):
    load = resources.load_base

    def with_another_kind(*words):
        base = load(*words)
        query = base.model.bert.encoder.layer[0].attention.self.query
        query.__class__ = FourBits
        return base

    monkeypatch.setattr(resources, "load_base", with_another_kind)
    fast, x, losses, _ = trained(config("bert"))
    assert fast.paths["packed tokens"] == "packed tokens need plain linear layers, the model has FourBits there"
    _, y, expected, _ = trained(config("bert", "train.fast=false"))
    assert float((x - y).abs().max()) < 1e-9 and float((losses - expected).abs().max()) < 1e-10
