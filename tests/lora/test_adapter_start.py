"""A PEFT folder as the start of a run."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from peft_folders import FP32, export, trained
from plain import initial_models, own_state
from safetensors.torch import load_file, save_file

from peerlora.errors import ModelError
from peerlora.lora.adapter_start import read_adapter
from peerlora.runtime.compose import compose


@pytest.mark.parametrize("words", [(), ("adapter.head=private",), ("adapter.head=frozen",), ("adapter.alpha=5.5",)])
def test_an_exported_folder_as_start_gives_the_same_tensors(config, tmp_path, words):
    chosen = config("bert", FP32, *words)
    x = trained(compose(chosen))
    export(compose(chosen), tmp_path, x, 2)
    start = compose(config("bert", FP32, *words, f"adapter.start={tmp_path}")).start
    assert torch.equal(start.flat, x.flat[2:3].expand(4, -1)) and torch.equal(start.ranks, x.ranks)


def test_a_folder_that_peft_wrote_is_a_start(config, tmp_path):
    chosen = config("bert", FP32)
    federation = compose(chosen)
    own = initial_models(chosen, federation)[0]
    for name, parameter in own.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    own.save_pretrained(tmp_path)
    start = compose(config("bert", FP32, f"adapter.start={tmp_path}")).start
    theirs = get_peft_model_state_dict(own)
    ours = own_state(start, 3)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def exported(config, tmp_path):
    """(folder, function that reads it back with a config of these words)."""
    federation = compose(config("bert", FP32))
    folder = export(federation, tmp_path / "exported", trained(federation))

    def read(*words, folder=folder):
        federation = compose(config("bert", FP32, *words))
        return read_adapter(Path(folder), federation.start, federation.model, federation.export)[0]

    return folder, read


def edit(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def first_A(tensors):
    return min(name for name in tensors if "lora_A" in name)


def test_a_sound_folder_can_be_read(exported):
    folder, read = exported
    assert read().flat.isfinite().all()


def test_a_head_that_the_folder_lacks_keeps_its_start(exported):
    folder, read = exported
    before = read()
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "classifier" in name])
    after = read()
    assert torch.equal(after.select("A", "B").flat, before.select("A", "B").flat)
    assert not torch.equal(after.select("head").flat, before.select("head").flat)


def test_a_missing_folder_is_refused(exported, tmp_path):
    _, read = exported
    with pytest.raises(ModelError, match="has no adapter_model.safetensors and adapter_config.json"):
        read(folder=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("content", [b"", b"not what it should be", b"\xff\xfe\x00\x01" * 4])
def test_a_damaged_file_is_refused(exported, name, content):
    folder, read = exported
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        read()


def test_a_config_that_is_no_mapping_is_refused(exported):
    folder, read = exported
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match="adapter_config.json|cannot be read"):
        read()


def test_a_truncated_tensor_file_is_refused(exported):
    folder, read = exported
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        read()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["adapter.rank=2"], "has rank 3 and alpha 6; the config has rank \\[2\\] and alpha 6"),
        (["adapter.alpha=12"], "has rank 3 and alpha 6; the config has rank \\[3\\] and alpha 12"),
        (["algorithm.name=local", "adapter.rank=[3, 1, 3, 3]"], "the config has rank \\[1, 3\\]"),
    ],
)
def test_another_rank_or_alpha_is_refused(exported, words, told):
    _, read = exported
    with pytest.raises(ModelError, match=told):
        read(*words)


def test_another_shape_is_refused(exported):
    folder, read = exported
    edit(folder, lambda tensors: tensors.update({first_A(tensors): torch.zeros(3, 5)}))
    with pytest.raises(ModelError, match=r"lora_A.weight: shape \(3, 5\); expected shape \(3, 16\)"):
        read()


def test_a_missing_layer_is_refused(exported):
    folder, read = exported
    edit(folder, lambda tensors: tensors.pop(first_A(tensors)))
    with pytest.raises(ModelError, match="no such tensor"):
        read()


def test_a_folder_for_other_layers_is_refused(exported):
    _, read = exported
    with pytest.raises(ModelError, match="key.lora_A.weight: no such tensor"):
        read("adapter.targets=[query, key]")


def test_another_number_of_classes_is_refused(exported):
    folder, read = exported
    name = "base_model.model.classifier.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(2, 16)}))
    with pytest.raises(ModelError, match="classifier.weight: shape"):
        read()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(exported, value):
    folder, read = exported
    edit(folder, lambda tensors: tensors[first_A(tensors)].view(-1)[3:4].fill_(value))
    with pytest.raises(ModelError, match="not finite"):
        read()


def test_layers_that_the_config_does_not_adapt_are_refused(exported):
    # Read without them, the adapter would be another one than was trained.
    _, read = exported
    with pytest.raises(ModelError, match="value.lora_"):
        read("adapter.targets=[query]")


@pytest.mark.parametrize("values", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_a_folder_that_means_another_update_is_refused(exported, values):
    folder, read = exported
    edit_config(folder, **values)
    with pytest.raises(ModelError):
        read()


def test_a_frozen_head_that_differs_from_the_folders_is_refused(exported):
    # The factors were trained for the folder's head; with another one they mean nothing.
    folder, read = exported
    with pytest.raises(ModelError, match="head"):
        read("adapter.head=frozen")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"peft_type": "IA3"}, "uses peft_type=IA3"),
        ({"bias": "lora_only"}, "uses bias=lora_only"),
        ({"init_lora_weights": "pissa_niter_4"}, "uses init_lora_weights=pissa_niter_4, which changes the base"),
        ({"init_lora_weights": "olora"}, "uses init_lora_weights=olora"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"trainable_token_indices": [3]}, "uses trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"a_setting_of_another_year": 1}, "uses a_setting_of_another_year"),
    ],
)
def test_settings_under_which_the_factors_mean_something_else_are_refused(exported, values, told):
    folder, read = exported
    edit_config(folder, **values)
    with pytest.raises(ModelError, match=told):
        read()


@pytest.mark.parametrize("start", ["gaussian", "eva", "orthogonal", False])
def test_starts_that_leave_the_base_alone_are_read(exported, start):
    folder, read = exported
    edit_config(folder, init_lora_weights=start)
    assert read().flat.isfinite().all()


@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.bias"])
def test_tensors_beside_factors_and_head_are_refused_unless_the_base_has_them(exported, config, name):
    folder, read = exported
    value = dict(compose(config("bert", FP32)).model.base.named_parameters())[name]
    edit(folder, lambda tensors: tensors.update({f"base_model.model.{name}": value.detach().clone()}))
    assert read().flat.isfinite().all()
    edit(folder, lambda tensors: tensors.update({f"base_model.model.{name}": value.detach() + 1}))
    with pytest.raises(ModelError, match=f"holds {name} .* which would be left out"):
        read()


def test_a_pickled_adapter_is_refused_unread(exported):
    folder, read = exported
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="holds adapter_model.bin, a pickle"):
        read()


def test_a_config_too_deep_to_read_is_refused(exported):
    folder, read = exported
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="cannot be read"):
        read()


def test_classes_in_another_order_are_refused(exported):
    folder, read = exported
    (folder / "labels.json").write_text(json.dumps({"id2label": {"0": "class1", "1": "class0", "2": "class2"}}))
    with pytest.raises(
        ModelError, match='order class1, class0, class2.*set task.labels=."class1", "class0", "class2".'
    ):
        read()


def warnings_of(config, folder, *words):
    federation = compose(config("bert", FP32, *words))
    return read_adapter(Path(folder), federation.start, federation.model, federation.export)[1]


def test_an_adapter_of_this_base_and_these_classes_has_no_warnings(exported, config):
    assert warnings_of(config, exported[0]) == ()


def test_another_base_other_classes_and_a_missing_head_are_told(exported, config):
    folder, _ = exported
    edit_config(folder, base_model_name_or_path="somebody/another")
    (folder / "labels.json").write_text(json.dumps({"id2label": {"0": "x", "1": "y", "2": "z"}}))
    base, classes = warnings_of(config, folder)
    assert "was trained on somebody/another" in base and "on the classes x, y, z" in classes
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "classifier" in name])
    assert "has no head; the base's own is where clients begin" in warnings_of(config, folder)[1]


def test_labels_that_cannot_be_read_are_refused(exported):
    folder, read = exported
    (folder / "labels.json").write_text("{")
    with pytest.raises(ModelError, match="labels.json cannot be read"):
        read()
