"""Three hosts with addresses of their own, in network namespaces joined by a switch; a cable is pulled."""

import os
import subprocess

import pytest
from processes import Processes
from test_real_processes import WORDS, rounds, told, until_round

PREFIX = f"plx{os.getpid() % 10000}"


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


def why_not():
    """Why this machine has no namespaces for us; None if it has."""
    try:
        ip("netns", "add", f"{PREFIX}-try")
        ip("netns", "del", f"{PREFIX}-try")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made here: {getattr(error, 'stderr', '') or error}"
    return None


@pytest.fixture
def hosts():
    """(namespace, address) of three hosts."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    switch = f"{PREFIX}-sw"
    made = [(f"{PREFIX}-{i}", f"10.77.0.{i + 1}") for i in range(3)]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "name", "switch0", "type", "bridge")
        ip("-n", switch, "link", "set", "switch0", "up")
        for i, (name, address) in enumerate(made):
            ip("netns", "add", name)
            ip("-n", name, "link", "add", "eth", "type", "veth", "peer", "name", f"port{i}", "netns", switch)
            ip("-n", switch, "link", "set", f"port{i}", "master", "switch0", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth")
            for device in ("lo", "eth"):
                ip("-n", name, "link", "set", device, "up")
        yield made
    finally:
        for name in (*[name for name, _ in made], switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.alone
def test_a_pulled_cable_costs_a_few_deadlines_and_comes_back(config, tmp_path, hosts):
    chosen = config("bert", *WORDS, "peer.deadline=3", "train.rounds=60", "train.local_steps=40")
    with Processes({"run": chosen}, tmp_path, hosts) as found:
        for client in range(3):
            found.start(client)
        until_round(found, 2, 4)
        ip("-n", f"{PREFIX}-sw", "link", "set", "port2", "down")  # no packet passes, and nobody is told
        until_round(found, 0, len(rounds(found, 0)) + 8)
        ip("-n", f"{PREFIX}-sw", "link", "set", "port2", "up")
        assert found.wait() == {0: 0, 1: 0, 2: 0}
        for client in (0, 1):
            done = rounds(found, client)
            assert [each.round for each in done] == list(range(60))
            assert any("2" in each.missed for each in done)
            assert {"down", "up"} <= set(told(found, client, 2))
        assert any(each.contacts == 2 for each in rounds(found, 0)[-20:])
