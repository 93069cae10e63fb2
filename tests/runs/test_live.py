"""The live page: a log that grows, the state of a federation, and a server that gives it to nobody else."""

import json
import math
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec

import pytest

from peerlora.cli.watch import _planned
from peerlora.config.loading import parse_spec
from peerlora.errors import ConfigError, ExtraMissing, RunError
from peerlora.network.base import REASONS
from peerlora.runs.client_spread import spread
from peerlora.runs.events import LISTED_CLIENTS, CaughtUp, NeighbourChanged, RunFinished, Warned, to_json
from peerlora.runs.live.follow import EventTail
from peerlora.runs.live.notices import KEPT, NAMED
from peerlora.runs.live.process import holder_of, usage_of
from peerlora.runs.live.source import GridSource, RunSource, held_of, source_of
from peerlora.runs.live.standing import status_of
from peerlora.runs.live.state import SHOWN_ROUNDS, LiveRun
from peerlora.runs.live.table import FEW_CLIENTS
from peerlora.runs.store import RunStore
from peerlora.topology.schedule import build_topology

ASSETS = files("peerlora.runs") / "assets"
served = pytest.mark.skipif(
    find_spec("uvicorn") is None or find_spec("starlette") is None,
    reason="starlette and uvicorn are not installed (pip install '.[watch]')",
)


def write(folder, events, mode="w"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "run.json"):
        (folder / name).exists() or (folder / name).write_text("{}")
    with open(folder / "events.jsonl", mode) as log:
        log.writelines(to_json(event) + "\n" for event in events)
    return folder


def live(events, held=()):
    made = LiveRun()
    for event in events:
        made.add(json.loads(to_json(event)), held)
    return made


def test_lines_are_read_when_they_are_whole_and_a_log_that_was_cut_back_is_read_anew(tmp_path, run):
    tail, events = EventTail(tmp_path), run()
    assert tail.poll() == (False, [])
    write(tmp_path, events[:3])
    assert [each["type"] for each in tail.poll()[1]] == ["RunStarted", "Evaluated", "RoundDone"]
    line = to_json(events[3]) + "\n"
    with open(tmp_path / "events.jsonl", "a") as log:
        log.write(line[:20])
        log.flush()
        assert tail.poll() == (False, [])
        log.write(line[20:] + "no event\n[1]\n")
    assert [each["round"] for each in tail.poll()[1]] == [1]
    write(tmp_path, [events[0], Warned("a resumed run goes another way")])
    anew, found = tail.poll()
    assert anew and [each["type"] for each in found] == ["RunStarted", "Warned"]


def test_a_log_longer_than_one_reading_is_read_in_several(tmp_path, run, monkeypatch):
    monkeypatch.setattr("peerlora.runs.live.follow._MOST_BYTES", 3000)
    events = run(rounds=12)
    tail, found = EventTail(write(tmp_path, events)), []
    while new := tail.poll()[1]:
        found += new
    assert len(found) == len(events)


def test_a_line_that_is_too_long_is_left_out_and_told_of_once(tmp_path, run, monkeypatch):
    monkeypatch.setattr("peerlora.runs.live.follow._MOST_BYTES", 1000)
    monkeypatch.setattr("peerlora.runs.live.follow._LONGEST_LINE", 3000)
    first, second, *_ = run()
    tail, folder = EventTail(write(tmp_path, [first])), tmp_path
    assert len(tail.poll()[1]) == 1
    with open(folder / "events.jsonl", "a") as log:
        log.write("x" * 3500)
        log.flush()
        (told,) = tail.poll()[1]
        assert told["type"] == "Warned" and "more than 3,000 bytes" in told["message"]
        log.write("x" * 10_000)
        log.flush()
        for _ in range(12):
            assert tail.poll() == (False, [])
        log.write("x\n" + to_json(second) + "\n")
    assert [each["type"] for each in tail.poll()[1]] == ["Evaluated"]
    write(folder, [first])
    anew, found = tail.poll()
    assert anew and len(found) == 1


def test_a_line_longer_than_one_reading_is_read(tmp_path, run, monkeypatch):
    monkeypatch.setattr("peerlora.runs.live.follow._MOST_BYTES", 50)
    tail = EventTail(write(tmp_path, run()))
    found = []
    while new := tail.poll()[1]:
        found += new
    assert len(found) == len(run())


def test_curves_have_mean_worst_and_every_client_where_they_are_few(made):
    found = live([made.started(3), made.round_done(0), made.evaluated(1, [0.5, 0.25, math.nan])])
    assert found.loss.entry(1, False) == {"x": 1, "mean": 0.1, "worst": 0.2, "who": 2, "all": [0.0, 0.1, 0.2]}
    assert found.score.entry(1, True) == {"x": 1, "mean": 0.375, "worst": 0.25, "who": 1, "all": [0.5, 0.25, None]}


def test_a_client_of_a_flow_policy_tells_its_environment(made):
    told = {"environment": "point-mass", "values": {"goal_x": [0.25, 0.5], "mass": [1.0, 2.0]}}
    found = live([replace(made.started(2), partition=told)])
    assert found.client(1)["environment"] == "point-mass with goal_x 0.5, mass 2"
    assert found.client(1)["labels"] is None
    assert live([replace(made.started(2), partition=told | {"values": {}})]).client(0)["environment"] == "point-mass"
    assert live([made.started(2)]).client(0)["environment"] == ""
    damaged = live([replace(made.started(2), partition=told | {"values": {"mass": ["heavy", 1]}})])
    assert damaged.notices[-1]["text"].startswith("a damaged event") and damaged.client(0)["environment"] == ""


def test_many_clients_come_as_quantiles_and_one_client_when_asked_for(made):
    many = FEW_CLIENTS + 1
    found = live([made.started(many), *(made.round_done(t, many) for t in range(3))])
    entry = found.loss.entry(1, False)
    assert "all" not in entry and entry["band"][2] == 3.0
    assert found.client(2)["loss"] == {"x": [1, 2, 3], "y": pytest.approx([0.2, 1.2, 2.2])}


def test_the_last_evaluation_on_other_rows_is_no_point_of_the_curve(run):
    found = live(run())
    assert sorted(found.score.rows) == [0]
    assert found.final["rows"] == 50 and found.final["mean"] == pytest.approx(0.5001)


def test_what_a_page_knows_is_not_sent_again(made):
    found = live([made.started(3, rounds=30), *(made.round_done(t, edges=[[0, 1]]) for t in range(20))])
    everything = found.since(-1, -1)
    assert len(everything["rounds"]) == 20 and len(everything["links"]) == SHOWN_ROUNDS
    found.add(json.loads(to_json(made.round_done(20, edges=[[1, 2]]))), ())
    update = found.since(21, found.numbered)  # events: the start, and 20 rounds
    assert [each["x"] for each in update["rounds"]] == [21] == [each["x"] for each in update["loss"]]
    assert update["links"] == {"21": [[1, 2]]} and update["notices"] == []


def test_a_peer_that_stopped_long_ago_makes_no_update_longer(made):
    found = LiveRun()
    for client, rounds in ((0, 3), (1, 40)):
        found.add(json.loads(to_json(made.started(2, rounds=50, held=[client]))), [client])
        for t in range(rounds):
            found.add(json.loads(to_json(made.round_done(t, 1))), [client])
    known = found.taken
    found.add(json.loads(to_json(made.round_done(40, 1))), [1])
    assert [each["x"] for each in found.since(known, found.numbered)["rounds"]] == [41]
    found.add(json.loads(to_json(made.round_done(3, 1))), [0])  # it goes on
    assert [each["x"] for each in found.since(known, found.numbered)["rounds"]] == [4, 41]


def test_why_a_link_was_not_used_says_how_the_neighbour_stands():
    words = {reason: status_of(reason) for reason in REASONS}
    assert {reason for reason, word in words.items() if word != "refused"} == {"late"}
    assert words["late"] is None  # the neighbour's round was over: this client was late itself
    assert status_of("refused: wrong-config (train.lr)") == "refused"
    for reason, word in {
        "absent": "absent",
        "down": "absent",
        "not on the member list": "absent",
        "no message": "late",
        "no acknowledgement": "late",
        "behind": "late",
        "ahead": None,
        "not asked": None,
        "sum given up": None,
        "too many messages waiting": None,
    }.items():
        assert status_of(reason) == word, reason


def peer_log(made, client, missed, rounds=6, clients=3):
    """The events of a peer that exchanges with all others but those ``missed``: round index -> neighbour -> reason."""
    events = [made.started(clients, rounds=rounds + 4, held=[client])]
    for t in range(rounds):
        gone = missed.get(t, {})
        met = [[client, each] for each in range(clients) if each != client and str(each) not in gone]
        events.append(replace(made.round_done(t, 1, met), missed=gone))
    return events


def read_one_after_the_other(logs):
    found = LiveRun()
    for client, events in logs.items():
        for event in events:
            found.add(json.loads(to_json(event)), [client])
    return found


def test_what_an_old_round_says_of_a_client_does_not_stay(made):
    late = {1: {"2": "no message"}}
    logs = {2: peer_log(made, 2, {}), 0: peer_log(made, 0, late), 1: peer_log(made, 1, {})}
    assert read_one_after_the_other(logs).status == {}
    part = {2: logs[2], 0: logs[0][:3]}  # the log of 0 is read up to the round that says it
    assert read_one_after_the_other(part).status == {}
    assert read_one_after_the_other({0: logs[0][:3]}).status == {2: "late"}


def test_what_the_last_round_says_stays_whatever_is_read_first(made):
    gone = {t: {"2": "absent"} for t in range(3, 6)}
    logs = {0: peer_log(made, 0, gone), 1: peer_log(made, 1, gone), 2: peer_log(made, 2, {}, rounds=3)}
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        assert read_one_after_the_other({each: logs[each] for each in order}).status == {2: "absent"}, order
    refused = logs | {1: peer_log(made, 1, {t: {"2": "wrong-config"} for t in range(3, 6)})}
    assert read_one_after_the_other(refused).status == {2: "refused"}


def test_a_neighbour_that_is_down_is_absent_until_it_is_there_again(made):
    def told(kind, detail=""):
        return NeighbourChanged("", 3, 2, kind, detail)

    before = [*peer_log(made, 0, {}, rounds=3), told("suspect")]
    assert read_one_after_the_other({0: before}).status == {}
    assert read_one_after_the_other({0: [*before, told("down")]}).status == {2: "absent"}
    assert read_one_after_the_other({0: [*before, told("down"), told("up")]}).status == {}
    met = made.round_done(3, 1, [[0, 2]])
    assert read_one_after_the_other({0: [*before, told("down"), met]}).status == {}
    other = [*peer_log(made, 1, {}, rounds=5)]
    assert read_one_after_the_other({0: [*before, told("down")], 1: other}).status == {}  # it exchanges with another
    for detail, word in (("wrong-config: train.lr", "refused"), ("late: round 1", "late")):
        assert read_one_after_the_other({0: [*before, told("refused", detail)]}).status == {2: word}
    ended = {2: [*peer_log(made, 2, {}, rounds=3), RunFinished("", {})], 0: [*before, told("down")]}
    assert read_one_after_the_other(ended).status == {}


def test_notices_of_peers_tell_the_round_that_the_peer_is_in(made):
    logs = {0: [*peer_log(made, 0, {}, rounds=5), Warned("a")], 1: [*peer_log(made, 1, {}, rounds=2), Warned("b")]}
    told = {each["text"]: each["round"] for each in read_one_after_the_other(logs).notices}
    assert told == {"a": 5, "b": 2}


def test_a_client_has_bytes_along_its_links(made):
    both = [made.started(3), made.round_done(0, edges=[[0, 1], [1, 2]]), made.round_done(1, edges=[[0, 1]])]
    assert [live(both).client(each)["bytes"]["y"] for each in range(3)] == [[100, 200], [200, 300], [100, 100]]
    one_way = [replace(each, bytes_sent=100 * each.contacts) for each in both[1:]]
    found = live([both[0], *one_way])
    assert [found.client(each)["bytes"]["y"] for each in range(3)] == [[100, 200], [100, 100], [0, 0]]
    assert live([both[0], replace(both[1], edges=None)]).client(0)["bytes"] == {"x": [], "y": []}


def test_bytes_of_a_client_are_right_where_only_some_rounds_go_one_way(made):
    topology, found, total = build_topology(parse_spec("one-peer"), 4, 0), LiveRun(), 0
    found.add(json.loads(to_json(made.started(4, 6))), ())
    listed = []
    for t in range(6):
        edges = [list(edge) for edge in topology.at(t).edges]
        listed.append(len(edges))
        done = replace(made.round_done(t, 4, edges), bytes_sent=400)  # every client sends to one other
        total += done.bytes_sent
        found.add(json.loads(to_json(done)), ())
        curves = [found.client(each)["bytes"]["y"] for each in range(4)]
        assert curves == [[100 * (past + 1) for past in range(t + 1)]] * 4
        assert sum(curve[-1] for curve in curves) == total
    assert listed == [4, 2] * 3  # in the last round of a period the links go both ways


def test_the_opening_makes_no_link_of_the_first_round_go_both_ways(made):
    def sent(opening, *rounds):
        events = [replace(made.round_done(t, 3, edges), bytes_sent=each) for t, (edges, each) in enumerate(rounds)]
        events[0] = replace(events[0], bytes_sent=events[0].bytes_sent + opening)
        found = live([made.started(3), *events])
        return [found.client(each)["bytes"]["y"] for each in range(3)]

    both_listed, ring, pair = [[0, 1], [1, 0], [0, 2]], [[0, 1], [1, 2], [2, 0]], [[0, 1]]
    assert sent(10_000, (both_listed, 300)) == [[200], [100], [0]]
    assert sent(50, (ring, 300), (pair, 200)) == [[100, 200], [100, 200], [100, 100]]
    assert sent(10_000, (ring, 300), (ring, 300)) == [[100, 200]] * 3
    assert sent(10_000, (pair, 200), (ring, 300)) == [[100, 200], [100, 200], [0, 100]]


def test_in_how_many_rounds_a_client_exchanged_is_told_where_all_rounds_list_their_links(made):
    listed = [made.started(3), *(made.round_done(t, edges=[[0, 1]]) for t in range(2))]
    assert [live(listed).client(0)[name] for name in ("met", "last")] == [2, 2]
    unlisted = replace(listed[2], edges=None, contacts=5050, bytes_sent=1_010_000)
    for events in (
        [*listed[:2], unlisted],
        [listed[0], unlisted],
        [*listed[:2], unlisted, replace(listed[2], round=2)],
    ):
        found = live(events).client(0)
        assert found["met"] is None and found["last"] is None and found["bytes"] == {"x": [], "y": []}
    assert live([*listed, replace(made.round_done(2), edges=None)]).client(2)["met"] == 0


def test_a_peer_has_the_bytes_that_it_says(made):
    log = [made.started(2, held=[1]), *(replace(made.round_done(t, 1), bytes_sent=70, edges=[]) for t in range(2))]
    found = read_one_after_the_other({1: log})
    assert found.client(1)["bytes"] == {"x": [1, 2], "y": [70, 140]}
    assert found.client(0)["bytes"]["y"] == [0, 0]


def test_absences_and_evaluations_are_events_of_their_clients(made):
    away = [[], [2], [2], [0, 2], []]
    rounds = [replace(made.round_done(t), absent=each) for t, each in enumerate(away)]
    found = live([made.started(3, rounds=5), *rounds, made.evaluated(5, [0.5, 0.25, 1.0])])
    told = [(each["level"], each["round"], each["text"]) for each in found.notices]
    assert told == [
        ("absence", 2, "absent: client 2"),
        ("absence", 4, "absent: client 0, client 2"),
        ("score", 5, "accuracy after 5 rounds, on 20 rows: mean 0.5833, worst 0.25 (client 1)"),
    ]
    assert [each["round"] for each in found.client(2)["notices"]] == [2] and found.status == {}
    assert [each["text"] for each in found.client(1)["notices"]] == [told[-1][2]]


@pytest.mark.parametrize(
    ("deadline", "away", "word"), [(None, [1], "absent"), (2.0, [], "late"), (2.0, [1], "absent or late")]
)
def test_an_absent_client_is_called_what_the_clock_lets_us_know(made, deadline, away, word):
    start = made.started(3, clock={"deadline": deadline, "away": away})
    assert live([start, replace(made.round_done(0), absent=[1])]).status == {1: word}


def test_notices_are_bounded_and_many_do_not_hide_the_warnings(made):
    many = NAMED + 5
    found = live([made.started(many, rounds=9999), Warned("look here")])
    for t in range(KEPT + 10):
        event = replace(made.round_done(t, many), absent=list(range(many - t % 2)))
        found.add(json.loads(to_json(event)), ())
    assert len(found.notices) == KEPT + 1 and found.notices[0]["text"] == "look here"
    assert found.notices[-1]["text"].endswith("and 4 more") and len(found.notices[-1]["clients"]) == NAMED
    assert found.client(many - 1)["notices"][-1]["round"] == KEPT + 9  # also of who is not named


def test_more_clients_than_a_round_lists_have_their_mean_and_spread(made):
    many = LISTED_CLIENTS + 1
    told = replace(made.round_done(0, 3), loss=[], measures=spread("loss", [1.0, 2.0, 6.0]))
    found = live([made.started(many, partition={}), told, replace(told, round=1, measures={})])
    update = found.since(-1, -1)
    assert update["loss"] == [
        {"x": 1, "mean": 3.0, "worst": 6.0, "who": None, "band": [1.0, 1.5, 2.0, 4.0, 6.0], "whole": True}
    ]
    assert len(update["rounds"]) == 2 and update["clients"]["loss"] == []


def test_peers_are_one_federation(made):
    names = {"0": "north", "1": "south"}
    found = LiveRun()
    for client in (0, 1):
        events = [made.started(2, held=[client], names=names, partition={"names": ["a"], "counts": [[client + 5]]})]
        events += [made.round_done(0, 1, [[0, 1]])]
        for event in events:
            found.add(json.loads(to_json(event)), [client])
    found.add(json.loads(to_json(NeighbourChanged("", 1, 1, "down", "no heartbeat"))), [0])
    found.add(json.loads(to_json(CaughtUp("", 1, 4, 0, True))), [1])
    assert found.loss.entry(1, False)["all"] == [0.0, 0.0] and found.meta["counts"] == [[5], [6]]
    assert found.links[1].tolist() == [[0, 1]] and found.rounds[1]["bytes_sent"] == 400
    assert found.done == {0: 1, 1: 1} and found.status == {1: "catching up"}
    assert [each["text"] for each in found.notices] == ["south: down no heartbeat", "left out rounds 1 to 4"]


def test_a_damaged_event_costs_nothing_but_itself(made):
    found = live([made.started(3)])
    start = json.loads(to_json(made.started(3)))
    for damaged in (
        {"type": "RoundDone"},
        {"type": "Evaluated", "round": "x", "own": 3},
        {"type": "Evaluated", "round": math.inf, "rows": 1, "own": []},
        {"type": "NeighbourChanged"},
        {**start, "clients": 10**12},
        {**start, "names": 3, "partition": []},
    ):
        found.add(damaged, ())
    found.add(json.loads(to_json(made.round_done(0))), ())
    assert len(found.rounds) == 1 and found.loss.clients == 3
    assert [each["text"][:25] for each in found.notices] == [f"a damaged event of type {kind}" for kind in "REENRR"]
    found.add({"type": "RoundDone", "round": 1, "loss": [], "measures": {"loss_mean": "x"}}, ())
    assert found.notices[-1]["text"].startswith("a damaged event") and found.since(-1, -1)["loss"]
    found.add({"type": "Warned", "message": "x" * 10**6}, ())
    assert len(found.notices[-1]["text"]) == 2000


def test_how_a_run_stands_is_read_from_its_lock(tmp_path, run):
    with RunStore.create(tmp_path / "run", "{}", {}) as store:
        store.emit(run()[0])
        source = RunSource(tmp_path / "run")
        source.poll()
        assert holder_of(tmp_path / "run") is not None
        standing = source.standing()
        assert standing["state"] == "running" and standing["memory"] > 1e6 and standing["processes"] == 1
    assert source.standing()["state"] == "stopped"
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert source.standing()["state"] == "finished"
    assert usage_of(2**22 + 1) is None


def test_a_comparison_shows_its_trials_those_to_come_too(tmp_path, run):
    write(tmp_path / "cells" / "a__seed-0", run())
    (tmp_path / "cells" / "a__seed-0" / "summary.json").write_text("{}")
    write(tmp_path / "cells" / "b__seed-0", run(stop=2))
    (tmp_path / "grid.yaml").write_text("")
    source = source_of(tmp_path, lambda folder: ["cells/a__seed-0", "cells/b__seed-0", "cells/c__seed-0"])
    assert isinstance(source, GridSource) and source.poll() and not source.poll()
    cells = source.cells.values()
    assert [cell["state"] for cell in cells] == ["finished", "stopped", "planned"]
    assert [cell["done"] for cell in cells] == [4, 2, 0]
    write(tmp_path / "cells" / "b__seed-0", run()[4:5], "a")
    assert source.poll() and source.cells["cells/b__seed-0"]["done"] == 3


def test_a_folder_of_runs_as_of_a_demo_is_shown_as_a_comparison(tmp_path, run):
    for name in ("dec-lora", "adf-lora"):
        write(tmp_path / name, run())
    source = source_of(tmp_path)
    assert isinstance(source, GridSource) and source.poll()
    assert [(cell["name"], cell["state"], cell["done"]) for cell in source.cells.values()] == [
        ("adf-lora", "stopped", 4),
        ("dec-lora", "stopped", 4),
    ]


def test_a_comparison_whose_grid_cannot_be_read_shows_the_trials_that_are_there(tmp_path, run):
    write(tmp_path / "cells" / "a__seed-0", run())
    (tmp_path / "grid.yaml").write_text("axes: [")
    source = source_of(tmp_path, _planned)
    assert isinstance(source, GridSource) and source.poll() and list(source.cells) == ["cells/a__seed-0"]
    assert "grid.yaml" in source.lacking
    (tmp_path / "grid.yaml").write_text("unheard: 3")
    assert "unheard" in source_of(tmp_path, _planned).lacking
    (tmp_path / "grid.yaml").write_text("seeds: [0]")
    assert source_of(tmp_path, lambda folder: []).lacking == ""


@pytest.mark.parametrize("facts", ["", "[]", "{}", '{"held": 5}', '{"held": [-1]}', '{"held": ["x"]}', "[" * 9999])
def test_damaged_facts_of_a_run_hold_all_clients(tmp_path, facts):
    (tmp_path / "run.json").write_text(facts)
    assert held_of(tmp_path) == []


def test_a_folder_without_anything_to_show_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        source_of(tmp_path)
    with pytest.raises(RunError, match="cannot be read .*too long"):
        source_of(tmp_path / ("x" * 300))


def test_a_missing_extra_is_named(tmp_path, run, monkeypatch):
    from peerlora.runs.live.server import PageServer

    monkeypatch.setattr("peerlora.environment.find_spec", lambda name: None)
    with pytest.raises(ExtraMissing, match=r"\.\[watch\]"):
        PageServer(RunSource(write(tmp_path, run())))


def test_nothing_on_the_page_asks_a_network():
    for asset in ASSETS.iterdir():
        if asset.name == "uPlot.LICENSE":
            continue
        text = asset.read_text(encoding="utf-8")
        addresses = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s\"')]*", text)) - {
            "http://www.w3.org/2000/svg"
        }
        addresses = {each for each in addresses if not each.startswith("https://github.com/leeoniya/uPlot")}
        assert not addresses, (asset.name, addresses)
        assert not re.search(r"@import|\bimportScripts\b|XMLHttpRequest|sendBeacon|WebSocket", text), asset.name


@contextmanager
def page(source, host="127.0.0.1"):
    import uvicorn

    from peerlora.runs.live.server import PageServer

    made = PageServer(source, host)
    config = uvicorn.Config(made.app(), log_level="warning", lifespan="on", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [made.socket]}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.should_exit = True
        thread.join(20)


def ask(address, method="GET", **headers):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(urllib.request.Request(address, method=method, headers=headers), timeout=20)
    except urllib.error.HTTPError as error:
        return error


def messages(answer):
    """(kind, body) of a stream of server-sent events."""
    kind = ""
    for line in answer:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            kind = text.removeprefix("event: ")
        elif text.startswith("data: "):
            yield kind, json.loads(text.removeprefix("data: "))


@served
def test_the_page_needs_its_token_and_only_answers(tmp_path, run):
    folder = write(tmp_path / "run", run())
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with page(RunSource(folder)) as made:
        with ask(made.address) as answer:
            assert answer.status == 200 and b"peerlora" in answer.read()
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        root = f"http://127.0.0.1:{made.port}/"
        for path in ("", "watch.html", "x" * len(made.token) + "/", f"{made.token[:-1]}/events"):
            assert ask(root + path).status == 404
        for path in ("../events.jsonl", "config.yaml", "watch.html", "client/99", "nothing"):
            assert ask(made.address + path).status == 404
        assert ask(made.address, Host="evil.example:80").status == 404
        assert ask(made.address, "POST").status == 405 and ask(made.address, "DELETE").status == 405
        for name in ("watch.js", "watch.css", "uPlot.iife.min.js", "uPlot.min.css"):
            with ask(made.address + name) as answer:
                assert answer.status == 200 and answer.read()
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


@served
def test_a_page_that_is_open_to_a_network_answers_by_any_name_to_those_with_the_token(tmp_path, run):
    with page(RunSource(write(tmp_path / "run", run())), "0.0.0.0") as made:
        assert made.address == f"http://{socket.gethostname()}:{made.port}/{made.token}/"
        here = f"http://127.0.0.1:{made.port}/{made.token}/"
        for host in ("127.0.0.1", f"10.1.2.3:{made.port}", "trainer.example:80", "[fe80::1]:8000", ""):
            with ask(here, Host=host) as answer:
                assert answer.status == 200
        assert ask(f"http://127.0.0.1:{made.port}/x/", Host="10.1.2.3").status == 404
    with page(RunSource(tmp_path / "run")) as made:
        for host, status in (
            ("localhost", 200),
            ("127.0.0.2:1", 200),
            ("[::1]:80", 200),
            ("[::1", 404),
            ("10.1.2.3", 404),
        ):
            assert ask(made.address, Host=host).status == status, host


class Untouchable:
    """A source that nobody may read."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was read")


@served
def test_nothing_is_read_for_those_who_are_not_admitted(tmp_path, run):
    with page(RunSource(write(tmp_path / "run", run()))) as made:
        root, source = f"http://127.0.0.1:{made.port}/x/", made.source
        made.source = made.cells = Untouchable()
        for path in ("", "events", "events?cell=x", "client/0", "client/" + "9" * 5000, "watch.js"):
            with ask(root + path) as answer:
                assert answer.status == 404, path
        made.source, made.cells = source, {}
        for number in ("9" * 5000, "-1", "1e3", "%D9%A1"):
            assert ask(f"{made.address}client/{number}").status == 404


@served
def test_a_look_that_fails_is_shown_and_the_page_goes_on(tmp_path, run, monkeypatch):
    events = run(rounds=4)
    source = RunSource(write(tmp_path / "run", events[:3]))
    poll, failing = source.poll, threading.Event()

    def fail_now_and_then():
        if failing.is_set():
            raise PermissionError(13, "Permission denied", "events.jsonl")
        return poll()

    monkeypatch.setattr(source, "poll", fail_now_and_then)
    with page(source) as made, ask(made.address + "events") as answer:
        heard = messages(answer)
        next(body for kind, body in heard if kind != "standing" and body["rounds"])
        failing.set()
        assert "Permission denied" in next(b["trouble"] for kind, b in heard if kind == "standing" and b["trouble"])
        write(tmp_path / "run", events[3:5], "a")
        failing.clear()
        seen = [next(heard) for _ in range(2)]
        assert any(kind == "standing" and body["trouble"] == "" for kind, body in seen)
        assert any(kind == "update" and body["rounds"][-1]["x"] == 3 for kind, body in seen)


@served
def test_an_update_that_fails_is_shown_and_the_page_goes_on(tmp_path, run, monkeypatch):
    source = RunSource(write(tmp_path / "run", run()))
    since, failures = LiveRun.since, iter([True, True])

    def fail_twice(self, *words):
        if next(failures, False):
            raise ValueError("odd numbers")
        return since(self, *words)

    monkeypatch.setattr(LiveRun, "since", fail_twice)
    with page(source) as made, ask(made.address + "events") as answer:
        heard = messages(answer)
        assert next(body for kind, body in heard if kind == "standing")["trouble"] == "odd numbers"
        assert next(body for kind, body in heard if kind != "standing")["meta"]["method"] == "adf-lora"


@served
def test_the_page_hears_of_what_is_written(tmp_path, run):
    events = run(rounds=4)
    folder = write(tmp_path / "run", events[:3])
    with page(RunSource(folder)) as made, ask(made.address + "events") as answer:
        heard = messages(answer)
        seen = {}
        while "RoundDone" not in seen:
            kind, body = next(heard)
            if body.get("rounds"):
                seen["RoundDone"] = [each["x"] for each in body["rounds"]]
        assert seen["RoundDone"] == [1]
        write(folder, events[3:5], "a")
        kind, body = next(each for each in heard if each[0] != "standing" and each[1]["rounds"][-1]["x"] == 3)
        assert kind == "update"
        with ask(made.address + "client/1") as client:
            assert json.load(client)["loss"]["x"] == [1, 2, 3]
        write(folder, [events[0]])
        assert next(each for each in heard if each[0] == "snapshot")[1]["rounds"] == []


@served
def test_the_page_of_a_comparison_leads_to_its_trials(tmp_path, run):
    write(tmp_path / "cells" / "a__seed-0", run())
    (tmp_path / "grid.yaml").write_text("")
    with page(source_of(tmp_path)) as made:
        with ask(made.address + "events") as answer:
            body = next(body for kind, body in messages(answer) if body["cells"])
            assert [cell["name"] for cell in body["cells"]] == ["cells/a__seed-0"]
        with ask(made.address + "events?cell=cells/a__seed-0") as answer:
            body = next(body for kind, body in messages(answer) if kind != "standing" and body["rounds"])
            assert body["meta"]["method"] == "adf-lora"
        assert ask(made.address + "events?cell=../..").status == 404


@served
def test_a_port_that_is_taken_is_named(tmp_path, run):
    from peerlora.runs.live.server import PageServer

    source = RunSource(write(tmp_path, run()))
    first = PageServer(source)
    with pytest.raises(ConfigError, match="choose another --port"):
        PageServer(source, port=first.port)
    first.socket.close()


@served
def test_what_an_update_of_a_thousand_clients_takes_is_bounded(made):
    found = live([made.started(1000, rounds=9), *(made.round_done(t, 1000, [[0, 1]] * 5000) for t in range(8))])
    found.since(-1, -1)
    update = json.dumps(found.since(8, found.numbered))
    assert len(update) < 100_000  # bytes, a few times a second


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path, run):
    from peerlora.runs.live.source import wait_for

    later = threading.Thread(target=lambda: (time.sleep(0.3), write(tmp_path / "run", run()))[0])
    later.start()
    wait_for(tmp_path / "run")
    later.join()
    assert (tmp_path / "run" / "run.json").exists() or (tmp_path / "run" / "config.yaml").exists()
