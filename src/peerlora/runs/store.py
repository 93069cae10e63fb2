"""The run folder: the files of a run, and how a run killed at any moment is resumed from them.

    config.yaml               the resolved config                  run.json      facts: versions, seed, ...
    events.jsonl              one event a line, append only        lock          held while a process runs here
    checkpoints/round-000010.safetensors, round-000010.json        the newest two
    metrics.parquet, summary.json                                  written at the end
    label_counts.json         of a peer: what the network holds, where it was summed before round 0
    start.safetensors         of a training loop of the user's own: what it began with
    tracking.json             the id by which trackers know the run; tensorboard, wandb: what they keep here
    privacy.jsonl             noisy releases that ever began, where they cannot be repeated; never cut back

A checkpoint counts when its ``.json`` is there.  A resumed run cuts the event log back to the length that it tells, so
it goes on exactly where the undisturbed run would have been.

Of the newest two checkpoints the older one has been trained on.  Where training diverges at once from the newer one,
which a neighbour may have spoiled, that is marked, and a resumed run goes on from the older.
"""

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from peerlora.display import format_now
from peerlora.errors import RunError
from peerlora.files import write_atomically
from peerlora.runs.checkpoints import Checkpoint, Checkpoints
from peerlora.runs.events import (
    CheckpointSaved,
    Event,
    RoundDone,
    RunFinished,
    RunStarted,
    Warned,
    contradiction,
    from_json,
    plain,
    to_json,
)
from peerlora.runs.json_files import read_json, write_json
from peerlora.runs.write_failures import describe_write_failures

if TYPE_CHECKING:
    import torch

START_FILE, TRACKING_FILE = "start.safetensors", "tracking.json"
TENSORBOARD_FOLDER, WANDB_FOLDER = "tensorboard", "wandb"
_BESIDE = (START_FILE, TRACKING_FILE, TENSORBOARD_FOLDER, WANDB_FOLDER)
"""What a run may write before its first round without the store."""
START_AGAIN = "start again"
"""What to do where nothing of a run is kept."""
_HALF_MADE = {"lock", "config.yaml", "config.yaml.tmp", "run.json.tmp"}  # of a folder before it is a run's


class RunStore:
    """One run folder, held by this process alone until ``close``; also a context manager.

    Where a run that was created here fails before its first round is done, leaving the block takes the folder away.
    """

    def __init__(self, folder: Path, lock: IO[str]):
        self.folder = folder
        self._lock = lock
        self._unused = self._made = False
        self.config_yaml = _read_config(folder / "config.yaml")
        self.facts: dict[str, Any] = read_json(folder / "run.json")
        self._checkpoints = Checkpoints(folder)
        # Unbuffered: of a line for which there is no room, nothing must be written later.
        self._log = open(folder / "events.jsonl", "ab", buffering=0)
        whole = (folder / "events.jsonl").read_bytes().rfind(b"\n") + 1
        self._log.truncate(whole)  # a kill may have left half a line, and the next event must not continue it

    @classmethod
    def create(cls, folder: Path | str, config_yaml: str, facts: Mapping[str, Any]) -> "RunStore":
        """Make the folder and its parents, and write the config and the facts of a run.

        Raises RunError when the folder holds something already, cannot be written, or another process is in it.
        """
        folder = Path(folder)
        there = folder.is_dir()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            require_free(folder)  # before the lock, which would leave a file in a folder that is not ours
            lock = _take_lock(folder)
        except OSError as error:
            raise RunError(
                f"output folder {folder} cannot be written ({error.strerror}); choose another --out"
            ) from None
        try:
            require_free(folder)  # again: another process may have been faster
            with describe_write_failures(folder, lambda: "choose another --out"):
                write_atomically(folder / "config.yaml", config_yaml)
                write_json(folder / "run.json", facts)  # last: with it, the folder is a run folder
                store = cls(folder, lock)
            store._unused, store._made = True, not there
            return store
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open(cls, folder: Path | str) -> "RunStore":
        """Open the folder of a stopped run.

        Raises RunError when it is not a run folder, when run.json is damaged, it cannot be written, or another process
        is in it.
        """
        folder = Path(folder)
        _require_run(folder)
        with describe_write_failures(folder, lambda: "make it writable, or go on with a copy of it"):
            lock = _take_lock(folder)
            try:
                return cls(folder, lock)
            except BaseException:
                lock.close()
                raise

    @property
    def finished(self) -> bool:
        """Whether the run reached its end and everything about it was written."""
        return (self.folder / "summary.json").is_file()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the failure of a write in the folder into a RunError that says what to do."""
        with describe_write_failures(self.folder, self.what_then):
            yield

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Like ``writing``, of what a run spends for good: its folder is never taken away again."""
        self._unused = False
        with self.writing():
            yield

    def what_then(self) -> str:
        """Say what a user does next where the run ends early: a run without anything to keep is taken away."""
        return START_AGAIN if self._unused else f"go on with: {resume_command(self.folder)}"

    def emit(self, event: Event) -> None:
        """Append one event; it survives the death of this process at once.

        ``RunFinished`` ends the run: metrics.parquet and, as the very last thing, summary.json are written with it.
        Raises RunError where it cannot be written; then nothing of it is in the log.
        """
        before = self._log_bytes()
        with self.writing():
            try:
                left = memoryview(to_json(event).encode() + b"\n")
                while left:
                    left = left[self._log.write(left) :]
            except OSError:
                self._log.truncate(before)
                raise
        self._unused &= not isinstance(event, RoundDone)
        if isinstance(event, RunFinished):
            with self.writing():
                self._write_results(event.summary)

    def save_checkpoint(self, round: int, tensors: "Mapping[str, torch.Tensor]", facts: Mapping[str, Any]) -> None:
        """Save the state after ``round`` finished rounds, emit ``CheckpointSaved``, keep the newest two.

        ``facts`` must be JSON: tuples come back as lists, keys as strings, NaN as None.
        """
        self._unused = False
        with self.writing():
            checksum = self._checkpoints.save_tensors(round, tensors, facts)
            self.emit(CheckpointSaved(round, f"checkpoints/{self._checkpoints.data_of(round).name}", checksum))
            os.fsync(self._log.fileno())  # a checkpoint whose events are lost in a power cut could not be used
            self._checkpoints.complete(round, checksum, self._log_bytes())

    def mark_diverged(self, round: int) -> str | None:
        """Mark a checkpoint as one that training diverged from; see ``Checkpoints``."""
        with self.writing():
            return self._checkpoints.mark_diverged(round)

    def load_checkpoint(
        self, unfit: "Callable[[Mapping[str, torch.Tensor]], str]" = lambda tensors: ""
    ) -> Checkpoint | None:
        """Load the newest checkpoint that is whole and fits; see ``Checkpoints``."""
        return self._checkpoints.load(unfit)

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Restore the folder to the moment of ``checkpoint`` (None: to the start of the run)."""
        with self.writing():
            self._log.truncate(checkpoint.events_bytes if checkpoint else 0)
            (self.folder / "summary.json").unlink(missing_ok=True)
            self._checkpoints.remove_after(checkpoint.round if checkpoint else None)
            # The second kind of name is what safetensors writes to before it renames.
            for leftover in [*self.folder.rglob("*.tmp"), *self.folder.rglob(".tmp*")]:
                leftover.unlink()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Emit ``RunFinished``, with which the results are written."""
        self.emit(RunFinished(format_now(), plain(summary)))

    def _write_results(self, summary: Mapping[str, Any]) -> None:
        from peerlora.runs.metrics import write_table

        write_table(read_events(self.folder), self.folder / "metrics.parquet")
        write_json(self.folder / "summary.json", summary)

    def write(self, name: str, tree: Mapping[str, Any]) -> None:
        """Write a JSON file of its own into the folder, in one step; it stays when the run is resumed."""
        self._unused = False
        with self.writing():
            write_json(self.folder / name, tree)

    def read(self, name: str) -> dict[str, Any] | None:
        """Read a file that `write` wrote; None where there is none.  Raises RunError where the file is damaged."""
        return read_json(self.folder / name) if (self.folder / name).is_file() else None

    def close(self) -> None:
        """Release the folder; closing twice is fine."""
        self._log.close()
        self._lock.close()

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        try:
            if self._unused and kind is not None and issubclass(kind, Exception):
                self._discard()
        finally:
            self.close()

    def _discard(self) -> None:
        """Take away a run that has done no round, so that its folder is free for the next try.

        What is no run's stays.  After a kill in between it is a run folder still, or as good as empty.
        """
        for name in _BESIDE:
            path = self.folder / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for name in ("events.jsonl", "run.json", "config.yaml", "lock"):
            (self.folder / name).unlink(missing_ok=True)
        if self._made and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _log_bytes(self) -> int:
        return os.fstat(self._log.fileno()).st_size


def read_events(folder: Path | str) -> list[Event]:
    """Read all events of a run folder; a last line that was cut off by a kill is left out.

    So are damaged lines; a Warned in the place of the first says how many there are.
    Raises RunError when it is not a run folder.
    """
    folder = Path(folder)
    _require_run(folder)
    log = folder / "events.jsonl"
    *whole, _torn = log.read_bytes().split(b"\n") if log.exists() else [b""]
    events: list[Event] = []
    start, damage = None, []
    for number, line in enumerate(whole, start=1):
        try:
            event = from_json(line.decode("utf-8", errors="replace"))
            if reason := contradiction(event, start):
                raise RunError(reason)
            start = start or (event if isinstance(event, RunStarted) else None)
            events.append(event)
        except RunError as error:
            damage.append((len(events), f"line {number}: {error}"))
    if damage:
        place, first = damage[0]
        several = f"{len(damage)} lines are" if len(damage) > 1 else "a line is"
        events.insert(place, Warned(f"{log}: {several} damaged and left out ({first})"))
    return events


def _require_run(folder: Path) -> None:
    missing = [name for name in ("config.yaml", "run.json") if not (folder / name).is_file()]
    if missing:
        raise RunError(
            f"{folder} is not a run folder (no {' and no '.join(missing)}); give the --out of an earlier run"
        )


def new_folder(name: str) -> Path:
    """A path under runs/, named by what is run and the local time; nothing is created."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def require_free(folder: Path, resumable: bool = True) -> None:
    """Raise RunError where ``folder`` is a file or holds something already; also asked before anything slow is done.

    ``resumable``: whether the command that asks can go on with a run.
    What a process leaves that is killed while it makes a run folder does not count; the lock tells it from a user's.
    """
    with describe_write_failures(folder, lambda: "choose another --out"):  # one that may not be looked into
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or not (names <= _HALF_MADE and ("lock" in names or not names)):
        otherwise = f" or resume it with --resume {folder}" if resumable else ""
        raise RunError(f"output folder {folder} is in use; choose another --out{otherwise}")


def _read_config(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}); put it back, or start a new run with another --out") from None


def _take_lock(folder: Path) -> IO[str]:
    """An exclusive lock that the operating system frees when this process dies, however it dies."""
    import fcntl

    lock = open(folder / "lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RunError(f"another process is running in {folder}; wait for it, or choose another --out") from None
    return lock


def clients_of(run: Path) -> list[int] | None:
    """Return the clients that a run trains; None: all."""
    return read_facts(run).get("held")


def read_facts(run: Path) -> dict[str, Any]:
    """Read run.json, the facts of a run beside its config; raises RunError where it is damaged."""
    return read_json(run / "run.json")


def resume_command(run: Path) -> str:
    """Return the command that resumes an unfinished run."""
    folder = shlex.quote(str(run))
    if clients_of(run) is None:
        return f"peerlora train --resume {folder}"
    return f"peerlora peer CONFIG.yaml --identity DIR --members FILE --out {folder} --resume"
