"""Layers of the body that train in full, against PEFT's ``modules_to_save``."""

import json

import pytest
import torch
from peft_folders import export, trained
from test_adapter_init import CAUSAL, assert_same_logits

from peerlora.config.loading import load_config
from peerlora.errors import ConfigError, ModelError
from peerlora.lora.layer import StackedEmbedding, StackedHead
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import simulate

WORDS = ("adapter.modules_to_save=[word_embeddings]",)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", WORDS),
        ("bert", ("adapter.modules_to_save=[word_embeddings, output.dense]", "adapter.head=frozen")),
        ("bert", ("adapter.modules_to_save=[position_embeddings]",)),  # rows share it: one client per graph
        ("llama", ("adapter.modules_to_save=[embed_tokens, lm_head]", *CAUSAL)),
    ],
)
def test_saved_modules_give_our_logits_in_peft(config, tmp_path, kind, words):
    federation = compose(config(kind, *words))
    x = trained(federation)
    export(federation, tmp_path, x, 1)
    assert_same_logits(federation, x, tmp_path)
    assert "dense" in str(words) or federation.paths["packed tokens"] is not None
    written = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert set(federation.model.targets.saved) <= set(written) and federation.model.targets.saved


def test_a_table_per_client_is_what_each_would_have_alone():
    torch.manual_seed(0)
    base = torch.nn.Embedding(7, 3, padding_idx=2)
    from peerlora.lora.layer import Step

    stacked = StackedEmbedding(base, Step(clients=2))
    stacked.weight = torch.randn(2, 7, 3, requires_grad=True)
    ids = torch.tensor([[0, 2], [3, 3], [6, 1], [2, 2]])
    found = stacked(ids)
    (gradient,) = torch.autograd.grad(found.square().sum(), stacked.weight)
    for client, rows in enumerate(ids.chunk(2)):
        table = torch.nn.Embedding(7, 3, padding_idx=2)
        table.weight.data = stacked.weight[client].detach().clone()
        assert torch.equal(found.chunk(2)[client], table(rows))
        table(rows).square().sum().backward()
        assert torch.allclose(gradient[client], table.weight.grad)


def test_clients_train_their_tables_as_each_would_alone(config):
    words = [*WORDS, "algorithm.name=local", "train.local_steps=2"]
    together = compose(config("bert", *words))
    one_by_one = compose(config("bert", *words, "train.block=1"))
    assert isinstance(together.model.base.get_submodule("bert.embeddings.word_embeddings"), StackedEmbedding)
    results = []
    for federation in (together, one_by_one):
        with federation.learner.round(0):
            results.append(federation.learner.fit(federation.start, "AB"))
    assert torch.allclose(results[0].flat, results[1].flat, atol=1e-10)
    name = "bert.embeddings.word_embeddings.weight"
    moved = results[0].head[name] - together.start.head[name]
    assert bool(moved.flatten(1).any(1).all()) and not torch.equal(moved[0], moved[1])


def test_a_run_mixes_them_and_its_folder_is_a_start(config, tmp_path, no_reports):
    settings = config("bert", *WORDS, "topology=complete", "train.rounds=1", "eval.every=1")
    result = simulate(settings, tmp_path / "run", report=False)
    tables = result.adapters.head["bert.embeddings.word_embeddings.weight"]
    assert torch.allclose(tables, tables[:1].expand_as(tables))
    start = compose(config("bert", *WORDS, f"adapter.start={result.run / 'adapters' / 'client-00'}")).start
    assert torch.equal(start.flat[0], result.adapters.flat[0])
    with pytest.raises(ModelError, match="name the module in adapter.modules_to_save"):
        compose(config("bert", f"adapter.start={result.run / 'adapters' / 'client-00'}"))


@pytest.mark.parametrize("ending", ["classifier.dense", "out_proj", "classifier"])
def test_what_is_of_a_head_trains_with_it(config, ending):
    """RoBERTa's head holds two linear layers, which train once, whoever names them."""
    named = compose(config("roberta", f"adapter.modules_to_save=[{ending}]"))
    plain = compose(config("roberta"))
    assert named.model.targets == plain.model.targets and set(named.start.head) == set(plain.start.head)
    trained = []
    for federation in (named, plain):
        with federation.learner.round(0):
            trained.append(federation.learner.fit(federation.start, "AB").flat)
    assert torch.equal(*trained)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", ["adapter.modules_to_save=[output.dense]"]),
        ("bert", ["adapter.modules_to_save=[intermediate.dense]", "adapter.head=frozen"]),
        ("roberta", ["adapter.modules_to_save=[dense]"]),
        ("llama", ["adapter.modules_to_save=[o_proj]", *CAUSAL]),
        ("llama", ["adapter.modules_to_save=[mlp.down_proj, embed_tokens]"]),
    ],
)
def test_in_bf16_a_linear_layer_of_the_body_is_trained_in_fp32(config, kind, words):
    """Near to the same run in fp32, which is what bf16 stands for."""
    found = []
    for dtype in ("bf16", "fp32"):
        federation = compose(config(kind, *words, f"train.dtype={dtype}"))
        with federation.learner.round(0):
            x = federation.learner.fit(federation.start, "AB")
        scores = federation.learner.evaluate(x, federation.eval_data, 7)
        saved = [name for name in x.head if name.startswith(federation.model.targets.saved)]
        assert saved and x.flat.dtype == torch.float32
        assert all(bool((x.head[name] != federation.start.head[name]).any()) for name in saved)
        found.append(scores.loss)
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_in_bf16_a_table_is_trained_in_fp32(config):
    federation = compose(config("bert", *WORDS, "train.dtype=bf16"))
    with federation.learner.round(0):
        x = federation.learner.fit(federation.start, "AB")
    assert x.flat.dtype == torch.float32 and x.flat.isfinite().all()
    linear = compose(config("llama", "adapter.modules_to_save=[lm_head]", *CAUSAL, "train.dtype=bf16"))
    assert isinstance(linear.model.base.get_submodule("lm_head"), StackedHead)
    with linear.learner.round(0):
        assert linear.learner.fit(linear.start, "AB").flat.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "words", "told"),
    [
        ("bert", ["adapter.modules_to_save=[nowhere]"], "no module of BertForSequenceClassification has this name"),
        ("bert", ["adapter.modules_to_save=[LayerNorm]"], "is a LayerNorm; linear and embedding layers"),
        ("bert", ["adapter.modules_to_save=[query]"], "is adapted, too"),
        ("gpt2", ["adapter.modules_to_save=[wte]", *CAUSAL], "shares its weights with lm_head"),
        ("bert", ["adapter.modules_to_save=[classifier]", "adapter.head=frozen"], "is of the head, which adapter.head"),
        ("roberta", ["adapter.modules_to_save=[out_proj]", "adapter.head=frozen"], "drop one of them"),
        ("roberta", ["adapter.modules_to_save=[dense]", "adapter.head=frozen"], "drop one of them"),
    ],
)
def test_modules_that_cannot_be_saved_are_refused(config, kind, words, told):
    with pytest.raises(ModelError, match=told):
        compose(config(kind, *words))


@pytest.mark.parametrize("name", ["dora", "use_dora", "ia3", "prompt_tuning", "prefix_tuning"])
def test_adapters_of_other_kinds_are_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=f"{name} given; .*use LoRA"):
        load_config({}, [f"adapter.{name}=true"])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("adapter.peft_type=IA3", "adapter: peft_type=IA3 given; IA3 multiplies activations by vectors, .*use LoRA"),
        ("adapter.peft_type=PREFIX_TUNING", "peft_type=PREFIX_TUNING given; prompt and prefix tuning lengthen"),
        ("adapter.peft_type=BOFT", "peft_type=BOFT given; every adapter here is of type LORA; drop it"),
        ("adapter.peft_type=LORA", "every adapter here is of type LORA; drop it"),
        ("adapter.init=eva", "adapter: init=eva given; it looks at the rows of one place.*adapter.init=default"),
        ("adapter.init=gaussian", "init=gaussian given; of a random A only the scale .*adapter.alpha"),
        ("adapter.init=loftq", "init=loftq given; it quantises the base together .*model.quantize"),
        ("model.dtype=bf16", "model: dtype=bf16 given; the precision of the base is train.dtype"),
        ("model.torch_dtype=float16", "torch_dtype=float16 given; the precision of the base is train.dtype"),
        ("model.load_in_4bit=true", "load_in_4bit=True given; use model.quantize"),
        ("model.trust_remote_code=true", "trust_remote_code=True given; the Python code of a base never runs"),
        ("model.trust_remote_code=false", "trust_remote_code=False given; the Python code of a base never runs"),
    ],
)
def test_settings_of_peft_and_transformers_are_refused_with_the_reason_or_the_place(word, told):
    with pytest.raises(ConfigError, match=told) as error:
        load_config({}, [word])
    assert "\n" not in str(error.value) and "; " in str(error.value)


def test_an_unknown_start_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match="adapter.init: 'nearly' given; .*'default', 'pissa', 'olora'"):
        load_config({}, ["adapter.init=nearly"])
