"""What events, summary, table, report and the long table tell of further metrics, own rows and best rounds."""

import json
from dataclasses import fields, replace

import pyarrow.parquet as pq
import pytest
from test_relayed_report import written

from peerlora.cli.progress import Progress, print_summary
from peerlora.errors import RunError
from peerlora.runs.events import Evaluated, RoundDone, RunStarted, contradiction, from_json, to_json
from peerlora.runs.further_scores import describe_best
from peerlora.runs.metrics import rows, summarise, write_table

NAN = float("nan")
SELECT = {"metric": "loss", "mode": "min", "rows": "common", "model": "own"}
MORE = {
    "own": {"macro-f1": [0.25, 0.5, NAN], "perplexity": [3.0, 7.0, NAN]},
    "averaged": {"macro-f1": [0.75], "perplexity": [2.0]},
    "personal": {"macro-f1": [0.125, NAN, NAN], "perplexity": [4.0, 5.0, NAN]},
}
ADDED = {"personal": [0.375, 0.875, NAN], "personal_loss": [1.5, 2.5, NAN], "metrics": MORE}
KEPT = {"best_rounds": [2, 4, 4], "best": [0.25, 0.75, NAN], "stopped": [1]}


@pytest.fixture
def further(run):
    """The events of a run of 3 clients, the last of which attacks, with everything that can be asked for."""
    changes = {RunStarted: {"select": SELECT}, Evaluated: ADDED | KEPT}
    return [replace(event, **changes.get(type(event), {})) for event in run()]


def evaluated(events):
    return [event for event in events if isinstance(event, Evaluated)]


def test_events_come_back_as_they_were(further):
    for event in further:
        assert repr(from_json(to_json(event))) == repr(event)


def test_lines_of_older_versions_are_read(run):
    """They know none of the fields that were added."""
    new = {"personal", "personal_loss", "personal_relayed", "personal_relayed_loss", "metrics"}
    new |= {"best_rounds", "best", "stopped"}
    (event, *_) = evaluated(run())
    assert new < {each.name for each in fields(event)}
    tree = {name: value for name, value in json.loads(to_json(event)).items() if name not in new}
    assert repr(from_json(json.dumps(tree))) == repr(event)


@pytest.mark.parametrize(
    "change",
    [
        {"personal": [0.5]},
        {"best": [0.5, 0.5]},
        {"best_rounds": [1]},
        {"metrics": {"own": {"macro-f1": [0.5, 0.5]}}},
        {"metrics": {"personal": {"macro-f1": [0.5]}}},
    ],
)
def test_lists_of_other_clients_are_a_contradiction(further, change):
    start, event = further[0], evaluated(further)[0]
    assert not contradiction(event, start)
    assert "in a run of 3" in contradiction(replace(event, **change), start)


def test_values_of_a_wrong_type_are_damage(further):
    tree = json.loads(to_json(evaluated(further)[0]))
    for wrong in ({"own": [0.5]}, {"own": {"macro-f1": "high"}}, {"own": {"macro-f1": [True]}}):
        with pytest.raises(RunError, match="values of a wrong type: metrics"):
            from_json(json.dumps(tree | {"metrics": wrong}))


def test_the_summary_has_them_without_attackers(further, run):
    found = summarise(further)
    assert found["scores"]["personal_mean"] == 0.625 and found["scores"]["personal_worst"] == 0.375
    assert found["metrics"]["macro-f1"] == {
        "own_mean": 0.375,
        "own_worst": 0.25,
        "averaged": 0.75,
        "personal_mean": 0.125,
        "personal_worst": 0.125,
    }
    assert found["metrics"]["perplexity"]["own_worst"] == 7.0, "lower is better"
    kept = {"mean": 0.5, "values": [0.25, 0.75, None], "rounds": [2, 4, 4], "stopped": [1]}
    assert found["best"] == SELECT | kept
    plain = summarise(run())
    assert not {"metrics", "best"} & set(plain) and set(plain["scores"]) == {
        *("own_mean", "own_min", "own_max", "averaged")
    }


def test_the_long_table_has_a_row_for_each_number(further, tmp_path):
    last = evaluated(further)[-1].round
    found = {(client, name): value for client, done, name, value in rows(further) if done == last}
    assert found[0, "personal"] == 0.375 and found[1, "personal_loss"] == 2.5
    assert found[1, "own_macro-f1"] == 0.5 and found[None, "averaged_macro-f1"] == 0.75
    assert found[0, "personal_perplexity"] == 4.0 and found[1, "best"] == 0.75 and found[1, "best_round"] == 4
    write_table(further, tmp_path / "metrics.parquet")
    assert pq.read_table(tmp_path / "metrics.parquet").num_rows == len(list(rows(further)))


def test_the_report_has_their_numbers(further, run, tmp_path):
    page, plain = written(tmp_path / "further", further), written(tmp_path / "plain", run())
    for told in (
        "macro-f1, averaged model",
        "on held-out rows or in environments of their own",
        "0.625",
        "scores of the best rounds flatter",
    ):
        assert told in page and told not in plain


def test_the_table_at_the_end_says_them_in_a_line_each(further, capsys):
    summary = summarise(further) | {"run": "runs/one"}
    print_summary([("one", summary)])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "one: accuracy: mean 0.625, worst 0.375 (clients' own models, on held-out rows or in environments of their own)"
        in shown
    )
    assert "one: macro-f1: mean 0.375, worst 0.250, averaged 0.750 (clients' own models); mean 0.125" in shown
    assert (
        "one: best adapters: of rounds 2 to 4, each client's by the minimum of loss (mean 0.500) on the common" in shown
    )
    assert "one: trained no more at the end (eval.patience): clients 1" in shown


def test_what_was_chosen_on_own_rows_flatters_there_alone(further):
    own = {"best": summarise(further)["best"] | {"rows": "own", "stopped": [], "rounds": [3, 3, 3]}}
    (told,) = describe_best(own)
    assert "of round 3," in told and told.endswith("scores on these flatter, and those on the common rows do not")
    assert describe_best({}) == []


def test_the_progress_line_has_own_rows(further):
    shown = Progress()
    for event in further:
        shown(event)
    (done, *_) = [event for event in further if isinstance(event, RoundDone)]
    assert shown._facts(done)["own rows"] == "0.625"
