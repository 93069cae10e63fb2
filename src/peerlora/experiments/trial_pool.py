"""Trials of a grid on the workers of a Ray cluster: one after another on each, several at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from peerlora.config.cluster import ClusterConfig
from peerlora.config.run import RunConfig
from peerlora.errors import ClusterError, RunError, WorkersLost
from peerlora.experiments.resource_cache import ResourceCache, data_key
from peerlora.experiments.trial_run import run_trial
from peerlora.experiments.trials import Trial
from peerlora.runtime.cluster.checks import refuse_device
from peerlora.runtime.cluster.machines import await_machines, fitting_workers, machines_of
from peerlora.runtime.cluster.ray_engine import await_start, fetch
from peerlora.runtime.cluster.session import ray_session
from peerlora.runtime.cluster.worker import describe_process, name_machine
from peerlora.runtime.policy import PolicyResources
from peerlora.runtime.resources import BaseModelCache, RunResources

_LOOK = 1.0  # seconds between two looks at workers that are busy
_PING = 10.0  # seconds between two questions whether a worker is alive

Files = dict[str, bytes]
"""The files of a run folder, by their paths in it."""


@dataclass(frozen=True)
class TrialJob:
    """What a worker needs for one trial, beside its rows."""

    config: RunConfig
    run: Path
    """The folder that the driver will put the results in."""
    files: Files
    """Of a trial that was begun before."""


class TrialWorker:
    """Runs trials in folders of its own; it keeps rows and base model for the next trial that needs the same."""

    def __init__(self, share_prefix: bool, folder: str):
        self.share_prefix, self.bases = share_prefix, BaseModelCache()
        self.key, self.rows = "", None
        if os.path.isdir(folder):  # paths of a config may be relative to the driver's
            os.chdir(folder)

    def run(self, job: TrialJob, key: str, rows: RunResources | PolicyResources) -> Files:
        """Run a trial to its end and return its files."""
        if self.rows is None or key != self.key:
            self.key, self.rows = key, rows  # a policy comes with its base
            if isinstance(rows, RunResources):
                self.rows = replace(rows, bases=self.bases, share_prefix=self.share_prefix)
        with tempfile.TemporaryDirectory() as temporary:
            run = Path(temporary) / "run"
            write_files(run, job.files)
            with name_machine("a worker"):
                run_trial(job.config, run, self.rows)
            return {name: _relocated(name, data, run, job.run) for name, data in read_files(run).items()}


def _relocated(name: str, data: bytes, here: Path, there: Path) -> bytes:
    """A file that names the folder of its run, with the one that the driver puts it in."""
    return data.replace(str(here).encode(), str(there).encode()) if name.endswith((".json", ".jsonl")) else data


def read_files(folder: Path) -> Files:
    """Read all files of a folder; of none where there is none."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def write_files(folder: Path, files: Files) -> None:
    """Write files into a folder that is not there yet, all of them or none; nothing where there are no files."""
    if not files:
        return
    half = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    for name, data in files.items():
        path = half / name
        if not path.resolve().is_relative_to(half.resolve()):
            raise RunError(f"a worker returned the file {name!r}, which is outside its run; expected paths below it")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)


@dataclass
class _Seat:
    """One worker and what it does."""

    actor: Any
    key: str | None = None
    """Of the rows that its worker keeps."""
    job: tuple[Trial, TrialJob] | None = None
    answer: Any = None
    ping: Any = None
    asked: float = field(default_factory=time.monotonic)


class TrialPool:
    """Workers that run trials side by side; where one is lost, its trial begins again on a new one.

    They start at once, and are waited for when there are trials.  ``warn`` is told of losses.  Rows of data go to each
    machine once; the base model is read by every worker from its own files.
    """

    def __init__(self, ray: Any, settings: ClusterConfig, cache: ResourceCache, warn: Callable[[str], None]):
        self.ray, self.settings, self.cache, self.warn = ray, settings, cache, warn
        self.lost: Counter[str] = Counter()
        """Trial -> how often its worker was lost."""
        self._rows: dict[str, Any] = {}
        """Rows in Ray's object store, by the key of those that need them."""
        self._started = self._threads_noted = False
        self.seats = [_Seat(self._actor()) for _ in range(settings.workers)]

    def _actor(self) -> Any:
        resources = {"num_cpus": self.settings.cpus_per_worker, "num_gpus": self.settings.gpus_per_worker}
        return actor_class().options(**resources).remote(self.cache.share_prefix, os.getcwd())

    def run(
        self, trials: Sequence[Trial], folder: Path, begun: Callable[[Trial], None], stop: Callable[[], bool]
    ) -> Iterator[Trial]:
        """Run trials, as many at once as there are workers; yield each when its folder is written.

        They begin in this order, but that a worker goes on with trials of the rows that it has.  It ends early where
        ``stop`` says so.  Where machines leave, it goes on with the workers that still fit.  Raises what a trial
        raised, RunError where a trial's workers are lost again and again, or no machine is left.
        """
        self._check(trials)
        self._await_start()
        waiting = [(data_key(trial.config), trial) for trial in trials]
        try:
            while not stop() and (waiting or self._busy):
                for seat in self._free() if waiting else ():
                    if waiting:
                        key, trial = waiting.pop(self._choose(seat, [key for key, _ in waiting]))
                        begun(trial)
                        self._begin(seat, key, trial, folder)
                if not self._busy:
                    self._await_machine(folder)
                    continue
                for seat, trial, job in self._ended():
                    try:
                        files = fetch(self.ray, seat.answer, f"the worker of {trial.name}")
                    except WorkersLost as error:
                        self._give_up(seat, trial, error)
                        waiting.insert(0, (data_key(trial.config), trial))
                        continue
                    seat.job = None
                    write_files(job.run, files)
                    yield trial
        finally:
            for seat in self._busy:
                self._end(seat)

    def _await_start(self) -> None:
        """Wait until all workers have answered once; raises ClusterError where one can't start, or doesn't in time."""
        if self._started:
            return
        try:
            await_start(self.ray, [seat.actor for seat in self.seats], self.settings, self.warn)
        except BaseException as error:
            self.close()
            raise ClusterError(str(error)) if isinstance(error, WorkersLost) else error from None
        self._started = True

    def _check(self, trials: Sequence[Trial]) -> None:
        """Refuse trials that would not use what workers have; warn of those that would use more."""
        for trial in trials:
            refuse_device(trial.config, self.settings)
        cores = self.settings.cpus_per_worker
        threads = {trial.config.threads or cores for trial in trials} - {cores}
        if threads and not self._threads_noted:
            self._threads_noted = True
            self.warn(
                f"cells compute in {', '.join(map(str, sorted(threads)))} threads (threads), and workers have "
                f"cpus_per_worker={cores} cores each: they take each other's cores, or leave some unused"
            )

    def _free(self) -> Iterator[_Seat]:
        """Seats that can begin a trial: whose worker is idle, and those without one as far as machines have room."""
        idle = [seat for seat in self.seats if seat.job is None]
        yield from (seat for seat in idle if seat.actor is not None)
        empty = [seat for seat in idle if seat.actor is None]
        if empty:
            room = fitting_workers(self.settings, machines_of(self.ray)) - (len(self.seats) - len(empty))
            yield from empty[: max(0, room)]

    def _await_machine(self, folder: Path) -> None:
        """Wait until one worker fits again; raises RunError where none does in time."""
        try:
            await_machines(self.ray, self.settings.model_copy(update={"workers": 1}), self.warn)
        except ClusterError as error:
            raise RunError(f"{error}, and go on with: peerlora compare --resume {folder}") from None

    @property
    def _busy(self) -> list[_Seat]:
        return [seat for seat in self.seats if seat.job]

    def _choose(self, seat: _Seat, keys: Sequence[str]) -> int:
        """The place of the trial that a worker takes: of rows that it has, else that no worker has, else the first.

        ``keys``: of the rows of the trials that wait.
        """
        if seat.key in keys:
            return keys.index(seat.key)
        kept = {each.key for each in self.seats}
        return next((at for at, key in enumerate(keys) if key not in kept), 0)

    def _begin(self, seat: _Seat, key: str, trial: Trial, folder: Path) -> None:
        seat.key, run = key, folder / trial.folder
        if key not in self._rows:
            rows = self.cache.resources(trial.config)
            if isinstance(rows, RunResources):
                rows = replace(rows, bases=None)
            self._rows[key] = self.ray.put(rows)
        for unused in self._rows.keys() - {each.key for each in self.seats}:
            del self._rows[unused]
        if seat.actor is None:
            seat.actor = self._actor()
        job = TrialJob(trial.config, run, read_files(run) if (run / "run.json").is_file() else {})
        seat.job, seat.answer = (trial, job), seat.actor.run.remote(job, key, self._rows[key])
        seat.ping, seat.asked = seat.actor.describe.remote(), time.monotonic()

    def _ended(self) -> list[tuple[_Seat, Trial, TrialJob]]:
        """A seat whose worker has answered or died, if any has after a wait; workers silent too long are ended."""
        busy = self._busy
        ready, _ = self.ray.wait([seat.answer for seat in busy], timeout=_LOOK)  # the first one ends it
        now = time.monotonic()
        for seat in busy:
            answered, _ = self.ray.wait([seat.ping], timeout=0)
            if answered and now - seat.asked > _PING:
                seat.ping, seat.asked = seat.actor.describe.remote(), now
            elif not answered and now - seat.asked > self.settings.timeout:
                self.ray.kill(seat.actor, no_restart=True)  # its answer will be that it died
        return [(seat, *seat.job) for seat in busy if seat.job and seat.answer in ready]

    def _give_up(self, seat: _Seat, trial: Trial, error: WorkersLost) -> None:
        """Count the loss of a worker, and raise RunError where a trial has lost too many."""
        self._end(seat)
        self.lost[trial.folder] += 1
        if self.lost[trial.folder] > self.settings.retries:
            raise RunError(f"{error}, and {self.settings.retries} before it; see what ends them, and resume")
        self.warn(f"{error}; it begins again on another worker")

    def _end(self, seat: _Seat) -> None:
        """End a worker; the next trial of its seat gets a new one."""
        if seat.actor is not None:
            self.ray.kill(seat.actor, no_restart=True)
        seat.actor = seat.job = seat.key = None

    def close(self) -> None:
        """End all workers."""
        for seat in self.seats:
            self._end(seat)


@contextmanager
def trial_pools(settings: ClusterConfig, warn: Callable[[str], None]) -> Iterator[Callable[[ResourceCache], TrialPool]]:
    """Connect to a cluster, and yield what gives a grid its pool: one for all its trials."""
    with ray_session(settings) as ray, ExitStack() as opened:
        pools: list[TrialPool] = []

        def pool(cache: ResourceCache) -> TrialPool:
            if not pools:
                pools.append(TrialPool(ray, settings, cache, warn))
                opened.callback(pools[0].close)
            return pools[0]

        yield pool


@lru_cache(maxsize=1)
def actor_class() -> Any:
    """The class of a worker's actor: trials on one thread, questions whether it is alive on another."""
    ray: Any = import_module("ray")

    class TrialActor(TrialWorker):
        @ray.method(concurrency_group="health")
        def describe(self) -> dict[str, Any]:
            return describe_process()

    return ray.remote(concurrency_groups={"health": 1})(TrialActor)
