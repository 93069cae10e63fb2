import math
from dataclasses import replace

import pyarrow.parquet as pq

from peerlora.runs import metrics as table
from peerlora.runs.events import RoundDone


def read(events, path):
    table.write_table(events, path)
    return {(row["client"], row["round"], row["metric"]): row["value"] for row in pq.read_table(path).to_pylist()}


def test_the_table_holds_every_number_once_by_finished_rounds(tmp_path, run):
    found = read(run(clients=3, rounds=4), tmp_path / "metrics.parquet")
    assert found[2, 1, "loss"] == 0.2 and found[0, 4, "loss"] == 3.0 and (0, 0, "loss") not in found
    assert found[None, 4, "bytes_sent"] == 200 and found[None, 1, "consensus_product"] == 0.3
    assert found[1, 4, "own"] == 0.5001 and found[None, 4, "averaged"] == 0.9 and found[None, 4, "eval_rows"] == 50
    assert len(found) == 4 * (3 + len(table.PER_ROUND)) + 2 * (2 * 3 + 4)


def test_the_columns_have_their_types(tmp_path, run):
    table.write_table(run(), tmp_path / "metrics.parquet")
    types = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "metrics.parquet")}
    assert types == {"client": "int32", "round": "int32", "metric": "string", "value": "double"}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.parquet"]


def test_no_number_becomes_null_and_no_event_an_empty_table(tmp_path, run):
    events = [replace(e, loss=[math.nan] * 3) if isinstance(e, RoundDone) else e for e in run()]
    assert read(events, tmp_path / "metrics.parquet")[0, 1, "loss"] is None
    assert read([], tmp_path / "empty.parquet") == {}


def test_the_later_of_two_evaluations_of_a_round_counts(tmp_path, run):
    events = run()
    final = next(e for e in table.evaluations(events) if e.final)
    during = replace(final, own=[0.0] * 3, final=False, rows=5)
    found = read([*events[:-2], during, *events[-2:]], tmp_path / "metrics.parquet")
    assert found[0, 4, "own"] == 0.5 and found[None, 4, "eval_rows"] == 50


def test_contacts_and_link_uses_by_hand(run):
    meetings = [[[0, 1], [2, 1]], [[1, 0]], []]
    rounds = [e for e in run(clients=4, rounds=3) if isinstance(e, RoundDone)]
    events = [replace(done, edges=edges) for done, edges in zip(rounds, meetings, strict=True)]
    assert table.last_contact(events, 4) == [2, 2, 1, None]
    assert table.link_uses(events) == {(0, 1): 2, (1, 2): 1}
    assert table.link_uses([replace(done, edges=None) for done in rounds]) is None
    both_ways = [replace(done, edges=[[0, 1], [1, 0], [1, 2]]) for done in rounds[:2]]
    assert table.link_uses(both_ways) == {(0, 1): 2, (1, 2): 2}


def test_where_a_round_lacks_its_links_no_last_contact_is_known(made):
    listed = made.round_done(0, 4, [[0, 1]])
    unlisted = replace(listed, round=1, edges=None, contacts=5050)
    quiet = replace(made.round_done(2, 4), edges=None)  # without contacts there is nothing to list
    assert table.links_written([listed, quiet]) and table.last_contact([listed, quiet], 4) == [1, 1, None, None]
    for events in ([listed, unlisted, quiet], [unlisted]):
        assert not table.links_written(events) and table.last_contact(events, 4) is None
        assert table.summarise([made.started(4), *events])["last_contact"] is None


def test_the_summary_of_a_run_and_of_nothing(run):
    found = table.summarise(run(clients=2, rounds=4))
    assert found["rounds"] == 4 and found["bytes_sent"] == 800 and found["last_contact"] == [4, 4]
    assert found["accuracy"] == {"own_mean": 0.50005, "own_min": 0.5, "own_max": 0.5001, "averaged": 0.9}
    assert found["seconds"] == {"total": 11.0, "train": 4.0, "mix": 2.0, "diagnostics": 1.0, "eval": 4.0}
    assert table.summarise([])["scores"]["own_mean"] is None
    assert table.summarise(run(stop=0))["consensus"]["A"] is None


def test_virtual_seconds_are_in_the_table_of_a_run_on_a_clock_only(tmp_path, run):
    events = [
        replace(e, virtual_seconds=1.5 * (e.round + 1), absent=[0, 2]) if isinstance(e, RoundDone) else e for e in run()
    ]
    found = read(events, tmp_path / "timed.parquet")
    assert found[None, 2, "virtual_seconds"] == 3.0 and found[None, 2, "absent"] == 2
    assert table.summarise(events)["virtual_seconds"] == 6.0
    assert not any(name in ("virtual_seconds", "absent") for _, _, name in read(run(), tmp_path / "plain.parquet"))
    assert table.summarise(run())["virtual_seconds"] is None
