"""The programs to measure, and one of them on one job with what its repeats gave."""

import json
import os
import re
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import HERE
from measure import measure
from safetensors.numpy import load_file


@dataclass(frozen=True)
class Runner:
    """One program to measure: what it averages over which graph, its script, where that runs, its arguments."""

    graph: str
    rule: str
    script: str
    environment: str | None = None
    arguments: tuple[str, ...] = ()


CORES = len(os.sched_getaffinity(0))
NEIGHBOURS, EVERYBODY = "W over neighbours", "mean of all"
RUNNERS = {
    "plain loop": Runner("ring", NEIGHBOURS, "run_plain.py"),
    "peerlora": Runner("ring", NEIGHBOURS, "run_peerlora.py", arguments=("1",)),
    "peerlora, all cores": Runner("ring", NEIGHBOURS, "run_peerlora.py", arguments=(str(CORES),)),
    "flower, star": Runner("star", EVERYBODY, "run_flower.py", "flower", ("star",)),
    "flower, ring": Runner("ring", NEIGHBOURS, "run_flower.py", "flower", ("ring",)),
    "nvflare": Runner("ring", NEIGHBOURS, "run_nvflare.py", "nvflare"),
    "p2pfl, stock": Runner("ring", EVERYBODY, "run_p2pfl.py", "p2pfl", ("stock",)),
    "p2pfl, tuned": Runner("ring", EVERYBODY, "run_p2pfl.py", "p2pfl", ("tuned",)),
}
FIGURES = [
    "startup_seconds",
    "round_seconds",
    "end_seconds",
    "wall_seconds",
    "cpu_seconds",
    "peak_bytes",
    "bytes",
    "accuracy_mean",
    "accuracy_worst",
    "difference",
]


@dataclass
class Cell:
    """One runner on one job, with what its repeats gave."""

    runner: Runner
    python: Path
    work: Path
    runs: list[dict[str, Any]] = field(default_factory=list)
    failed: str = ""
    """Why it is not run again."""

    def run(self, limit: float) -> dict[str, Any]:
        """One run in an empty folder; returns all nodes' final adapters, none where it did not get through."""
        script = HERE.absolute() / self.runner.script
        with tempfile.TemporaryDirectory() as place:
            answer = Path(place) / "answer.json"
            words = [str(self.python), str(script), str(self.work), str(answer), *self.runner.arguments]
            seen = measure(words, environment(), Path(place), limit)
            if seen.ended or not answer.is_file():
                self.failed = without_places(seen.ended or "it ended without an answer")
                return {}
            found = json.loads(answer.read_text())
            adapters = load_file(answer.with_suffix(".safetensors"))
        if found["bytes_kind"] == "loopback":
            found["bytes"] = seen.loopback_bytes
        end = seen.wall_seconds - found["startup_seconds"] - found["round_seconds"]
        measured = {"end_seconds": end, "wall_seconds": seen.wall_seconds}
        measured |= {"cpu_seconds": seen.cpu_seconds, "peak_bytes": seen.peak_bytes}
        self.runs.append(found | measured)
        return adapters

    def compare(self, reference: dict[str, Any], adapters: dict[str, Any]) -> None:
        """Note how far the last run's numbers are from the first runner's with the same rule."""
        apart = [float(abs(adapters[name] - value).max()) for name, value in reference.items()]
        self.runs[-1]["difference"] = max(apart)

    def told(self) -> str:
        """How the last run went."""
        return self.failed or f"{self.runs[-1]['round_seconds']:.1f} s in the rounds"

    def row(self) -> dict[str, Any]:
        """Medians over the repeats, and how far the rounds' times spread."""
        row = {"graph": self.runner.graph, "rule": self.runner.rule, "repeats": len(self.runs)}
        row |= {figure: statistics.median(run[figure] for run in self.runs) for figure in FIGURES}
        row |= {figure: round(row[figure]) for figure in ("peak_bytes", "bytes")}
        seconds = [run["round_seconds"] for run in self.runs]
        row["round_seconds_range"] = [min(seconds), max(seconds)]
        return row | {name: self.runs[-1][name] for name in ("bytes_kind", "note")}


def environment() -> dict[str, str]:
    """One thread per process, no network, no telemetry; the runners' own modules, wherever a worker starts."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR") if key in os.environ}
    return kept | {
        "PYTHONPATH": str(HERE.absolute()),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def without_places(text: str) -> str:
    """The text without this machine's folders and hosts."""
    text = text.replace(str(Path.cwd()), ".").replace(tempfile.gettempdir(), "TMP").replace(str(Path.home()), "~")
    return re.sub(r"\w+://\S+", "ADDRESS", text)
