import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from peft_folders import FP32, export, trained
from safetensors.torch import load_file

from cases import others_slow
from peerlora.data.batches import collate
from peerlora.lora.peft_io import export_adapter
from peerlora.runtime.compose import compose

CAUSAL = ("task.kind=causal-lm", "data.label=null")


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
    if ours.ndim == 3:  # what is said of padding is nobody's business
        ours, theirs, without = (each[inputs["attention_mask"].bool()] for each in (ours, theirs, without))
    assert (ours - theirs).abs().max() <= 2e-6 * float(theirs.abs().max().clamp_min(1))
    assert (ours - without).abs().max() > 1e-3, "the adapter does nothing"
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


@pytest.mark.parametrize("case", others_slow(CASES, [0, 2, 4, 6, 8, 10, 12, 13]))
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
    assert federation.export.extra_modules == ("bert.pooler.dense",)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["bert.pooler.dense", "classifier"]
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
