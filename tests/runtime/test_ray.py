"""Runs on a real Ray cluster of this machine: the bits of threads, killed workers and drivers, resources that lack."""

import os
import random
import subprocess
import sys
import threading

import psutil
import pytest

from peerlora.config.cluster import ClusterConfig
from peerlora.runs.events import RoundDone, Warned
from peerlora.runs.store import read_events
from peerlora.runtime.cluster.run import resume, simulate
from peerlora.runtime.cluster.session import ray_session
from peerlora.runtime.simulate import simulate as simulate_here
from ray_runs import actor_processes, kill, same_bits
from waiting import until

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'peerlora[cluster]'")

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
SETTINGS = ClusterConfig(workers=2, timeout=300)
# Workers killed; each costs half a minute of a busy machine. Before a release: 20.
KILLS = int(os.environ.get("PEERLORA_TEST_KILLS", "5"))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all: its start takes 7 to 40 seconds."""
    tests = os.path.dirname(os.path.dirname(__file__))
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), tests])
    with ray_session(SETTINGS) as session:
        yield session


def on_ray(config, out, **options):
    return simulate(config, out, cluster=SETTINGS, report=False, **options)


@pytest.fixture
def undisturbed(config, tmp_path):
    """A config and the result of one process."""
    words = ["clients=6", "topology=complete", "algorithm.name=fedsa-lora", "train.rounds=6", "train.block=2"]
    chosen = config("bert", *words)
    return chosen, simulate_here(chosen, tmp_path / "here", report=False).adapters


def listening(processes):
    """Addresses at which processes wait for connections."""
    found = set()
    for each in processes:
        try:
            found |= {own.laddr.ip for own in each.net_connections("inet") if own.status == psutil.CONN_LISTEN}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_a_cluster_of_ones_own_listens_on_loopback_alone_and_tells_nobody(cluster):
    there = psutil.Process().children(recursive=True)
    found = listening([psutil.Process(), *there])
    assert found and found <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    (raylet,) = (each for each in there if each.name() == "raylet")
    assert raylet.environ()["RAY_USAGE_STATS_ENABLED"] == "0"


class Killer:
    """A sink that kills a worker at a moment after a round, in training, in an exchange or at a checkpoint."""

    def __init__(self, kills, seed, latest=0.3):
        self.left, self.latest, self.random = kills, latest, random.Random(seed)

    def __call__(self, event):
        there = actor_processes() if isinstance(event, RoundDone) and self.left else []
        if there and self.random.random() < 0.6:
            self.left -= 1
            victim, wait = self.random.choice(there), self.random.random() * self.latest
            threading.Timer(wait, kill, [victim]).start() if wait else kill(victim)


def test_actors_get_the_bits_of_one_process(undisturbed, tmp_path):
    config, expected = undisturbed
    found = on_ray(config, tmp_path / "there")
    assert same_bits(found.adapters, expected)
    notes = read_events(tmp_path / "there")[0].notes
    assert any(note.startswith("2 workers hold") for note in notes), notes


def test_a_killed_worker_costs_the_rounds_since_the_checkpoint_and_no_bit(undisturbed, tmp_path):
    config, expected = undisturbed
    found = on_ray(config, tmp_path / "there", sinks=[Killer(1, 0, latest=0)])
    assert same_bits(found.adapters, expected)
    lost = [each.message for each in read_events(tmp_path / "there") if isinstance(each, Warned)]
    assert any("was lost" in message and "go on from the last checkpoint" in message for message in lost), lost
    until(lambda: actor_processes() == [], every=0.2)


@pytest.mark.timeout(3600)
def test_random_kills_cost_no_bit(config, tmp_path):
    words = ["clients=6", "topology=ring", "algorithm.name=dec-lora", f"train.rounds={2 * KILLS + 4}", "train.block=2"]
    chosen = config("bert", *words, "train.optimizer_state=keep", "exchange.codec={kind: top-k, share: 0.3}")
    expected = simulate_here(chosen, tmp_path / "here", report=False).adapters
    killer, settings = Killer(KILLS, 1), SETTINGS.model_copy(update={"retries": 100})
    found = simulate(chosen, tmp_path / "there", cluster=settings, report=False, sinks=[killer])
    assert killer.left == 0 and same_bits(found.adapters, expected)


def test_a_killed_driver_leaves_no_worker_and_is_resumed_by_another_number_of_them(undisturbed, tmp_path):
    config, expected = undisturbed
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "peerlora", "train", "config.yaml", "--out", "there", "--cluster", "ray"]
    driver = subprocess.Popen([*command, "--workers", "2"], cwd=tmp_path, stderr=subprocess.PIPE)
    checkpoint = tmp_path / "there" / "checkpoints" / "round-000002.json"
    until(checkpoint.exists, lambda: driver.poll() is None)
    left = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs(left, timeout=120)
    assert alive == []
    one = ClusterConfig(workers=1, timeout=300)
    found = resume(tmp_path / "there", where=lambda stored: one, report=False)
    assert same_bits(found.adapters, expected)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--workers", "500"], "500 workers with 1 cores each asked for"),
        (["--address", "127.0.0.1:9"], "no cluster answers at 127.0.0.1:9"),
        (["data.train=jsonl:missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing_behind(undisturbed, tmp_path, words, reason):
    (tmp_path / "config.yaml").write_text(undisturbed[0].to_yaml())
    command = [sys.executable, "-m", "peerlora", "train", "config.yaml", "--out", "there", "--cluster", "ray"]
    before = {each.pid for each in psutil.process_iter()}
    settings = [word for word in words if "=" in word]
    options = [word for word in words if "=" not in word]
    told = subprocess.run(
        [*command[:5], *settings, *command[5:], *options], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert (told.returncode, reason in told.stderr) == (2, True), told.stderr
    assert "Traceback" not in told.stderr and not (tmp_path / "there").exists()
    names = ("raylet", "gcs_server")
    until(lambda: not {each.pid for each in psutil.process_iter(["name"]) if each.name() in names} - before)
