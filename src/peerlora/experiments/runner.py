"""Run a grid: check every trial first, search the learning rates, run the trials, write the comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from peerlora.errors import DivergenceError, RunError, Stopped
from peerlora.experiments.comparison import Comparison
from peerlora.experiments.grid import GridConfig, load_grid, search_warnings
from peerlora.experiments.rate_search import RateSearch, choose_rates, gather_searches, next_rate
from peerlora.experiments.resource_cache import ResourceCache, data_key, order_trials
from peerlora.experiments.results import write_results
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.trial_checks import check_grid
from peerlora.experiments.trials import Trial, plan_search, plan_trials, search_labels, searched_settings
from peerlora.files import write_atomically
from peerlora.runs.events import Event
from peerlora.runs.resume import list_changes
from peerlora.runs.store import new_folder, read_events, read_facts, require_free
from peerlora.runtime.compose import resolve_threads
from peerlora.runtime.inputs import describe_rows, require_same_inputs
from peerlora.runtime.resources import RunResources
from peerlora.runtime.simulate import resume, simulate


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
        grid = grid.model_copy(update={"base": {**grid.base, "threads": resolve_threads(None)}})
    cache = ResourceCache(grid.share_prefix)
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
    changed = list_changes(stored.model_dump(mode="json"), now.model_dump(mode="json"))
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
        for trial in order_trials(trials):
            runner.finish(trial, cache)
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
        for trial in order_trials([trial for trial in planned if trial.folder not in found]):
            runner.finish(trial, cache)
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
        self.number = self.trials = self.done = self.total = 0
        self.rows: dict[str, dict[str, Any]] = {}
        """By ``data_key``, the digests of the rows that finished trials used."""

    def expect(self, trials: Sequence[Trial]) -> None:
        """Count trials that are to be run."""
        self.trials += len(trials)
        self.total += sum(trial.config.training_samples for trial in trials)

    def finish(self, trial: Trial, cache: ResourceCache) -> None:
        """Run a trial to its end, unless it is finished already."""
        work, run, store = trial.config.training_samples, self.folder / trial.folder, self.callbacks.outcomes
        self.number += 1
        if _is_finished(run):
            _require_same(run, trial)
            if (run / "run.json").is_file():
                self.rows.setdefault(data_key(trial.config), read_facts(run).get("inputs", {}))
        elif store is None or store.find(trial) is None:
            if self.callbacks.stop():
                raise self._stopped()
            rounds = trial.config.train.rounds
            status = GridStatus(trial.name, self.number, self.trials, self.done, work, self.total, rounds)
            with self.callbacks.progress(status) as listen:
                self._run_trial(trial, cache, listen)
            if store is not None:
                store.keep(trial, self.outcome(trial))
                shutil.rmtree(run)
        self.done += work

    def outcome(self, trial: Trial) -> Outcome:
        """Read the outcome of a trial, finished or not."""
        store = self.callbacks.outcomes
        kept = None if store is None else store.find(trial)
        return kept or _read_outcome(trial, self.folder)

    def _run_trial(self, trial: Trial, cache: ResourceCache, listen: Callable[[Event], None]) -> None:
        run = self.folder / trial.folder
        resources = cache.resources(trial.config)
        was = self.rows.get(data_key(trial.config))
        if was and isinstance(resources, RunResources):
            now = describe_rows(resources.train_data, resources.eval_data)
            require_same_inputs({name: was[name] for name in now}, now, trial.config, self.folder)
        options: dict[str, Any] = {"resources": resources, "sinks": [listen]}
        options["stop"] = self.callbacks.stop
        try:
            if (run / "run.json").is_file():
                resume(run, expected=lambda stored: trial.config, **options)
            else:
                shutil.rmtree(run, ignore_errors=True)  # killed before the run folder was one
                simulate(trial.config, run, **options)
        except (Stopped, KeyboardInterrupt):
            raise self._stopped() from None
        except DivergenceError as error:
            run.mkdir(exist_ok=True)  # one that diverged in its first round has left nothing
            write_atomically(run / "config.yaml", trial.config.to_yaml())
            write_atomically(run / "diverged.json", json.dumps({"reason": str(error)}) + "\n")
        _remove_peft_folders(run)

    def _stopped(self) -> Stopped:
        done = self.number - 1
        return Stopped(
            f"stopped after {done} of {self.trials} cells; go on with: peerlora compare --resume {self.folder}"
        )


def _is_finished(run: Path) -> bool:
    return (run / "summary.json").is_file() or (run / "diverged.json").is_file()


def _require_same(run: Path, trial: Trial) -> None:
    """Raise RunError unless a finished trial was run with today's config."""
    from peerlora.config.loading import load_config

    stored = load_config(run / "config.yaml")
    changed = list_changes(stored.model_dump(mode="json"), trial.config.model_dump(mode="json"))
    if changed:
        raise RunError(f"{run} was run with another config ({'; '.join(changed)}); start anew with another --out")


def _remove_peft_folders(run: Path) -> None:
    """Remove the PEFT folder of each client; ``peerlora export`` makes them from all.safetensors again."""
    for each in (run / "adapters").glob("*/"):
        shutil.rmtree(each)


def _read_outcome(trial: Trial, folder: Path) -> Outcome:
    run = folder / trial.folder
    diverged = run / "diverged.json"
    return Outcome.of_events(
        trial.setting,
        trial.labels,
        trial.config.seed,
        trial.config.train.lr,
        trial.folder,
        read_events(run) if _is_finished(run) and not diverged.is_file() else [],
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
