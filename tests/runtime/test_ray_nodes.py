"""Runs on Ray clusters of two and three nodes on this machine: workers killed at chosen moments, nodes that leave."""

import os
import threading
from contextlib import contextmanager

import psutil
import pytest

from peerlora.config.cluster import ClusterConfig
from peerlora.errors import RunError
from peerlora.runs.events import RoundDone, Warned
from peerlora.runs.store import read_events
from peerlora.runtime.cluster.run import resume, simulate
from peerlora.runtime.simulate import simulate as simulate_here
from ray_runs import actor_processes, kill, same_bits

pytest.importorskip("ray", reason="Ray is not installed; pip install 'peerlora[cluster]'")

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
WORDS = ["clients=6", "topology=ring", "train.rounds=10", "train.block=2", "train.optimizer_state=keep"]
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}


@contextmanager
def nodes(count):
    """A cluster whose head computes nothing, and so many nodes of one core each; all end with the block."""
    from ray.cluster_utils import Cluster

    tests = os.path.dirname(os.path.dirname(__file__))
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), tests])
    quiet = {"include_dashboard": False, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **quiet}, shutdown_at_exit=True)
    try:
        cluster.extra = [cluster.add_node(**NODE) for _ in range(count)]
        cluster.wait_for_nodes(timeout=120)
        yield cluster
    finally:
        cluster.shutdown()


def settings_of(cluster, **others):
    return ClusterConfig(address=cluster.address, workers=2, timeout=300, **others)


def remove(cluster, node):
    """Take a node out of its cluster, and wait until its workers are gone: a short run could end before."""
    raylet = node.all_processes["raylet"][0].process.pid
    workers = [each for each in map(psutil.Process, actor_processes()) if each.ppid() == raylet]
    assert workers
    cluster.extra.remove(node)
    cluster.remove_node(node, allow_graceful=False)
    _, left = psutil.wait_procs(workers, timeout=120)
    assert not left


@pytest.fixture(scope="module")
def three():
    with nodes(3) as cluster:
        yield cluster


@pytest.fixture
def undisturbed(config, tmp_path):
    chosen = config("bert", *WORDS)
    return chosen, simulate_here(chosen, tmp_path / "here", report=False).adapters


def killed_when_asked(monkeypatch, method, at, wait=0.0):
    """Kill a worker when it has been asked something for the ``at``-th time, some seconds later."""
    from peerlora.runtime.cluster import ray_engine

    wait_for, count = ray_engine.wait_for, iter(range(at, -1, -1))

    def waiting(ray, answers, timeout, what, *others):
        if what == f"to {method}" and next(count, -1) == 0:
            victim = actor_processes()[-1]
            threading.Timer(wait, kill, [victim]).start() if wait else kill(victim)
        return wait_for(ray, answers, timeout, what, *others)

    monkeypatch.setattr(ray_engine, "wait_for", waiting)


def warnings_among(events):
    return [each for each in events if isinstance(each, Warned)]


def lost(run):
    return [each.message for each in warnings_among(read_events(run)) if "last checkpoint" in each.message]


@pytest.mark.parametrize(
    ("method", "at", "wait"),
    [("build", 0, 0.1), ("start", 0, 0.0), ("advance", 2, 0.0), ("advance", 3, 0.02), ("collect", 2, 0.0)],
    ids=["loading", "starting", "in a round", "in an exchange", "at a checkpoint"],
)
def test_a_worker_killed_at_any_moment_costs_no_bit(three, undisturbed, tmp_path, monkeypatch, method, at, wait):
    chosen, expected = undisturbed
    killed_when_asked(monkeypatch, method, at, wait)
    heard = []
    found = simulate(chosen, tmp_path / "there", cluster=settings_of(three), report=False, sinks=[heard.append])
    assert same_bits(found.adapters, expected)
    if method == "build":  # before there is a run to go on with, whose events would say so
        assert any("was lost" in each.message and "new workers start" in each.message for each in warnings_among(heard))
    else:
        assert lost(tmp_path / "there")


def test_a_node_that_leaves_costs_no_bit_where_others_have_room(three, undisturbed, tmp_path):
    chosen, expected = undisturbed
    gone = []

    def leave(event):
        if isinstance(event, RoundDone) and event.round == 2 and not gone:
            busy = {psutil.Process(pid).ppid() for pid in actor_processes()}
            own = [each for each in three.extra if each.all_processes["raylet"][0].process.pid in busy]
            gone.append(own[0])
            remove(three, own[0])

    try:
        found = simulate(chosen, tmp_path / "there", cluster=settings_of(three), report=False, sinks=[leave])
    finally:
        three.extra += [three.add_node(**NODE) for _ in gone]  # for those that come after
    assert gone and same_bits(found.adapters, expected) and lost(tmp_path / "there")


def test_too_few_nodes_are_waited_for_with_a_message_and_a_limit(undisturbed, tmp_path):
    chosen, expected = undisturbed
    with nodes(2) as cluster:
        told, gone = [], []

        def leave(event):
            told.extend([event.message] if isinstance(event, Warned) else [])
            if isinstance(event, RoundDone) and event.round == 2 and not gone:
                gone.append(cluster.extra[-1])
                remove(cluster, gone[0])

        with pytest.raises(RunError, match="2 workers with 1 CPUs each asked for, the cluster has 1 in all.*resume"):
            limit = settings_of(cluster, wait=2)
            simulate(chosen, tmp_path / "there", cluster=limit, report=False, sinks=[leave])
        assert any("machines have left" in each and "waiting up to 2 s" in each for each in told), told
        assert actor_processes() == []
        cluster.extra.append(cluster.add_node(**NODE))
        cluster.wait_for_nodes(timeout=120)
        go_on = settings_of(cluster).model_copy(update={"workers": 1})
        found = resume(tmp_path / "there", where=lambda stored: go_on, report=False)
        assert same_bits(found.adapters, expected)
