"""Workers as actors of a Ray cluster, each of whose calls has a deadline."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any, Self

from peerlora.config.cluster import ClusterConfig
from peerlora.errors import ClusterError, PeerloraError, WorkersLost
from peerlora.runtime.cluster.group import Engine, WorkerGroup
from peerlora.runtime.cluster.machines import await_machines, describe_free, lacking, machines_of
from peerlora.runtime.cluster.rows import Values
from peerlora.runtime.cluster.session import ray_session
from peerlora.runtime.cluster.worker import BlockWorker, describe_process

_INBOX = "inbox"  # the threads of an actor that take rows while it computes
_GLANCE = 10.0  # seconds between two looks at its machines while workers compute
_FETCH = 60.0  # seconds to fetch an answer that is there


class RayEngine(Engine):
    """Starts workers on a Ray cluster."""

    def __init__(self, settings: ClusterConfig, exchanged_bytes: int):
        self.settings, self.exchanged_bytes, self._open = settings, exchanged_bytes, ExitStack()
        self._started = False
        self._noted: list[str] = []

    def __enter__(self) -> Self:
        self.ray: Any = self._open.enter_context(ray_session(self.settings, self.exchanged_bytes, self._noted.append))
        self.notes = tuple(self._noted)
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()

    def start(self, workers: int, settings: ClusterConfig) -> WorkerGroup:
        """See ``Engine``."""
        try:
            group = RayGroup(self.ray, workers, settings, tell=self.tell)
        except WorkersLost as error:
            if self._started:
                raise
            raise ClusterError(str(error)) from None
        self._started = True
        return group

    def await_machines(self, settings: ClusterConfig, tell: Callable[[str], None]) -> None:
        """See ``Engine``."""
        await_machines(self.ray, settings, tell)


class RayGroup:
    """Workers on the machines of a Ray cluster.

    Where one fails or is lost, all are ended: the others wait for its rows.  ``kind``: what each does when it is asked.
    """

    def __init__(
        self,
        ray: Any,
        count: int,
        settings: ClusterConfig,
        kind: type[BlockWorker] = BlockWorker,
        tell: Callable[[str], None] = lambda message: None,
    ):
        self.ray, self.settings, self.timeout, self.nodes = ray, settings, settings.timeout, 1
        resources = {"num_cpus": settings.cpus_per_worker, "num_gpus": settings.gpus_per_worker}
        actor = actor_class(kind).options(**resources)
        self.workers = [actor.remote(index) for index in range(count)]
        try:
            facts = await_start(ray, self.workers, settings, tell)
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
            return wait_for(self.ray, answers, self.timeout, f"to {method}", self._lacking)
        except BaseException:
            self.close()
            raise

    def _lacking(self) -> str:
        return lacking(self.settings, machines_of(self.ray))

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            self.ray.kill(worker, no_restart=True)


def await_start(
    ray: Any, actors: Sequence[Any], settings: ClusterConfig, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return what workers tell of themselves once all have started; ``tell`` is told where they wait for others.

    Raises WorkersLost where they don't start in time, ClusterError where a machine cannot start one.
    """
    reported = False

    def waiting() -> str:
        nonlocal reported
        if not reported:
            tell(f"workers wait for cores and GPUs that others use: {describe_free(ray)}")
        reported = True
        return lacking(settings, machines_of(ray))

    free = "to start; are so many cores and GPUs free?"
    with describe_failed_start(ray):
        facts = wait_for(ray, [actor.describe.remote() for actor in actors], settings.timeout, free, waiting)
    check_versions(facts)
    return facts


@contextmanager
def describe_failed_start(ray: Any) -> Iterator[None]:
    """Turn the failure of a worker that was asked to describe itself into a ClusterError."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        versions = ", ".join(f"{name} {version}" for name, version in describe_process()["versions"].items())
        raise ClusterError(
            f"a worker cannot start on a machine of the cluster ({_last_line(error)}); all machines need the driver's "
            f"versions: {versions}"
        ) from None


def _last_line(error: BaseException) -> str:
    """What an error of another process ends with: above stand its calls."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else "".join(traceback.format_exception_only(cause)).strip()


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
