"""The run folder: the files of a run, and how a run killed at any moment is resumed from them.

    config.yaml               the resolved config                  run.json      facts: versions, seed, ...
    events.jsonl              one event a line, append only        lock          held while a process runs here
    checkpoints/round-000010.safetensors, round-000010.json        the newest two
    metrics.parquet, summary.json                                  written at the end
    label_counts.json         of a peer: what the network holds, where it was summed before round 0

A checkpoint counts when its ``.json`` is there, which is written last.  That file holds the checksum of the tensors
and the length of the event log just after ``CheckpointSaved``: a resumed run cuts the log back to this length, so it
goes on exactly where the undisturbed run would have been.

Of the newest two checkpoints the older one has been trained on.  Where training diverges at once from the newer one,
which a neighbour may have spoiled, that is marked, and a resumed run goes on from the older.
"""

import errno
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from peerlora.display import format_now
from peerlora.errors import RunError, TooManyFiles
from peerlora.files import atomic_file, write_atomically
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

if TYPE_CHECKING:
    import torch

KEEP = 2  # checkpoints, so that one damaged file does not cost the run
_HALF_MADE = {"lock", "config.yaml", "config.yaml.tmp", "run.json.tmp"}  # of a folder before it is a run's
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_FILES = (errno.EMFILE, errno.ENFILE)
_SIDE = {"round", "sha256", "events_bytes"}  # what the file beside a checkpoint always told; newer ones have a check


@dataclass(frozen=True)
class Checkpoint:
    """One saved state of a run."""

    round: int
    """Finished rounds."""
    tensors: "dict[str, torch.Tensor]"
    facts: dict[str, Any]
    notes: list[str]
    """For the user: newer checkpoints that could not be used, and why."""
    events_bytes: int
    """Length of the event log that belongs to it."""


class RunStore:
    """One run folder, held by this process alone until ``close``; also a context manager.

    Where a run that was created here fails before its first round is done, leaving the block takes the folder away.
    """

    def __init__(self, folder: Path, lock: IO[str]):
        self.folder = folder
        self._lock = lock
        self._unused = self._made = False
        self.config_yaml = _read_config(folder / "config.yaml")
        self.facts: dict[str, Any] = _read_json(folder / "run.json")
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
            with write_failures_told(folder, lambda: "choose another --out"):
                write_atomically(folder / "config.yaml", config_yaml)
                write_atomically(folder / "run.json", _pretty(facts))  # last: with it, the folder is a run folder
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
        with write_failures_told(folder, lambda: "make it writable, or go on with a copy of it"):
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
        with write_failures_told(self.folder, self._what_then):
            yield

    def _what_then(self) -> str:
        return "start again" if self._unused else f"go on with: {resume_command(self.folder)}"

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
            folder = self.folder / "checkpoints"
            folder.mkdir(exist_ok=True)
            data = folder / f"round-{round:06d}.safetensors"
            checksum = _save_tensors(data, tensors, facts)
            self.emit(CheckpointSaved(round, f"checkpoints/{data.name}", checksum))
            os.fsync(self._log.fileno())  # a checkpoint whose events are lost in a power cut could not be used
            side = {"round": round, "sha256": checksum, "events_bytes": self._log_bytes()}
            _write_side(data.with_suffix(".json"), side)
            for old in self._checkpoints()[KEEP:]:
                _remove_checkpoint(old)

    def mark_diverged(self, round: int) -> str | None:
        """Mark the checkpoint after ``round`` rounds as one that training diverged from; return what is used instead.

        None where there is no such checkpoint.
        """
        sides = self._checkpoints()
        marked = next((side for side in sides if _round_of(side) == round), None)
        if marked is None:
            return None
        facts = _read_side(marked)
        if facts:
            with self.writing():
                _write_side(marked, facts | {"diverged": True})
        return next((side.stem for side in sides if _round_of(side) < round), "the start")

    def load_checkpoint(self) -> Checkpoint | None:
        """Load the newest checkpoint that is whole; None when there is none, and the run starts from round 0.

        One that training diverged from is passed over.  Raises RunError when there are checkpoints but every one is
        damaged.
        """
        bad: list[tuple[str, str]] = []
        for side in self._checkpoints():
            facts = _read_side(side)
            reason = self._reason_against(side, facts)
            if not reason:
                notes = [f"checkpoint {name} {why}; using {side.stem}" for name, why in bad]
                return Checkpoint(facts["round"], *_load_tensors(side), notes, facts["events_bytes"])
            bad.append((side.stem, reason))
        if any(reason != _DIVERGED for _, reason in bad):
            listed = ", ".join(f"{name} {reason}" for name, reason in bad)
            raise RunError(f"no checkpoint in {self.folder} can be used: {listed}; start again with another --out")
        return None

    def _reason_against(self, side: Path, facts: Mapping[str, Any]) -> str:
        """Why a checkpoint cannot be used, or an empty string."""
        if facts.get("diverged"):
            return _DIVERGED
        damage = _damage(side, facts)
        if not damage and not _ends_line(self.folder / "events.jsonl", facts["events_bytes"]):
            damage = "event log too short" if self._log_bytes() < facts["events_bytes"] else "event log changed"
        return f"is damaged ({damage})" if damage else ""

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Restore the folder to the moment of ``checkpoint`` (None: to the start of the run)."""
        with self.writing():
            self._log.truncate(checkpoint.events_bytes if checkpoint else 0)
            (self.folder / "summary.json").unlink(missing_ok=True)
            for side in self._checkpoints():
                if checkpoint is None or _round_of(side) > checkpoint.round:
                    _remove_checkpoint(side)  # its length is of a log that is gone now
            orphans = [
                data for data in self.folder.glob("checkpoints/*.safetensors") if not data.with_suffix(".json").exists()
            ]
            # .tmpXXXXXX: what safetensors writes before it renames.
            for leftover in [*orphans, *self.folder.rglob("*.tmp"), *self.folder.rglob(".tmp*")]:
                leftover.unlink()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Emit ``RunFinished``, with which the results are written."""
        self.emit(RunFinished(format_now(), plain(summary)))

    def _write_results(self, summary: Mapping[str, Any]) -> None:
        from peerlora.runs.metrics import write_table

        write_table(read_events(self.folder), self.folder / "metrics.parquet")
        write_atomically(self.folder / "summary.json", _pretty(summary))

    def write(self, name: str, tree: Mapping[str, Any]) -> None:
        """Write a JSON file of its own into the folder, in one step; it stays when the run is resumed."""
        self._unused = False
        with self.writing():
            write_atomically(self.folder / name, _pretty(tree))

    def read(self, name: str) -> dict[str, Any] | None:
        """Read a file that `write` wrote; None where there is none.  Raises RunError where the file is damaged."""
        return _read_json(self.folder / name) if (self.folder / name).is_file() else None

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
        """Take away a run that has done no round, so that its folder is free for the next try."""
        for name in ("run.json", "config.yaml", "events.jsonl", "lock"):  # without the first, it is no run folder
            (self.folder / name).unlink(missing_ok=True)
        if self._made and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _checkpoints(self) -> list[Path]:
        """The ``.json`` files of all checkpoints, newest first."""
        return sorted((self.folder / "checkpoints").glob("round-*[0-9].json"), key=_round_of, reverse=True)

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


def require_free(folder: Path) -> None:
    """Raise RunError where ``folder`` is a file or holds something already; also asked before anything slow is done.

    What a process leaves that is killed while it makes a run folder does not count; the lock tells it from a user's.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or not (names <= _HALF_MADE and ("lock" in names or not names)):
        raise RunError(f"output folder {folder} is in use; choose another --out or resume it with --resume {folder}")


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


@contextmanager
def write_failures_told(folder: Path, then: Callable[[], str]) -> Iterator[None]:
    """Turn the failure of a write in a folder into a RunError; ``then``: what to do once it can be written again."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        if number in _NO_FILES:
            raise TooManyFiles(f"{folder} cannot be written ({os.strerror(number)}); {then()}") from error
        if number in _NO_ROOM:
            raise RunError(f"no room left in {folder} ({os.strerror(number)}); make room, then {then()}") from error
        raise RunError(f"{folder} cannot be written ({os.strerror(number)}); {then()}") from error


def _errno(error: Exception) -> int | None:
    """The operating system's number of a failed write; None for another error."""
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError":  # has no number of its own
        found = re.search(r"os error (\d+)", str(error))
        return int(found.group(1)) if found else None
    return None


def _save_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]", facts: Mapping[str, Any]) -> str:
    """Write a safetensors file in one step and return its sha256."""
    import torch
    from safetensors.torch import save_file

    # Cloned because the format refuses tensors that share memory, and ours are views of one buffer.
    own = {name: each.detach().cpu().clone(memory_format=torch.contiguous_format) for name, each in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(own, temporary, metadata={"facts": json.dumps(plain(facts))})
        return _sha256(temporary)


def _load_tensors(side: Path) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    from safetensors import safe_open

    with safe_open(side.with_suffix(".safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])


def _read_side(side: Path) -> dict[str, Any]:
    """The facts beside a checkpoint, or an empty dict when they cannot be read."""
    try:
        facts = json.loads(side.read_bytes())
    except ValueError:
        return {}
    if not isinstance(facts, dict):
        return {}
    if set(facts) == _SIDE:  # of an older version
        return facts
    return facts if facts.pop("check", None) == _check(facts) and set(facts) >= _SIDE else {}


def _write_side(side: Path, facts: Mapping[str, Any]) -> None:
    write_atomically(side, _pretty({**facts, "check": _check(facts)}))


def _check(facts: Mapping[str, Any]) -> str:
    """The checksum of what the file beside a checkpoint tells."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _ends_line(log: Path, length: int) -> bool:
    """Whether the first ``length`` bytes of the event log are whole lines."""
    with open(log, "rb") as file:
        file.seek(max(0, length - 1))
        return length == 0 or file.read(1) == b"\n"


_DIVERGED = "is one that training diverged from"


def _damage(side: Path, facts: Mapping[str, Any]) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    data = side.with_suffix(".safetensors")
    if not facts:
        return f"{side.name} unreadable"
    if not data.is_file():
        return f"{data.name} missing"
    return "checksum" if _sha256(data) != facts["sha256"] or facts["round"] != _round_of(side) else ""


def _round_of(side: Path) -> int:
    return int(side.stem.removeprefix("round-"))


def _remove_checkpoint(side: Path) -> None:
    side.unlink()  # first, so that a kill in between leaves no checkpoint without its tensors
    side.with_suffix(".safetensors").unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pretty(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(plain(tree), indent=2, allow_nan=False).encode() + b"\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        tree = None
    if isinstance(tree, dict):
        return tree
    raise RunError(f"{path} is not valid JSON (an object); the run folder is damaged, start again with another --out")


def clients_of(run: Path) -> list[int] | None:
    """Return the clients that a run trains; None: all."""
    return read_facts(run).get("held")


def read_facts(run: Path) -> dict[str, Any]:
    """Read run.json, the facts of a run beside its config; raises RunError where it is damaged."""
    return _read_json(run / "run.json")


def resume_command(run: Path) -> str:
    """Return the command that resumes an unfinished run."""
    folder = shlex.quote(str(run))
    if clients_of(run) is None:
        return f"peerlora train --resume {folder}"
    return f"peerlora peer CONFIG.yaml --identity DIR --members FILE --out {folder} --resume"
