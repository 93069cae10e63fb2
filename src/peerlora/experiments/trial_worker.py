"""What a worker of a cluster does in a comparison: it runs trials in folders of its own and returns their files."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from peerlora.config.run import RunConfig
from peerlora.errors import RunError, Stopped
from peerlora.experiments.trial_run import run_trial
from peerlora.runtime.cluster.worker import describe_process, name_machine
from peerlora.runtime.policy import PolicyResources
from peerlora.runtime.resources import BaseModelCache, RunResources

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
        self._stopping = threading.Event()
        if os.path.isdir(folder):  # paths of a config may be relative to the driver's
            os.chdir(folder)

    def run(self, job: TrialJob, key: str, rows: RunResources | PolicyResources) -> Files:
        """Run a trial and return its files: of its end or, where ``ask_stop`` came first, of its checkpoint."""
        if self.rows is None or key != self.key:
            self.key, self.rows = key, rows  # a policy comes with its base
            if isinstance(rows, RunResources):
                self.rows = replace(rows, bases=self.bases, share_prefix=self.share_prefix)
        with tempfile.TemporaryDirectory() as temporary:
            run = Path(temporary) / "run"
            write_files(run, job.files)
            with name_machine("a worker"), suppress(Stopped):
                run_trial(job.config, run, self.rows, stop=self._stopping.is_set)
            return {name: _relocated(name, data, run, job.run) for name, data in read_files(run).items()}

    def ask_stop(self) -> None:
        """Let ``run`` end after its round with a checkpoint, for good; another thread may call it meanwhile."""
        self._stopping.set()


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
    try:
        for name, data in files.items():
            path = half / name
            if not path.resolve().is_relative_to(half.resolve()):
                raise RunError(
                    f"a worker returned the file {name!r}, which is outside its run; expected paths below it"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)  # a full disk needs the room
        raise
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)


@lru_cache(maxsize=1)
def actor_class() -> Any:
    """The class of a worker's actor: trials on one thread, what it is asked meanwhile on another."""
    ray: Any = import_module("ray")

    class TrialActor(TrialWorker):
        @ray.method(concurrency_group="health")
        def describe(self) -> dict[str, Any]:
            return describe_process()

        @ray.method(concurrency_group="health")
        def ask_stop(self) -> None:
            super().ask_stop()

    return ray.remote(concurrency_groups={"health": 1})(TrialActor)
