"""The study of the prior-adjusted loss at a size of seconds."""

import importlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("study_label_prior")


def write(folder, column, labels, rows):
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for split in ("train", "validation"):
        marks = [int(draw.integers(labels)) for _ in range(rows)]
        texts = [" ".join(f"w{label * 9 + draw.integers(12)}" for _ in range(4)) for label in marks]
        pq.write_table(pa.table({column: texts, "label": marks}), folder / f"{split}.parquet")


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "glue" / "sst2", "sentence", 2, 400)
    write(tmp_path / "extra" / "ag_news", "text", 4, 400)
    return tmp_path


def test_every_condition_composes_to_what_it_is_named_after(study, data):
    found = {}
    for name, method, prior in study.conditions(""):
        config = study.cell_config(data, name, method, prior, 1e-3, 0, False, 2)
        assert config.algorithm.name == method and config.train.label_prior == prior
        found.setdefault(name, []).append((method, prior))
    assert set(found) == set(study.PARTS)
    assert ("local", "uniform") in found["sst2 p=0.1"] and ("local", "uniform") not in found["sst2 p=0.02"]
    assert {name for name, row in found.items() if ("dec-lora", "pooled") in row} == set(study.UNEVEN)
    for name, row in found.items():
        methods = study.LONG.get(name, ("dec-lora",))
        assert {(method, prior) for method in methods for prior in ("none", "uniform")} <= set(row)
        assert name not in study.LONG or config.train.rounds == 5


@pytest.mark.slow
def test_a_tiny_study_end_to_end(study, data, models, cache, tmp_path, monkeypatch):
    plain = study.cell_config

    def small(*words):
        config = plain(*words)
        model = config.model.model_copy(update={"source": models("bert")})
        data = config.data.model_copy(update={"max_length": 8})
        return config.model_copy(update={"model": model, "data": data})

    monkeypatch.setattr(study, "cell_config", small)
    monkeypatch.setattr(study, "RATES", (1e-3, 2e-3))
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    monkeypatch.setattr(study, "METHODS", {"dec-lora": "algorithm.name=dec-lora"})
    monkeypatch.setattr(study, "run_cells", run_here)
    out = tmp_path / "out.json"
    study.run_study(data, out, 2, 1, "shifted")
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 2 * 2 + 3 * 2  # a pooled target takes the rate of the uniform one
    cell = cells["final|sst2 shifted|dec-lora|uniform|0"]
    assert len(cell["calibration_error"]) == 10 and len(cell["recalls"][0]) == 2
    labels = np.bincount(pq.read_table(data / "glue" / "sst2" / "validation.parquet")["label"].to_numpy())
    labels = labels.clip(max=200)
    accuracy = np.array(cell["recalls"]) @ (labels / labels.sum())
    assert accuracy.mean() == pytest.approx(cell["accuracy"]["own_mean"])
    assert cell["pooled"][0] > 1.5 * cell["pooled"][1]
    table = study.render(out, 2)
    assert table.count("| dec-lora |") == 3 and "**sst2 shifted**" in table


def run_here(cells, path, wanted, workers, run):
    """As the study's own, in this process."""
    for key, config in wanted.items():
        cells[key] = run(config)
    facts = {"versions": {"torch": "-"}}
    path.write_text(json.dumps({"facts": facts, "config": config.model_dump(mode="json"), "cells": cells}))
