"""Run a grid: check every trial first, search the learning rates, run the trials, write the comparison."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from peerlora.config.run import RunConfig
from peerlora.errors import CompositionError, ConfigError, DivergenceError, PeerloraError, RunError, Stopped
from peerlora.experiments.grid import GridConfig, Trial, load_grid, plan_search, plan_trials, rate_groups, search_labels
from peerlora.experiments.results import write_results
from peerlora.experiments.statistics import Comparison, Outcome
from peerlora.files import write_atomically
from peerlora.runs.events import Event
from peerlora.runs.metrics import evaluations, find_start
from peerlora.runs.resume import list_changes
from peerlora.runs.store import new_folder, read_events, read_facts, require_free
from peerlora.runtime.compose import assemble, resolve_threads
from peerlora.runtime.inputs import describe_rows, require_same_inputs
from peerlora.runtime.plan import Plan, plan
from peerlora.runtime.resources import BaseModelCache, RunResources, load_resources
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


@dataclass(frozen=True)
class Callbacks:
    """Functions of the caller that a running grid calls."""

    progress: ProgressReporter
    stop: Callable[[], bool] = lambda: False


def start_grid(grid: GridConfig, out: Path | str | None, callbacks: Callbacks) -> Comparison:
    """Run a grid in a new folder; nothing is written before every trial has been composed once."""
    folder = Path(out) if out is not None else new_folder("compare")
    require_free(folder)
    if grid.base.get("threads") is None:  # a grid that is resumed elsewhere goes on with as many
        grid = grid.model_copy(update={"base": {**grid.base, "threads": resolve_threads(None)}})
    cache = ResourceCache()
    check_grid(grid, cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "grid.yaml", grid.to_yaml())
    except OSError as error:
        raise RunError(f"output folder {folder} cannot be written ({error.strerror}); choose another --out") from None
    return _run(grid, folder, callbacks, cache)


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
    return _run(stored, folder, callbacks, ResourceCache())


def check_grid(grid: GridConfig, cache: ResourceCache) -> None:
    """Plan every trial, and assemble one of all those that are the same to data and model.

    Raises CompositionError that lists every refused trial with its reason.
    """
    planned, searched = plan_trials(grid), plan_search(grid)
    refused, assembled = [*planned.refused, *searched.refused], {}
    for trial in order_trials([*searched.trials, *planned.trials]):
        if reason := _refusal(trial.config, cache, assembled):
            refused.append((trial.name, reason))
    if refused:
        count = len(planned.trials) + len(searched.trials) + len(planned.refused)
        raise CompositionError(_refusal_message(refused, count))


def _refusal(config: RunConfig, cache: ResourceCache, assembled: dict[str, str | None]) -> str | None:
    """Why a trial cannot run; None where it can.  ``assembled``: what came of others, by ``_assembly_key``."""
    try:
        planned = plan(config)
    except PeerloraError as error:
        return str(error)
    key = _assembly_key(planned)
    if key not in assembled:
        try:
            assemble(planned, cache.resources(config))
            assembled[key] = None
        except PeerloraError as error:
            assembled[key] = str(error)
    return assembled[key]


def _assembly_key(planned: Plan) -> str:
    """The settings on which `assemble` depends; a method that merges is refused where its sums don't fit."""
    tree = planned.config.model_dump(mode="json")
    names = ["model", "adapter", "task", "data", "partition", "clients", "exchange", "adversary", "device", "seed"]
    if planned.algorithm.traits.merges_into:
        names += ["algorithm", "topology"]
    train = ("batch", "label_prior", "dtype", "fast", *(["rounds"] if planned.algorithm.traits.merges_into else []))
    return json.dumps([{name: tree[name] for name in names}, {name: tree["train"][name] for name in train}])


def _refusal_message(refused: Sequence[tuple[str, str]], count: int) -> str:
    """List every refused trial under its reason: most wrong grids are wrong in one setting."""
    reasons: dict[str, list[str]] = {}
    for name, reason in refused:
        reasons.setdefault(reason, []).append(name)
    lines = [f"  {'; '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    return "\n".join([f"{len(refused)} of {count} cells cannot run, so none was started:", *lines])


class ResourceCache:
    """Keeps the tokenised rows and the base model of the latest trial, for the next one."""

    def __init__(self):
        self._key: Any = None
        self._kept: RunResources | None = None
        self._bases = BaseModelCache()

    def resources(self, config: RunConfig) -> RunResources:
        """Return a trial's resources, loaded only where the previous trial had others."""
        key = _data_key(config)
        if self._kept is None or key != self._key:
            self._kept = None  # free the old rows first; both may not fit
            self._kept, self._key = replace(load_resources(config), bases=self._bases), key
        return self._kept


def _data_key(config: RunConfig) -> str:
    """Everything that ``load_resources`` depends on; the seed only where it draws rows."""
    data = config.data
    drawn = data.eval is None or data.train_per_class or data.eval_per_class
    column = getattr(config.partition, "column", None)
    return repr((config.model.source, data, config.task, column, config.seed if drawn else None))


def order_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials by their rows, then by seed: so little is loaded twice, and early seeds are whole."""
    keys = [(_data_key(trial.config), trial.config.seed) for trial in trials]
    rows = list(dict.fromkeys(data for data, _ in keys))
    seeds = list(dict.fromkeys(keys))
    return [
        trial
        for _, _, trial in sorted(
            ((rows.index(key[0]), seeds.index(key), trial) for key, trial in zip(keys, trials, strict=True)),
            key=lambda each: each[:2],
        )
    ]


def _run(grid: GridConfig, folder: Path, callbacks: Callbacks, cache: ResourceCache) -> Comparison:
    searched, planned = plan_search(grid).trials, plan_trials(grid).trials
    runner = _TrialRunner(callbacks, folder, [*searched, *planned])
    for trial in order_trials(searched):
        runner.finish(trial, cache)
    rates = choose_rates(grid, [_read_outcome(trial, folder) for trial in searched])
    trials = plan_trials(grid, rates).trials
    try:
        for trial in order_trials(trials):
            runner.finish(trial, cache)
    except Stopped:
        _write_results(grid, folder, searched, trials)
        raise
    return _write_results(grid, folder, searched, trials)


class _TrialRunner:
    """Runs trials one after another and counts the work left."""

    def __init__(self, callbacks: Callbacks, folder: Path, trials: Sequence[Trial]):
        self.callbacks, self.folder = callbacks, folder
        self.number, self.trials, self.done = 0, len(trials), 0
        self.total = sum(_count_samples(trial.config) for trial in trials)
        self.rows: dict[str, dict[str, Any]] = {}
        """By ``_data_key``, the digests of the rows that finished trials used."""

    def finish(self, trial: Trial, cache: ResourceCache) -> None:
        """Run a trial to its end, unless it is finished already."""
        work = _count_samples(trial.config)
        self.number += 1
        if _is_finished(self.folder / trial.folder):
            run = self.folder / trial.folder
            _require_same(run, trial)
            if (run / "run.json").is_file():
                self.rows.setdefault(_data_key(trial.config), read_facts(run).get("inputs", {}))
        else:
            if self.callbacks.stop():
                raise self._stopped()
            rounds = trial.config.train.rounds
            status = GridStatus(trial.name, self.number, self.trials, self.done, work, self.total, rounds)
            with self.callbacks.progress(status) as listen:
                self._run_trial(trial, cache, listen)
        self.done += work

    def _run_trial(self, trial: Trial, cache: ResourceCache, listen: Callable[[Event], None]) -> None:
        run = self.folder / trial.folder
        resources = cache.resources(trial.config)
        if was := self.rows.get(_data_key(trial.config)):
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


def _count_samples(config: RunConfig) -> int:
    """Count the training samples of a run."""
    return config.train.training_rounds * config.train.local_steps * sum(config.batches)


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
    return Outcome(
        setting=trial.setting,
        labels=trial.labels,
        seed=trial.config.seed,
        rate=trial.config.train.lr,
        folder=trial.folder,
        events=read_events(run) if _is_finished(run) and not diverged.is_file() else [],
        diverged=json.loads(diverged.read_text(encoding="utf-8"))["reason"] if diverged.is_file() else None,
        p=trial.config.topology.p if trial.config.topology.kind == "random" else None,
    )


def choose_rates(grid: GridConfig, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Setting -> the rate of its group with the best mean client over the search's seeds; the lowest of equals.

    Raises ConfigError where every rate diverged.
    """
    if not grid.search.rates:
        return {}
    scores: dict[str, dict[float, list[float]]] = {}
    for each in outcomes:
        scores.setdefault(each.setting, {}).setdefault(each.rate, []).append(_score(each))
    best: dict[tuple[str, ...], float] = {}
    for setting, group in rate_groups(grid):
        if group not in best:
            best[group] = _choose_rate(setting.name, scores[setting.name])
    return {setting.name: best[group] for setting, group in rate_groups(grid)}


def _score(outcome: Outcome) -> float:
    """The last mean client, negated where lower is better; minus infinity for a run that diverged."""
    start = find_start(outcome.events)
    if start is None:
        return -math.inf
    own = [value for value in evaluations(outcome.events)[-1].own if not math.isnan(value)]  # attackers have none
    mean = sum(own) / len(own)
    return mean if start.higher_is_better else -mean


def _choose_rate(setting: str, scores: dict[float, list[float]]) -> float:
    rate = max(sorted(scores), key=lambda each: sum(scores[each]))
    if sum(scores[rate]) == -math.inf:
        raise ConfigError(f"every rate of search.rates diverged for {setting}; start anew with lower ones")
    return rate


def _write_results(grid: GridConfig, folder: Path, searched: Sequence[Trial], trials: Sequence[Trial]) -> Comparison:
    searched_on = search_labels(grid)
    return write_results(
        folder,
        [replace(_read_outcome(trial, folder), searched_on=searched_on.get(trial.setting)) for trial in trials],
        [_read_outcome(trial, folder) for trial in searched],
        grid.baseline,
        grid.to_yaml(),
        {trial.setting: trial.config for trial in reversed(trials)},
        grid.published,
    )
