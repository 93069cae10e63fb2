"""All clients in this process: the loop over rounds, with evaluation, checkpoints and events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peerlora.config.run import RunConfig
from peerlora.runs.events import Event
from peerlora.runs.resume import check_same, default_folder, run_facts, stored_config
from peerlora.runs.store import RunStore, require_free
from peerlora.runtime.compose import composed, resolve_threads
from peerlora.runtime.resources import RunResources
from peerlora.runtime.trainer import Result, Trainer


def simulate(
    config: RunConfig,
    out: Path | str | None = None,
    *,
    resources: RunResources | None = None,
    partitioner: Any = None,
    listener: Callable[[Event], None] = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
    report: bool = True,
) -> Result:
    """Run a config from the start, in ``out`` or in a new folder under ``runs/``.

    ``listener`` gets every event; ``stop`` is asked after every round and, when true, a checkpoint is written and
    Stopped raised.  Without ``report`` no report.html is drawn at the end, which takes about a second;
    ``runs.report.write_report`` does it later.  Nothing is written before everything has been loaded and checked.
    """
    folder = Path(out) if out is not None else default_folder(config)
    require_free(folder)
    config = config.model_copy(update={"threads": resolve_threads(config.threads)})
    federation = composed(config, resources, partitioner)
    with RunStore.create(folder, config.to_yaml(), run_facts(config, partitioner)) as store:
        return Trainer(federation, store, listener, stop, report).run()


def resume(
    folder: Path | str,
    *,
    expected: Callable[[RunConfig], RunConfig] = lambda stored: stored,
    resources: RunResources | None = None,
    partitioner: Any = None,
    listener: Callable[[Event], None] = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
    report: bool = True,
) -> Result:
    """Take up a run where its last good checkpoint left it; the result is bit-identical to an undisturbed run.

    ``expected`` turns the stored config into the one that the user asks for; RunError lists the differences.
    """
    with RunStore.open(folder) as store:
        config = stored_config(store)
        check_same(config, expected(config), store, partitioner)
        return Trainer(composed(config, resources, partitioner), store, listener, stop, report).run(resumed=True)
