"""Adapters of a run are exported and merged on the base model that they were trained on, or refused by its name."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from peerlora.errors import RunError
from peerlora.lora import base_models
from peerlora.runtime import resources
from peerlora.runtime.export import export_from_run
from peerlora.runtime.model_choice import ModelChoice
from peerlora.runtime.simulate import simulate
from peerlora.runtime.whole_model import export_with_base, merge_from_run

QUICK = ["train.rounds=1", "train.local_steps=1", "train.batch=2", "eval.every=1", "topology=complete", "clients=2"]
CUT = ModelChoice(1, rank=1)  # which no run writes itself
WAYS = {
    "cut": lambda run, to: export_from_run(run, to, CUT),
    "base": lambda run, to: export_with_base(run, to, 1),
    "merge": lambda run, to: merge_from_run(run, to, 1),
}
ACTIVATION = {"bert": "hidden_act", "gpt2": "activation_function"}


@pytest.fixture
def finished(config, models, tmp_path, monkeypatch):
    """A finished run on a base model in a folder of its own."""
    monkeypatch.setattr(resources, "load_base", base_models.load_base)  # the tests' own keeps what it loaded

    def run(kind, *words):
        shutil.copytree(models(kind), tmp_path / "base")
        return simulate(config(kind, *QUICK, f"model.source={tmp_path / 'base'}", *words), tmp_path / "run").run

    return run


@pytest.mark.usefixtures("no_reports")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", ["train.dtype=bf16"]),
        ("bert", ["train.dtype=fp64", "adapter.init=pissa", "algorithm.name=dec-lora"]),
        ("gpt2", ["train.dtype=fp32", "adapter.init=olora", "algorithm.name=dec-lora"]),
        ("gpt2", ["task.kind=causal-lm", "data.label=null", "train.dtype=fp32"]),
    ],
)
def test_another_base_is_refused_and_the_same_is_not(finished, tmp_path, kind, words):
    run, base = finished(kind, *words), tmp_path / "base"
    for name, way in WAYS.items():
        way(run, tmp_path / "to" / name)
    weights = base / "model.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    some = max(tensors, key=lambda name: ("query" in name or "c_attn.weight" in name, name))
    save_file({**tensors, some: tensors[some] * 1.5}, weights, metadata={"format": "pt"})
    refuses(run, tmp_path, r"base changed since \(weights\): .* on another base model")
    weights.write_bytes(whole)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {ACTIVATION[kind]: "relu"}))
    refuses(run, tmp_path, r"base changed since \(config.json\): ")
    forget_digests(run)
    for name, way in WAYS.items():  # as of an older version
        way(run, tmp_path / "unchecked" / name)


def refuses(run, folder, told):
    for name, way in WAYS.items():
        with pytest.raises(RunError, match=told):
            way(run, folder / "refused" / name)
        assert not (folder / "refused" / name).exists()
    assert export_from_run(run, folder / f"written-{len(list(folder.iterdir()))}", 1)  # needs no base


def forget_digests(run):
    facts = json.loads((run / "run.json").read_text())
    facts["inputs"]["base"] = {"weights": facts["inputs"]["base"]["weights"]}
    (run / "run.json").write_text(json.dumps(facts))
