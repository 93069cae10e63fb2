"""Groups of workers: how the driver of a run calls them, here as threads of its own process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol

from peerlora.config.cluster import ClusterConfig
from peerlora.runtime.cluster.rows import RowsMissing, Values
from peerlora.runtime.cluster.worker import BlockWorker

ALONE = ("build",)  # methods that draw from the process's own generator, so that threads must not meet in them


class WorkerGroup(Protocol):
    """The workers of one run."""

    nodes: int
    """Machines that they are on."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of ``BlockWorker`` on all workers at once; return the answers in their order.

        Raises what a worker raised, and WorkersLost where one died or did not answer in time.
        """
        ...

    def call_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """Call a method on all workers, each with arguments of its own."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


class Engine(AbstractContextManager["Engine"]):
    """What starts workers: a connection to a cluster, or this process."""

    notes: Sequence[str] = ()
    """What there is to know about it."""

    def tell(self, message: str) -> None:
        """Take a warning while workers start; its owner puts something better in the place of this."""

    @abstractmethod
    def start(self, workers: int, settings: ClusterConfig) -> WorkerGroup:
        """Start so many workers; raises ClusterError where they cannot be had."""

    def await_machines(self, settings: ClusterConfig, tell: Callable[[str], None]) -> None:
        """Return when the workers of a run fit again, after some were lost; ``tell`` is told where that takes a while.

        Raises ClusterError where they do not within ``settings.wait`` seconds.
        """

    def __exit__(self, *_error: object) -> None:
        """Leave nothing running that this engine started."""


class ThreadEngine(Engine):
    """Starts workers as threads of this process."""

    def start(self, workers: int, settings: ClusterConfig) -> WorkerGroup:
        """See ``Engine``."""
        return ThreadGroup(workers)


class ThreadGroup:
    """Workers in threads of this process: the plain twin of a cluster, which needs nothing installed.

    They share one base model's file, but not the model.
    """

    nodes = 1

    def __init__(self, count: int):
        self.workers = [BlockWorker(index) for index in range(count)]
        for worker in self.workers:
            worker.send = self._sender(worker.index)
        self._pool = ThreadPoolExecutor(count)

    def _sender(self, sender: int):
        def send(number: int, receivers: Sequence[int], values: Values) -> None:
            for receiver in receivers:
                self.workers[receiver].deliver(number, sender, values)

        return send

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """See ``WorkerGroup``."""
        return self.call_each(method, [arguments] * len(self.workers))

    def call_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """See ``WorkerGroup``."""
        if method in ALONE:
            return [getattr(worker, method)(*own) for worker, own in zip(self.workers, arguments, strict=True)]
        calls = [
            self._pool.submit(self._call, worker, method, own)
            for worker, own in zip(self.workers, arguments, strict=True)
        ]
        failures = [error for call in calls if (error := call.exception()) is not None]
        if failures:
            raise first_cause(failures)
        return [call.result() for call in calls]

    def _call(self, worker: BlockWorker, method: str, arguments: Sequence[Any]) -> Any:
        try:
            return getattr(worker, method)(*arguments)
        except BaseException:
            for each in self.workers:
                each.close("another worker failed")
            raise

    def close(self) -> None:
        """End all threads."""
        for worker in self.workers:
            worker.close("the run ends")
        self._pool.shutdown()


def first_cause(failures: Sequence[BaseException]) -> BaseException:
    """The failure that made the others fail: the first that is no complaint about missing rows."""
    return next((each for each in failures if not isinstance(each, RowsMissing)), failures[0])
