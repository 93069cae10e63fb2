"""Checkpoints of a run folder: the newest two, each a safetensors file and a ``.json`` that is written last.

One beyond these may be kept, as the one that goes with a Trainer's own checkpoint.  The ``.json`` holds the checksum of
the tensors and the length of the event log just after ``CheckpointSaved``.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlora.errors import RunError
from peerlora.files import atomic_file
from peerlora.runs.events import plain
from peerlora.runs.json_files import write_json

if TYPE_CHECKING:
    import torch

KEEP = 2  # checkpoints, so that one damaged file does not cost the run
_SIDE = {"round", "sha256", "events_bytes"}  # what the file beside a checkpoint always told; newer ones have a check
_DIVERGED = "is one that training diverged from"
_UNFIT = "does not fit"


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


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path):
        self.folder, self.log = run / "checkpoints", run / "events.jsonl"

    def save_tensors(self, round: int, tensors: "Mapping[str, torch.Tensor]", facts: Mapping[str, Any]) -> str:
        """Write the tensors of the state after ``round`` rounds and return their SHA-256; not yet a checkpoint."""
        self.folder.mkdir(exist_ok=True)
        return _save_tensors(self.data_of(round), tensors, facts)

    def complete(self, round: int, checksum: str, events_bytes: int) -> None:
        """Make what ``save_tensors`` wrote a checkpoint; of the others stay the newest and the one that is kept."""
        facts = {"round": round, "sha256": checksum, "events_bytes": events_bytes}
        _write_side(self.data_of(round).with_suffix(".json"), facts)
        for old in self._sides()[KEEP:]:
            if not _read_side(old).get("kept"):
                _remove(old)

    def keep_newest(self) -> None:
        """Keep the newest checkpoint, however many follow, until another one is kept."""
        for place, side in enumerate(self._sides()):
            facts = _read_side(side)
            if facts and facts.get("kept", False) != (place == 0):
                _write_side(side, facts | {"kept": place == 0})

    def data_of(self, round: int) -> Path:
        """The file of the tensors after ``round`` rounds."""
        return self.folder / f"round-{round:06d}.safetensors"

    def mark_diverged(self, round: int) -> str | None:
        """Mark the checkpoint after ``round`` rounds as one that training diverged from; return what is used instead.

        None where there is no such checkpoint.
        """
        sides = self._sides()
        marked = next((side for side in sides if _round_of(side) == round), None)
        if marked is None:
            return None
        if facts := _read_side(marked):
            _write_side(marked, facts | {"diverged": True})
        return next((side.stem for side in sides if _round_of(side) < round), "the start")

    def load(self, unfit: "Callable[[Mapping[str, torch.Tensor]], str]" = lambda tensors: "") -> Checkpoint | None:
        """Load the newest checkpoint that is whole; None when there is none, and the run starts from round 0.

        One that training diverged from is passed over, and one of which ``unfit`` says why it does not fit.  Raises
        RunError when there are checkpoints but every one is damaged.
        """
        bad: list[tuple[str, str]] = []
        for side in self._sides():
            facts = _read_side(side)
            reason = self._reason_against(side, facts)
            if not reason:
                tensors, own = _load_tensors(side)
                if why := unfit(tensors):
                    bad.append((side.stem, f"{_UNFIT} ({why})"))
                    continue
                notes = [f"checkpoint {name} {why}; using {side.stem}" for name, why in bad]
                return Checkpoint(facts["round"], tensors, own, notes, facts["events_bytes"])
            bad.append((side.stem, reason))
        if any(reason != _DIVERGED and not reason.startswith(_UNFIT) for _, reason in bad):
            listed = ", ".join(f"{name} {reason}" for name, reason in bad)
            raise RunError(
                f"no checkpoint in {self.folder.parent} can be used: {listed}; start again with another --out"
            )
        return None

    def remove_after(self, round: int | None) -> None:
        """Remove those after ``round`` rounds, whose log is gone, and tensors without a ``.json``; None: all."""
        for side in self._sides():
            if round is None or _round_of(side) > round:
                _remove(side)
        for data in self.folder.glob("*.safetensors"):
            if not data.with_suffix(".json").exists():
                data.unlink()

    def _sides(self) -> list[Path]:
        """The ``.json`` files of all checkpoints, newest first."""
        return sorted(self.folder.glob("round-*[0-9].json"), key=_round_of, reverse=True)

    def _reason_against(self, side: Path, facts: Mapping[str, Any]) -> str:
        """Why a checkpoint cannot be used, or an empty string."""
        if facts.get("diverged"):
            return _DIVERGED
        damage = _damage(side, facts)
        if not damage and not _ends_line(self.log, facts["events_bytes"]):
            short = self.log.stat().st_size < facts["events_bytes"]
            damage = "event log too short" if short else "event log changed"
        return f"is damaged ({damage})" if damage else ""


def _save_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]", facts: Mapping[str, Any]) -> str:
    """Write a safetensors file in one step and return its sha256."""
    from safetensors.torch import save_file

    own = _with_memory_of_their_own(tensors)
    with atomic_file(path) as temporary:
        save_file(own, temporary, metadata={"facts": json.dumps(plain(facts))})
        return _sha256(temporary)


def _with_memory_of_their_own(tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Tensors as the format takes them, which share no memory; those that do, as views of one buffer, are copied."""
    import torch

    found, seen = {}, set()
    for name, each in tensors.items():
        own = each.detach().cpu()
        storage = own.untyped_storage()
        if not own.is_contiguous() or storage.nbytes() != own.nbytes or storage.data_ptr() in seen:
            own = own.clone(memory_format=torch.contiguous_format)
        seen.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


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
    write_json(side, {**facts, "check": _check(facts)})


def _check(facts: Mapping[str, Any]) -> str:
    """The checksum of what the file beside a checkpoint tells."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _ends_line(log: Path, length: int) -> bool:
    """Whether the first ``length`` bytes of the event log are whole lines."""
    with open(log, "rb") as file:
        file.seek(max(0, length - 1))
        return length == 0 or file.read(1) == b"\n"


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


def _remove(side: Path) -> None:
    side.unlink()  # first, so that a kill in between leaves no checkpoint without its tensors
    side.with_suffix(".safetensors").unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
