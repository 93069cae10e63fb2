"""The adapter in a PEFT model: read, written, named, digested, exported; and what is refused."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from peerlora.errors import ModelError
from peerlora.lora.peft_io import ExportContext
from peerlora.lora.peft_model import PeftAdapter

TARGETS = ["query", "value"]


@pytest.fixture
def base(models):
    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_pretrained(models("bert"), num_labels=3)


def adapted(base, **settings):
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "SEQ_CLS"} | settings)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(torch.randn(value.shape, generator=generator))
    return model


def test_values_are_read_by_peft_s_names_and_written_back(base):
    model = randomise(adapted(base))
    adapter = PeftAdapter(model)
    x = adapter.adapters()
    assert [layer.name for layer in adapter.spec.layers][0] == "bert.encoder.layer.0.attention.self.query"
    assert dict(adapter.spec.head) == {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    layer = model.base_model.model.bert.encoder.layer[1].attention.self.value
    name = "bert.encoder.layer.1.attention.self.value"
    assert torch.equal(x.A[name][0], layer.lora_A["default"].weight)
    assert torch.equal(x.B[name][0], layer.lora_B["default"].weight)
    assert torch.equal(x.head["classifier.bias"][0], model.base_model.model.classifier.modules_to_save.default.bias)
    adapter.write(2 * x.flat[0], ["B"])
    after = adapter.adapters()
    assert torch.equal(after.B[name], 2 * x.B[name]) and torch.equal(after.A[name], x.A[name])
    adapter.write(3 * x.flat[0])
    assert torch.equal(adapter.read(), 3 * x.flat[0])


def test_a_smaller_rank_is_padded_and_its_padding_never_read_from_the_model(base):
    model = randomise(adapted(base))
    adapter = PeftAdapter(model, largest_rank=5)
    x = adapter.adapters()
    name = adapter.spec.layers[0].name
    assert x.A[name].shape == (1, 5, 16) and x.ranks.tolist() == [3]
    assert not x.A[name][0, 3:].any() and not x.B[name][0, :, 3:].any() and x.A[name][0, :3].all()
    adapter.write(torch.ones_like(x.flat[0]))
    assert torch.equal(
        model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A.default.weight[0], torch.ones(16)
    )


def test_half_precision_is_mixed_in_fp32_and_cast_back(base):
    model = randomise(adapted(base)).to(torch.bfloat16)
    adapter = PeftAdapter(model)
    flat = adapter.read()
    assert flat.dtype == torch.float32
    mean = (flat + 1.001 * flat) / 2
    adapter.write(mean)
    assert torch.equal(adapter.read(), mean.bfloat16().float()) and not torch.equal(adapter.read(), mean)


def test_the_default_start_is_drawn_anew_and_others_stay(base):
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapter = PeftAdapter(adapted(copy.deepcopy(base)))
        adapter.draw_start(torch.Generator().manual_seed(7))
        starts.append(adapter.read())
    assert torch.equal(*starts) and starts[0].any()
    for model in (randomise(adapted(copy.deepcopy(base))), adapted(copy.deepcopy(base), init_lora_weights="gaussian")):
        adapter = PeftAdapter(model)
        before = adapter.read()
        adapter.draw_start(torch.Generator().manual_seed(7))
        assert torch.equal(adapter.read(), before)


def test_the_digest_is_of_the_frozen_weights(base):
    one, other = (PeftAdapter(randomise(adapted(copy.deepcopy(base)), seed)) for seed in (0, 1))
    assert one.digest() == other.digest()
    with torch.no_grad():
        other.model.base_model.model.classifier.original_module.weight.add_(1)  # replaced by the trained copy
    assert one.digest() == other.digest()
    with torch.no_grad():
        other.model.base_model.model.bert.embeddings.word_embeddings.weight[3, 3] += 1e-3
    assert one.digest() != other.digest()


def test_the_digest_of_a_layer_does_not_tell_whether_it_is_adapted(base):
    one = PeftAdapter(adapted(copy.deepcopy(base)))
    other = PeftAdapter(adapted(copy.deepcopy(base), target_modules=["key"]))
    assert one.digest() == other.digest()


def test_an_export_is_loaded_by_peft(base, tmp_path):
    model = randomise(adapted(copy.deepcopy(base)))
    adapter = PeftAdapter(model)
    x = adapter.adapters()
    adapter.export(tmp_path / "out", x, 0, ExportContext("base", "SEQ_CLS", 0.0))
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"), autocast_adapter_dtype=False, is_trainable=True)
    assert torch.equal(PeftAdapter(loaded).read(), x.flat[0])


def merged(base):
    model = randomise(adapted(base))
    model.merge_adapter()
    return model


def tied(base):
    model = adapted(base)
    layers = model.base_model.model.bert.encoder.layer
    layers[0].attention.self.query.lora_A = layers[1].attention.self.query.lora_A
    return model


def with_open_base(base):
    model = adapted(base)
    model.base_model.model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    return model


def two_active(base):
    model = adapted(base, task_type=None)
    model.add_adapter("other", LoraConfig(target_modules=["key"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def frozen(base):
    model = adapted(base)
    model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A.default.weight.requires_grad_(False)
    return model


class DeepSpeedEngine(torch.nn.Module):
    pass


def sharded(base):
    model = adapted(base)
    model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A.default.weight.ds_id = 3
    return model


REFUSED = [
    (lambda base: base, "has no PEFT adapter"),
    (lambda base: get_peft_model(base, IA3Config(target_modules=["query"], feedforward_modules=[])), "is IA3"),
    (lambda base: adapted(base, use_dora=True), "norm of every row"),
    (lambda base: adapted(base, lora_bias=True), "no part of the product"),
    (lambda base: adapted(base, rank_pattern={"query": 2}), "one rank"),
    (lambda base: adapted(base, alpha_pattern={"query": 2}), "one scaling"),
    (lambda base: adapted(base, trainable_token_indices=[1]), "single rows of an embedding"),
    (lambda base: adapted(base, target_modules=["word_embeddings"]), "linear layers only"),
    (lambda base: adapted(base, bias="all"), "biases of the base"),
    (with_open_base, "word_embeddings.* trains beside the adapter"),
    (merged, "is merged into layer"),
    (tied, "are tied"),
    (two_active, "2 active adapters"),
    (frozen, "does not train"),
    (sharded, "one shard of a parameter"),
    (lambda base: DeepSpeedEngine(), "of which each process holds a part only"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_what_cannot_be_mixed_is_refused_with_the_reason(base, make, reason):
    with pytest.raises(ModelError, match=reason):
        PeftAdapter(make(base))


def test_wrappers_of_torch_are_seen_through(base):
    model = adapted(base)
    assert PeftAdapter(torch.nn.DataParallel(model)).model is model
