"""What is wrong with a cluster is told in one message; with doubles of Ray and of sockets, so that none is started."""

import importlib.metadata
import os
import socket
import subprocess
import sys
import types

import pytest

from peerlora.config.cluster import ClusterConfig
from peerlora.errors import ClusterError, DataError, ExtraMissing, ModelError, RunError, WorkersLost
from peerlora.runtime.cluster import machines, ray_engine, session, worker
from peerlora.runtime.cluster.group import ThreadEngine, ThreadGroup
from peerlora.runtime.cluster.machines import check_resources, fitting_workers
from peerlora.runtime.cluster.ray_engine import RayEngine, await_start, check_versions
from peerlora.runtime.cluster.run import simulate
from peerlora.runtime.cluster.session import check_address, ray_session
from peerlora.runtime.cluster.worker import describe_process


class RayDouble(types.ModuleType):
    """As much of Ray as a session uses, on a cluster with these machines, or one of these resources."""

    __version__ = "2.60.0"

    def __init__(self, error=None, machines=None, **resources):
        super().__init__("ray")
        self.error, self.open = error, False
        self.machines = [resources] if machines is None else machines

    def is_initialized(self):
        return self.open

    def init(self, **options):
        self.options = options
        if self.error:
            raise self.error
        self.open = True

    def shutdown(self):
        self.open = False

    def nodes(self):
        gone = {"Alive": False, "Resources": {"CPU": 100.0, "GPU": 100.0}}
        return [gone, *({"Alive": True, "Resources": each} for each in self.machines)]

    def cluster_resources(self):
        return {name: sum(each.get(name, 0.0) for each in self.machines) for name in ("CPU", "GPU")}

    def available_resources(self):
        return {"CPU": 1.0}


@pytest.fixture
def ray_is(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ})  # a session sets what Ray reads

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
        check_resources(ClusterConfig(gpus_per_worker=0.5), [{"CPU": 8.0}])
    check_resources(ClusterConfig(gpus_per_worker=0.5), [{"CPU": 2.0, "GPU": 1.0}])


@pytest.mark.parametrize(
    ("settings", "there", "fitting"),
    [
        ({"cpus_per_worker": 3}, [{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 2.0}], 2),
        ({"gpus_per_worker": 2}, [{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 1.0}], 1),
        ({"gpus_per_worker": 0.4}, [{"CPU": 8.0, "GPU": 2.0}], 4),
        ({"gpus_per_worker": 0.1}, [{"CPU": 2.0, "GPU": 1.0}], 2),
        ({"gpus_per_worker": 1}, [{"CPU": 4.0}, {"GPU": 4.0}], 0),
    ],
)
def test_a_worker_fits_on_one_machine_only(settings, there, fitting):
    assert fitting_workers(ClusterConfig(**settings), there) == fitting


def test_machines_whose_sum_suffices_and_none_alone_are_told(ray_is):
    ray_is(RayDouble(machines=[{"CPU": 2.0}, {"CPU": 2.0}]))
    with pytest.raises(ClusterError, match=r"1 workers with 3 cores each.*room for 0: a worker needs all of it on one"):
        with ray_session(ClusterConfig(address="head:6379", workers=1, cpus_per_worker=3)):
            pass


@pytest.mark.parametrize("error", [ValueError("exceeds /dev/shm size"), SystemExit(15)])
def test_a_cluster_that_does_not_start_here_is_told_with_its_store(ray_is, monkeypatch, error):
    double, told = ray_is(RayDouble(error, CPU=64.0)), []
    monkeypatch.setattr(machines.os, "sched_getaffinity", lambda process: range(64))
    with pytest.raises(ClusterError, match=r"Ray 2\.60\.0 cannot be started on this machine .*object store of"):
        with ray_session(ClusterConfig(workers=2), 10**15, told.append):
            pass
    size = double.options["object_store_memory"]
    assert size < session.main_memory() and "of the 1000 TB that may be under way" in told[0]
    assert (double.options["address"], double.options["include_dashboard"]) == ("local", False)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0", "only then does Ray listen on loopback alone"


def test_an_object_store_has_what_is_under_way_within_what_there_is(monkeypatch):
    monkeypatch.setattr(session, "main_memory", lambda: 10**10)
    monkeypatch.setattr(session.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=2 * 10**9))
    assert [session.store_bytes(each) for each in (0, 10**9, 10**12)] == [200_000_000, 10**9, 1_800_000_000]
    monkeypatch.setattr(session.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=64 * 10**6))
    assert session.store_bytes(10**9) == 80_000_000, "the least that Ray takes, which it then puts elsewhere"


def test_what_auto_stands_for_is_asked_before_ray_is(ray_is, monkeypatch):
    """Ray itself tries for more than a minute, and ends the process."""
    double, asked = ray_is(RayDouble(CPU=4.0)), []

    def dead(address):
        asked.append(address)
        raise ClusterError(f"no cluster answers at {address}")

    services = types.ModuleType("ray._private.services")
    services.get_ray_address_from_environment = lambda given, folder: "10.0.0.9:6379"
    monkeypatch.setitem(sys.modules, "ray._private.services", services)
    monkeypatch.setattr(session, "check_address", dead)
    with pytest.raises(ClusterError, match=r"no cluster answers at 10\.0\.0\.9:6379"):
        with ray_session(ClusterConfig(address="auto")):
            pass
    assert asked == ["10.0.0.9:6379"] and not hasattr(double, "options")
    monkeypatch.setattr(session, "check_address", asked.append)
    with ray_session(ClusterConfig(address="auto")):
        assert double.options["address"] == "10.0.0.9:6379"
    double.error = SystemExit(15)
    with pytest.raises(ClusterError, match=r"10\.0\.0\.9:6379 \(auto\) cannot be used \(SystemExit: 15\)"):
        with ray_session(ClusterConfig(address="auto")):
            pass


def test_no_cluster_for_auto_is_told(ray_is, monkeypatch):
    def nothing(given, folder):
        raise ConnectionError("Could not find any running Ray instance.")

    services = types.ModuleType("ray._private.services")
    services.get_ray_address_from_environment = nothing
    monkeypatch.setitem(sys.modules, "ray._private.services", services)
    ray_is(RayDouble(CPU=4.0))
    with pytest.raises(ClusterError, match="no cluster found for --address auto"):
        with ray_session(ClusterConfig(address="auto")):
            pass


class ActorDouble:
    """A worker whose answers are what it was given."""

    def __init__(self, *answers):
        self.answers = list(answers)

    @property
    def describe(self):
        return types.SimpleNamespace(remote=lambda: self)


class StartingRay(RayDouble):
    """Workers whose answers come after so many looks."""

    def __init__(self, looks, **resources):
        super().__init__(**resources)
        self.looks = looks
        kinds = {name: type(name, (Exception,), {"cause": None}) for name in ("RayTaskError", "RayError")}
        self.exceptions = types.SimpleNamespace(**kinds)

    def wait(self, answers, timeout):
        self.looks -= 1
        return ([], answers) if self.looks >= 0 else (answers, [])

    def get(self, answer, timeout):
        found = answer.answers.pop(0)
        if isinstance(found, str):
            raise self.exceptions.RayTaskError(found)
        return found


def test_workers_that_wait_for_others_cores_are_told_once():
    told, own = [], describe_process()
    found = await_start(StartingRay(3, CPU=4.0), [ActorDouble(own), ActorDouble(own)], ClusterConfig(), told.append)
    assert found == [own, own] and told == ["workers wait for cores and GPUs that others use: 1 of 4 CPUs are free"]


def test_a_machine_without_peerlora_is_told_with_the_versions_that_it_needs():
    failure = "ray::BlockActor.describe()\n  File x\nModuleNotFoundError: No module named 'peerlora'"
    with pytest.raises(
        ClusterError, match=r"cannot start on a machine.*No module named 'peerlora'.*peerlora \d.*torch"
    ):
        await_start(StartingRay(0, CPU=4.0), [ActorDouble(failure)], ClusterConfig(workers=1), lambda message: None)


@pytest.mark.parametrize("started", [False, True])
def test_workers_that_do_not_start_at_first_are_an_error_and_later_lost(monkeypatch, started):
    def late(*arguments, **others):
        raise WorkersLost("workers [1] did not answer")

    monkeypatch.setattr(ray_engine, "RayGroup", late)
    engine = RayEngine(ClusterConfig(), 0)
    engine.ray, engine._started = None, started
    with pytest.raises(WorkersLost if started else ClusterError, match="did not answer"):
        engine.start(2, ClusterConfig())


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


@pytest.mark.parametrize(
    ("part", "kind", "path"), [("load_resources", DataError, "/data/rows"), ("assemble", ModelError, "/models/base")]
)
def test_a_worker_without_data_or_base_says_on_which_machine_and_which_path(
    config, tmp_path, monkeypatch, part, kind, path
):
    def absent(*arguments, **others):
        raise kind(f"{path} does not exist; give another")

    monkeypatch.setattr(worker, part, absent)
    monkeypatch.setattr(worker.platform, "node", lambda: "node7")
    chosen = config("bert", "train.rounds=1")
    with pytest.raises(kind, match=rf"worker 0 on node7: {path} does not exist"):
        simulate(chosen, tmp_path / "run", cluster=ClusterConfig(), engine=lambda *_: ThreadEngine(), report=False)
    assert not (tmp_path / "run").exists()


def test_machines_that_left_are_waited_for_and_then_given_up(monkeypatch):
    double, told, moments = RayDouble(CPU=1.0), [], iter(range(100))
    monkeypatch.setattr(machines.time, "monotonic", lambda: float(next(moments)))
    monkeypatch.setattr(machines.time, "sleep", lambda seconds: None)
    engine = RayEngine(ClusterConfig(), 0)
    engine.ray = double
    with pytest.raises(ClusterError, match="has 1 in all, 5 s after machines have left"):
        engine.await_machines(ClusterConfig(wait=5), told.append)
    assert len(told) == 1 and "waiting up to 5 s" in told[0]
    double.machines = [{"CPU": 2.0}]
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
            raise ClusterError("too few cores; add machines")

    told = []
    with pytest.raises(RunError, match="too few cores; add machines, and go on with: peerlora train --resume"):
        simulate(
            config("bert", "train.rounds=3", "train.block=2"),
            tmp_path / "run",
            cluster=ClusterConfig(),
            engine=lambda *_: Leaving(),
            sinks=[told.append],
            report=False,
        )
    assert any("machines have left" in getattr(each, "message", "") for each in told)
