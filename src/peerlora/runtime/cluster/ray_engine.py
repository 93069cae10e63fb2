"""Workers as actors of a Ray cluster, each of whose calls has a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from importlib import import_module
from typing import Any, Self

from peerlora.config.cluster import ClusterConfig
from peerlora.errors import ClusterError, PeerloraError, WorkersLost
from peerlora.runtime.cluster.group import Engine, WorkerGroup
from peerlora.runtime.cluster.rows import Values
from peerlora.runtime.cluster.session import lacking, ray_session
from peerlora.runtime.cluster.worker import BlockWorker, describe_process

_INBOX = "inbox"  # the threads of an actor that take rows while it computes
_ASKED = {"describe": "to start; are so many cores and GPUs free?"}
_LOOK = 1.0  # seconds between two looks at a cluster that lacks machines
_GLANCE = 10.0  # seconds between two looks at its machines while workers compute
_FETCH = 60.0  # seconds to fetch an answer that is there


class RayEngine(Engine):
    """Starts workers on a Ray cluster."""

    def __init__(self, settings: ClusterConfig, exchanged_bytes: int):
        self.settings, self.exchanged_bytes, self._open = settings, exchanged_bytes, ExitStack()

    def __enter__(self) -> Self:
        self.ray = self._open.enter_context(ray_session(self.settings, self.exchanged_bytes))
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()

    def start(self, workers: int, settings: ClusterConfig) -> WorkerGroup:
        """See ``Engine``."""
        return RayGroup(self.ray, workers, settings)

    def await_machines(self, settings: ClusterConfig, tell: Callable[[str], None]) -> None:
        """See ``Engine``."""
        end, reported = time.monotonic() + settings.wait, False
        while reason := lacking(settings, self.ray.cluster_resources()):
            if time.monotonic() >= end:
                raise ClusterError(f"{reason}, {settings.wait:g} s after machines have left; add machines, and resume")
            if not reported:
                tell(f"machines have left: {reason}; waiting up to {settings.wait:g} s for others")
            reported = True
            time.sleep(_LOOK)


class RayGroup:
    """Workers on the machines of a Ray cluster.

    Where one fails or is lost, all are ended: the others wait for its rows.  ``kind``: what each does when it is asked.
    """

    def __init__(self, ray: Any, count: int, settings: ClusterConfig, kind: type[BlockWorker] = BlockWorker):
        self.ray, self.settings, self.timeout, self.nodes = ray, settings, settings.timeout, 1
        resources = {"num_cpus": settings.cpus_per_worker, "num_gpus": settings.gpus_per_worker}
        actor = actor_class(kind).options(**resources)
        self.workers = [actor.remote(index) for index in range(count)]
        try:
            facts = self.call("describe")
            check_versions(facts)
            self.nodes = len({each["node"] for each in facts})
            self.call("meet", self.workers)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """See ``WorkerGroup``."""
        return self.call_each(method, [arguments] * len(self.workers))

    def call_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """See ``WorkerGroup``."""
        answers = [getattr(worker, method).remote(*own) for worker, own in zip(self.workers, arguments, strict=True)]
        try:
            return wait_for(self.ray, answers, self.timeout, _ASKED.get(method, f"to {method}"), self._lacking)
        except BaseException:
            self.close()
            raise

    def _lacking(self) -> str:
        return lacking(self.settings, self.ray.cluster_resources())

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            self.ray.kill(worker, no_restart=True)


def wait_for(
    ray: Any, answers: Sequence[Any], timeout: float, what: str, lacking: Callable[[], str] = lambda: ""
) -> list[Any]:
    """Return the answers of all workers, which were asked something.

    Raises WorkersLost where one died, did not answer in ``timeout`` seconds, or has no machine left, as ``lacking``
    says; else what a worker raised.
    """
    end, pending, found = time.monotonic() + timeout, list(answers), {}
    while pending:
        ready, pending = ray.wait(pending, timeout=min(_GLANCE, max(0.0, end - time.monotonic())))
        if not ready and time.monotonic() < end:
            if reason := lacking():
                raise WorkersLost(f"machines have left when workers were asked {what}: {reason}")
            continue
        if not ready:
            late = [answers.index(each) for each in pending]
            raise WorkersLost(f"workers {late} did not answer within {timeout:g} s when asked {what}")
        for each in ready:
            found[answers.index(each)] = fetch(ray, each, f"worker {answers.index(each)}")
    return [found[worker] for worker in range(len(answers))]


def fetch(ray: Any, answer: Any, who: str) -> Any:
    """Return an answer that is there; raises what ``who`` raised, or WorkersLost where it died."""
    try:
        return ray.get(answer, timeout=_FETCH)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, PeerloraError) else error) from None
    except ray.exceptions.RayError as error:
        raise WorkersLost(f"{who} was lost ({type(error).__name__})") from None


def check_versions(facts: Sequence[dict[str, Any]]) -> None:
    """Raise ClusterError where machines differ in a version that decides a result, or is needed to talk."""
    own = describe_process()["versions"]
    for each in facts:
        for name, version in each["versions"].items():
            if version != own.get(name):
                raise ClusterError(
                    f"{each['host']} has {name} {version}, the driver has {own.get(name)}; install the same versions "
                    "on all machines"
                )


@lru_cache(maxsize=4)
def actor_class(kind: Any) -> Any:
    """The class of a worker's actor: calls of the driver on one thread, deliveries on another."""
    ray: Any = import_module("ray")

    class BlockActor(kind):
        def describe(self) -> dict[str, Any]:
            return describe_process() | {"node": ray.get_runtime_context().get_node_id()}

        def meet(self, workers: Sequence[Any]) -> None:
            def send(number: int, receivers: Sequence[int], values: Values) -> None:
                once = ray.put(values) if len(receivers) > 1 else values
                for receiver in receivers:
                    workers[receiver].deliver.remote(number, self.index, once)

            self.send = send

        @ray.method(concurrency_group=_INBOX)
        def deliver(self, number: int, sender: int, values: Values) -> None:
            super().deliver(number, sender, values)

    return ray.remote(concurrency_groups={_INBOX: 1})(BlockActor)
