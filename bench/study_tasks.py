"""Studies of other tasks and of single settings: pairs of texts, the label prior, half precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study_base import ALONE, BINARY, LEARNED, TASKS, Study, Tree, base, grid, learned, row, search, settings_of, skewed

PAIRS: dict[str, Tree] = {
    "qnli": {
        "folder": "glue/qnli",
        "text": ["question", "sentence"],
        "labels": ["entailment", "not_entailment"],
        "partition": BINARY,
        "max_length": 64,
        "rows": 12096,
    },
    "qqp": {
        "folder": "glue/qqp",
        "text": ["question1", "question2"],
        "labels": ["not_duplicate", "duplicate"],
        "partition": BINARY,
        "eval_per_class": 250,
        "max_length": 64,
        "rows": 12257,
    },
}
TASKS |= PAIRS
PAIR_ROUNDS = 120
"""QNLI leaves chance between rounds 30 and 40 at a constant rate (docs/log.md); three times that, 48,000 rows."""
FACTORS: dict[str, Any] = {
    ALONE: "local",
    "dec-lora": "dec-lora",
    "adf-lora, T = 1": {"name": "adf-lora", "interval": 1},
    "adf-lora, T = 5": {"name": "adf-lora", "interval": 5},
    "ffa-lora": "ffa-lora",
    "rolora": "rolora",
}


def pairs(task: str) -> Study:
    """A task of text pairs at p = 0.1; all blocks are adapted, since a pair is read in the lower ones, too."""

    def parts(data: Path) -> list[Tree]:
        common = base(task, data, 0.1, PAIR_ROUNDS)
        common["adapter"] |= {"targets": ["query", "value"]}
        return [grid(task, common, {name: learned(method) for name, method in FACTORS.items()})]

    return Study(parts, "text-pairs.md", {"system": "dec-lora"})


def dtype(data: Path) -> list[Tree]:
    """Whether studies may use bf16: the same runs in both, at the rate that is found for fp32."""
    methods = {"dec-lora": "dec-lora", "adf-lora, T = 5": FACTORS["adf-lora, T = 5"]}
    axes = {
        "method": {name: learned(method) for name, method in methods.items()},
        "dtype": {name: {"train": {"dtype": name}} for name in ("fp32", "bf16")},
    }
    return [crossed("sst2", base("sst2", data, 0.1), axes, [])]


def crossed(task: str, common: Tree, axes: Mapping[str, Tree], more: list[str]) -> Tree:
    """A grid of several axes; ``more``: settings that ask for a rate of their own."""
    found = grid(task, common, {})
    return found | {"axes": dict(axes), "search": search(task, more)}


def prior(name: str) -> Tree:
    """The loss, and the rest of the recipe's training."""
    return {"train": {**LEARNED, "label_prior": name}}


def priors(task: str, conditions: Mapping[str, Tree], names: tuple[str, ...]) -> Study:
    """What the adjusted loss changes, each row beside the same row with the plain loss, each at its own rate."""

    def parts(data: Path) -> list[Tree]:
        axes = {"condition": dict(conditions), "label prior": {name: prior(name) for name in names}}
        return [crossed(task, base(task, data), axes, settings_of(conditions.values()))]

    return Study(parts, "label-prior.md", {"label prior": "none"})


def meet(p: float, partition: Tree = BINARY, method: Any = "dec-lora") -> Tree:
    """A condition: method, graph, shards."""
    return row(method, {"kind": "random", "p": p}) | {"partition": partition}


ADF5 = FACTORS["adf-lora, T = 5"]
CONDITIONS: dict[str, Tree] = {
    ALONE: meet(0.1, method="local"),
    **{f"dec-lora, p = {p:g}": meet(p) for p in (0.5, 0.1, 0.02)},
    **{f"adf-lora T = 5, p = {p:g}": meet(p, method=ADF5) for p in (0.5, 0.1, 0.02)},
    "alone, shares of 70 %": meet(0.1, skewed(0.7), "local"),
    "dec-lora, p = 0.1, shares of 70 %": meet(0.1, skewed(0.7)),
    "dec-lora, p = 0.1, shares of 99 %": meet(0.1, skewed(0.99)),
    "dec-lora, p = 0.1, one label absent": meet(0.1, skewed(1.0)),
}
UNEVEN: dict[str, Tree] = {
    "dec-lora, p = 0.1": meet(0.1, skewed(0.9, (6, 1, 3))),
    "adf-lora T = 5, p = 0.1": meet(0.1, skewed(0.9, (6, 1, 3)), ADF5),
}
"""The network's own proportions are 70/30, so that a pooled target is another one."""
DIRICHLET: dict[str, Tree] = {
    f"dec-lora, p = 0.1, Dirichlet {c:g}": meet(0.1, {"kind": "dirichlet", "concentration": c}) for c in (0.1, 0.5)
}
EVERY_PRIOR = ("none", "uniform", "pooled")

STUDIES: dict[str, Study] = {
    **{task: pairs(task) for task in PAIRS},
    "dtype": Study(dtype, "speed-and-memory.md", {"dtype": "fp32"}),
    "label-prior": priors("sst2", CONDITIONS, ("none", "uniform")),
    "label-prior-uneven": priors("sst2", UNEVEN, EVERY_PRIOR),
    "label-prior-agnews": priors("agnews", DIRICHLET, EVERY_PRIOR),
}
