"""Decoders without padding against their own padded forward: logits, rounds, rows' gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import others_slow
from peerlora.data.batches import collate
from peerlora.runtime.compose import compose
from peerlora.train.kernels.attention import attend, attend_long
from peerlora.train.kernels.packed_decoder import _FAMILIES, PackedDecoder
from peerlora.train.kernels.packing import TokenPacking

SMALL = dict(vocab_size=44, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(intermediate_size=24, max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TYPES = {"SmolLM3": "smollm3", "Phi3": "phi3"}
MORE = {
    "Gemma": dict(head_dim=8),
    "Mistral": dict(sliding_window=40, head_dim=4),
    "Qwen3": dict(head_dim=8),
    "SmolLM3": dict(no_rope_layers=[1, 0], use_sliding_window=False, layer_types=["full_attention"] * 2),
}
EVERY_LINEAR = "adapter.targets=[q_proj, k_proj, v_proj, o_proj, up_proj, gate_proj, down_proj]"
CAUSAL = ["task.kind=causal-lm", "data.label=null", "partition.kind=iid"]


@pytest.fixture(scope="session")
def decoder(tmp_path_factory, write_tokenizer):
    """Folder of a tiny decoder of a family."""
    import transformers as tf

    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            write_tokenizer(folder)
            kind = TYPES.get(family, family.lower())
            torch.manual_seed(1)
            model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(kind, **(SMALL | MORE.get(family, {}))))
            for parameter in model.parameters():  # larger than usual, so that a wrong factor shows
                parameter.data.mul_(4) if parameter.ndim == 2 else None
            model.save_pretrained(folder)
            made[family] = str(folder)
        return made[family]

    return get


@pytest.mark.parametrize("family", others_slow(_FAMILIES, ["Llama", "Mistral", "Qwen3"]))
def test_every_family_gives_the_logits_of_its_padded_forward(config, decoder, family):
    federation = compose(
        config(
            "llama",
            f"model.source={decoder(family)}",
            *CAUSAL,
            "clients=2",
            "topology=complete",
            "adapter.targets=all-linear",
        )
    )
    model, x = federation.model, federation.start
    assert isinstance(model.forward, PackedDecoder), federation.paths
    torch.manual_seed(0)
    x.flat.normal_(std=0.3)
    model.bind_adapters(x)
    real = torch.arange(9) < torch.tensor([3, 9, 6, 4, 1, 9])[:, None]
    inputs = {"input_ids": torch.randint(4, 44, real.shape) * real, "attention_mask": real.long()}
    with torch.no_grad():
        packed, padded = model(inputs), model.plain(inputs)
    assert packed.shape == padded.shape and padded.abs().max() > 0.1
    assert torch.allclose(packed[real], padded[real], rtol=1e-9, atol=1e-9)
    assert model.step.packed is None and model.base.config._attn_implementation != "peerlora-packed"


@pytest.mark.parametrize(
    "words",
    others_slow(
        [
            [],
            [EVERY_LINEAR],
            ["adapter.dropout=0.3"],
            ["train.batch=[1, 3, 4, 2]"],
            ["train.batch=[1, 3, 4, 2]", "adapter.dropout=0.3", EVERY_LINEAR],
            ["adapter.rank=[1, 3, 2, 3]", "algorithm.name=local"],
            ["data.max_length=5"],
            ["train.accumulate=2"],
        ],
        [0, 4],
    ),
    ids=lambda words: " ".join(words) or "default",
)
def test_rounds_are_those_of_the_padded_forward(config, words):
    found = []
    for more in ((), ("train.fast=false",)):
        federation = compose(config("llama", *CAUSAL, *words, *more))
        x, losses = federation.start, []
        for t, train in enumerate(("AB", "B", "A")):
            with federation.learner.round(t) as trained:
                x = federation.learner.fit(x, train)
                losses.append(trained.losses)
        scores = federation.learner.evaluate(x, federation.eval_data, 5)
        found.append((federation, x.flat, torch.stack(losses), scores))
    (fast, x, losses, scores), (plain, y, expected, others) = found
    assert isinstance(fast.model.forward, PackedDecoder) and plain.model.forward == plain.model.plain
    assert float((y - plain.start.flat).abs().max()) > 1e-3, "nothing was trained"
    assert float((x - y).abs().max()) < 1e-9 and float((losses - expected).abs().max()) < 1e-10
    assert np.abs(scores.loss - others.loss).max() < 1e-10


@pytest.mark.parametrize("task", ["chat", "causal-lm"])
def test_private_rounds_are_those_of_the_padded_forward(config, chats, task):
    """Every row's gradient is clipped by itself, and the noise is the same."""
    words = ["privacy={epsilon: 8}", "train.batch=3", "algorithm.name=local"]
    data = [f"data.train=jsonl:{chats}"] if task == "chat" else []
    found = []
    for fast in ("true", "false"):
        given = [*CAUSAL, f"task.kind={task}", *data, *words, f"train.fast={fast}"]
        federation = compose(config("llama", *given))
        with federation.learner.round(0):
            found.append(federation.learner.fit(federation.start, "AB").flat)
    assert float((found[0] - federation.start.flat).abs().max()) > 1e-4
    assert float((found[0] - found[1]).abs().max()) < 1e-9


def test_rows_longer_than_a_sliding_window_take_the_models_own_forward(config, decoder, monkeypatch):
    federation = compose(
        config("llama", f"model.source={decoder('Mistral')}", *CAUSAL, "clients=2", "topology=complete")
    )
    federation.model.forward.window = 4
    batch = collate(federation.train_data, [np.array([0]), np.array([7])], 0, torch.float64)
    federation.model.bind_adapters(federation.start)
    assert batch.inputs["input_ids"].shape[1] > 4
    monkeypatch.setattr(TokenPacking, "of", None)  # calling it would raise
    with torch.no_grad():
        assert torch.equal(federation.model(batch.inputs), federation.model.plain(batch.inputs))


@pytest.mark.parametrize(
    ("kind", "words", "reason"),
    [
        ("gpt2", ("adapter.targets=[c_attn]",), "families Gemma"),
        ("llama", ("adapter.modules_to_save=[lm_head]",), "modules_to_save"),
        ("llama", ("train.fast=false",), "train.fast is false"),
    ],
)
def test_where_padding_stays_it_is_said(config, kind, words, reason):
    federation = compose(config(kind, *CAUSAL, *words))
    assert reason in federation.paths["packed tokens"] and federation.model.forward == federation.model.plain


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]))
def test_causal_attention_equals_torchs_on_padded_rows(lengths, sizes):
    heads, shared = sizes
    rows, longest = len(lengths), max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    packing = TokenPacking.of(mask, 1)
    torch.manual_seed(0)
    widths, real = (4 * heads, 4 * shared, 4 * shared), packing.tokens.padded
    leaves = [torch.randn(len(real), width, dtype=torch.float64, requires_grad=True) for width in widths]
    g = torch.randn(len(real), widths[0], dtype=torch.float64)
    mine = attend(*leaves, packing, heads, shared=shared, causal=True, scale=0.3)
    by_kernel = attend_long(*leaves, packing, heads, shared, 0.3)
    assert torch.allclose(by_kernel, mine, atol=1e-12)
    of_kernel = torch.autograd.grad(by_kernel, leaves, g)
    padded = []
    for leaf, width in zip(leaves, widths, strict=True):
        full = torch.zeros(rows * longest, width, dtype=torch.float64).index_put((real,), leaf)
        padded.append(full.view(rows, longest, width // 4, 4).transpose(1, 2))
    theirs = torch.nn.functional.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=True, scale=0.3)
    theirs = theirs.transpose(1, 2).reshape(rows * longest, -1)[real]
    assert torch.allclose(mine, theirs, atol=1e-12)
    ours = torch.autograd.grad(mine, leaves, g)
    for one, kernel, other in zip(ours, of_kernel, torch.autograd.grad(theirs, leaves, g), strict=True):
        assert torch.allclose(one, other, atol=1e-12) and torch.allclose(kernel, other, atol=1e-12)


def test_long_rows_keep_no_scores_and_train_alike(config, monkeypatch):
    """What a step keeps for backward grows with the tokens, not with their square."""
    found, kept = [], []
    for short in (256, 0):
        monkeypatch.setattr("peerlora.train.kernels.packed_decoder._SHORT", short)
        federation = compose(config("llama", *CAUSAL, EVERY_LINEAR))
        saved = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.add(x.shape) or x, lambda x: x):
            with federation.learner.round(0):
                found.append(federation.learner.fit(federation.start, "AB").flat)
        kept.append(saved)
    assert float((found[0] - federation.start.flat).abs().max()) > 1e-4
    assert float((found[0] - found[1]).abs().max()) < 1e-9
    squares = [{shape for shape in own if len(shape) >= 3 and shape[-1] == shape[-2] > 1} for own in kept]
    assert squares[0] and not squares[1]
