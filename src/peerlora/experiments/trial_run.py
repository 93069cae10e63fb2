"""One trial of a grid in its folder: run or resumed, and whether it is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from peerlora.config.run import RunConfig
from peerlora.errors import DivergenceError, RunError
from peerlora.files import write_atomically
from peerlora.runs.resume import list_changes
from peerlora.runtime.policy import PolicyResources
from peerlora.runtime.resources import RunResources
from peerlora.runtime.simulate import resume, simulate
from peerlora.runtime.trainer import Sink


def run_trial(
    config: RunConfig,
    run: Path,
    resources: RunResources | PolicyResources,
    sinks: Sequence[Sink] = (),
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run a trial to its end, from its checkpoint where it has one; one that diverges leaves the reason."""
    try:
        if (run / "run.json").is_file():
            resume(run, expected=lambda stored: config, resources=resources, sinks=sinks, stop=stop)
        else:
            shutil.rmtree(run, ignore_errors=True)  # killed before the run folder was one
            simulate(config, run, resources=resources, sinks=sinks, stop=stop)
    except DivergenceError as error:
        run.mkdir(exist_ok=True)  # one that diverged in its first round has left nothing
        write_atomically(run / "config.yaml", config.to_yaml())
        write_atomically(run / "diverged.json", json.dumps({"reason": str(error)}) + "\n")
    _remove_peft_folders(run)


def is_finished(run: Path) -> bool:
    """Whether a trial has reached its end, or diverged."""
    return (run / "summary.json").is_file() or (run / "diverged.json").is_file()


def require_same(run: Path, config: RunConfig) -> None:
    """Raise RunError unless a finished trial was run with today's config."""
    from peerlora.config.loading import load_config

    stored = load_config(run / "config.yaml")
    changed = list_changes(stored.model_dump(mode="json"), config.model_dump(mode="json"))
    if changed:
        raise RunError(f"{run} was run with another config ({'; '.join(changed)}); start anew with another --out")


def _remove_peft_folders(run: Path) -> None:
    """Remove the PEFT folder of each client; ``peerlora export`` makes them from all.safetensors again."""
    for each in (run / "adapters").glob("*/"):
        shutil.rmtree(each)
