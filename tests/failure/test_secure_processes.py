"""Eight real processes over gRPC, with secure sums and differential privacy, of which one is killed and comes back."""

import json

import pytest
from processes import QUICK, Processes

from peerlora.runs.events import CaughtUp, NeighbourChanged, Resumed, RoundDone, Warned
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.train import accounting
from waiting import until

CLIENTS, ROUNDS, VICTIM = 8, 30, 5
GONE, HOLD = 5, 12  # rounds after which one is killed, and after which the others wait until it is back
WORDS = [
    *QUICK,
    f"clients={CLIENTS}",
    "topology.kind=random-regular",
    "topology.degree=4",
    "exchange.secure=true",
    f"train.rounds={ROUNDS}",
    "train.local_steps=10",
    "peer.deadline=30",
    "peer.join=120",
    "checkpoint.every=2",
    "peer.pull=3",
]


def rounds(found, client):
    run = found.run("run", client)
    return select_events(read_events(run), RoundDone) if (run / "run.json").exists() else []


def until_round(found, client, count):
    until(lambda: len(rounds(found, client)) >= count, found.running[client].is_alive)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not accounting.has_accountants(), reason="opacus is missing; install the extra privacy")
def test_private_peers_with_secure_sums_lose_one_and_get_it_back(config, tmp_path):
    with Processes({"run": config("bert", *WORDS, "privacy.noise=0.5")}, tmp_path, reports=True) as found:
        for client in range(CLIENTS):
            found.start(client, GONE if client == VICTIM else HOLD)
        until_round(found, VICTIM, GONE)
        found.running[VICTIM].kill()
        found.running[VICTIM].join()
        for other in set(range(CLIENTS)) - {VICTIM}:
            until_round(found, other, HOLD)
        again = found.start(VICTIM)
        until(lambda: select_events(read_events(found.run("run", VICTIM)), CaughtUp), again.is_alive)
        found.release()
        assert set(found.wait().values()) == {0}
        for client in range(CLIENTS):
            check(found.run("run", client), client == VICTIM)


def check(run, killed):
    events, summary = read_events(run), json.loads((run / "summary.json").read_text())
    done = select_events(events, RoundDone)
    assert done[-1].round == ROUNDS - 1 and (run / "report.html").is_file()
    whole = [each for each in done if each.contacts == 4]
    assert len(whole) >= ROUNDS // 3, "most sums hold all four neighbours"
    given_up = sum(round(each.measures.get("sums_given_up", 0)) for each in done)
    assert (
        summary["secure_sums"] == {"given_up": given_up} and "secure sums given up" in (run / "report.html").read_text()
    )
    assert given_up <= ROUNDS // 3, "one that dies and comes back costs few sums"
    assert summary["privacy"]["guarantee"].startswith("each row") and summary["privacy"]["spent"]["releases"][0] > 0
    told = [event.message for event in select_events(events, Warned)]
    assert any("secure sums were given up" in text for text in told) <= (given_up > 0)
    refusals = [each.detail for each in select_events(events, NeighbourChanged) if each.kind == "refused"]
    allowed = ("late", "replay", "from-the-future", "second-set", "other-set")
    assert all(detail.split(" ")[0].strip(",:") in allowed or "closing" in detail for detail in refusals), refusals
    if killed:
        assert select_events(events, Resumed) and done[-1].contacts == 4
    for each in done:
        assert each.contacts in (0, 3, 4) or each.missed, "a sum is of the whole set, or of nobody"
