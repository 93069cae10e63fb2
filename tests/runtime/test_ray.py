"""Runs on a real Ray cluster of this machine: the bits of threads, killed workers and drivers, resources that lack."""

import os
import random
import signal
import threading
import time

import pytest
import torch

from peerlora.config.cluster import ClusterConfig
from peerlora.runs.events import RoundDone, Warned
from peerlora.runs.store import read_events
from peerlora.runtime.cluster.run import simulate
from peerlora.runtime.cluster.session import ray_session
from peerlora.runtime.simulate import simulate as simulate_here
from peerlora.tree import leaves

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'peerlora[cluster]'")

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
SETTINGS = ClusterConfig(workers=2, timeout=300)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all: its start takes 7 to 40 seconds."""
    tests = os.path.dirname(os.path.dirname(__file__))
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), tests])
    with ray_session(SETTINGS) as session:
        yield session


def same_bits(one, other):
    one, other = leaves(one), leaves(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def on_ray(config, out, **options):
    return simulate(config, out, cluster=SETTINGS, report=False, **options)


@pytest.fixture
def undisturbed(config, tmp_path):
    """A config and the result of one process."""
    words = ["clients=6", "topology=complete", "algorithm.name=fedsa-lora", "train.rounds=6", "train.block=2"]
    chosen = config("bert", *words)
    return chosen, simulate_here(chosen, tmp_path / "here", report=False).adapters


def workers_of(session):
    from ray.util.state import list_actors

    return [each.pid for each in list_actors(filters=[("state", "=", "ALIVE")])]


class Killer:
    """A sink that kills a worker at a moment after a round, as seldom as asked for."""

    def __init__(self, kills, seed):
        self.left, self.random = kills, random.Random(seed)
        self.pids = []

    def __call__(self, event):
        if isinstance(event, RoundDone) and self.left and self.random.random() < 0.6:
            self.left -= 1
            victim = self.random.choice(processes())
            wait = self.random.random() * 0.3
            threading.Thread(target=lambda: (time.sleep(wait), kill(victim)), daemon=True).start()


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def processes():
    """The processes of this cluster's actors, by the title that Ray gives them."""
    import psutil

    own = psutil.Process().children(recursive=True)
    return [each.pid for each in own if "BlockActor" in " ".join(each.cmdline())]


def test_actors_get_the_bits_of_one_process(undisturbed, tmp_path):
    config, expected = undisturbed
    found = on_ray(config, tmp_path / "there")
    assert same_bits(found.adapters, expected)
    notes = read_events(tmp_path / "there")[0].notes
    assert any(note.startswith("2 workers hold") for note in notes), notes


def test_a_killed_worker_costs_the_rounds_since_the_checkpoint_and_no_bit(undisturbed, tmp_path):
    config, expected = undisturbed
    found = on_ray(config, tmp_path / "there", sinks=[Killer(1, 0)])
    assert same_bits(found.adapters, expected)
    lost = [each.message for each in read_events(tmp_path / "there") if isinstance(each, Warned)]
    assert any("was lost" in message and "go on from the last checkpoint" in message for message in lost), lost
    assert processes() == []
