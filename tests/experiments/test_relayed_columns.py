"""Comparisons in which some settings relay: two more columns, and only then."""

import csv
import io
from dataclasses import replace

from peerlora.experiments.comparison import Comparison
from peerlora.experiments.measures import measure_run
from peerlora.experiments.statistics import Outcome, compare, to_long_rows
from peerlora.experiments.tables import column_names, csv_text, row_cells
from peerlora.runs.events import Evaluated, RoundDone, RunStarted

RELAYED = ["relayed client", "worst relayed client"]


def events(relayed=()):
    start = RunStarted("", "dec-lora", 2, 1, "accuracy", True, 0, 1, {}, {}, {"kind": "ring"}, 5, [])
    score = Evaluated(1, 10, [0.5, 0.75], 0.7, [1.0, 1.0], 1.0, 2.0, True)
    score = replace(score, relayed=list(relayed), relayed_loss=[1.0] * len(relayed))
    return [start, RoundDone(0, [1.0, 1.0], 0, 0, 0.5, 0.25, 0, 0.5, [], 1, 50, 100, 1, 1, 0), score]


def comparison(tmp_path, *relayed):
    outcomes = [
        Outcome.of_events(f"s{number}", {"relay": f"s{number}"}, 0, 0.01, "cells/x", events(scores))
        for number, scores in enumerate(relayed)
    ]
    return Comparison(tmp_path, compare(outcomes, {}), {"accuracy": True}, {}), outcomes


def test_columns_of_relayed_models_where_a_cell_has_them(tmp_path):
    result, outcomes = comparison(tmp_path, (), (0.25, 0.75))
    names = column_names(result)
    assert [name for name in names if "relayed" in name] == RELAYED
    plain, relays = (dict(zip(names, row_cells(result, line), strict=True)) for line in result.lines)
    assert [relays[name] for name in RELAYED] == ["0.500", "0.250"] and [plain[name] for name in RELAYED] == ["–", "–"]
    found = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert {(row["relay"], row["mean"]) for row in found if row["measure"] == RELAYED[1]} == {
        ("s0", ""),
        ("s1", "0.25"),
    }
    long = [row for row in to_long_rows(outcomes, "report") if row["metric"] == "relayed"]
    assert [(row["client"], row["value"]) for row in long] == [(0, 0.25), (1, 0.75)]


def test_no_such_columns_where_nothing_relays(tmp_path):
    result, _ = comparison(tmp_path, ())
    assert not any("relayed" in name for name in column_names(result)) and "relayed" not in csv_text(result)


def test_attackers_have_no_relayed_model():
    assert measure_run(events((0.5, float("nan"))))["relayed client"] == 0.5
