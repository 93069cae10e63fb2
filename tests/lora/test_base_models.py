import json
import shutil

import pytest
import torch

from peerlora.errors import ModelError
from peerlora.lora.base_models import load_base, load_tokenizer

LABELS = ("x", "y", "z")


def head_of(models, seed, dtype=torch.float64):
    return load_base(models("bert"), "classification", LABELS, seed, 0, dtype).model.classifier.weight


def test_a_head_that_the_weights_lack_comes_from_the_seed(models):
    torch.manual_seed(1)
    first = head_of(models, 5)
    torch.manual_seed(2)
    assert torch.equal(head_of(models, 5), first) and not torch.equal(head_of(models, 6), first)


def test_loading_leaves_the_global_generator_alone(models):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    head_of(models, 5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [("bert", ["classifier"]), ("roberta", ["classifier.dense", "classifier.out_proj"])],
)
def test_it_is_told_which_modules_were_initialised(models, kind, missing):
    assert load_base(models(kind), "classification", LABELS, 0, 0, torch.float32).initialised == tuple(missing)


def test_a_causal_model_comes_complete(models):
    base = load_base(models("llama"), "causal-lm", (), 0, 0, torch.float32)
    assert base.initialised == () and base.model.config.use_cache is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_labels_and_padding_are_set(models, dtype):
    model = load_base(models("bert"), "classification", LABELS, 0, 7, dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"} and model.config.pad_token_id == 7
    assert model.classifier.out_features == 3


def test_regression_has_one_output(models):
    assert load_base(models("bert"), "regression", (), 0, 0, torch.float32).model.classifier.out_features == 1


@pytest.mark.parametrize(
    "load", [load_tokenizer, lambda source: load_base(source, "classification", LABELS, 0, 0, torch.float32)]
)
def test_sources_that_cannot_be_loaded_are_named(load, tmp_path):
    with pytest.raises(ModelError, match="no such folder; give a folder with config.json"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=f"model.source='{tmp_path}' cannot be loaded"):
        load(str(tmp_path))
    with pytest.raises(ModelError, match="model.source='nobody/no-such-model' cannot be loaded"):
        load("nobody/no-such-model")


@pytest.mark.parametrize("damage", ["{", "[]", "{}"])
def test_a_damaged_config_is_a_model_error(models, tmp_path, damage):
    folder = tmp_path / "broken"
    shutil.copytree(models("bert"), folder)
    (folder / "config.json").write_text(damage)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(str(folder), "classification", LABELS, 0, 0, torch.float32)


def test_damaged_weights_are_a_model_error(models, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(models("bert"), folder)
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(str(folder), "classification", LABELS, 0, 0, torch.float32)


def test_weights_of_another_shape_are_a_model_error(models, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(models("bert"), folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 16', '"hidden_size": 32'))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(str(folder), "classification", LABELS, 0, 0, torch.float32)


def test_a_tokenizer_without_padding_token_pads_with_the_end(models, tmp_path):
    folder = tmp_path / "unpadded"
    shutil.copytree(models("gpt2"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "[SEP]" and tokenizer.pad_token_id == 2
