"""Outcomes of studies, a line each in a file of bench/results/outcomes, so that a study goes on in any checkout."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peerlora.experiments.measures import measure_run
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.trials import Trial
from study_costs import Look, follow, only_of

PLACE = Path("bench/results/outcomes")
_ALWAYS = ("optimizer", "optimizer_state", "schedule", "label_prior", "lr", "rounds", "local_steps", "batch", "dtype")


class OutcomeLines:
    """Keeps the outcomes of a study's finished runs, by their whole config without this machine's folders."""

    def __init__(self, study: str, data: Path, judged: Sequence[int] | None = None):
        """``judged``: the clients whose scores are measured; null: all."""
        self.path, self.data, self.judged = PLACE / f"{study}.jsonl", data, judged
        self._found: dict[str, Outcome] = {}
        self._looks: dict[str, list[Look]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            kept = json.loads(line)
            self._found[kept["config"]] = Outcome(**kept["outcome"])
            self._looks[kept["config"]] = [Look(**look) for look in kept.get("looks", ())]

    def __len__(self) -> int:
        """The finished runs."""
        return len(self._found)

    def find(self, trial: Trial) -> Outcome | None:
        """Return the outcome of a run with this config, under the trial's own names."""
        kept = self._found.get(self._key(trial))
        return kept and restored(kept, trial)

    def looks(self, trial: Trial) -> list[Look]:
        """Return a finished run's evaluations by round; empty where it diverged, or an older line has none."""
        return self._looks.get(self._key(trial), [])

    def keep(self, trial: Trial, outcome: Outcome) -> None:
        """Append a line, which is whole even if the next one is cut off."""
        key, events = self._key(trial), outcome.events
        if self.judged is not None and events:
            events = only_of(events, self.judged)
            outcome = replace(outcome, measures=measure_run(events, trial.config))
        self._found[key], self._looks[key] = replace(outcome, events=()), follow(events, trial.config)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"config": key, "machine": machine(), "outcome": json.loads(outcome.to_json())}
        line["looks"] = [asdict(look) for look in self._looks[key]]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _key(self, trial: Trial) -> str:
        """What tells runs apart: settings other than the defaults, so that a new setting of peerlora changes no key.

        Those of ``train`` that decide a comparison are always in it, whatever their default becomes.
        """
        config = trial.config.model_dump(mode="json", exclude_defaults=True)
        config = {name: value for name, value in config.items() if name not in ("threads", "peer", "checkpoint")}
        named = {name: getattr(trial.config.train, name) for name in _ALWAYS}
        config = without_folder({**config, "train": config.get("train", {}) | named}, self.data)
        config = without_folder(config, Path.cwd())
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:20]


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
