import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peerlora.data.batches import collate
from peerlora.errors import ModelError
from peerlora.lora.adapters import mask_ranks
from peerlora.lora.peft_io import export_adapter, read_adapter
from peerlora.runtime.compose import compose

CAUSAL = ("task.kind=causal-lm", "data.label=null")
FP32 = "train.dtype=fp32"


def trained(federation, seed=3):
    """Adapters of which every tensor differs from the start, from client to client."""
    generator = torch.Generator().manual_seed(seed)
    x = federation.start
    noise = torch.randn(x.flat.shape, generator=generator, dtype=torch.float64).to(x.flat.dtype)
    return mask_ranks(replace(x, flat=x.flat + 0.1 * noise))


def export(federation, folder, x, client=0):
    return export_adapter(Path(folder), x, client, federation.model, federation.export)


def load_with_peft(source, kind, folder, seed=123):
    """What a user does with the folder: a fresh base from the same source, then PEFT."""
    import transformers
    from peft import PeftModel
    from transformers.utils import logging

    auto = transformers.AutoModelForCausalLM if kind == "causal-lm" else transformers.AutoModelForSequenceClassification
    labels = {} if kind == "causal-lm" else {"num_labels": 1 if kind == "regression" else 3}
    logging.set_verbosity_error()
    torch.manual_seed(seed)  # a head that the base lacks is drawn anew: the folder must bring its own
    base = auto.from_pretrained(source, dtype=torch.float32, **labels)
    base.config.pad_token_id = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return PeftModel.from_pretrained(base, folder).eval()


def logits_of(federation, x, client):
    data = federation.eval_data
    batch = collate(data, [torch.arange(6).numpy()], 0, torch.float32)
    with torch.no_grad():
        federation.model.bind_adapters(x.rows([client]))
        return federation.model(batch.inputs), batch.inputs


def assert_peft_agrees(config, folder, kind, words, client=1):
    chosen = config(kind, FP32, *words)
    federation = compose(chosen)
    x = trained(federation)
    export(federation, folder, x, client)
    ours, inputs = logits_of(federation, x, client)
    loaded = load_with_peft(chosen.model.source, chosen.task.kind, folder)
    with torch.no_grad():
        theirs = loaded(**inputs).logits
        plain = loaded.get_base_model()
        with loaded.disable_adapter():
            without = plain(**inputs).logits
    assert (ours - theirs).abs().max() <= 2e-6 * float(theirs.abs().max().clamp_min(1))
    assert (ours - without).abs().max() > 1e-2, "the adapter does nothing"
    return federation, x, loaded


CASES = {
    "bert": ("bert", ()),
    "bert-frozen-head": ("bert", ("adapter.head=frozen",)),
    "bert-private-head": ("bert", ("adapter.head=private",)),
    "bert-regression": ("bert", ("task.kind=regression", "data.label=score")),
    "bert-dense-layers": ("bert", ("adapter.targets=[query, intermediate.dense]",)),
    "bert-regex": ("bert", (r'adapter.targets=".*layer\\.1\\.attention\\.self\\.(query|key)"',)),
    "bert-all-linear": ("bert", ("adapter.targets=all-linear",)),
    "roberta": ("roberta", ()),
    "roberta-frozen-head": ("roberta", ("adapter.head=frozen",)),
    "llama-classification": ("llama", ()),
    "llama": ("llama", CAUSAL),
    "gpt2": ("gpt2", CAUSAL),
    "gpt2-classification": ("gpt2", ()),
    "unequal-ranks": ("bert", ("algorithm.name=local", "adapter.rank=[1, 2, 3, 3]", "adapter.alpha=5.5")),
    "dropout": ("roberta", ("adapter.dropout=0.1", "model.dropout=0.2")),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_folder_and_gives_our_logits(config, tmp_path, case):
    kind, words = CASES[case]
    assert_peft_agrees(config, tmp_path / "out", kind, words)


def without_pooler(models, tmp_path):
    """A BERT folder whose weights lack the pooler, which its classification model needs."""
    import transformers

    folder = tmp_path / "without"
    shutil.copytree(models("bert"), folder)
    transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    assert not [name for name in load_file(folder / "model.safetensors") if "pooler" in name]
    return folder


def test_modules_that_the_base_lacks_travel_with_the_adapter(config, models, tmp_path):
    words = [f"model.source={without_pooler(models, tmp_path)}"]
    federation, _, _ = assert_peft_agrees(config, tmp_path / "out", "bert", words)
    assert "bert.pooler.dense" in federation.export.extra_modules
    assert "base_model.model.bert.pooler.dense.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_an_adapted_layer_that_the_base_lacks_travels_too(config, models, tmp_path):
    words = [f"model.source={without_pooler(models, tmp_path)}", "adapter.targets=[query, pooler.dense]"]
    assert_peft_agrees(config, tmp_path / "out", "bert", words)


def test_tensors_are_written_bit_for_bit_at_the_own_rank(config, tmp_path):
    federation = compose(config("bert", FP32, "algorithm.name=local", "adapter.rank=[1, 2, 3, 3]"))
    x = trained(federation)
    for client, rank in enumerate([1, 2, 3, 3]):
        tensors = load_file(export(federation, tmp_path / str(client), x, client) / "adapter_model.safetensors")
        for layer in x.A:
            assert torch.equal(tensors[f"base_model.model.{layer}.lora_A.weight"], x.A[layer][client, :rank])
            assert torch.equal(tensors[f"base_model.model.{layer}.lora_B.weight"], x.B[layer][client, :, :rank])
        for name, value in x.head.items():
            assert torch.equal(tensors[f"base_model.model.{name}"], value[client])
        assert len(tensors) == 2 * len(x.A) + len(x.head)


def test_a_frozen_head_is_written_as_the_base_has_it(config, tmp_path):
    federation = compose(config("roberta", FP32, "adapter.head=frozen"))
    tensors = load_file(export(federation, tmp_path, trained(federation)) / "adapter_model.safetensors")
    head = federation.model.base.classifier
    for name, value in head.state_dict().items():
        assert torch.equal(tensors[f"base_model.model.classifier.{name}"], value)


def test_the_folder_holds_what_others_need(config, tmp_path):
    from transformers import AutoTokenizer

    chosen = config("bert", FP32, "adapter.dropout=0.1")
    federation = compose(chosen)
    context = replace(federation.export, facts={"rounds": 3})
    folder = export_adapter(tmp_path / "deep" / "out", trained(federation), 0, federation.model, context)
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    written = json.loads((folder / "adapter_config.json").read_text())
    expected = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "task_type": "SEQ_CLS", "peft_type": "LORA"}
    expected |= {"base_model_name_or_path": chosen.model.source, "fan_in_fan_out": False, "inference_mode": True}
    assert expected.items() <= written.items()
    assert written["modules_to_save"] == ["classifier"]
    assert written["target_modules"] == sorted(layer.name for layer in federation.start.spec.layers)
    card = (folder / "README.md").read_text()
    assert "| rounds | 3 |" in card and "Rank 3, alpha 6" in card and card.startswith("---\n")
    text = "w1 w2 w30"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(chosen.model.source)(text)


def test_equal_adapters_give_byte_equal_files(config, tmp_path):
    federation = compose(config("bert", FP32))
    x = trained(federation)
    same = replace(x, flat=x.flat[:1].repeat(4, 1))
    folders = [export(federation, tmp_path / "0", same, 0), export(federation, tmp_path / "3", same, 3)]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]


def test_exporting_does_not_change_the_model(config, tmp_path):
    federation = compose(config("roberta", FP32))
    x = trained(federation)
    before, _ = logits_of(federation, x, 2)
    export(federation, tmp_path, x, 1)
    after, _ = logits_of(federation, x, 2)
    assert torch.equal(before, after)


# --- the way back


@pytest.mark.parametrize("words", [(), ("adapter.head=private",), ("adapter.head=frozen",), ("adapter.alpha=5.5",)])
def test_an_exported_folder_as_start_gives_the_same_tensors(config, tmp_path, words):
    chosen = config("bert", FP32, *words)
    x = trained(compose(chosen))
    export(compose(chosen), tmp_path, x, 2)
    start = compose(config("bert", FP32, *words, f"adapter.start={tmp_path}")).start
    assert torch.equal(start.flat, x.flat[2:3].expand(4, -1)) and torch.equal(start.ranks, x.ranks)


def test_a_folder_that_peft_wrote_is_a_start(config, tmp_path):
    from plain import initial_models, own_state

    chosen = config("bert", FP32)
    federation = compose(chosen)
    own = initial_models(chosen, federation)[0]
    for name, parameter in own.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    own.save_pretrained(tmp_path)
    start = compose(config("bert", FP32, f"adapter.start={tmp_path}")).start
    from peft import get_peft_model_state_dict

    theirs = get_peft_model_state_dict(own)
    ours = own_state(start, 3)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def exported(config, tmp_path):
    """(folder, function that reads it back with a config of these words)."""
    federation = compose(config("bert", FP32))
    folder = export(federation, tmp_path / "exported", trained(federation))

    def read(*words, folder=folder):
        start = compose(config("bert", FP32, *words)).start
        return read_adapter(Path(folder), start.spec, start)

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
    assert torch.equal(after.only("AB").flat, before.only("AB").flat)
    assert not torch.equal(after.only("head").flat, before.only("head").flat)


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


@pytest.mark.parametrize(
    "values",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"query": 32}},
        {"rank_pattern": {"query": 2}},
        {"peft_type": "LOHA"},
    ],
)
def test_a_folder_that_means_another_update_is_refused(exported, values):
    folder, read = exported
    edit_config(folder, **values)
    with pytest.raises(ModelError):
        read()


def test_a_frozen_head_that_differs_from_the_folders_is_refused_or_taken_over(exported):
    # The factors were trained for the folder's head; with another one they mean nothing.
    folder, read = exported
    with pytest.raises(ModelError, match="head"):
        read("adapter.head=frozen")
