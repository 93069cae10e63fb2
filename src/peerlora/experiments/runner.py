"""Run a grid: check every cell first, search the learning rates, run the cells, write the comparison."""

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
from peerlora.experiments.grid import GridConfig, Trial, differences, groups, load_grid, plan, search_plan, searched_on
from peerlora.experiments.results import write_results
from peerlora.experiments.statistics import Comparison, Outcome
from peerlora.files import write_atomically
from peerlora.runs.events import Event
from peerlora.runs.metrics import evaluations, started
from peerlora.runs.store import new_folder, read_events, require_free
from peerlora.runtime.compose import compose, resolve_threads
from peerlora.runtime.resources import BaseModelCache, RunResources, load_resources
from peerlora.runtime.simulate import resume, simulate


@dataclass(frozen=True)
class GridStatus:
    """How far a grid is when a cell begins.  Work is counted in training samples."""

    cell: str
    number: int
    cells: int
    done: int
    """Work of the cells that are finished."""
    own: int
    """Work of this cell."""
    total: int
    rounds: int
    """Of this cell."""


class ProgressReporter(Protocol):
    """What shows the progress: called at the start of a cell, gives what listens to its events."""

    def __call__(self, standing: GridStatus) -> AbstractContextManager[Callable[[Event], None]]:
        """A context manager around the cell."""
        ...


@dataclass(frozen=True)
class Callbacks:
    """What the caller has to say while a grid runs."""

    watch: ProgressReporter
    stop: Callable[[], bool] = lambda: False


def start_grid(grid: GridConfig, out: Path | str | None, hooks: Callbacks) -> Comparison:
    """Run a grid in a new folder; nothing is written before every cell has been composed once."""
    folder = Path(out) if out is not None else new_folder("compare")
    require_free(folder)
    if grid.base.get("threads") is None:  # a grid that is resumed elsewhere goes on with as many
        grid = grid.model_copy(update={"base": {**grid.base, "threads": resolve_threads(None)}})
    shared = Shared()
    check_grid(grid, shared)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "grid.yaml", grid.to_yaml())
    except OSError as error:
        raise RunError(f"output folder {folder} cannot be written ({error.strerror}); choose another --out") from None
    return _run(grid, folder, hooks, shared)


def resume_grid(folder: Path | str, expected: Callable[[GridConfig], GridConfig], hooks: Callbacks) -> Comparison:
    """Go on with a grid: finished cells stay, the unfinished one goes on from its checkpoint.

    ``expected`` turns the stored grid into the one that the user asks for; RunError lists the differences.
    """
    folder = Path(folder)
    if not (folder / "grid.yaml").is_file():
        raise RunError(f"{folder} is not a comparison (no grid.yaml); give the --out of an earlier one")
    stored = load_grid(folder / "grid.yaml")
    now = expected(stored)
    if now.base.get("threads") is None:
        now = now.model_copy(update={"base": {**now.base, "threads": stored.base.get("threads")}})
    changed = differences(stored.model_dump(mode="json"), now.model_dump(mode="json"))
    if changed:
        raise RunError(
            f"{folder} was started with another grid ({'; '.join(changed)}); "
            "resume with the same grid, or start a new one with another --out"
        )
    return _run(stored, folder, hooks, Shared())


def check_grid(grid: GridConfig, shared: Shared) -> None:
    """Compose every cell once.  Raises CompositionError with all that cannot be and why."""
    found, searched = plan(grid), search_plan(grid)
    refused = [*found.refused, *searched.refused]
    for cell in in_order([*searched.cells, *found.cells]):
        try:
            compose(cell.config, resources=shared.resources(cell.config))
        except PeerloraError as error:
            refused.append((cell.name, str(error)))
    if refused:
        cells = len(found.cells) + len(searched.cells) + len(found.refused)
        raise CompositionError(_refusal(refused, cells))


def _refusal(refused: Sequence[tuple[str, str]], cells: int) -> str:
    """Every refused cell under its reason: most grids that are wrong are wrong in one thing."""
    reasons: dict[str, list[str]] = {}
    for name, reason in refused:
        reasons.setdefault(reason, []).append(name)
    lines = [f"  {'; '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    return "\n".join([f"{len(refused)} of {cells} cells cannot run, so none was started:", *lines])


class Shared:
    """The tokenised rows, and the base model, of cells that follow each other: those of the latest cell are kept."""

    def __init__(self):
        self._key: Any = None
        self._kept: RunResources | None = None
        self._bases = BaseModelCache()

    def resources(self, config: RunConfig) -> RunResources:
        """The materials of a cell, loaded where the one before had others."""
        key = _data_key(config)
        if self._kept is None or key != self._key:
            self._kept = None  # the old ones go before the new ones come
            self._kept, self._key = replace(load_resources(config), bases=self._bases), key
        return self._kept


def _data_key(config: RunConfig) -> str:
    """Everything that ``load_resources`` looks at; of the seed only where it draws rows."""
    data = config.data
    drawn = data.eval is None or data.train_per_class or data.eval_per_class
    column = getattr(config.partition, "column", None)
    return repr((config.model.source, data, config.task, column, config.seed if drawn else None))


def in_order(cells: Sequence[Trial]) -> list[Trial]:
    """Cells of the same rows together, inside these the seeds: so little is loaded twice, and early seeds are whole."""
    keys = [(_data_key(cell.config), cell.config.seed) for cell in cells]
    rows = list(dict.fromkeys(data for data, _ in keys))
    seeds = list(dict.fromkeys(keys))
    return [
        cell
        for _, _, cell in sorted(
            ((rows.index(key[0]), seeds.index(key), cell) for key, cell in zip(keys, cells, strict=True)),
            key=lambda each: each[:2],
        )
    ]


def _run(grid: GridConfig, folder: Path, hooks: Callbacks, shared: Shared) -> Comparison:
    searched, planned = search_plan(grid).cells, plan(grid).cells
    progress = _Progress(hooks, folder, [*searched, *planned])
    for cell in in_order(searched):
        progress.finish(cell, shared)
    rates = best_rates(grid, [_outcome(cell, folder) for cell in searched])
    cells = plan(grid, rates).cells
    try:
        for cell in in_order(cells):
            progress.finish(cell, shared)
    except Stopped:
        _results(grid, folder, searched, cells)
        raise
    return _results(grid, folder, searched, cells)


class _Progress:
    """Runs cells one after another and knows how much is left."""

    def __init__(self, hooks: Callbacks, folder: Path, cells: Sequence[Trial]):
        self.hooks, self.folder = hooks, folder
        self.number, self.cells, self.done = 0, len(cells), 0
        self.total = sum(_work(cell.config) for cell in cells)

    def finish(self, cell: Trial, shared: Shared) -> None:
        """Run a cell to its end, unless it is there already."""
        work = _work(cell.config)
        self.number += 1
        if _finished(self.folder / cell.folder):
            _require_same(self.folder / cell.folder, cell)
        else:
            if self.hooks.stop():
                raise self._stopped()
            rounds = cell.config.train.rounds
            standing = GridStatus(cell.name, self.number, self.cells, self.done, work, self.total, rounds)
            with self.hooks.watch(standing) as listen:
                self._work_on(cell, shared, listen)
        self.done += work

    def _work_on(self, cell: Trial, shared: Shared, listen: Callable[[Event], None]) -> None:
        place = self.folder / cell.folder
        options: dict[str, Any] = {"resources": shared.resources(cell.config), "sinks": [listen]}
        options["stop"] = self.hooks.stop
        try:
            if (place / "run.json").is_file():
                resume(place, expected=lambda stored: cell.config, **options)
            else:
                shutil.rmtree(place, ignore_errors=True)  # killed before the run folder was one
                simulate(cell.config, place, **options)
        except (Stopped, KeyboardInterrupt):
            raise self._stopped() from None
        except DivergenceError as error:
            write_atomically(place / "diverged.json", json.dumps({"reason": str(error)}) + "\n")
        _drop_folders(place)

    def _stopped(self) -> Stopped:
        done = self.number - 1
        return Stopped(
            f"stopped after {done} of {self.cells} cells; go on with: peerlora compare --resume {self.folder}"
        )


def _work(config: RunConfig) -> int:
    """Training samples."""
    return config.train.rounds * config.train.local_steps * sum(config.batches)


def _finished(place: Path) -> bool:
    return (place / "summary.json").is_file() or (place / "diverged.json").is_file()


def _require_same(place: Path, cell: Trial) -> None:
    """A finished cell counts only for the config it was run with."""
    from peerlora.config.loading import load_config

    stored = load_config(place / "config.yaml")
    changed = differences(stored.model_dump(mode="json"), cell.config.model_dump(mode="json"))
    if changed:
        raise RunError(f"{place} was run with another config ({'; '.join(changed)}); start anew with another --out")


def _drop_folders(place: Path) -> None:
    """A PEFT folder per client is much in a grid; ``peerlora export`` makes them of all.safetensors again."""
    for each in (place / "adapters").glob("*/"):
        shutil.rmtree(each)


def _outcome(cell: Trial, folder: Path) -> Outcome:
    place = folder / cell.folder
    told = place / "diverged.json"
    return Outcome(
        place=cell.place,
        labels=cell.labels,
        seed=cell.config.seed,
        rate=cell.config.train.lr,
        folder=cell.folder,
        events=read_events(place) if _finished(place) and not told.is_file() else [],
        diverged=json.loads(told.read_text(encoding="utf-8"))["reason"] if told.is_file() else None,
        p=cell.config.topology.p if cell.config.topology.kind == "random" else None,
    )


def best_rates(grid: GridConfig, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Place -> the rate of its group with the best mean client over the search's seeds; the lowest of equals.

    Raises ConfigError where every rate diverged.
    """
    if not grid.search.rates:
        return {}
    scores: dict[str, dict[float, list[float]]] = {}
    for each in outcomes:
        scores.setdefault(each.place, {}).setdefault(each.rate, []).append(_score(each))
    best: dict[tuple[str, ...], float] = {}
    for place, group in groups(grid):
        if group not in best:
            best[group] = _best(place.name, scores[place.name])
    return {place.name: best[group] for place, group in groups(grid)}


def _score(outcome: Outcome) -> float:
    """The last mean client, turned so that more is better; a run that diverged is the worst there is."""
    start = started(outcome.events)
    if start is None:
        return -math.inf
    own = [value for value in evaluations(outcome.events)[-1].own if not math.isnan(value)]  # attackers have none
    mean = sum(own) / len(own)
    return mean if start.higher_is_better else -mean


def _best(place: str, scores: dict[float, list[float]]) -> float:
    rate = max(sorted(scores), key=lambda each: sum(scores[each]))
    if sum(scores[rate]) == -math.inf:
        raise ConfigError(f"every rate of search.rates diverged for {place}; start anew with lower ones")
    return rate


def _results(grid: GridConfig, folder: Path, searched: Sequence[Trial], cells: Sequence[Trial]) -> Comparison:
    on = searched_on(grid)
    return write_results(
        folder,
        [replace(_outcome(cell, folder), searched_on=on.get(cell.place)) for cell in cells],
        [_outcome(cell, folder) for cell in searched],
        grid.baseline,
        grid.to_yaml(),
        {cell.place: cell.config for cell in reversed(cells)},
        grid.published,
    )
