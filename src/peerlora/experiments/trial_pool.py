"""Trials of a grid on the workers of a Ray cluster: one after another on each, several at a time."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peerlora.config.cluster import ClusterConfig
from peerlora.errors import ClusterError, RunError, WorkersLost
from peerlora.experiments.resource_cache import ResourceCache, data_key
from peerlora.experiments.results import writing
from peerlora.experiments.trial_run import is_finished
from peerlora.experiments.trial_worker import TrialJob, actor_class, read_files, write_files
from peerlora.experiments.trials import Trial
from peerlora.runtime.cluster.checks import refuse_device
from peerlora.runtime.cluster.machines import await_machines, fitting_workers, machines_of
from peerlora.runtime.cluster.ray_engine import await_start, check_versions, describe_failed_start, fetch
from peerlora.runtime.cluster.session import ray_session
from peerlora.runtime.resources import RunResources

_LOOK = 1.0  # seconds between two looks at workers that are busy
_PING = 10.0  # seconds between two questions whether a worker is alive
_RESTARTS = "resumed, the cell begins again from where it was when this command gave it to a worker"


@dataclass
class _Seat:
    """One worker and what it does."""

    actor: Any
    checked: bool = False
    """Whether its machine is known to have the driver's versions."""
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
        """Run trials, as many at once as there are workers; yield each that has finished when its folder is written.

        They begin in this order, but that a worker goes on with trials of the rows that it has.  Where ``stop`` says
        so, those under way end after their rounds, and their folders have checkpoints.  Where machines leave, it goes
        on with the workers that still fit.  Raises what a trial raised, RunError where a trial's workers are lost again
        and again, or no machine is left, ClusterError where one that joins has other versions.
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
                        self._take(seat, trial, job, folder)
                    except WorkersLost as error:
                        self._give_up(seat, trial, error, folder)
                        waiting.insert(0, (data_key(trial.config), trial))
                        continue
                    yield trial
            yield from self._stop(folder)
        finally:
            for seat in self._busy:
                self._end(seat)

    def _take(self, seat: _Seat, trial: Trial, job: TrialJob, folder: Path) -> None:
        """Write the files that a worker has returned.

        Raises what the trial raised, WorkersLost where it died, ClusterError where its machine has other versions,
        RunError where they cannot be written.
        """
        self._check_versions(seat, trial)
        files = fetch(self.ray, seat.answer, f"the worker of {trial.name}")
        seat.job = None
        with writing(folder):
            write_files(job.run, files)

    def _check_versions(self, seat: _Seat, trial: Trial) -> None:
        """Raise ClusterError where a worker's machine has other versions than the driver, WorkersLost where it died."""
        if not seat.checked:
            with describe_failed_start(self.ray):
                check_versions([fetch(self.ray, seat.ping, f"the worker of {trial.name}")])
            seat.checked = True

    def _stop(self, folder: Path) -> Iterator[Trial]:
        """Let busy workers end their rounds, write what they have done, and end them; yield trials that have finished.

        What is not there after ``settings.timeout`` seconds is given up.
        """
        for seat in self._busy:
            seat.actor.ask_stop.remote()
        end = time.monotonic() + self.settings.timeout
        while self._busy and time.monotonic() < end:
            for seat, trial, job in self._ended():
                try:
                    self._take(seat, trial, job, folder)
                except WorkersLost as error:
                    self.warn(f"{error}; {_RESTARTS}")
                finally:
                    self._end(seat)  # one that was asked to stop runs nothing to its end any more
                if is_finished(job.run):
                    yield trial
        for seat in self._busy:
            if seat.job:
                late = f"the worker of {seat.job[0].name} did not end its round within {self.settings.timeout:g} s"
                self.warn(f"{late}; {_RESTARTS}")

    def _await_start(self) -> None:
        """Wait until all workers have answered once; raises ClusterError where one can't start, or doesn't in time."""
        if self._started:
            return
        try:
            await_start(self.ray, [seat.actor for seat in self.seats], self.settings, self.warn)
        except BaseException as error:
            self.close()
            raise ClusterError(str(error)) if isinstance(error, WorkersLost) else error from None
        for seat in self.seats:
            seat.checked = True
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
            if answered and seat.job:
                with suppress(WorkersLost):  # its answer will say so, too
                    self._check_versions(seat, seat.job[0])
            if answered and now - seat.asked > _PING:
                seat.ping, seat.asked = seat.actor.describe.remote(), now
            elif not answered and now - seat.asked > self.settings.timeout:
                self.ray.kill(seat.actor, no_restart=True)  # its answer will be that it died
        return [(seat, *seat.job) for seat in busy if seat.job and seat.answer in ready]

    def _give_up(self, seat: _Seat, trial: Trial, error: WorkersLost, folder: Path) -> None:
        """Count the loss of a worker, and raise RunError where a trial has lost too many."""
        self._end(seat)
        self.lost[trial.folder] += 1
        if self.lost[trial.folder] > self.settings.retries:
            raise RunError(
                f"{error}, and {self.settings.retries} before it; see what ends them, and resume: "
                f"peerlora compare --resume {folder}"
            )
        self.warn(f"{error}; it begins again on another worker")

    def _end(self, seat: _Seat) -> None:
        """End a worker; the next trial of its seat gets a new one."""
        if seat.actor is not None:
            self.ray.kill(seat.actor, no_restart=True)
        seat.actor = seat.job = seat.key = None
        seat.checked = False

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
