import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from peerlora.errors import ModelError
from peerlora.lora.base_models import load_base, load_image_processor, load_tokenizer, longest
from peerlora.lora.base_weights import check_class_order, real_names

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


@pytest.fixture
def copied(models, tmp_path):
    """A copy of a tiny model's folder, whose config and weights functions may change."""

    def copy(kind, config=None, weights=None):
        folder = tmp_path / kind
        shutil.copytree(models(kind), folder)
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if weights:
            save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return copy


def classifier(source, labels=LABELS):
    return load_base(source, "classification", labels, 0, 0, torch.float32)


def test_a_folder_without_files_of_a_tokenizer_is_refused(copied):
    source = copied("bert")
    for path in Path(source).glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="a tokenizer of 5 tokens without any word.*tokenizer.json"):
        load_tokenizer(source)


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(copied):
    source = copied("gpt2")
    settings = json.loads((Path(source) / "tokenizer_config.json").read_text())
    settings.pop("pad_token"), settings.pop("eos_token")
    (Path(source) / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="neither a padding nor an end token.*pad_token"):
        load_tokenizer(source)


@pytest.mark.parametrize("load", [load_tokenizer, classifier])
def test_an_adapter_as_a_model_is_named(tmp_path, load):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"is a PEFT adapter.*adapter.start={tmp_path}"):
        load(str(tmp_path))


def test_weights_under_a_foreign_prefix_are_refused(copied):
    source = copied("bert", weights=lambda found: {f"student.body.{name}": value for name, value in found.items()})
    with pytest.raises(ModelError, match="missing: bert.embeddings.*the files hold others instead: student.body.embed"):
        classifier(source)


def test_a_missing_layer_is_refused(copied):
    with pytest.raises(
        ModelError, match=r"16 tensors of BertForSequenceClassification are missing: bert.encoder.layer.2"
    ):
        classifier(copied("bert", config={"num_hidden_layers": 3}))


def test_layers_that_the_config_leaves_out_are_told(copied):
    warnings = classifier(copied("bert", config={"num_hidden_layers": 1})).warnings
    assert "16 tensors of its files belong to no layer of the model" in warnings[0]
    assert "encoder.layer.1." in warnings[0]


def test_a_complete_model_has_no_warnings(models):
    assert classifier(models("bert")).warnings == ()


def test_a_language_model_without_its_head_is_refused(copied):
    source = copied(
        "llama", weights=lambda found: {name: each for name, each in found.items() if "lm_head" not in name}
    )
    with pytest.raises(ModelError, match="no weights for its language head .lm_head.weight."):
        load_base(source, "causal-lm", (), 0, 0, torch.float32)


@pytest.fixture
def with_head(models, tmp_path):
    """A folder of a BERT that was trained on three classes."""
    import transformers

    folder = tmp_path / "headed"
    shutil.copytree(models("bert"), folder)
    names = {"id2label": {0: "low", 1: "middle", 2: "high"}}
    transformers.BertForSequenceClassification.from_pretrained(models("bert"), **names).save_pretrained(folder)
    return str(folder)


def test_a_head_of_another_size_is_drawn_anew_and_told(with_head):
    base = classifier(with_head, ("no", "yes"))
    assert base.initialised == ("classifier",) and base.model.classifier.out_features == 2
    assert "a head of 3 outputs (low, middle, high), the data need 2 (no, yes): a new head" in base.warnings[0]
    assert torch.equal(base.model.classifier.weight, classifier(with_head, ("no", "yes")).model.classifier.weight)


def test_a_trained_head_comes_with_its_names(with_head):
    base = classifier(with_head)
    assert base.initialised == () and base.own_names == ("low", "middle", "high") and not base.warnings


@pytest.mark.parametrize(
    ("own", "names", "told"),
    [
        (("high", "low"), ("low", "high"), "order high, low, the data have them as low, high; set task.labels="),
        (("NEG", "POS"), ("pos", "neg"), r'set task.labels=."neg", "pos".'),
    ],
)
def test_a_head_with_the_classes_in_another_order_is_refused(own, names, told):
    with pytest.raises(ModelError, match=told):
        check_class_order("it", own, names)


def test_a_head_of_other_classes_is_told():
    assert "trained on the classes a, b, the data have c, d" in check_class_order("it", ("a", "b"), ("c", "d"))[0]
    assert check_class_order("it", ("A", "b"), ("a", "B")) == check_class_order("it", (), ("a", "b")) == ()


@pytest.mark.parametrize("given", [{}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, {"id2label": {"x": "y"}}])
def test_numbered_names_are_none(given):
    assert real_names(given) == ()


def test_code_of_a_model_never_runs_and_nobody_is_asked(copied, monkeypatch):
    source = copied("bert", config={"model_type": "homemade", "auto_map": {"AutoConfig": "own.Own"}})
    (Path(source) / "own.py").write_text("raise SystemExit('code of a stranger ran')")
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    with pytest.raises(ModelError, match="it needs Python code of its own, which is never run here"):
        classifier(source)


@pytest.mark.parametrize("named", ["somebody/kernel", "flash_attention_2"])
def test_the_attention_that_a_config_names_is_not_followed(copied, named):
    model = classifier(copied("bert", config={"attn_implementation": named, "_attn_implementation": named})).model
    assert model.config._attn_implementation == "sdpa"


def test_a_pickle_is_a_model_error(copied):
    source = copied("bert")
    (Path(source) / "model.safetensors").rename(Path(source) / "gone")
    (Path(source) / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ModelError, match="cannot be loaded"):
        classifier(source)


@pytest.mark.parametrize("config", [{"num_attention_heads": 0}, {"hidden_size": "wide"}, {"id2label": 3}])
def test_settings_that_make_no_model_are_a_model_error(copied, config):
    with pytest.raises(ModelError, match="cannot be loaded"):
        classifier(copied("bert", config=config))


@pytest.mark.parametrize(
    ("table", "positions", "limit"),
    [(torch.nn.Embedding(40, 8), 40, 40), (torch.nn.Embedding(40, 8, padding_idx=1), 40, 38)]
    + [(torch.nn.Embedding(40, 8, padding_idx=1), 38, 38), (torch.nn.Embedding(40, 8), -1, None)],
)
def test_positions_behind_padding_are_left_out_of_the_limit(table, positions, limit):
    model = torch.nn.Module()
    model.position_embeddings, model.config = table, SimpleNamespace(max_position_embeddings=positions)
    assert longest(model) == limit


def test_a_model_of_images_is_no_model_of_texts_nor_the_other_way_round(models):
    with pytest.raises(ModelError, match=r"reads images .* and has no tokenizer; use task\.kind=image-classification"):
        load_tokenizer(models("vit"))
    with pytest.raises(ModelError, match=r"config\.json and preprocessor_config\.json, or a hub id") as refused:
        load_image_processor(models("bert"))
    assert "packaged:" not in str(refused.value), "which is a model of texts"


OFFLINE = """
import socket, sys

def refuse(*_, **__):
    raise AssertionError("a connection was tried")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from peerlora.config.loading import load_config
from peerlora.runtime.compose import compose

found = compose(load_config(sys.argv[1], sys.argv[2:]))
print(found.export.location, sum(leaf.numel() for leaf in found.model.base.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("revision", [[], ["model.revision=v1"], ["model.revision=v2"]])
def test_an_offline_machine_takes_a_hub_id_from_its_cache_and_tries_no_connection(config, models, tmp_path, revision):
    place = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(models("bert"), place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    for name in ("main", "v1"):
        (place / "refs" / name).write_text("0" * 40)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config("bert").model_dump(mode="json")))
    words = [str(tmp_path / "config.yaml"), "model.source=somebody/tiny", *revision]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", OFFLINE, *words]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "a connection was tried" not in found.stderr
    if revision == ["model.revision=v2"]:  # which the cache lacks
        assert found.returncode != 0 and "ModelError" in found.stderr and "somebody/tiny" in found.stderr
    else:
        assert found.returncode == 0, found.stderr
        assert found.stdout.startswith("somebody/tiny ") and int(found.stdout.split()[1]) > 0
