"""A resumed run finds the rows, labels, base model and start that it began with, or is refused by name."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from peerlora.errors import PeerloraError, RunError, Stopped
from peerlora.lora import base_models
from peerlora.runs.resume import _MAY_CHANGE
from peerlora.runs.store import RunStore
from peerlora.runtime import resources
from peerlora.runtime.inputs import describe_rows
from peerlora.runtime.resources import load_resources
from peerlora.runtime.simulate import resume, simulate

QUICK = ["train.rounds=2", "train.local_steps=1", "train.batch=2", "eval.every=2", "topology=complete", "clients=2"]


@pytest.fixture
def begun(config, models, texts, tmp_path):
    """A run that was stopped after its first round, on files of its own."""
    shutil.copy(texts, tmp_path / "train.jsonl")
    shutil.copy(texts, tmp_path / "eval.jsonl")
    shutil.copytree(models("bert"), tmp_path / "base")
    words = [f"model.source={tmp_path / 'base'}"]
    words += [f"data.{name}=jsonl:{tmp_path / name}.jsonl" for name in ("train", "eval")]

    def begin(*more, **options):
        with pytest.raises(Stopped):
            made = config("bert", *QUICK, *words, *more)
            simulate(made, tmp_path / "run", stop=lambda: True, report=False, **options)
        return tmp_path / "run"

    return begin


def rewrite(path, change):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row) for row in change(rows)))


def swapped(rows):
    other = {"class0": "class1", "class1": "class0"}
    return [row | {"label": other.get(row["label"], row["label"])} for row in rows]


CHANGES = {
    "labels": (swapped, r"train.jsonl changed since \(labels\): "),
    "fewer rows": (lambda rows: rows[:30], r"train.jsonl changed since \(\d+ rows then, \d+ now"),
    "another order": (lambda rows: rows[::-1], r"train.jsonl changed since \(tokens"),
    "another word": (lambda rows: [rows[0] | {"text": rows[1]["text"]}, *rows[1:]], r"changed since \(tokens\)"),
    "a class more": (lambda rows: [*rows[:-2], *[rows[0] | {"label": "new"}] * 2], r"train.jsonl changed .*classes"),
}


def test_rows_that_changed_are_named(begun, tmp_path):
    run, train = begun(), tmp_path / "train.jsonl"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    whole = train.read_text()
    for name, (change, told) in CHANGES.items():
        rewrite(train, change)
        with pytest.raises(RunError, match=told) as error:
            resume(run, report=False)
        assert not any(word in str(error.value) for word in ("eval.jsonl", "model.source", "division")), name
        train.write_text(whole)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before  # nothing was lost
    assert resume(run, report=False).summary["rounds"] == 2


def test_evaluation_rows_base_model_and_start_that_changed_are_named(begun, tmp_path, config, monkeypatch):
    start = simulate(config("bert", *QUICK), tmp_path / "start", report=False).run / "adapters" / "client-01"
    run = begun(f"adapter.start={start}")
    places = {
        tmp_path / "base" / "model.safetensors": "model.source=.*base changed since .weights",
        start / "adapter_model.safetensors": "adapter.start=.*client-01 changed since .values",
    }
    for place, told in places.items():
        whole, tensors = place.read_bytes(), load_file(place)
        first = max(tensors, key=lambda name: ("lora_A" in name or "query" in name, name))
        save_file({**tensors, first: tensors[first] * 1.5}, place, metadata={"format": "pt"})
        monkeypatch.setattr(resources, "load_base", base_models.load_base)  # the tests' own keeps what it loaded
        with pytest.raises(RunError, match=told):
            resume(run, report=False)
        place.write_bytes(whole)
    rewrite(tmp_path / "eval.jsonl", lambda rows: rows[1:])
    with pytest.raises(RunError, match=r"eval.jsonl changed since .60 rows then, 59 now"):
        resume(run, report=False)


def test_a_partitioner_that_divides_otherwise_is_refused(begun):
    from flwr_datasets.partitioner import DirichletPartitioner

    def partitioner(seed):
        return DirichletPartitioner(2, "label", 0.5, min_partition_size=2, seed=seed)

    run = begun(partitioner=partitioner(5))
    with pytest.raises(RunError, match="the division of rows changed since"):
        resume(run, partitioner=partitioner(4), report=False)


def test_a_run_of_an_older_version_goes_on_unchecked(begun, tmp_path):
    run = begun()
    facts = json.loads((run / "run.json").read_text())
    assert facts["classes"] == ["class0", "class1", "class2"]
    (run / "run.json").write_text(json.dumps({key: facts[key] for key in facts.keys() - {"inputs", "classes", "base"}}))
    rewrite(tmp_path / "train.jsonl", swapped)
    assert resume(run, report=False).summary["rounds"] == 2


def test_types_and_shapes_count_beside_bytes(config):
    data = load_resources(config("bert")).train_data
    one, other = data.take(np.arange(4)), data.take(np.arange(4))
    assert describe_rows(one, other)["train"] == describe_rows(one, other)["eval"]
    object.__setattr__(other, "labels", other.labels.astype(np.int32))
    assert describe_rows(one, other)["train"]["labels"] != describe_rows(one, other)["eval"]["labels"]


def test_a_damaged_config_of_a_run_is_one_message(begun):
    run = begun()
    for damage in (b"\xff\xfe", b"a: [", b"- 1"):
        (run / "config.yaml").write_bytes(damage)
        with pytest.raises(PeerloraError, match="config.yaml"):
            resume(run)
    (run / "run.json").write_text("[]")
    with pytest.raises(RunError, match="run.json is not valid JSON"):
        RunStore.open(run)


def test_the_page_lists_what_may_change():
    page = (Path(__file__).parents[2] / "docs" / "runs.md").read_text()
    told = page[page.index("Only these may change") :].split("\n- ")[0]
    assert set(re.findall(r"`(\w+\.\w+)`", told)) == set(_MAY_CHANGE)
