"""What is wrong with a cluster is told in one message; with doubles of Ray and of sockets, so that none is started."""

import importlib.metadata
import socket
import subprocess
import sys
import types

import pytest

from peerlora.config.cluster import ClusterConfig
from peerlora.errors import ClusterError, DataError, ExtraMissing, RunError, WorkersLost
from peerlora.runtime.cluster import ray_engine, session, worker
from peerlora.runtime.cluster.group import ThreadEngine, ThreadGroup
from peerlora.runtime.cluster.ray_engine import RayEngine, check_versions
from peerlora.runtime.cluster.run import simulate
from peerlora.runtime.cluster.session import check_address, check_resources, ray_session
from peerlora.runtime.cluster.worker import describe_process


class RayDouble(types.ModuleType):
    """As much of Ray as a session uses, on a cluster with these resources."""

    __version__ = "2.60.0"

    def __init__(self, error=None, **resources):
        super().__init__("ray")
        self.error, self.resources, self.open = error, resources, False

    def is_initialized(self):
        return self.open

    def init(self, **options):
        if self.error:
            raise self.error
        self.open = True

    def shutdown(self):
        self.open = False

    def cluster_resources(self):
        return self.resources


@pytest.fixture
def ray_is(monkeypatch):
    def put(double):
        monkeypatch.setattr(session, "need_extra", lambda name: None)
        monkeypatch.setattr(session, "check_address", lambda address: None)
        monkeypatch.setitem(sys.modules, "ray", double)
        return double

    return put


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("peerlora.environment.find_spec", lambda name: None)
    with pytest.raises(ExtraMissing, match=r"needs ray.*\[cluster\]"), ray_session(ClusterConfig()):
        pass


def test_another_version_of_ray_on_the_cluster_is_told_with_ours(ray_is):
    ray_is(RayDouble(RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.40.0")))
    with pytest.raises(ClusterError, match=r"Version mismatch.*expected a running Ray cluster of version 2\.60\.0"):
        with ray_session(ClusterConfig(address="head:6379")):
            pass


def test_a_cluster_with_too_little_is_told_and_left(ray_is):
    double = ray_is(RayDouble(CPU=3.0))
    with pytest.raises(ClusterError, match="4 workers with 1 CPUs each asked for, the cluster has 3 in all"):
        with ray_session(ClusterConfig(address="head:6379", workers=4)):
            pass
    assert not double.open
    with pytest.raises(ClusterError, match=r"2 workers with 0\.5 GPUs each asked for, the cluster has 0 in all"):
        check_resources(ClusterConfig(gpus_per_worker=0.5), {"CPU": 8.0})
    check_resources(ClusterConfig(gpus_per_worker=0.5), {"CPU": 2.0, "GPU": 1.0})


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "ray://:1"])
def test_what_is_no_address_is_told_without_asking_the_network(monkeypatch, address):
    def connect(place, timeout):
        raise OSError("nobody there")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ClusterError, match=f"{address}"):
        check_address(address)


def test_what_listens_and_says_nothing_is_given_up(monkeypatch):
    ended = []

    class Child(subprocess.Popen):
        def kill(self):
            ended.append(self.pid)
            super().kill()

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr(session, "_ANSWERS", 0.5)
    monkeypatch.setattr(session, "_QUESTION", "import time; print(flush=True); time.sleep(600)")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match=rf"{address} gave no answer within 0\.5 s"):
            check_address(address)
    assert len(ended) == 1


@pytest.mark.parametrize("package", ["peerlora", "torch", "python"])
def test_machines_with_other_versions_are_told_by_name(package):
    own = describe_process()
    check_versions([own])
    other = own | {"host": "node7", "versions": own["versions"] | {package: "0.0.1"}}
    with pytest.raises(ClusterError, match=rf"node7 has {package} 0\.0\.1, the driver has .*install the same versions"):
        check_versions([own, other])
    assert own["versions"]["torch"] == importlib.metadata.version("torch")


def test_a_worker_without_the_data_says_on_which_machine_and_which_path(config, tmp_path, monkeypatch):
    def absent(config):
        raise DataError("/data/rows.jsonl does not exist; give a file")

    monkeypatch.setattr(worker, "load_resources", absent)
    monkeypatch.setattr(worker.platform, "node", lambda: "node7")
    chosen = config("bert", "train.rounds=1")
    with pytest.raises(DataError, match=r"worker 0 on node7: /data/rows\.jsonl does not exist"):
        simulate(chosen, tmp_path / "run", cluster=ClusterConfig(), engine=lambda *_: ThreadEngine(), report=False)
    assert not (tmp_path / "run").exists()


def test_machines_that_left_are_waited_for_and_then_given_up(monkeypatch):
    double, told, moments = RayDouble(CPU=1.0), [], iter(range(100))
    monkeypatch.setattr(ray_engine.time, "monotonic", lambda: float(next(moments)))
    monkeypatch.setattr(ray_engine.time, "sleep", lambda seconds: None)
    engine = RayEngine(ClusterConfig(), 0)
    engine.ray = double
    with pytest.raises(ClusterError, match="has 1 in all, 5 s after machines have left"):
        engine.await_machines(ClusterConfig(wait=5), told.append)
    assert len(told) == 1 and "waiting up to 5 s" in told[0]
    double.resources = {"CPU": 2.0}
    engine.await_machines(ClusterConfig(wait=5), told.append)
    assert len(told) == 1


def test_a_run_whose_machines_do_not_come_back_says_how_to_resume(config, tmp_path):
    class Leaving(ThreadEngine):
        def start(self, workers, settings):
            group = ThreadGroup(workers)
            call = group.call_each

            def dying(method, arguments):
                if method == "advance" and arguments[0][0] == 1:
                    raise WorkersLost("worker 1 was lost")
                return call(method, arguments)

            group.call_each = dying
            return group

        def await_machines(self, settings, tell):
            tell("machines have left: waiting")
            raise ClusterError("too few cores; add machines, and resume")

    told = []
    with pytest.raises(RunError, match="too few cores; add machines, and resume: peerlora train --resume"):
        simulate(
            config("bert", "train.rounds=3", "train.block=2"),
            tmp_path / "run",
            cluster=ClusterConfig(),
            engine=lambda *_: Leaving(),
            sinks=[told.append],
            report=False,
        )
    assert any("machines have left" in getattr(each, "message", "") for each in told)
