"""The demo: five ways to learn from ten clients' skewed data, on the same shards and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.runs.events import Event
from peerlora.runs.store import new_folder

DEMO: dict[str, Any] = {
    "data": {"max_length": 32, "train_per_class": 250, "eval_per_class": 20},
    "partition": {"kind": "dirichlet", "concentration": 0.3},
    "topology": {"kind": "random", "p": 0.3},
    "train": {"rounds": 30, "local_steps": 2, "batch": 8},
    "eval": {"every": 5, "rows": 32},
    "checkpoint": {"every": 15},
}
"""R8 is capped per class, else half of it is one class.  Evaluations before the end: six on 32 rows, as costly as three
on 64, since a curve needs points."""

ROWS = {
    "alone": ("local", 5e-3),
    "Dec-LoRA": ("dec-lora", 5e-3),
    "ADF-LoRA": ("adf-lora", 5e-3),
    "all data in one place": ("local", 5e-3),
}
"""Row -> (algorithm, learning rate); ``bench/demo_rates.py`` searches one grid for all rows (docs/log.md)."""


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    name: str
    note: str
    summary: dict[str, Any]


@dataclass(frozen=True)
class DemoReport:
    """What the demo found and where it wrote it."""

    rows: list[Row]
    findings: list[str]
    report: Path


def demo_config(overrides: Sequence[str]) -> RunConfig:
    """The embedded default with the user's changes; its method is set row by row."""
    return load_config(DEMO, overrides)


def pool_clients(config: RunConfig) -> RunConfig:
    """The same samples with all data in one place: one client whose steps take everybody's batch."""
    tree = config.model_dump(mode="json")
    ranks = set(config.ranks)
    return load_config(
        tree
        | {
            "clients": 1,
            "partition": {"kind": "iid"},
            "topology": {"kind": "complete"},
            "algorithm": {"name": "local"},
            "adapter": tree["adapter"] | {"rank": max(ranks)},
            "train": tree["train"] | {"batch": sum(config.batches)},
        }
    )


def run_demo(
    config: RunConfig,
    overrides: Sequence[str],
    out: Path | str | None,
    listener: Callable[[str], AbstractContextManager[Callable[[Event], None]]],
    stop: Callable[[], bool] = lambda: False,
) -> DemoReport:
    """Run every row in a folder of its own below ``out`` and write one report about all.

    ``listener(title)`` opens what shows one row's progress.
    """
    from peerlora.experiments.demo_report import ComparisonRow, write_comparison
    from peerlora.runs.store import read_events, require_free
    from peerlora.runtime.resources import load_resources
    from peerlora.runtime.simulate import simulate

    folder = Path(out) if out is not None else new_folder("demo")
    require_free(folder, resumable=False)
    resources = load_resources(config)
    rows, shown = [], []
    for name in ROWS:
        with listener(name) as listen:
            run = folder / name.lower().replace(" ", "-")
            result = simulate(
                configure_row(config, name, overrides), run, resources=resources, sinks=[listen], stop=stop
            )
        rows.append(Row(name, _note(name), result.summary))
        shown.append(ComparisonRow(name, _note(name), read_events(run), result.summary))
        if name == "alone":
            rows.append(Row("averaged once", _note("averaged once"), average_once(result.summary, result.adapters)))
            shown.append(ComparisonRow("averaged once", _note("averaged once"), None, rows[-1].summary))
    return DemoReport(rows, describe_findings(rows), write_comparison(folder, shown, describe_findings(rows)))


def configure_row(config: RunConfig, name: str, overrides: Sequence[str]) -> RunConfig:
    """The config of one row: its method and its learning rate, unless the user gave one for all."""
    method, rate = ROWS[name]
    tree = config.model_dump(mode="json")
    given = [word.partition("=")[0] for word in overrides]
    if "train.lr" not in given:
        tree["train"]["lr"] = rate
    settings = {
        word.partition(".")[2]: tree["algorithm"][word.partition(".")[2]] for word in given if "algorithm." in word
    }
    settings.pop("name", None)
    tree["algorithm"] = {"name": method, **(settings if method == config.algorithm.name else {})}
    changed = load_config(tree)
    return pool_clients(changed) if name == "all data in one place" else changed


def average_once(alone: dict[str, Any], adapters: Any) -> dict[str, Any]:
    """Make the row of clients that train alone and average all adapters once, at the end."""
    from peerlora.exchange.schema import encoded_bytes

    clients, reached = alone["clients"], alone["scores"]["averaged"]
    message = encoded_bytes(adapters.message())
    return alone | {
        "method": "averaged once",
        **dict.fromkeys(("scores", "accuracy"), dict.fromkeys(("own_mean", "own_min", "own_max", "averaged"), reached)),
        "consensus": dict.fromkeys(("A", "B", "product", "cross_term"), 0.0),
        "bytes_sent": clients * (clients - 1) * message,
        "last_contact": [alone["rounds"]] * clients,
    }


def _note(name: str) -> str:
    return {
        "alone": "every client trains on its own data and exchanges nothing",
        "averaged once": "the same clients; all adapters are averaged once, at the end",
        "Dec-LoRA": "train both factors, mix both with the neighbours every round",
        "ADF-LoRA": "train one factor at a time, mix both with the neighbours every round",
        "all data in one place": "one client that holds all rows: what decentralised training gives away",
    }[name]


def describe_findings(rows: list[Row]) -> list[str]:
    """What these rows show, in words, and what they don't."""
    by_name = {row.name: row.summary for row in rows}
    alone, once, dec, adf, everything = (by_name[row.name]["scores"] for row in rows)
    gap = abs(dec["own_mean"] - adf["own_mean"])
    return [
        f"Exchanging adapters took the mean client from {alone['own_mean']:.3f} (alone) to {dec['own_mean']:.3f} "
        f"(Dec-LoRA) and {adf['own_mean']:.3f} (ADF-LoRA), the worst client from {alone['own_min']:.3f} to "
        f"{dec['own_min']:.3f} and {adf['own_min']:.3f}; averaging once reached {once['averaged']:.3f}, "
        f"all data in one place {everything['own_mean']:.3f}.",
        f"Dec-LoRA and ADF-LoRA differ by {gap:.3f} here.  This is one seed on one small task: no ranking of the two "
        "follows from it.  Repeat it with seed=1, seed=2, ... to see the spread.",
    ]
