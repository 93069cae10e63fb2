"""Comparisons of runs with further metrics, rows of clients' own and best rounds: more columns, and only then."""

import csv
import io
from dataclasses import replace

import pytest
from test_relayed_columns import events

from peerlora.config.loading import load_config
from peerlora.experiments.comparison import Comparison
from peerlora.experiments.measures import MEASURES, count_work, measure_run
from peerlora.experiments.statistics import Outcome, compare, to_long_rows
from peerlora.experiments.tables import column_names, csv_text, row_cells
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events

MORE = {"own": {"macro-f1": [0.25, 0.5]}, "averaged": {"macro-f1": [0.875]}, "personal": {"macro-f1": [0.5, 1.0]}}
ADDED = {"personal": [0.5, 1.0], "personal_loss": [1.0, 1.0], "metrics": MORE, "best": [0.75, 0.25]}
EXPECTED = {
    "personalised client": 0.75,
    "worst personalised client": 0.5,
    "best rounds of clients": 0.5,
    "macro-f1, mean client": 0.375,
    "macro-f1, worst client": 0.25,
    "macro-f1, averaged model": 0.875,
}


def further():
    *before, score = events()
    return [*before, replace(score, **ADDED, best_rounds=[1, 0])]


def comparison(tmp_path, *runs):
    outcomes = [
        Outcome.of_events(f"s{number}", {"own": f"s{number}"}, 0, 0.01, "cells/x", each)
        for number, each in enumerate(runs)
    ]
    return Comparison(tmp_path, compare(outcomes, {"own": "s0"}), {"accuracy": True}, {"own": "s0"}), outcomes


def test_a_run_is_measured_by_them():
    found = measure_run(further())
    assert {name: found[name] for name in EXPECTED} == EXPECTED and set(EXPECTED) < set(MEASURES)
    assert not set(EXPECTED) & set(measure_run(events()))


def test_they_are_columns_where_a_line_has_them(tmp_path):
    result, outcomes = comparison(tmp_path, events(), further())
    names = column_names(result)
    plain, more = (dict(zip(names, row_cells(result, line), strict=True)) for line in result.lines)
    shown = [name for name in EXPECTED if name in names]
    assert set(EXPECTED) - set(shown) == {"macro-f1, worst client", "macro-f1, averaged model"}, "in table.csv"
    assert [more[name] for name in shown] == [f"{EXPECTED[name]:.3f}" for name in shown]
    assert all(plain[name] == "–" for name in shown)
    found = {row["measure"]: row["mean"] for row in csv.DictReader(io.StringIO(csv_text(result))) if row["own"] == "s1"}
    assert {name: float(found[name]) for name in EXPECTED} == EXPECTED
    long = {(row["client"], row["metric"]): row["value"] for row in to_long_rows(outcomes, "report")}
    assert long[1, "own_macro-f1"] == 0.5 and long[None, "averaged_macro-f1"] == 0.875


def test_there_are_none_of_them_otherwise(tmp_path):
    result, _ = comparison(tmp_path, events())
    assert not set(EXPECTED) & set(column_names(result)) and "f1" not in csv_text(result)


def test_accumulated_minibatches_are_work():
    rounds, words = select_events(events(), RoundDone), ["clients=2", "algorithm.name=dec-lora", "train.local_steps=5"]
    once, often = (count_work(rounds, load_config({}, [*words, f"train.accumulate={n}"])) for n in (1, 3))
    assert often == {name: pytest.approx(3 * value) for name, value in once.items()}
