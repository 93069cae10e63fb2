"""Failures as the command line writes them, the relay that cuts links, and a launched federation."""

import asyncio
import errno
import json
import os
import re
import sys

import pytest

from peerlora.errors import ConfigError, PeerloraError, Stopped
from peerlora.runs.events import CaughtUp, Joined, NeighbourChanged, RoundDone, to_json
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.launch.faults import Fault, check_faults, parse_fault
from peerlora.runtime.launch.processes import LocalFederation, free_ports, launch
from peerlora.runtime.launch.tcp_relay import Relay

GOOD = [
    ("kill", "3@5s", Fault("kill", 3, 5.0)),
    ("kill", "0@1.5:2s", Fault("kill", 0, 1.5, 2.0)),
    ("stop", "2@4s:3s", Fault("stop", 2, 4.0, 3.0)),
    ("cut", "1-2@4s:3s", Fault("cut", 1, 4.0, 3.0, 2, True)),
    ("cut", "1>2@4s", Fault("cut", 1, 4.0, None, 2, False)),
]


@pytest.mark.parametrize(("kind", "word", "expected"), GOOD)
def test_a_failure_is_read(kind, word, expected):
    assert parse_fault(kind, word, 4) == expected


@pytest.mark.parametrize(
    ("kind", "word", "told"),
    [
        ("kill", "3", "such as 3@5s"),
        ("kill", "4@5s", "peers are 0 to 3"),
        ("stop", "2@-1s", "such as 2@4s:3s"),
        ("cut", "2@4s", "such as 1-2@4s:3s"),
        ("cut", "2-2@4s", "peers are 0 to 3"),
        ("cut", "1-9@4s", "peers are 0 to 3"),
    ],
)
def test_what_cannot_be_done_is_refused(kind, word, told):
    with pytest.raises(ConfigError, match=told):
        parse_fault(kind, word, 4)


def test_a_relay_passes_bytes_until_it_is_cut():
    async def echo(reader, writer):
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async def main():
        port, listen = free_ports(2)
        server, relay = await asyncio.start_server(echo, "127.0.0.1", port), Relay(port)
        await relay.start(listen)
        reader, writer = await asyncio.open_connection("127.0.0.1", listen)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        for forward in (True, False):
            relay.cut(forward, True)
            writer.write(b"two")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await reader.readexactly(3)
            relay.cut(forward, False)
            assert await reader.readexactly(3) == b"two"
        writer.close()
        await writer.wait_closed()
        await relay.close()
        server.close()
        await asyncio.sleep(0.1)

    asyncio.run(main())


def test_a_relay_to_nobody_ends_the_connection():
    async def main():
        port, listen = free_ports(2)
        relay = Relay(port)
        await relay.start(listen)
        reader, writer = await asyncio.open_connection("127.0.0.1", listen)
        assert await reader.read() == b""
        writer.close()
        await relay.close()

    asyncio.run(main())


def test_one_peer_is_no_federation(config, tmp_path):
    with pytest.raises(ConfigError, match="at least 2 peers"):
        launch(config("bert", "clients=1", "topology=complete"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peers_that_would_all_train_on_the_whole_file_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="partition.kind=own given: all peers of launch read one file"):
        launch(config("bert", "clients=2", "topology=path", "partition=own", "task.labels=[a, b]"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


SCRIPT = """
import pathlib, signal, sys, time
asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(number))
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
folder.mkdir()
(folder / "events.jsonl").write_text(sys.argv[3])
end = time.monotonic() + seconds
while time.monotonic() < end and not asked:
    time.sleep(0.01)
time.sleep(0.3 if asked else 0)
(folder / "signals").write_text(str(len(asked)))
sys.exit(130 if asked else 0)
"""


def played(config, folder, seconds, *faults):
    """A federation whose processes only say that they began, and end by themselves after their seconds."""
    made = LocalFederation(config("bert", f"clients={len(seconds)}", "topology=path"), folder, faults)
    for peer, each in zip(made.peers, seconds, strict=True):
        peer.command = [sys.executable, "-c", SCRIPT, str(peer.folder), str(each), joined()]
    return made


def joined():
    return to_json(Joined("", 0, [])) + "\n"


def test_what_peers_cannot_do_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(PeerloraError, match="pairwise"):
        launch(config("bert", "topology.weights=pairwise"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_peer_that_is_stopped_for_good_is_not_waited_for(config, tmp_path):
    made = played(config, tmp_path / "out", [2, 600], Fault("stop", 1, 0.2))
    made.run(lambda peers: None, lambda: False)
    made.close()
    assert [peer.state for peer in made.peers] == ["finished", "stopped"]
    assert made.peers[1].killed and not any(peer.alive for peer in made.peers)


def test_a_peer_that_is_stopped_for_a_while_goes_on(config, tmp_path):
    made = played(config, tmp_path / "out", [1, 1.5], Fault("stop", 1, 0.2, 1.0))
    made.run(lambda peers: None, lambda: False)
    made.close()
    assert [peer.state for peer in made.peers] == ["finished", "finished"]


OVERLAPPING = [
    (Fault("cut", 1, 4.0, 3.0, 2), Fault("cut", 2, 5.0, 10.0, 1), "--cut 1-2@4s:3s and --cut 2-1@5s:10s"),
    (Fault("cut", 1, 4.0, 3.0, 2), Fault("cut", 1, 5.0, None, 2, False), "--cut 1-2@4s:3s and --cut 1>2@5s"),
    (Fault("kill", 3, 5.0, 5.0), Fault("kill", 3, 6.0), "--kill 3@5s:5s and --kill 3@6s"),
    (Fault("stop", 3, 5.0), Fault("kill", 3, 60.5, 1.0), "--stop 3@5s and --kill 3@60.5s:1s"),
]


@pytest.mark.parametrize(("one", "other", "named"), OVERLAPPING)
def test_faults_that_would_undo_each_other_are_refused(config, tmp_path, one, other, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        launch(config("bert", "clients=4", "topology=ring"), tmp_path / "out", [one, other])
    assert not (tmp_path / "out").exists()


def test_faults_one_after_another_or_on_other_peers_and_directions_are_not():
    check_faults([Fault("kill", 3, 5.0, 5.0), Fault("kill", 3, 10.0), Fault("stop", 2, 5.0)])
    check_faults(
        [Fault("cut", 1, 4.0, None, 2, False), Fault("cut", 2, 4.0, None, 1, False), Fault("cut", 1, 4.0, 9.0, 3)]
    )


def test_faults_whose_moment_never_comes_are_listed(config, tmp_path):
    late = [Fault("kill", 1, 500.0), Fault("stop", 0, 0.6), Fault("kill", 1, 0.2, 0.1)]
    made = played(config, tmp_path / "out", [0.1, 3], *late)
    made.peers[1].command[2] = SCRIPT.replace("folder.mkdir()", "folder.mkdir(exist_ok=True)")  # it starts twice
    made.run(lambda peers: None, lambda: False)
    made.close()
    assert made.peers[1].starts == 2
    assert made.summary()["not_injected"] == ["--kill 1@500s", "--stop 0@0.6s"]


def test_why_a_peer_failed_is_among_its_notices_once(config, tmp_path):
    made = played(config, tmp_path / "out", [0.1, 0.1])
    made.peers[0].command = [sys.executable, "-c", "import sys; print('peerlora: no such file\\n'); sys.exit(2)"]
    made.peers[1].command = [sys.executable, "-c", "import sys; sys.exit(3)"]
    made.run(lambda peers: None, lambda: False)
    for peer in made.peers:
        made._poll(peer)
    made.close()
    assert [peer.state for peer in made.peers] == ["failed (2)", "failed (3)"]
    assert made.peers[0].notices == ["peerlora: no such file"]
    assert made.peers[1].notices == [f"wrote nothing; see {made.peers[1].log}"]
    assert [peer.get("why") for peer in made.summary()["peers"]] == ["peerlora: no such file", ""]


@pytest.mark.parametrize(("ended", "code"), [(["failed (2)"] * 2, 2), (["failed (2)", "finished"], 1)])
def test_a_mistake_in_what_all_peers_were_given_is_exit_code_2(cli, yaml_file, monkeypatch, ended, code):
    peers = [{"client": i, "ended": each} for i, each in enumerate(ended)]
    peers = [peer | dict.fromkeys(("rounds", "metric", "missed", "skipped", "starts"), 0) for peer in peers]
    summary = {"ok": False, "peers": peers, "method": "dec-lora", "run": "out", "not_injected": ["--kill 1@500s"]}
    summary |= dict.fromkeys(("own_mean", "own_min", "own_max"))
    monkeypatch.setattr("peerlora.runtime.launch.processes.launch", lambda *words, **settings: summary)
    answer = cli("launch", yaml_file("clients=2", "topology=path"))
    assert answer.code == code and "had ended before: --kill 1@500s" in answer.out


def test_a_folder_in_use_is_not_to_be_resumed(cli, yaml_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    answer = cli("launch", yaml_file("clients=2", "topology=path"), "--out", tmp_path / "out")
    assert answer.code == 2 and answer.err.strip().endswith("is in use; choose another --out")


def test_an_interrupt_reaches_every_peer_once(config, tmp_path):
    made = played(config, tmp_path / "out", [600, 600])
    with pytest.raises(Stopped, match="checkpoint"):
        made.run(lambda peers: None, lambda: all(peer.state == "running" for peer in made.peers))
    groups = {os.getpgid(peer.process.pid) for peer in made.peers if peer.process is not None}
    made.close()
    assert len(groups | {os.getpgid(0)}) == 3  # a terminal's Ctrl-C is no signal to them
    assert [(peer.folder / "signals").read_text() for peer in made.peers] == ["1", "1"]


def test_a_second_interrupt_leaves_no_process_behind(config, tmp_path, monkeypatch):
    made = played(config, tmp_path / "out", [600, 600])
    with pytest.raises(Stopped):
        made.run(lambda peers: None, lambda: all(peer.state == "running" for peer in made.peers))

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("peerlora.runtime.launch.processes.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.close()
    assert not any(peer.alive for peer in made.peers)


def dialled_ports(made, client):
    """Port of every peer by client, as the member list of one peer has them."""
    members = json.loads(made._list_path(client).read_text())["list"]["members"]
    assert made._list_path(client).as_posix() in made.peers[client].command
    return [int(each["address"].rpartition(":")[2]) for each in members]


@pytest.mark.parametrize("clients", [4, 40])
def test_only_links_that_are_cut_have_relays(config, tmp_path, clients):
    made = LocalFederation(
        config("bert", f"clients={clients}", "topology=path"),
        tmp_path / "out",
        [Fault("cut", 1, 4.0, None, 2, False), Fault("cut", 2, 9.0, 1.0, 1), Fault("kill", 0, 5.0)],
    )
    try:
        made._start_relays()
        assert {pair: relay.port for pair, relay in made.relays.items()} == {
            (1, 2): made.ports[2],
            (2, 1): made.ports[1],
        }
        for client in range(clients):
            expected = list(made.ports)
            for (dialler, dialled), listen in made.listens.items():
                if dialler == client:
                    expected[dialled] = listen
            assert dialled_ports(made, client) == expected
    finally:
        made.close()


@pytest.fixture
def too_few_descriptors(monkeypatch):
    """The system opens no socket any more."""

    def refuse(*words):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as full:
        full.setattr("peerlora.runtime.launch.processes.socket.socket", refuse)
        yield


def test_too_many_peers_for_the_limit_of_open_files_leave_the_folder_free(config, tmp_path, too_few_descriptors):
    with pytest.raises(PeerloraError, match="8 free ports were asked for.*raise the limit of open files"):
        launch(config("bert", "clients=6", "topology=path"), tmp_path / "out", [Fault("cut", 0, 1.0, None, 1)])
    assert not (tmp_path / "out").exists()


def test_a_relay_that_does_not_start_ends_the_launch_with_a_message(config, tmp_path, monkeypatch):
    async def refuse(*words):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    monkeypatch.setattr(Relay, "start", refuse)
    with pytest.raises(PeerloraError, match="peers 0 and 1 cannot be cut, since its relay does not start"):
        launch(config("bert", "clients=2", "topology=path"), tmp_path / "out", [Fault("cut", 0, 1.0, None, 1)])


def test_launch_raises_the_limit_of_open_files(config, tmp_path, monkeypatch, too_few_descriptors):
    calls = []
    monkeypatch.setattr("peerlora.runtime.launch.processes.raise_descriptor_limit", lambda: calls.append("raised"))
    with pytest.raises(PeerloraError):
        launch(config("bert", "clients=2", "topology=path"), tmp_path / "out")
    assert calls == ["raised"]


SETTINGS = ["train.dtype=fp32", "peer.quorum=0", "peer.deadline=20", "eval.rows=4", "threads=null"]


@pytest.mark.slow
@pytest.mark.alone
def test_a_federation_of_two_processes(cli, yaml_file, tmp_path):
    path = yaml_file(*SETTINGS, "clients=2", "topology=path", "train.rounds=2")
    answer = cli("launch", path, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    summary = json.loads(answer.out.strip().splitlines()[-1])
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ok"] and [peer["ended"] for peer in summary["peers"]] == ["finished", "finished"]
    assert [peer["rounds"] for peer in summary["peers"]] == [2, 2] and summary["own_mean"] is not None
    for client in range(2):
        run = tmp_path / "out" / f"peer-{client:02d}"
        assert (run / "report.html").is_file() and (run / "adapters" / f"client-{client:02d}").is_dir()
    assert "peer 0: finished" in answer.err
    shown = cli("show", tmp_path / "out" / "peer-01")
    assert shown.code == 0
    exported = cli("export", tmp_path / "out" / "peer-01", "--client", "1", "--rank", "2", "--to", tmp_path / "adapter")
    assert exported.code == 0, exported.err
    refused = cli("export", tmp_path / "out" / "peer-01", "--client", "0", "--to", tmp_path / "other")
    assert refused.code == 2 and "give --client 1" in refused.err


def launched(cli, config, out):
    """The summary of a federation that was launched and ended well."""
    answer = cli("launch", config, "--out", out, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out.strip().splitlines()[-1])


def known_to_each(folder):
    """How many clients' adapters each of three peers on a path holds, and how old the oldest is, after each round."""
    rounds = [select_events(read_events(folder / f"peer-{i:02d}"), RoundDone) for i in range(3)]
    assert not any("relayed_refused" in done.measures for each in rounds for done in each)
    if not any(done.missed for each in rounds for done in each):  # on a busy machine a peer may come late
        assert [each[-1].measures["relayed_known_min"] for each in rounds] == [3, 3, 3]
        assert [each[-1].measures["relayed_age_max"] for each in rounds] == [1, 0, 1]


@pytest.mark.slow
@pytest.mark.alone
def test_a_launched_federation_trains_on_from_what_its_peers_pass_on(cli, yaml_file, tmp_path):
    settings = ["clients=3", "topology=path", "train.rounds=4", "algorithm.name=cached-dfl", "algorithm.weights=rows"]
    summary = launched(cli, yaml_file(*SETTINGS, *settings), tmp_path / "out")
    assert summary["ok"] and "deployed" not in summary
    known_to_each(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.alone
def test_a_launched_federation_relays_and_deploys_what_it_relayed(cli, yaml_file, tmp_path):
    settings = ["clients=3", "topology=path", "train.rounds=4", "exchange.relay={weights: rows}"]
    summary = launched(cli, yaml_file(*SETTINGS, *settings), tmp_path / "out")
    assert summary["deployed"] == "relayed" and summary["relayed_mean"] is not None
    known_to_each(tmp_path / "out")
    exported = cli("export", tmp_path / "out" / "peer-02", "--client", "2", "--exact", "--to", tmp_path / "adapter")
    assert exported.code == 0, exported.err


@pytest.mark.slow
@pytest.mark.alone
def test_a_launched_federation_has_secure_sums(cli, yaml_file, tmp_path):
    settings = ["clients=4", "topology=complete", "train.rounds=4", "exchange.secure=true"]
    assert launched(cli, yaml_file(*SETTINGS, *settings), tmp_path / "out")["ok"]
    for client in range(4):
        run = tmp_path / "out" / f"peer-{client:02d}"
        told = json.loads((run / "summary.json").read_text())["secure_sums"]
        done = select_events(read_events(run), RoundDone)
        assert len([each for each in done if each.contacts == 3]) == 4 - told["given_up"] >= 1
        assert all(each.bytes_sent > 0 for each in done)


@pytest.mark.slow
@pytest.mark.alone
def test_failures_on_purpose(cli, yaml_file, tmp_path):
    words = [*SETTINGS, "clients=4", "train.rounds=65", "train.local_steps=30", "algorithm.name=dec-lora"]
    path = yaml_file(*words, "peer.deadline=2", "peer.join=60", "checkpoint.every=5", "eval.every=1000")
    failures = ["--kill", "3@1s", "--kill", "1@2s:1s", "--stop", "2@3s:2s", "--cut", "0-1@3s:5s"]
    answer = cli("launch", path, "--out", tmp_path / "out", "--json", *failures)
    assert answer.code == 0, answer.err
    summary = json.loads(answer.out.strip().splitlines()[-1])
    ended = {peer["client"]: peer["ended"] for peer in summary["peers"]}
    assert ended == {0: "finished", 1: "finished", 2: "finished", 3: "killed"}
    assert summary["peers"][1]["starts"] == 2 and all(summary["peers"][client]["missed"] for client in (0, 2))
    events = read_events(tmp_path / "out" / "peer-01")  # it misses no link itself: it goes on where the others are
    (back,) = select_events(events, CaughtUp)
    after = [done for done in select_events(events, RoundDone) if done.round >= back.to]
    assert back.to > back.round and after[-1].round == 64
    assert sum(done.contacts == 2 for done in after) >= len(after) // 2


@pytest.mark.slow
@pytest.mark.alone
def test_a_link_that_is_cut_one_way_is_missed_by_both_its_ends_and_comes_back(cli, yaml_file, tmp_path):
    words = [*SETTINGS, "clients=3", "topology=complete", "train.rounds=70", "train.local_steps=30"]
    path = yaml_file(*words, "algorithm.name=dec-lora", "peer.deadline=5", "peer.join=60", "eval.every=1000")
    answer = cli("launch", path, "--out", tmp_path / "out", "--json", "--cut", "0>1@1s:8s")
    assert answer.code == 0, answer.err
    events = [read_events(tmp_path / "out" / f"peer-{client:02d}") for client in range(3)]
    done = [select_events(own, RoundDone) for own in events]

    def missed(i, j):
        """Rounds in which i missed j."""
        return {each.round for each in done[i] if str(j) in each.missed}

    def told(i, j):
        """Rounds of which i learned that j saw their link otherwise."""
        changes = [
            each for each in select_events(events[i], NeighbourChanged) if (each.kind, each.client) == ("half-used", j)
        ]
        return {int(each.detail.split()[1].strip(":")) for each in changes}

    for i, j in ((0, 1), (0, 2), (1, 2)):  # W stays doubly stochastic, but where an answer was lost and it is told
        assert missed(i, j) ^ missed(j, i) <= told(i, j) | told(j, i)
    third = missed(0, 2) | missed(2, 0) | missed(1, 2) | missed(2, 1)
    assert (missed(0, 1) & missed(1, 0)) - third  # while those two miss each other, it goes on with both
    assert all(own[-1].round == 69 and own[-1].contacts == 2 for own in done)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("method", ["aedfl", "ad-psgd"])
def test_processes_without_common_rounds(cli, yaml_file, tmp_path, method):
    """Over gRPC: one is killed and comes back, one is stopped for a while, and nobody waits."""
    words = [*SETTINGS, "clients=3", "topology=complete", "train.rounds=80", "train.local_steps=30"]
    words += [f"algorithm.name={method}", *(["algorithm.patience=1"] if method == "ad-psgd" else [])]
    path = yaml_file(*words, "peer.join=60", "checkpoint.every=5", "eval.every=1000")
    answer = cli("launch", path, "--out", tmp_path / "out", "--json", "--kill", "2@2s:1s", "--stop", "1@3s:2s")
    assert answer.code == 0, answer.err
    summary = json.loads(answer.out.strip().splitlines()[-1])
    assert [peer["ended"] for peer in summary["peers"]] == ["finished"] * 3
    assert [peer["rounds"] for peer in summary["peers"]] == [80] * 3 and summary["peers"][2]["starts"] == 2
    for client in range(3):
        told = select_events(read_events(tmp_path / "out" / f"peer-{client:02d}"), RoundDone)
        assert [done.round for done in told] == list(range(80))
        assert sum(done.bytes_sent for done in told) > 0 and any("staleness" in done.measures for done in told)
    changes = select_events(read_events(tmp_path / "out" / "peer-00"), NeighbourChanged)
    assert {"down", "up"} <= {change.kind for change in changes if change.client == 2}
