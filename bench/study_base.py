"""What the studies of docs/results have in common: data, model and graph, the rates that are searched, and the work.

MiniLM with its upper two blocks adapted, ten clients with skewed labels, 5 steps x 8 rows a round.  Every row's rate is
searched on rows set aside, with two seeds that are not reported, in a grid that grows until its best is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peerlora.algorithms import method_class

Tree = dict[str, Any]
PLACE, RESULTS, PAGES = Path(".bench/studies"), Path("bench/results"), Path("docs/results")
ROUNDS, STEPS, BATCH, CLIENTS = 60, 5, 8, 10
SEEDS, SEARCHED = [0, 1, 2, 3, 4], [100, 101]
RATES = [2e-3, 4e-3, 8e-3]
SGD_RATES = [0.05, 0.15, 0.45]
"""Plain SGD's right rates are some fifty times those of AdamW, so it has a grid of its own, which grows likewise."""
UPPER_BLOCKS = r".*layer\.[45]\..*(query|value)"
SET_ASIDE = 500
"""Training rows, about, that the search is scored on."""


def skewed(share: float, counts: Sequence[int] = (3, 3, 4)) -> Tree:
    """So many clients hold this share of the one label, of the other label, and half of each."""
    return {"kind": "shares", "shares": [[share, 1 - share], [1 - share, share], [0.5, 0.5]], "counts": list(counts)}


BINARY = {"kind": "shares", "shares": [[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]], "counts": [3, 3, 4]}
FOUR = {
    "kind": "shares",
    "shares": [[0.85, 0.05, 0.05, 0.05], [0.05, 0.85, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05], [0.05, 0.05, 0.05, 0.85]],
    "counts": [3, 3, 2, 2],
}
TASKS: dict[str, Tree] = {
    "sst2": {
        "folder": "glue/sst2",
        "text": ["sentence"],
        "labels": ["negative", "positive"],
        "partition": BINARY,
        "rows": 67349,
    },
    "agnews": {
        "folder": "extra/ag_news",
        "text": ["text"],
        "labels": ["World", "Sports", "Business", "Sci/Tech"],
        "partition": FOUR,
        "eval_per_class": 250,
        "rows": 5934,
    },
}
"""``rows``: for training, of which the search's share is taken."""
LEARNED: Tree = {"schedule": "cosine", "optimizer_state": "keep", "label_prior": "uniform"}
"""What the recipe sets for training."""
RELAY: Tree = {"exchange": {"relay": {}}}
ALONE = "alone"
"""What gossip is to be judged by, with the same loss, schedule and memory as the others."""


@dataclass(frozen=True)
class Tuned:
    """A setting of rows' methods that is chosen as rates are: on rows set aside, with the search's seeds."""

    setting: str
    """Dotted."""
    values: tuple[float, ...]
    """Rising; where the best is at an edge, they grow by their own ratio."""
    at_most: float = float("inf")
    """The largest value that the setting may have."""

    @property
    def word(self) -> str:
        """The last part of the setting's name."""
        return self.setting.rpartition(".")[2]


@dataclass(frozen=True)
class Study:
    """One table of docs/results."""

    parts: Callable[[Path], list[Tree]]
    """Data folder -> grids, whose rows make one table; several where rows need other rates to start the search from."""
    page: str
    """The file in docs/results."""
    baseline: Mapping[str, str]
    """The axis and label that differences are taken against; empty: none are."""
    further: Mapping[str, str] | None = None
    """A row against which the same runs are compared once more, in a table of its own."""
    tuned: Mapping[str, Tuned] | None = None
    """By row."""
    split: tuple[str, str] | None = None
    """The axes that a row's label has on both sides of its colon."""
    judged: Sequence[int] | None = None
    """The clients whose scores count; null: all."""
    costs: bool = False
    """Whether a second table compares the rows at equal bytes and equal virtual time."""
    prepare: Callable[[Path], None] = lambda data: None
    """Writes what the grids read beside the data folder's files."""


def in_dtype(study: Study, dtype: str) -> Study:
    """The same study with the base model of every row in a precision, unless its rows are about that."""

    def parts(data: Path) -> list[Tree]:
        return [tree if "dtype" in tree["axes"] else _with_dtype(tree, dtype) for tree in study.parts(data)]

    return study if dtype == "fp32" else replace(study, parts=parts)


def _with_dtype(tree: Tree, dtype: str) -> Tree:
    common = tree["base"]
    return tree | {"base": common | {"train": common["train"] | {"dtype": dtype}}}


def split_labels(study: Study, labels: Mapping[str, str]) -> dict[str, str]:
    """A row's labels by axis, where its one label stands for two."""
    if study.split is None:
        return dict(labels)
    return dict(zip(study.split, labels["system"].split(": "), strict=True))


def base(task: str, data: Path, p: float = 0.02, rounds: int = ROUNDS) -> Tree:
    """What the rows of one table have in common."""
    about = TASKS[task]
    rows = {
        "train": f"parquet:{data / about['folder'] / 'train.parquet'}",
        "eval": f"parquet:{data / about['folder'] / 'validation.parquet'}",
        "text": about["text"],
        "label": "label",
        "max_length": about.get("max_length", 32),
        "eval_per_class": about.get("eval_per_class"),
    }
    return {
        "data": rows,
        "task": {"labels": about["labels"]},
        "partition": about["partition"],
        "clients": CLIENTS,
        "adapter": {"rank": 8, "alpha": 16, "targets": UPPER_BLOCKS},
        "topology": {"kind": "random", "p": p},
        "train": {"rounds": rounds, "local_steps": STEPS, "batch": BATCH},
        "eval": {"every": rounds},
        "checkpoint": {"every": rounds},
        "threads": 1,
    }


def row(method: Any = "dec-lora", graph: Any = None, relay: bool = False, **train: Any) -> Tree:
    """A change to the base: method, graph, settings of ``train``."""
    change: Tree = {"algorithm": {"name": method} if isinstance(method, str) else method, "train": train}
    if graph is not None:
        change["topology"] = graph
    if "rounds" in train:  # in place of the base's, of which an evaluation may lie behind the end
        change |= {"eval": {"every": train["rounds"]}, "checkpoint": {"every": train["rounds"]}}
    return change | (RELAY if relay else {})


def learned(method: Any = "dec-lora", graph: Any = None, **train: Any) -> Tree:
    """A row with the recipe's training; its memory is fresh in every round where the method can't keep one."""
    return row(method, graph, **{**LEARNED, **({} if keeps_memory(method) else {"optimizer_state": "round"}), **train})


def keeps_memory(method: Any) -> bool:
    """Whether the optimiser's memory can outlast a round of the method."""
    about = {"name": method} if isinstance(method, str) else dict(method)
    return method_class(about.pop("name"))(**about).fresh_optimizer is None


def named(label: str, method: Any) -> str:
    """A row's label, which says where memory is not kept."""
    return label if keeps_memory(method) else f"{label} (fresh memory)"


def pooled(**train: Any) -> Tree:
    """All data in one place: one client, whose steps take the batches of all."""
    alone = {"clients": 1, "partition": {"kind": "iid"}, "topology": {"kind": "complete"}}
    return row("local", **{"batch": CLIENTS * BATCH, **train}) | alone


def search(task: str, more: Sequence[str] = (), rates: Sequence[float] = tuple(RATES)) -> Tree:
    """Every row has a rate of its own; ``more``: settings in which rows differ beside the usual ones."""
    each = ["algorithm.name", "algorithm.interval", "topology.kind", "topology.p", "clients"]
    each += [f"train.{name}" for name in ("schedule", "optimizer_state", "label_prior", "batch", "quiet")]
    each.append("exchange.relay")  # changes no training, but which models the search scores
    return {
        "rates": list(rates),
        "seeds": SEARCHED,
        "holdout": SET_ASIDE / TASKS[task]["rows"],
        "each": [*each, *(name for name in more if name not in each)],
        "grow": True,
        "ties": "common",
    }


def grid(task: str, common: Tree, systems: Mapping[str, Tree], rates: Sequence[float] = tuple(RATES)) -> Tree:
    """One row per system, each with a rate of its own."""
    return {
        "base": common,
        "axes": {"system": dict(systems)},
        "seeds": SEEDS,
        "search": search(task, settings_of(systems.values()), rates),
        "share_prefix": True,
    }


def settings_of(changes: Any) -> list[str]:
    """The settings on which training depends in any of these changes, two levels deep."""
    found: dict[str, None] = {}
    for change in changes:
        for section, value in change.items():
            if section not in ("eval", "checkpoint"):
                found |= {f"{section}.{name}": None for name in value} if isinstance(value, dict) else {section: None}
    return list(found)
