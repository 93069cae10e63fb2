from dataclasses import replace

import pytest

from peerlora.runs.events import CaughtUp, NeighbourChanged
from peerlora.runs.metrics import rows
from peerlora.runs.peer_summary import left_out, neighbours
from peerlora.runs.report import write_report
from peerlora.runs.store import RunStore


@pytest.fixture
def events(made):
    """Client 1 of 3: two rounds with both, then client 2 dies; one link was used by one end only."""
    names = {"0": "clinic-a", "1": "clinic-b", "2": "clinic-<c>"}
    done = [replace(made.round_done(t), loss=[0.5 + t], edges=[[0, 1], [1, 2]], contacts=2) for t in range(2)]
    done += [replace(made.round_done(t), loss=[0.1], edges=[[0, 1]], contacts=1, missed={"2": "down"}) for t in (2, 6)]
    changes = [
        NeighbourChanged(made.TIME, 2, 2, "down", "the process died"),
        NeighbourChanged(made.TIME, 2, 2, "half-used", "x"),
    ]
    end = [CaughtUp(made.TIME, 3, 6, 0, True), made.evaluated(7, [0.75])]
    return [made.started(rounds=8, held=[1], names=names), *done[:3], *changes, end[0], done[3], end[1]]


def test_every_neighbour_is_counted(events):
    one, other = neighbours(events)
    assert (one.client, one.site, one.met, dict(one.missed), one.half_used) == (0, "clinic-a", 4, {}, 0)
    assert (other.client, other.met, dict(other.missed), other.half_used) == (2, 2, {"down": 2}, 1)
    assert [change.kind for change in other.changes] == ["down", "half-used"] and left_out(events) == 3


def test_a_simulation_has_no_neighbours(run):
    assert neighbours(run()) == [] and neighbours([]) == []


def test_the_table_names_the_client_by_its_number(events):
    found = [row for row in rows(events) if row[0] is not None]
    assert {client for client, *_ in found} == {1}
    assert (1, 7, "own", 0.75) in found


def test_the_report_tells_of_the_neighbours(tmp_path, events):
    with RunStore.create(tmp_path / "run", "clients: 3\n", {}) as store:
        for event in events:
            store.emit(event)
    page = write_report(tmp_path / "run").read_text()
    assert "adf-lora, clinic-b, client 1 of 3" in page and "neighbourhood only" in page
    assert "clinic-&lt;c&gt; (client 2)" in page and "down: 2" in page and "left out 3 rounds" in page
    assert "the process died" in page and "Last contact" not in page
