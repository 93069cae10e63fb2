"""Tiny random models of many types: a run equals plain PEFT, before and after a step and once more when reloaded.

Each type is built once with random weights and without a head.  What cannot be right is refused, by name.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peerlora.config.task_kinds import task_kind
from peerlora.data.batches import collate
from peerlora.errors import ModelError
from peerlora.lora.attach import inputs_of
from peerlora.lora.peft_io import export_adapter
from peerlora.runtime.compose import compose
from peerlora.runtime.resources import DTYPES

SIZE = 44  # tokens of the tests' tokenizer
SMALL = dict(vocab_size=SIZE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
SMALL |= dict(max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
BOTH = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
BOTH |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24)
T5 = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
GPT = dict(n_embd=16, n_layer=2, n_head=2, n_positions=40)
KV = dict(num_key_value_heads=1)
RELATIVE = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0, position_biased_input=False)

ENCODERS = {
    "albert": dict(embedding_size=8),
    "bert": {},
    "big_bird": dict(attention_type="original_full"),
    "camembert": {},
    "convbert": dict(embedding_size=16),
    "deberta": RELATIVE | dict(max_relative_positions=8),
    "deberta-v2": RELATIVE | dict(position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm"),
    "distilbert": dict(dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "electra": dict(embedding_size=16),
    "esm": dict(mask_token_id=3),
    "flaubert": dict(emb_dim=16, n_layers=2, n_heads=2),
    "fnet": dict(tpu_short_seq_length=40),
    "ibert": {},
    "longformer": dict(attention_window=[4, 4], type_vocab_size=1),
    "luke": dict(entity_vocab_size=4, entity_emb_size=8),
    "mobilebert": dict(embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    "modernbert": dict(global_attn_every_n_layers=1, cls_token_id=1, sep_token_id=2),
    "mpnet": {},
    "nystromformer": dict(num_landmarks=4, segment_means_seq_len=40),
    "roberta": {},
    "roformer": dict(embedding_size=16),
    "squeezebert": {f"{part}_groups": 1 for part in "q k v post_attention intermediate output".split()}
    | dict(embedding_size=16),
    "xlm": dict(emb_dim=16, n_layers=2, n_heads=2),
    "xlm-roberta-xl": {},
    "xlnet": dict(d_model=16, n_layer=2, n_head=2, d_inner=24, d_head=8, max_position_embeddings=None),
    "xmod": dict(default_language="en_XX", languages=["en_XX"]),
    "reformer": dict(
        attn_layers=["local", "local"],
        axial_pos_shape=[4, 8],
        axial_pos_embds_dim=[8, 8],
        feed_forward_size=24,
        attention_head_size=8,
        max_position_embeddings=32,
        local_attn_chunk_length=4,
    ),
}
PAIRS = {
    "bart": BOTH,
    "blenderbot": BOTH,
    "led": BOTH | dict(attention_window=[4, 4], max_encoder_position_embeddings=40, max_decoder_position_embeddings=40),
    "m2m_100": BOTH,
    "marian": BOTH,
    "mvp": BOTH,
    "pegasus": BOTH,
    "bigbird_pegasus": BOTH | dict(attention_type="original_full"),
    "mbart": BOTH,
    "t5": T5,
    "umt5": T5,
}
DECODERS = {
    "bloom": GPT,
    "ctrl": GPT | dict(dff=24),
    "falcon": {},
    "gemma2": KV | dict(head_dim=8),
    "gemma3_text": KV | dict(head_dim=8),
    "gpt2": GPT,
    "gpt_neo": dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": {},
    "gptj": GPT | dict(rotary_dim=4),
    "llama": KV,
    "mamba": dict(state_size=4, expand=2, time_step_rank=4),
    "mistral": KV,
    "mixtral": KV | dict(num_local_experts=2),
    "mpt": dict(d_model=16, n_heads=2, n_layers=2, max_seq_len=40),
    "openai-gpt": GPT,
    "opt": dict(ffn_dim=24, word_embed_proj_dim=16),
    "persimmon": {},
    "phi": {},
    "phi3": KV,
    "qwen2_moe": KV
    | dict(num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts_per_tok=1),
    "qwen3": KV | dict(head_dim=8),
    "rwkv": dict(attention_hidden_size=16),
    "xglm": dict(d_model=16, num_layers=2, attention_heads=2, ffn_dim=24),
}
TYPES = ENCODERS | PAIRS | DECODERS
TARGETS = {"mamba": "[in_proj, x_proj]", "ibert": "[query]"}
"""Where all-linear is refused by PEFT."""
FP32 = {"led", "xlnet", "xglm", "qwen2_moe", "mixtral"}
"""Types that do not run in fp64."""
FAST = {"deberta-v2", "bart", "xlnet", "longformer"}
"""One of each kind of layout, head and padding."""
REFUSED = {
    "ibert": "QuantLinear.* is not supported",
    "nystromformer": "fails on rows of tokens",  # it takes rows of certain lengths only
    "reformer": "never uses",  # its layers compute their gradients by a way of their own
}
"""Classifiers that cannot be right."""


@pytest.fixture(scope="session")
def saved(tmp_path_factory, write_tokenizer):
    """Folder of a tiny model of a type, as it is saved for a task that has another head, or none."""
    import transformers as tf

    made = {}

    def get(name, auto):
        if (name, auto) not in made:
            folder = tmp_path_factory.mktemp(name)
            assert write_tokenizer(folder) == SIZE
            settings = {key: value for key, value in (SMALL | TYPES[name]).items() if value is not None}
            torch.manual_seed(1)
            model = getattr(tf, auto).from_config(tf.AutoConfig.for_model(name, **settings))
            for parameter in model.parameters():  # larger than usual, so that a wrong factor shows
                parameter.data.mul_(4) if parameter.ndim == 2 else None
            model.save_pretrained(folder)
            made[name, auto] = str(folder)
        return made[name, auto]

    return get


def loss(model, data, kind, rows, left):
    """Plain PEFT's mean loss over some rows in one batch, and in the way of its library."""
    batch = collate(data, [rows], 0, torch.float64, left)
    read = inputs_of(model.get_base_model())
    inputs = {name: value for name, value in batch.inputs.items() if name in read}
    if kind == "sequence-to-sequence":
        logits = model(**inputs, labels=batch.targets).logits.double()
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    logits = model(**inputs).logits.double()
    if kind == "classification":
        return F.cross_entropy(logits, batch.labels)
    targets = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)


def with_peft(federation, x, client, folder, seed):
    """What a user of plain PEFT has: a base of its own, whose head is another one, and the folder of the adapter."""
    import transformers
    from peft import PeftModel

    config, export = federation.config, federation.export
    folder = export_adapter(folder, x, client, federation.model, export)
    task = task_kind(config.task.kind)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected) keys.*")
        base = getattr(transformers, task.auto_model).from_pretrained(
            config.model.source, dtype=DTYPES[config.train.dtype], **task.model_options(federation.train_data.names)
        )
        base.config.pad_token_id, base.config.use_cache = 0, False
        return PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False).eval()


def with_noise(x):
    noise = torch.randn(x.flat.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return replace(x, flat=x.flat + 0.1 * noise.to(x.flat))


def composed(config, source, name, kind, *words):
    words = [*words, *([f"task.kind={kind}", "data.label=null"] if kind != "classification" else [])]
    words += [f"model.source={source}", "clients=3", "algorithm.name=local", "train.optimizer=sgd", "train.lr=1.0"]
    words += [f"adapter.targets={TARGETS.get(name, 'all-linear')}", f"train.dtype={'fp32' if name in FP32 else 'fp64'}"]
    return compose(config("bert", *words, "train.local_steps=1", "train.rounds=1"))


def assert_equal_to_peft(federation, kind, folder):
    """One local step of the middle client of three, by hand and here."""
    learner, data, client, lr = federation.learner, federation.train_data, 1, federation.config.train.lr
    tolerance = 1e-7 if federation.start.flat.dtype == torch.float64 else 2e-5
    left = federation.model.step.layout.padding == "left"
    start = with_noise(federation.start)
    plain = with_peft(federation, start, client, folder / "start", seed=5)
    before = loss(plain, data, kind, learner.shards.rows(client, 0, 1)[0], left)
    places = ["lora_", *(f"{head}.modules_to_save" for head in federation.model.targets.heads)]
    trained = [value for name, value in plain.named_parameters() if any(place in name for place in places)]
    for parameter, gradient in zip(trained, torch.autograd.grad(before, trained), strict=True):
        parameter.data.sub_(lr * gradient)
    with learner.round(0) as stats:
        x = learner.fit(start, "AB")
    assert float(stats.losses[client]) == pytest.approx(before.item(), rel=tolerance)
    few = np.arange(min(6, len(federation.eval_data)))
    rows = federation.eval_data.take(few)
    after = learner.evaluate(x, rows, len(few)).loss[client]
    assert abs(after - learner.evaluate(start, rows, len(few)).loss[client]) > 1e-5, "nothing was learned"
    again = with_peft(federation, x, client, folder / "end", seed=6)
    with torch.no_grad():
        for model in (plain, again):
            assert loss(model, rows, kind, few, left).item() == pytest.approx(after, rel=tolerance)


def cases(kind, fast):
    """Every type that has a class for this kind of task; the slow ones are marked so."""
    import transformers as tf

    known = getattr(tf, task_kind(kind).auto_model)._model_mapping._model_mapping
    for name in TYPES:
        if name in known and not (name == "reformer" and kind == "causal-lm"):  # it has to be told that it is one
            yield pytest.param(name, marks=[] if name in fast else [pytest.mark.slow])


@pytest.mark.parametrize("name", [*cases("classification", FAST)])
def test_a_classifier_equals_plain_peft_or_is_refused(config, saved, name, tmp_path):
    source = saved(name, "AutoModel")
    if name in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[name]):
            composed(config, source, name, "classification")
    else:
        assert_equal_to_peft(composed(config, source, name, "classification"), "classification", tmp_path)


@pytest.mark.parametrize("name", [*cases("causal-lm", FAST)])
def test_a_language_model_equals_plain_peft_or_is_refused(config, saved, name, tmp_path):
    source = saved(name, "AutoModelForCausalLM")
    if name in ENCODERS:  # classes for language models exist, and see the tokens to predict
        with pytest.raises(ModelError, match="sees the tokens that it is to predict"):
            composed(config, source, name, "causal-lm")
    else:
        assert_equal_to_peft(composed(config, source, name, "causal-lm"), "causal-lm", tmp_path)


@pytest.mark.parametrize("name", [*cases("sequence-to-sequence", {"led", "marian"})])
def test_an_encoder_with_a_decoder_equals_plain_peft(config, saved, pairs, name, tmp_path):
    source = saved(name, "AutoModelForSeq2SeqLM")
    federation = composed(config, source, name, "sequence-to-sequence", f"data.train=jsonl:{pairs}")
    assert_equal_to_peft(federation, "sequence-to-sequence", tmp_path)
