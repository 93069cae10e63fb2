"""Run a grid: check every trial first, search the learning rates, run the trials, write the comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from peerlora.errors import RunError, Stopped
from peerlora.experiments.comparison import Comparison
from peerlora.experiments.grid import GridConfig, load_grid, search_warnings
from peerlora.experiments.rate_search import RateSearch, choose_rates, gather_searches, next_rate
from peerlora.experiments.resource_cache import ResourceCache, data_key, order_trials
from peerlora.experiments.results import write_results
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.trial_checks import check_grid
from peerlora.experiments.trial_pool import TrialPool
from peerlora.experiments.trial_run import is_finished, require_same, run_trial
from peerlora.experiments.trials import Trial, plan_search, plan_trials, search_labels, searched_settings
from peerlora.files import write_atomically
from peerlora.runs.events import Event
from peerlora.runs.resume import list_changes
from peerlora.runs.store import new_folder, read_events, read_facts, require_free
from peerlora.runtime.compose import resolve_threads
from peerlora.runtime.inputs import describe_rows, require_same_inputs
from peerlora.runtime.resources import RunResources


@dataclass(frozen=True)
class GridStatus:
    """Progress of a grid when a trial begins.  Work is counted in training samples."""

    trial: str
    number: int
    trials: int
    done: int
    """Work of the trials that are finished."""
    own: int
    """Work of this trial."""
    total: int
    rounds: int
    """Of this trial."""


class ProgressReporter(Protocol):
    """Shows progress: called when a trial starts, returns a context manager that yields a listener to its events."""

    def __call__(self, status: GridStatus) -> AbstractContextManager[Callable[[Event], None]]:
        """Report one trial."""
        ...


class OutcomeStore(Protocol):
    """Keeps the outcomes of finished trials, without their run folders, for a grid that goes on elsewhere."""

    def find(self, trial: Trial) -> Outcome | None:
        """Return the outcome of a trial that has finished; None where it has not."""
        ...

    def keep(self, trial: Trial, outcome: Outcome) -> None:
        """Store the outcome of a trial that has just finished."""
        ...


@dataclass(frozen=True)
class Callbacks:
    """What a running grid asks of its caller."""

    progress: ProgressReporter
    stop: Callable[[], bool] = lambda: False
    outcomes: OutcomeStore | None = None
    """Where outcomes are kept in place of run folders, whose figures the report then lacks; null: folders stay."""
    pool: Callable[[ResourceCache], TrialPool] | None = None
    """Gives workers that run several trials at once, whenever it is asked the same; null: one trial after another."""


def start_grid(grid: GridConfig, out: Path | str | None, callbacks: Callbacks) -> Comparison:
    """Run a grid in a new folder; nothing is written before every trial has been composed once."""
    return _run(*_prepare(grid, out, callbacks))


def search_rates(grid: GridConfig, out: Path | str | None, callbacks: Callbacks) -> list[RateSearch]:
    """Run the search of a grid alone, in a new folder; return what the rates of each group reached."""
    grid, runner, cache = _prepare(grid, out, callbacks)
    runner.expect(plan_search(grid).trials)
    return _search(grid, runner, cache)


def _prepare(
    grid: GridConfig, out: Path | str | None, callbacks: Callbacks
) -> tuple[GridConfig, _TrialRunner, ResourceCache]:
    """Check every trial of a grid, and make its folder."""
    folder = Path(out) if out is not None else new_folder("compare")
    require_free(folder)
    if grid.base.get("threads") is None:  # a grid that is resumed elsewhere goes on with as many
        threads = grid.cluster.cpus_per_worker if grid.cluster else resolve_threads(None)
        grid = grid.model_copy(update={"base": {**grid.base, "threads": threads}})
    cache = ResourceCache(grid.share_prefix)
    if callbacks.pool is not None:
        callbacks.pool(cache)  # its workers start while trials are checked
    check_grid(grid, cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "grid.yaml", grid.to_yaml())
    except OSError as error:
        raise RunError(f"output folder {folder} cannot be written ({error.strerror}); choose another --out") from None
    return grid, _TrialRunner(callbacks, folder), cache


def resume_grid(folder: Path | str, expected: Callable[[GridConfig], GridConfig], callbacks: Callbacks) -> Comparison:
    """Resume a grid: finished trials stay, the unfinished one goes on from its checkpoint.

    ``expected`` turns the stored grid into the one that the user asks for; RunError lists the differences.
    """
    folder = Path(folder)
    if not (folder / "grid.yaml").is_file():
        raise RunError(f"{folder} is not a comparison (no grid.yaml); give the --out of an earlier one")
    stored = load_grid(folder / "grid.yaml")
    now = expected(stored)
    if now.base.get("threads") is None:
        now = now.model_copy(update={"base": {**now.base, "threads": stored.base.get("threads")}})
    changed = list_changes(*(each.model_dump(mode="json", exclude={"cluster"}) for each in (stored, now)))
    if changed:
        raise RunError(
            f"{folder} was started with another grid ({'; '.join(changed)}); "
            "resume with the same grid, or start a new one with another --out"
        )
    return _run(stored, _TrialRunner(callbacks, folder), ResourceCache(stored.share_prefix))


def _run(grid: GridConfig, runner: _TrialRunner, cache: ResourceCache) -> Comparison:
    runner.expect([*plan_search(grid).trials, *plan_trials(grid).trials])
    searches = _search(grid, runner, cache)
    trials = plan_trials(grid, choose_rates(grid, searches)).trials
    try:
        runner.finish_all(order_trials(trials), cache)
    except Stopped:
        _write_results(grid, runner, searches, trials)
        raise
    return _write_results(grid, runner, searches, trials)


def _search(grid: GridConfig, runner: _TrialRunner, cache: ResourceCache) -> list[RateSearch]:
    """Run the search, and as long as rates have to grow, the next ones.

    Which rates come next follows from what the runs before them reached, so a resumed grid comes to the same.
    """
    found: dict[str, Outcome] = {}
    rates = {setting.name: list(grid.search.rates) for setting in searched_settings(grid).values()}
    while True:
        planned = plan_search(grid, rates).trials
        fresh = order_trials([trial for trial in planned if trial.folder not in found])
        runner.finish_all(fresh, cache)
        for trial in fresh:
            found[trial.folder] = replace(runner.outcome(trial), events=())  # of many runs they are large
        searches = gather_searches(grid, [found[trial.folder] for trial in planned])
        more = {each.setting: rate for each in searches if (rate := next_rate(each, grid.search)) is not None}
        if not more:
            return searches
        for setting, rate in more.items():
            rates[setting].append(rate)
        runner.expect([trial for trial in plan_search(grid, rates).trials if trial.folder not in found])


class _TrialRunner:
    """Runs trials one after another and counts the work left."""

    def __init__(self, callbacks: Callbacks, folder: Path):
        self.callbacks, self.folder = callbacks, folder
        self.kept = self.finished = self.trials = self.done = self.total = 0
        self.numbers: dict[str, int] = {}
        """The number of every trial that was begun, by its folder, behind those that were kept: finished before.  One
        whose worker was lost begins again under its number."""
        self.rows: dict[str, dict[str, Any]] = {}
        """By ``data_key``, the digests of the rows that finished trials used."""

    def expect(self, trials: Sequence[Trial]) -> None:
        """Count trials that are to be run."""
        self.trials += len(trials)
        self.total += sum(trial.config.training_samples for trial in trials)

    def finish_all(self, trials: Sequence[Trial], cache: ResourceCache) -> None:
        """Run trials to their ends, but those that are finished already: in this process, or on workers."""
        open_ones = [trial for trial in trials if not self._is_done(trial)]
        self.done += sum(trial.config.training_samples for trial in trials if trial not in open_ones)
        self.finished += len(trials) - len(open_ones)
        self.kept += len(trials) - len(open_ones)
        if self.callbacks.pool is None:
            for trial in open_ones:
                self._finish(trial, cache)
            return
        for trial in open_ones:
            self._require_same_rows(trial, cache)
        pool = self.callbacks.pool(cache)
        for trial in pool.run(open_ones, self.folder, self._begun, self.callbacks.stop):
            self._keep(trial)
            open_ones.remove(trial)
        if open_ones:
            raise self._stopped()

    def _is_done(self, trial: Trial) -> bool:
        run, store = self.folder / trial.folder, self.callbacks.outcomes
        if is_finished(run):
            require_same(run, trial.config)
            if (run / "run.json").is_file():
                self.rows.setdefault(data_key(trial.config), read_facts(run).get("inputs", {}))
            return True
        return store is not None and store.find(trial) is not None

    def _begun(self, trial: Trial) -> None:
        """Say that a worker begins a trial."""
        with self.callbacks.progress(self._status(trial)):
            pass

    def _finish(self, trial: Trial, cache: ResourceCache) -> None:
        if self.callbacks.stop():
            raise self._stopped()
        with self.callbacks.progress(self._status(trial)) as listen:
            self._run_trial(trial, cache, listen)
        self._keep(trial)

    def _status(self, trial: Trial) -> GridStatus:
        """Count the trial where it begins for the first time, and tell how far the grid is."""
        number = self.numbers.setdefault(trial.folder, self.kept + len(self.numbers) + 1)
        work, rounds = trial.config.training_samples, trial.config.train.rounds
        return GridStatus(trial.name, number, self.trials, self.done, work, self.total, rounds)

    def _keep(self, trial: Trial) -> None:
        """Count a trial that has just finished; keep its outcome in place of its folder, where outcomes are kept."""
        self.finished += 1
        self.done += trial.config.training_samples
        if self.callbacks.outcomes is not None:
            self.callbacks.outcomes.keep(trial, self.outcome(trial))
            shutil.rmtree(self.folder / trial.folder)

    def outcome(self, trial: Trial) -> Outcome:
        """Read the outcome of a trial, finished or not."""
        store = self.callbacks.outcomes
        kept = None if store is None else store.find(trial)
        return kept or _read_outcome(trial, self.folder)

    def _run_trial(self, trial: Trial, cache: ResourceCache, listen: Callable[[Event], None]) -> None:
        self._require_same_rows(trial, cache)
        try:
            run = self.folder / trial.folder
            run_trial(trial.config, run, cache.resources(trial.config), [listen], self.callbacks.stop)
        except (Stopped, KeyboardInterrupt):
            raise self._stopped() from None

    def _require_same_rows(self, trial: Trial, cache: ResourceCache) -> None:
        """Raise RunError where a trial would see other rows than finished ones of the same data did."""
        was = self.rows.get(data_key(trial.config))
        if was and isinstance(resources := cache.resources(trial.config), RunResources):
            now = describe_rows(resources.train_data, resources.eval_data)
            require_same_inputs({name: was[name] for name in now}, now, trial.config, self.folder)

    def _stopped(self) -> Stopped:
        return Stopped(
            f"stopped after {self.finished} of {self.trials} cells; go on with: peerlora compare --resume {self.folder}"
        )


def _read_outcome(trial: Trial, folder: Path) -> Outcome:
    run = folder / trial.folder
    diverged = run / "diverged.json"
    return Outcome.of_events(
        trial.setting,
        trial.labels,
        trial.config.seed,
        trial.config.train.lr,
        trial.folder,
        read_events(run) if is_finished(run) and not diverged.is_file() else [],
        trial.config,
        diverged=json.loads(diverged.read_text(encoding="utf-8"))["reason"] if diverged.is_file() else None,
        p=trial.config.topology.p if trial.config.topology.kind == "random" else None,
    )


def _write_results(
    grid: GridConfig,
    runner: _TrialRunner,
    searches: Sequence[RateSearch],
    trials: Sequence[Trial],
) -> Comparison:
    searched_on = search_labels(grid)
    searched = plan_search(grid, {each.setting: [rate.rate for rate in each.rates] for each in searches}).trials
    return write_results(
        runner.folder,
        [replace(runner.outcome(trial), searched_on=searched_on.get(trial.setting)) for trial in trials],
        [runner.outcome(trial) for trial in searched],
        grid.baseline,
        grid.to_yaml(),
        {trial.setting: trial.config for trial in reversed(trials)},
        grid.published,
        searches,
        search_warnings(grid),
    )
