"""Real processes over gRPC, and real signals."""

import os
import signal
from datetime import timedelta

import pytest
from processes import QUICK, Processes

from peerlora.network.identity.authority import list_signer
from peerlora.network.identity.identity import load_identity
from peerlora.network.identity.members import load_members, remove_member, sign_list, write_list
from peerlora.runs.events import CaughtUp, NeighbourChanged, Resumed, RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from waiting import until

GONE, HOLD, ROUNDS = 4, 12, 24
# rounds after which each waits, so that one falls behind by as many on a slow machine as on a quick one
HOLDS = (HOLD, HOLD, GONE)
WORDS = [*QUICK, "clients=3", "peer.deadline=4", "peer.join=30", "checkpoint.every=2", "peer.pull=3"]


@pytest.fixture
def processes(config, tmp_path):
    made = []

    def start(*words, hold=(None, None, None)):
        made.append(Processes({"run": config("bert", *WORDS, *words)}, tmp_path))
        for client in range(3):
            made[0].start(client, hold[client])
        return made[0]

    yield start
    for each in made:
        each.__exit__()


def rounds(processes, client):
    run = processes.run("run", client)
    return select_events(read_events(run), RoundDone) if (run / "run.json").exists() else []


def until_round(processes, client, count):
    until(lambda: len(rounds(processes, client)) >= count, processes.running[client].is_alive)


def told(processes, client, about):
    changes = select_events(read_events(processes.run("run", client)), NeighbourChanged)
    return [change.kind for change in changes if change.client == about]


def kill_and_restart(processes, client):
    """A client dies and comes back once the others hold, some rounds later; then all come to the end."""
    until_round(processes, client, GONE)
    processes.running[client].kill()
    processes.running[client].join()
    until_round(processes, 0, HOLD)
    run, again = processes.run("run", client), processes.start(client)
    until(lambda: select_events(read_events(run), CaughtUp), again.is_alive)
    processes.release()
    assert processes.wait() == {0: 0, 1: 0, 2: 0}


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_process_is_missed_and_takes_part_again(processes):
    found = processes(f"train.rounds={ROUNDS}", "train.local_steps=10", hold=HOLDS)
    kill_and_restart(found, 2)
    for client in (0, 1):
        done = rounds(found, client)
        assert [each.round for each in done] == list(range(ROUNDS))
        assert any(each.missed.get("2") == "absent" for each in done), "it is not waited for"
        assert "down" in told(found, client, 2) and told(found, client, 2)[-1:] != ["suspect"]
    events = read_events(found.run("run", 2))
    assert len(select_events(events, Resumed)) == 1 and select_events(events, CaughtUp)
    assert any(
        each.contacts == 2
        for each in select_events(events, RoundDone)
        if each.round > select_events(events, CaughtUp)[0].to
    )


@pytest.mark.slow
@pytest.mark.alone
def test_a_stopped_process_is_missed_and_takes_part_again(processes):
    found = processes(f"train.rounds={ROUNDS}", "train.local_steps=10", hold=HOLDS)
    until_round(found, 2, GONE)
    os.kill(found.running[2].pid, signal.SIGSTOP)
    try:
        until_round(found, 0, HOLD)
        found.release(2)
    finally:
        os.kill(found.running[2].pid, signal.SIGCONT)
    until(lambda: select_events(read_events(found.run("run", 2)), CaughtUp), found.running[2].is_alive)
    found.release()
    assert found.wait() == {0: 0, 1: 0, 2: 0}
    # After a deadline it is not waited for, whether or not so many heartbeats were missing by then.
    assert any(each.missed.get("2") == "absent" for each in rounds(found, 0))
    assert any(each.contacts for each in rounds(found, 2)[-5:])


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_process_of_compressed_gossip_gets_and_sends_whole_replicas(processes):
    # Without a checkpoint it comes back with the common start as its replica, wherever it was killed.
    words = ["exchange.codec=top-k", "checkpoint.every=1000"]
    found = processes(f"train.rounds={ROUNDS + 10}", "train.local_steps=10", *words, hold=HOLDS)
    kill_and_restart(found, 2)
    told = [[each.measures.get("whole_replicas", 0) for each in rounds(found, client)] for client in range(3)]
    assert all(sum(each) >= 1 for each in told) and sum(told[2]) >= 2
    assert not any(sum(each[-10:]) for each in told) and rounds(found, 2)[-1].contacts == 2


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("relaying", ["exchange.relay={}", "algorithm.name=cached-dfl"])
def test_a_killed_process_goes_on_with_the_relayed_adapters_of_its_checkpoint(processes, relaying):
    """Over gRPC every entry is signed; on a path the two ends know each other by the one between them alone."""
    found = processes(f"train.rounds={ROUNDS}", "train.local_steps=10", "topology.kind=path", relaying, hold=HOLDS)
    kill_and_restart(found, 2)
    events = read_events(found.run("run", 2))
    assert len(select_events(events, Resumed)) == 1
    after = [done for done in select_events(events, RoundDone) if done.round >= select_events(events, Resumed)[0].round]
    assert all(done.measures["relayed_known_min"] == 3 for done in after)
    for client in range(3):
        done = rounds(found, client)
        assert not any("relayed_refused" in each.measures for each in done)
        assert done[-1].measures["relayed_known_min"] == 3 and done[-1].measures["relayed_age_max"] <= 1
    away = [each for each in rounds(found, 0) if each.round > 4 and each.measures["relayed_age_max"] > 2]
    assert away, "the entry of the killed process has grown old meanwhile"


@pytest.mark.slow
@pytest.mark.alone
def test_everybody_is_killed_and_goes_on(processes):
    found = processes(f"train.rounds={ROUNDS}", "train.local_steps=20")
    until_round(found, 0, 7)
    for process in list(found.running.values()):
        process.kill()
        process.join()
    for client in range(3):
        found.start(client)
    assert found.wait() == {0: 0, 1: 0, 2: 0}
    for client in range(3):
        events = read_events(found.run("run", client))
        assert len(select_events(events, Resumed)) == 1
        last = select_events(events, RoundDone)[-1]
        assert last.round == ROUNDS - 1 and last.contacts == 2


@pytest.mark.slow
@pytest.mark.alone
def test_a_removed_member_is_left_out_by_peers_that_run(processes):
    """Everybody's list is replaced while they train; nobody is restarted."""
    found = processes("train.rounds=5000", "train.local_steps=20")
    until_round(found, 0, 3)
    place = found.folder / "identities"
    listed = load_members(place / "members.json", load_identity(place / "site-0").signers)
    shorter = remove_member(listed, "site-2")
    write_list(place / "members.json", sign_list(shorter, list_signer(place / "authority"), timedelta(days=30)))
    before = {client: len(told(found, client, 2)) for client in (0, 1)}
    until(lambda: all("down" in told(found, client, 2)[before[client] :] for client in (0, 1)), every=0.2)
    for client in (0, 1):
        until_round(found, client, len(rounds(found, client)) + 5)
        last = rounds(found, client)[-1]
        assert "2" in last.missed and [edge for edge in last.edges if 2 in edge] == []
        assert last.contacts == 1  # the two that stay
