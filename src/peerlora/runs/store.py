"""The run folder: the files of a run, and how a run killed at any moment is resumed from them.

    config.yaml               the resolved config                  run.json      facts: versions, seed, ...
    events.jsonl              one event a line, append only        lock          held while a process runs here
    checkpoints/round-000010.safetensors, round-000010.json        the newest two
    metrics.parquet, summary.json                                  written at the end
    label_counts.json         of a peer: what the network holds, where it was summed before round 0

A checkpoint counts when its ``.json`` is there, which is written last.  That file holds the checksum of the tensors
and the length of the event log just after ``CheckpointSaved``: a resumed run cuts the log back to this length, so it
goes on exactly where the undisturbed run would have been.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from peerlora.display import utc_now
from peerlora.errors import RunError
from peerlora.files import atomic_file, write_atomically
from peerlora.runs.events import CheckpointSaved, Event, RunFinished, from_json, plain, to_json

if TYPE_CHECKING:
    import torch

KEEP = 2  # checkpoints, so that one damaged file does not cost the run


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
    """One run folder, held by this process alone until ``close``; also a context manager."""

    def __init__(self, folder: Path, lock: IO[str]):
        self.folder = folder
        self._lock = lock
        self.config_yaml = (folder / "config.yaml").read_text(encoding="utf-8")
        self.facts: dict[str, Any] = _read_json(folder / "run.json")
        self._log = open(folder / "events.jsonl", "ab")
        whole = (folder / "events.jsonl").read_bytes().rfind(b"\n") + 1
        self._log.truncate(whole)  # a kill may have left half a line, and the next event must not continue it

    @classmethod
    def create(cls, folder: Path | str, config_yaml: str, facts: Mapping[str, Any]) -> "RunStore":
        """Make the folder and its parents, and write the config and the facts of a run.

        Raises RunError when the folder holds something already, cannot be written, or another process is in it.
        """
        folder = Path(folder)
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
            write_atomically(folder / "config.yaml", config_yaml)
            write_atomically(folder / "run.json", _pretty(facts))  # last: with it, the folder is a run folder
            return cls(folder, lock)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open(cls, folder: Path | str) -> "RunStore":
        """Open the folder of a stopped run.

        Raises RunError when it is not a run folder, when run.json is damaged, or another process is in it.
        """
        folder = Path(folder)
        _require_run(folder)
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

    def emit(self, event: Event) -> None:
        """Append one event; it survives the death of this process at once.

        ``RunFinished`` ends the run: metrics.parquet and, as the very last thing, summary.json are written with it.
        """
        self._log.write(to_json(event).encode() + b"\n")
        self._log.flush()
        if isinstance(event, RunFinished):
            self._write_results(event.summary)

    def save_checkpoint(self, round: int, tensors: "Mapping[str, torch.Tensor]", facts: Mapping[str, Any]) -> None:
        """Save the state after ``round`` finished rounds, emit ``CheckpointSaved``, keep the newest two.

        ``facts`` must be JSON: tuples come back as lists, keys as strings, NaN as None.
        """
        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        data = folder / f"round-{round:06d}.safetensors"
        checksum = _save_tensors(data, tensors, facts)
        self.emit(CheckpointSaved(round, f"checkpoints/{data.name}", checksum))
        os.fsync(self._log.fileno())  # a checkpoint whose events are lost in a power cut could not be used
        side = {"round": round, "sha256": checksum, "events_bytes": self._log_bytes()}
        write_atomically(data.with_suffix(".json"), _pretty(side))
        for old in self._checkpoints()[KEEP:]:
            _remove_checkpoint(old)

    def load_checkpoint(self) -> Checkpoint | None:
        """Load the newest checkpoint that is whole; None when there is none, and the run starts from round 0.

        Raises RunError when there are checkpoints but every one is damaged.
        """
        bad: list[tuple[str, str]] = []
        for side in self._checkpoints():
            facts = _read_side(side)
            reason = _damage(side, facts, self._log_bytes())
            if not reason:
                notes = [f"checkpoint {name} is damaged ({why}); using {side.stem}" for name, why in bad]
                return Checkpoint(facts["round"], *_load_tensors(side), notes, facts["events_bytes"])
            bad.append((side.stem, reason))
        if bad:
            listed = ", ".join(f"{name} ({reason})" for name, reason in bad)
            raise RunError(f"all checkpoints in {self.folder} are damaged: {listed}; start again with another --out")
        return None

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Restore the folder to the moment of ``checkpoint`` (None: to the start of the run)."""
        self._log.truncate(checkpoint.events_bytes if checkpoint else 0)
        (self.folder / "summary.json").unlink(missing_ok=True)
        for side in self._checkpoints():
            if checkpoint is None or _round_of(side) > checkpoint.round:
                _remove_checkpoint(side)  # its length is of a log that is gone now
        orphans = [
            data for data in self.folder.glob("checkpoints/*.safetensors") if not data.with_suffix(".json").exists()
        ]
        for leftover in [*orphans, *self.folder.glob("*.tmp"), *self.folder.glob("checkpoints/*.tmp")]:
            leftover.unlink()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Emit ``RunFinished``, with which the results are written."""
        self.emit(RunFinished(utc_now(), plain(summary)))

    def _write_results(self, summary: Mapping[str, Any]) -> None:
        from peerlora.runs.metrics import write_table

        write_table(read_events(self.folder), self.folder / "metrics.parquet")
        write_atomically(self.folder / "summary.json", _pretty(summary))

    def write(self, name: str, tree: Mapping[str, Any]) -> None:
        """Write a JSON file of its own into the folder, in one step; it stays when the run is resumed."""
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

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _checkpoints(self) -> list[Path]:
        """The ``.json`` files of all checkpoints, newest first."""
        return sorted((self.folder / "checkpoints").glob("round-*[0-9].json"), key=_round_of, reverse=True)

    def _log_bytes(self) -> int:
        return os.fstat(self._log.fileno()).st_size


def read_events(folder: Path | str) -> list[Event]:
    """Read all events of a run folder; a last line that was cut off by a kill is left out.

    Raises RunError when it is not a run folder, or when another line is damaged.
    """
    folder = Path(folder)
    _require_run(folder)
    log = folder / "events.jsonl"
    *whole, _torn = log.read_bytes().split(b"\n") if log.exists() else [b""]
    events = []
    for number, line in enumerate(whole, start=1):
        try:
            events.append(from_json(line.decode("utf-8", errors="replace")))
        except RunError as error:
            raise RunError(f"{log}, line {number}: {error}") from None
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
    """Raise RunError where ``folder`` is a file or holds something already; also asked before anything slow is done."""
    if folder.is_file() or (folder.is_dir() and any(path.name != "lock" for path in folder.iterdir())):
        raise RunError(f"output folder {folder} is in use; choose another --out or resume it with --resume {folder}")


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
    return facts if isinstance(facts, dict) and {"round", "sha256", "events_bytes"} <= set(facts) else {}


def _damage(side: Path, facts: Mapping[str, Any], log_bytes: int) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    data = side.with_suffix(".safetensors")
    if not facts:
        return f"{side.name} unreadable"
    if not data.is_file():
        return f"{data.name} missing"
    if _sha256(data) != facts["sha256"]:
        return "checksum"
    return "event log too short" if log_bytes < facts["events_bytes"] else ""


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
        return json.loads(path.read_bytes())
    except ValueError:
        raise RunError(f"{path} is not valid JSON; the run folder is damaged, start again with another --out") from None


def clients_of(run: Path) -> list[int] | None:
    """Return the clients that a run trains; None: all."""
    return _read_json(run / "run.json").get("held")


def resume_command(run: Path) -> str:
    """Return the command that resumes an unfinished run."""
    if clients_of(run) is None:
        return f"peerlora train --resume {run}"
    return f"peerlora peer CONFIG.yaml --identity DIR --members FILE --out {run} --resume"
