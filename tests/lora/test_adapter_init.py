"""Starts of the factors, the scaling of rsLoRA and ranks by layer, against PEFT's own."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft_folders import FP32, export, trained
from safetensors.torch import load_file

from peerlora.config.loading import load_config
from peerlora.data.batches import collate
from peerlora.errors import CompositionError, ConfigError, ModelError, Stopped
from peerlora.lora.adapter_init import Principal, principal_factors
from peerlora.runtime import resources
from peerlora.runtime.compose import compose
from peerlora.runtime.export import exporter_of, read_adapters
from peerlora.runtime.peer.config_digest import section_hashes, spec_digest
from peerlora.runtime.simulate import resume, simulate

CAUSAL = ("task.kind=causal-lm", "data.label=null")
LOCAL = "algorithm.name=local"


def peft_base(federation, dtype=torch.float64):
    """The base model as a user loads it, and the adapter folder's own config."""
    import transformers

    causal = federation.config.task.kind == "causal-lm"
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    labels = {} if causal else {"num_labels": 3}
    base = auto.from_pretrained(federation.config.model.source, dtype=dtype, **labels)
    base.config.pad_token_id = 0
    return base


def in_peft(federation, folder, dtype=torch.float64):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return PeftModel.from_pretrained(peft_base(federation, dtype), folder, autocast_adapter_dtype=False).eval()


def logits_of(federation, x, client):
    batch = collate(federation.eval_data, [torch.arange(6).numpy()], 0, x.flat.dtype)
    with torch.no_grad():
        federation.model.bind_adapters(x.rows([client]))
        return federation.model(batch.inputs), batch.inputs


def assert_same_logits(federation, x, folder, client=1):
    ours, inputs = logits_of(federation, x, client)
    with torch.no_grad():
        theirs = in_peft(federation, folder)(**inputs).logits
    if ours.ndim == 3:  # what is said of padding is nobody's business
        ours, theirs = (each[inputs["attention_mask"].bool()] for each in (ours, theirs))
    assert (ours - theirs).abs().max() < 1e-9 * float(theirs.abs().max().clamp_min(1))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", ["adapter.rslora=true"]),
        ("bert", ["adapter.rslora=true", LOCAL, "adapter.rank=[1, 2, 3, 3]"]),
        ("bert", ["adapter.init=pissa"]),
        ("bert", ["adapter.init=olora", "adapter.rslora=true"]),
        ("bert", ["adapter.init=orthogonal", "adapter.rank=4"]),
        ("bert", ["adapter.init=pissa", "adapter.targets=all-linear"]),
        ("llama", ["adapter.init=pissa", *CAUSAL]),
        ("gpt2", ["adapter.init=olora", *CAUSAL]),  # whose Conv1D layers keep their weights transposed
        ("gpt2", ["adapter.targets=all-linear", "adapter.rslora=true"]),
    ],
)
def test_exported_adapters_give_our_logits_in_peft(config, tmp_path, kind, words):
    federation = compose(config(kind, *words))
    x = trained(federation)
    export(federation, tmp_path, x, 1)
    assert_same_logits(federation, x, tmp_path)


@pytest.mark.parametrize("init", ["default", "pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_every_start_leaves_the_model_as_it_was(config, kind, init):
    causal = CAUSAL if kind == "gpt2" else ()  # without a head that would be drawn
    federation = compose(config(kind, f"adapter.init={init}", "adapter.rank=4", "adapter.head=frozen", *causal))
    logits, _ = logits_of(federation, federation.start, 0)
    whole = compose(config(kind, "adapter.rank=4", "adapter.head=frozen", *causal))
    plain, _ = logits_of(whole, whole.start, 0)
    x = federation.start.select("A", "B")
    if init != "default":
        assert all(bool(B.any()) for B in x.B.values())
    assert torch.equal(x.flat, x.flat[:1].expand(4, -1)), "clients begin together"
    assert torch.allclose(logits, plain, atol=1e-9)


@pytest.mark.parametrize(("init", "rslora"), [("pissa", False), ("pissa", True), ("olora", False)])
def test_products_and_bases_are_those_of_peft(config, init, rslora):
    from peft import LoraConfig, get_peft_model

    words = [FP32, f"adapter.init={init}", f"adapter.rslora={rslora}", "train.fast=false"]
    federation = compose(config("bert", *words))
    asked = LoraConfig(
        r=3,
        lora_alpha=6,
        use_rslora=rslora,
        init_lora_weights=init,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    theirs = dict(get_peft_model(peft_base(federation, torch.float32), asked).named_modules())
    for layer, A in federation.start.A.items():
        module = theirs[f"base_model.model.{layer}"]
        product = module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert torch.allclose(federation.start.B[layer][0] @ A[0], product, atol=1e-5)
        ours = federation.model.base.get_submodule(layer)
        assert torch.allclose(ours.base.weight, module.base_layer.weight, atol=1e-5)
        assert float(federation.start.scaling[0]) == pytest.approx(module.scaling["default"])


def test_orthogonal_factors_cancel(config):
    x = compose(config("bert", "adapter.init=orthogonal", "adapter.rank=4")).start
    for layer, A in x.A.items():
        assert A.any() and x.B[layer].any() and (x.B[layer] @ A).abs().max() < 1e-12


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_principal_factors_do_not_depend_on_signs_of_a_library(init, monkeypatch):
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    B, A = principal_factors(weight, 2, 1.5, init)
    svd, qr = torch.linalg.svd, torch.linalg.qr

    def flipped(found):
        return (-found[0], *found[1:-1], -found[-1])

    monkeypatch.setattr(torch.linalg, "svd", lambda *words, **more: flipped(svd(*words, **more)))
    monkeypatch.setattr(torch.linalg, "qr", lambda *words, **more: flipped(qr(*words, **more)))
    for one, other in zip((B, A), principal_factors(weight, 2, 1.5, init), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_pissa_takes_the_best_approximation():
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    B, A = principal_factors(weight, 2, 1.5, "pissa")
    values = torch.linalg.svdvals(weight)
    assert torch.linalg.svdvals(weight - 1.5 * B @ A) == pytest.approx(
        torch.cat([values[2:], torch.zeros(2)]), abs=1e-9
    )
    assert torch.allclose(B.square().sum(0), A.square().sum(1))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["adapter.init=pissa", "algorithm.name=rac-lora"], "draws new factors after every merge"),
        (["adapter.init=olora", LOCAL, "adapter.rank=[1, 2, 3, 3]"], "give one rank"),
        (["adapter.init=orthogonal", "adapter.start=somewhere"], "drop one of them"),
    ],
)
def test_starts_that_do_not_fit_are_refused(config, words, told):
    with pytest.raises(CompositionError, match=told):
        compose(config("bert", *words))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["adapter.init=orthogonal"], "adapter.rank=3 is odd"),
        (["adapter.init=pissa", "adapter.rank=20"], "has 16; lower adapter.rank"),
    ],
)
def test_ranks_that_do_not_fit_a_start_are_refused(config, words, told):
    with pytest.raises(ConfigError, match=told):
        compose(config("bert", *words))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_directions_are_not_taken_out_of_a_weight_that_another_module_has_too(config, init):
    words = ["adapter.targets=[lm_head, c_attn]", *CAUSAL]
    with pytest.raises(ModelError, match=f"adapter.init={init} .*lm_head shares its weights with transformer.wte"):
        compose(config("gpt2", *words, f"adapter.init={init}"))
    assert compose(config("llama", "adapter.targets=[lm_head]", *CAUSAL, f"adapter.init={init}")).start.A.keys() == {
        "lm_head"
    }
    assert "lm_head" in compose(config("gpt2", *words, "adapter.init=orthogonal", "adapter.rank=4")).start.A


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_a_stopped_run_goes_on_bit_by_bit_and_exports(config, tmp_path, no_reports, init):
    settings = config("bert", FP32, f"adapter.init={init}", "adapter.rank=4", "train.rounds=2")
    whole = simulate(settings, tmp_path / "whole", report=False)
    with pytest.raises(Stopped):
        simulate(settings, tmp_path / "run", report=False, stop=lambda: True)
    assert torch.equal(resume(tmp_path / "run", report=False).adapters.flat, whole.adapters.flat)
    again = read_adapters(whole.run, exporter_of(whole.run))
    assert torch.equal(again.flat, whole.adapters.flat)
    written = load_file(whole.run / "adapters" / "client-01" / "adapter_model.safetensors")
    assert max(len(A) for name, A in written.items() if "lora_A" in name) == (8 if init == "pissa" else 4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["adapter.init=pissa"], "| holds | the adapter less its start, which the run took out of the base's weights;"),
        (["algorithm.name=rac-lora"], "| holds | the adapter and all that was merged into the base before it;"),
        ([], "| client |"),
    ],
)
def test_a_folder_costs_what_its_client_has_and_tells_what_it_holds(config, tmp_path, monkeypatch, words, told):
    seen, subtracted = [], Principal.subtracted
    monkeypatch.setattr(Principal, "subtracted", lambda self, x: seen.append(x.clients) or subtracted(self, x))
    run = simulate(config("bert", FP32, *words, "train.rounds=1"), tmp_path / "run", report=False).run
    assert seen == ([1] * 5 if words == ["adapter.init=pissa"] else []), "four clients and the average"
    card = (run / "adapters" / "client-01" / "README.md").read_text()
    assert told in card and ("less its start" in card) == bool(seen)


def test_a_base_of_the_next_run_is_whole_again(config):
    shared = resources.load_resources(config("bert"))
    shared = resources.RunResources(shared.train_data, shared.eval_data, shared.tokenizer, resources.BaseModelCache())
    plain = compose(config("bert")).base_digest
    changed = compose(config("bert", "adapter.init=pissa"), resources=shared)
    assert (
        changed.base_digest != plain
        and changed.base_digest == compose(config("bert", "adapter.init=olora")).base_digest
    )
    assert compose(config("bert"), resources=shared).base_digest == plain


def test_sites_of_versions_without_these_settings_agree():
    plain, scaled = (section_hashes(load_config({}, words), ["a"]) for words in ([], ["adapter.rslora=true"]))
    assert plain["adapter"] != scaled["adapter"]
    assert section_hashes(load_config({}, ["adapter.init=default"]), ["a"])["adapter"] == plain["adapter"]


def test_the_digest_of_a_layout_is_what_it_was(config):
    one, other = (compose(config("bert", f"adapter.rslora={word}")).start.spec for word in ("false", "true"))
    assert spec_digest(one) != spec_digest(other)


# --- ranks and alphas by layer


def written_by_peft(federation, folder, **patterns):
    """A PEFT folder whose layers differ in rank and scaling."""
    from peft import LoraConfig, get_peft_model

    asked = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS", **patterns)
    torch.manual_seed(5)
    model = get_peft_model(peft_base(federation), asked)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"query": 2}},
        {"alpha_pattern": {"layer.0.attention.self.value": 9}},
        {"rank_pattern": {"layer.1.attention.self.query": 1}, "alpha_pattern": {"query": 5}},
        {"rank_pattern": {"query": 2}, "use_rslora": True},
    ],
)
def test_ranks_and_alphas_by_layer_come_in_and_go_out(config, tmp_path, patterns):
    words = [f"adapter.rslora={patterns.get('use_rslora', False)}"]
    model = written_by_peft(compose(config("bert", *words)), tmp_path / "theirs", **patterns)
    federation = compose(config("bert", *words, f"adapter.start={tmp_path / 'theirs'}"))
    ours, inputs = logits_of(federation, federation.start, 0)
    with torch.no_grad():
        assert torch.allclose(ours, model(**inputs).logits, atol=1e-9)
    export(federation, tmp_path / "ours", federation.start, 0)
    assert_same_logits(federation, federation.start, tmp_path / "ours", 0)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert bool(written["rank_pattern"]) == ("rank_pattern" in patterns)
    assert written["use_rslora"] == patterns.get("use_rslora", False)
    again = compose(config("bert", *words, f"adapter.start={tmp_path / 'ours'}")).start
    assert torch.allclose(again.flat, federation.start.flat, atol=1e-12)


def test_a_layer_of_a_smaller_rank_keeps_it_in_training(config, tmp_path):
    written_by_peft(compose(config("bert")), tmp_path, rank_pattern={"query": 2})
    federation = compose(config("bert", f"adapter.start={tmp_path}"))
    with federation.learner.round(0):
        x = federation.learner.fit(federation.start, "AB")
    for layer, A in x.A.items():
        small = "query" in layer
        assert bool((A[:, 2:] == 0).all()) == small and bool((x.B[layer][:, :, 2:] == 0).all()) == small
    assert not torch.equal(x.flat, federation.start.flat)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rank_pattern", {"query": -1}),
        ("rank_pattern", {"query": 1.5}),
        ("alpha_pattern", [3]),
        ("alpha_pattern", {"(": 3}),
    ],
)
def test_patterns_that_mean_nothing_are_refused(config, tmp_path, setting, value):
    written_by_peft(compose(config("bert")), tmp_path)
    path = Path(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(ModelError, match="adapter_config.json is|cannot be told"):
        compose(config("bert", f"adapter.start={tmp_path}"))


def test_another_scaling_is_named(config, tmp_path):
    written_by_peft(compose(config("bert")), tmp_path, use_rslora=True)
    with pytest.raises(ModelError, match="use_rslora=True where adapter.rslora=False"):
        compose(config("bert", f"adapter.start={tmp_path}"))
