"""Grids of the studies whose rows share loss, schedule, memory and work, and differ in what the study is about.

MiniLM with its upper two blocks adapted, ten clients with skewed labels, 5 steps x 8 rows a round.  Every row's rate is
searched on rows set aside, with two seeds that are not reported, in a grid that grows until its best is inside.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Tree = dict[str, Any]
ROUNDS, STEPS, BATCH, CLIENTS = 60, 5, 8, 10
SEEDS, SEARCHED = [0, 1, 2, 3, 4], [100, 101]
RATES = [2e-3, 4e-3, 8e-3]
UPPER_BLOCKS = r".*layer\.[45]\..*(query|value)"

BINARY = {"kind": "shares", "shares": [[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]], "counts": [3, 3, 4]}
FOUR = {
    "kind": "shares",
    "shares": [[0.85, 0.05, 0.05, 0.05], [0.05, 0.85, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05], [0.05, 0.05, 0.05, 0.85]],
    "counts": [3, 3, 2, 2],
}
TASKS: dict[str, Tree] = {
    "sst2": {"folder": "glue/sst2", "text": ["sentence"], "labels": ["negative", "positive"], "partition": BINARY},
    "agnews": {
        "folder": "extra/ag_news",
        "text": ["text"],
        "labels": ["World", "Sports", "Business", "Sci/Tech"],
        "partition": FOUR,
        "eval_per_class": 250,
    },
}
LEARNED = {"schedule": "cosine", "optimizer_state": "keep", "label_prior": "uniform"}
"""What the recipe sets for training."""
RELAY: Tree = {"exchange": {"relay": {}}}


def base(task: str, data: Path, p: float = 0.02, rounds: int = ROUNDS) -> Tree:
    """What the rows of one table have in common."""
    about = TASKS[task]
    rows = {
        "train": f"parquet:{data / about['folder'] / 'train.parquet'}",
        "eval": f"parquet:{data / about['folder'] / 'validation.parquet'}",
        "text": about["text"],
        "label": "label",
        "max_length": 32,
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
    return change | (RELAY if relay else {})


def pooled(**train: Any) -> Tree:
    """All data in one place: one client, whose steps take the batches of all."""
    alone = {"clients": 1, "partition": {"kind": "iid"}, "topology": {"kind": "complete"}}
    return row("local", batch=CLIENTS * BATCH, **train) | alone


def search(task: str) -> Tree:
    """Every row has a rate of its own."""
    share = {"sst2": 500 / 67349, "agnews": 500 / 5934}[task]
    each = ["algorithm.name", "algorithm.interval", "topology.kind", "topology.p", "clients"]
    each += [f"train.{name}" for name in ("schedule", "optimizer_state", "label_prior", "batch")]
    return {"rates": RATES, "seeds": SEARCHED, "holdout": share, "each": each, "grow": True, "ties": "common"}


def sparse(task: str) -> Callable[[Path], Tree]:
    """From plain dec-lora to the recipe, one change at a time; then the recipe over other methods and graphs.

    60 rounds, 24,000 rows in all, in every row; "all data in one place" is one client whose steps take all batches.
    """

    def grid(data: Path) -> Tree:
        prior = {"label_prior": "uniform"}
        systems = {
            "dec-lora": row(),
            "+ adjusted loss": row(**prior),
            "+ cosine": row(**prior, schedule="cosine"),
            "+ kept memory, relayed (recipe)": row(relay=True, **LEARNED),
            "constant rate, kept memory, relayed": row(relay=True, **{**LEARNED, "schedule": "constant"}),
            "recipe, adf-lora T = 1": row({"name": "adf-lora", "interval": 1}, relay=True, **LEARNED),
            "recipe, adf-lora T = 5": row({"name": "adf-lora", "interval": 5}, relay=True, **LEARNED),
            "recipe, p = 0.01": row(graph={"kind": "random", "p": 0.01}, relay=True, **LEARNED),
            "recipe, p = 0.1": row(graph={"kind": "random", "p": 0.1}, relay=True, **LEARNED),
            "recipe, complete graph": row(graph={"kind": "complete"}, **LEARNED),
            "all data in one place": pooled(**LEARNED),
            "all data in one place, constant rate": pooled(**{**LEARNED, "schedule": "constant"}),
        }
        return {
            "base": base(task, data),
            "axes": {"system": systems},
            "seeds": SEEDS,
            "baseline": {"system": "all data in one place"},
            "search": search(task),
            "share_prefix": True,
        }

    return grid


GRAPHS: dict[str, Any] = {
    "p = 0.5": {"kind": "random", "p": 0.5},
    "p = 0.1": {"kind": "random", "p": 0.1},
    "p = 0.02": {"kind": "random", "p": 0.02},
    "ring": {"kind": "ring"},
}
ADF = {f"adf-lora, T = {T}": {"name": "adf-lora", "interval": T} for T in (1, 5, 10)}
FACTORS: dict[str, Any] = {"dec-lora": "dec-lora", **ADF, "ffa-lora": "ffa-lora", "rolora": "rolora"}
"""tad-lora is adf-lora with the T that it chooses: 1, 2, 5 and 3 on these graphs."""
BUDGETS = (24, 48, 96)


def alternating(rounds: int, schedule: str) -> Callable[[Path], Tree]:
    """Whether alternating factors helps: every graph and method at one budget and schedule, each at its best rate."""

    def grid(data: Path) -> Tree:
        chosen = {"p = 0.1": 2, "ring": 3}
        systems = {}
        for graph, topology in GRAPHS.items():
            methods = dict(FACTORS)
            if graph in chosen:
                methods[f"tad-lora (T = {chosen[graph]})"] = {"name": "adf-lora", "interval": chosen[graph]}
            for name, method in methods.items():
                systems[f"{graph}: {name}"] = row(method, topology, **{**LEARNED, "schedule": schedule})
        return {
            "base": base("sst2", data, rounds=rounds),
            "axes": {"system": systems},
            "seeds": SEEDS,
            "search": search("sst2"),
            "share_prefix": True,
        }

    return grid


STUDIES: dict[str, Callable[[Path], Tree]] = {
    **{f"sparse-{task}": sparse(task) for task in TASKS},
    **{
        f"alternating-{rounds}-{schedule}": alternating(rounds, schedule)
        for rounds in BUDGETS
        for schedule in ("constant", "cosine")
    },
}
