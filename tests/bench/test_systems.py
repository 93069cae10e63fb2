"""The conditions of the systems study: what they compose to, and what their tables are taken from."""

import importlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peerlora.config.loading import load_config
from peerlora.experiments.grid import load_grid
from peerlora.experiments.trials import plan_search, plan_trials
from peerlora.runs.events import Evaluated, RoundDone

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def systems(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("systems")


@pytest.fixture
def data(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    for folder, column, labels in (("glue/sst2", "sentence", 2), ("extra/ag_news", "text", 4)):
        (tmp_path / folder).mkdir(parents=True)
        for split in ("train", "validation"):
            marks = draw.integers(labels, size=12000)
            table = pa.table({column: [f"{column} {i}" for i in range(12000)], "label": marks.astype("int64")})
            pq.write_table(table, tmp_path / folder / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Rates(dict):
    """One for every row."""

    def __missing__(self, _row):
        return 3e-3


@pytest.mark.slow
def test_every_condition_is_a_grid_without_a_refused_cell(systems, data):
    for name, condition in systems.CONDITIONS.items():
        grid = load_grid(systems.grid(name, data, Rates()))
        for found in (plan_trials(grid), plan_search(grid)):
            assert not found.refused
        trials = plan_trials(grid).trials
        assert {trial.config.seed for trial in trials} == {0, 1, 2}
        alone = [trial.config for trial in trials if trial.labels["system"] == systems.ALONE]
        assert alone and all(config.train.label_prior == "uniform" for config in alone)
        assert all(config.algorithm.name == "local" for config in alone)
        rates = {trial.config.train.lr for trial in trials}
        assert rates == ({condition.rates[0]} if condition.rates else {3e-3})
        assert bool(plan_search(grid).trials) == bool(condition.rates)


def test_strangers_hold_news_under_random_labels(systems, data):
    table = pq.read_table(systems.with_strangers(data)).to_pandas()
    assert table["client"].value_counts().to_dict() == dict.fromkeys(range(10), 1000)
    news = table["sentence"].str.startswith("text")
    assert set(table["client"][news]) == set(systems.STRANGERS)
    share = table.groupby("client")["label"].mean()
    assert share[0] == pytest.approx(0.1) and share[3] == pytest.approx(0.9) and share[6] == 0.5
    assert all(0.4 < share[client] < 0.6 for client in systems.STRANGERS)


def evaluated(round, own, seconds):
    blank = {"rows": 4, "averaged": 0.5, "own_loss": [1.0] * len(own), "averaged_loss": 1.0, "seconds": 1.0}
    return Evaluated(round=round, own=own, virtual_seconds=seconds, final=round == 4, **blank)


def round_done(t, sent):
    known = dict.fromkeys((field.name for field in fields(RoundDone)), 0.0)
    return RoundDone(**known | {"round": t, "bytes_sent": sent, "edges": [], "missed": {}, "absent": []})


def test_rows_are_taken_at_equal_cost(systems):
    def run(sent):
        looks = [evaluated(0, [0.5, 0.5, 0.0], 0.0), evaluated(2, [0.6, 0.7, 0.0], 200.0)]
        done = [round_done(t, sent) for t in range(4)]
        return systems.Run(1e-3, [looks[0], *done[:2], looks[1], *done[2:], evaluated(4, [0.8, 0.9, 0.0], 400.0)])

    condition = systems.Condition("", "ring", dict, rounds=3, seconds=250.0, judged=[0, 1])
    dear, cheap = systems.table(condition, {"dear": [run(100)] * 2, "cheap": [run(50)] * 2})
    at, thrifty = dear["at"], cheap["at"]
    assert at["end"]["mean"] == pytest.approx([0.85, 0.85]) and at["end"]["worst"] == [0.8, 0.8]
    assert at["rounds"]["round"] == [2, 2] and at["time"]["mean"] == pytest.approx([0.65, 0.65])
    assert at["bytes"]["round"] == [2, 2] and thrifty["bytes"]["round"] == [4, 4]  # 200 bytes each
    page = systems.render(condition, [dear, cheap])
    assert "| dear | 0.001 | 4 | 400 | 0.00 | 0.850 ± 0.000 (0.800) |" in page


def test_the_base_of_a_condition_is_a_config(systems, data):
    for name in systems.CONDITIONS:
        assert load_config(systems.grid(name, data, Rates())["base"]).clients == 10


def test_a_condition_without_a_clock_counts_gradients_and_bytes(systems):
    words = ["clients=10", "train.local_steps=5", "algorithm.name=fedspeed", "topology=ring"]
    run = [evaluated(0, [0.5], float("nan")), round_done(0, 2e7), round_done(1, 0), evaluated(2, [0.6], float("nan"))]
    looks = [each.virtual_seconds for each in systems.timed(run, load_config(None, words)) if hasattr(each, "own")]
    assert looks == [0.0, 2 * 5 * 2 + 2e7 / 10 / systems.UPLINK]
    clock = load_config(None, [*words, "clock.step=1.0"])
    assert systems.timed(run, clock) == run
