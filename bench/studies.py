"""The studies of docs/results: grids of `peerlora compare`, on GLUE tasks with MiniLM and skewed labels.

    python bench/studies.py methods --data FOLDER

FOLDER holds sst2/train.parquet, sst2/validation.parquet and so on.  A study's runs lie below .bench/studies; it can be
stopped and gone on with.  At its end the table goes to bench/results and between the study's markers of its
page in docs/results.  Learning rates are searched per method and task, at p = 0.1, on training rows set aside;
``ring``, ``sparsity`` and ``drift`` take the rates that ``methods`` found.  Clients alone are the same on every graph,
so where a study has several graphs and searches, they are a study of their own: ``qnli-alone``, ``mnli-alone``.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import study_grids
from markers import insert
from outcomes import OutcomeLines, without_folder
from peerlora.algorithms import REGISTRY
from peerlora.config.loading import load_config
from peerlora.experiments.comparison import Comparison
from peerlora.experiments.grid import load_grid
from peerlora.experiments.presets import TASKS
from peerlora.experiments.runner import Callbacks, resume_grid, start_grid
from peerlora.runs.resume import run_facts

Tree = dict[str, Any]
PLACE, RESULTS, PAGES = Path(".bench/studies"), Path("bench/results"), Path("docs/results")
SEEDS = [0, 1, 2]
RATES = [2e-3, 5e-3]
ROUNDS, PAIR_ROUNDS = 24, 40
"""On text pairs more: QNLI does not leave chance before round 30 (docs/log.md)."""
LORA_METHODS = (
    "local", "dec-lora", "adf-lora", "tad-lora", "rolora", "ffa-lora", "fedit", "fedsa-lora", "decaf", "flexlora",
    "hetlora", "fedrot-lora", "lora-fair", "rac-lora", "flora", "fedex-lora", "fedhl",
)  # fmt: skip
ALONE = "alone, prior-adjusted"
"""What gossip is to be judged by; it is the same on every graph."""
FACTOR_METHODS = ("dec-lora", "ffa-lora", "rolora", "adf-lora", "tad-lora")


def page(study: str) -> Path:
    """Where a study's table goes."""
    others = {"dtype": "speed-and-memory.md"} | dict.fromkeys(PAIRS, "text-pairs.md")
    others |= {study: f"{study.split('-')[0]}.md" for study in study_grids.STUDIES}
    return PAGES / others.get(study, "lora-methods.md")


def task(name: str, data: Path) -> Tree:
    folder, text, labels, partition = TASKS[name]
    rows = {
        "train": f"parquet:{data / folder / 'train.parquet'}",
        "eval": f"parquet:{data / folder / 'validation.parquet'}",
        "text": text,
        "label": "label",
        "max_length": 64,
    }
    return {"data": rows, "task": {"labels": labels}, "partition": partition}


def base(rounds: int) -> Tree:
    """What the studies have in common; 40 rows a client and round."""
    return {
        "clients": 10,
        "adapter": {"rank": 8, "alpha": 16, "targets": ["query", "value"]},
        "topology": {"kind": "random", "p": 0.1},
        "train": {"rounds": rounds, "local_steps": 5, "batch": 8, "dtype": "bf16"},
        "eval": {"every": max(1, rounds // 2), "rows": 500},
        "checkpoint": {"every": rounds},
        "threads": 1,
    }


def search(rows_of: str) -> Tree:
    """Some 500 rows of every task are set aside, whatever its size."""
    shares = {"SST-2": 500 / 67349, "QNLI": 0.05, "QQP": 0.05, "MNLI": 0.05}
    return {"rates": RATES, "seeds": [0], "holdout": shares[rows_of]}


def methods(data: Path, rounds: int) -> Tree:
    """Every LoRA method on SST-2, meeting at random with p = 0.1."""
    return {
        "base": base(rounds) | task("SST-2", data),
        "axes": {"method": list(LORA_METHODS)},
        "seeds": SEEDS,
        "baseline": {"method": "dec-lora"},
        "search": search("SST-2"),
    }


def alone(rate: float | None = None) -> Tree:
    """Nobody exchanges anything, and the loss takes the client's own label shares into account."""
    train = {"label_prior": "uniform"} | ({} if rate is None else {"lr": rate})
    return {"algorithm": {"name": "local"}, "train": train}


def elsewhere(methods: Sequence[str], graphs: Sequence[Any], judge: bool = True) -> Callable[[Path, int], Tree]:
    """SST-2 on other graphs, with the rates that ``methods`` found; with ``judge`` also clients alone."""

    def grid(data: Path, rounds: int) -> Tree:
        rates = {row["labels"]["method"]: row["rate"] for row in read("methods")["rows"]}
        axis = {name: {"algorithm": {"name": name}, "train": {"lr": rates[name]}} for name in methods}
        if judge:  # its rate was searched on the same shards
            found = {row["system"]: row["rate"] for row in read("label-skew")["rows"]}
            axis |= {ALONE: alone(found[ALONE])}
        return {
            "base": base(rounds) | task("SST-2", data),
            "axes": {"method": axis, "topology": list(graphs)},
            "seeds": SEEDS,
            "baseline": {"method": "dec-lora"},
        }

    return grid


def drift(data: Path, rounds: int) -> Tree:
    """Methods that merge into the base, on a ring whose weights have no negative eigenvalue.

    What is merged is never mixed again, and differences grow along negative eigenvalues (docs/methods.md).  dec-lora
    shows what else these weights change.
    """
    ring = elsewhere(("dec-lora", "flora", "fedex-lora", "rac-lora"), [{"kind": "ring", "weights": "laplacian"}], False)
    tree = ring(data, rounds)
    found = tree["axes"]["method"]["rac-lora"]
    tree["axes"]["method"]["rac-lora, mix_merged"] = found | {"algorithm": {"name": "rac-lora", "mix_merged": True}}
    return tree


def pairs(name: str, axis: Tree, chances: Sequence[float]) -> Callable[[Path, int], Tree]:
    """A task of text pairs, every loss prior-adjusted; 500 rows (501 of three labels) are evaluated, the same ones."""

    def grid(data: Path, rounds: int) -> Tree:
        common = base(rounds) | task(name, data)
        common["data"] |= {"eval_per_class": round(500 / len(common["task"]["labels"]))}
        common["topology"] = {"kind": "random", "p": chances[0]}
        common["eval"]["every"] = rounds
        common["train"]["label_prior"] = "uniform"
        return {
            "base": common,
            "axes": {"method": axis, "topology": [{"kind": "random", "p": p} for p in chances]},
            "seeds": SEEDS,
            "baseline": {"method": next(iter(axis))},
            "search": search(name),
        }

    return grid


def dtype(data: Path, rounds: int) -> Tree:
    """Whether the other studies may use bf16: the same runs in both."""
    grid = {
        "base": base(rounds) | task("SST-2", data),
        "axes": {"method": ["dec-lora", "adf-lora"], "train.dtype": ["fp32", "bf16"]},
        "seeds": SEEDS,
        "baseline": {"train.dtype": "fp32"},
    }
    del grid["base"]["train"]["dtype"]
    grid["base"]["train"]["lr"] = 5e-3
    return grid


GOSSIPED = {name: {"algorithm": {"name": name}} for name in FACTOR_METHODS}
PAIRS: dict[str, Callable[[Path, int], Tree]] = {
    "qnli": pairs("QNLI", GOSSIPED, (0.1, 0.02)),
    "qnli-alone": pairs("QNLI", {ALONE: alone()}, (0.1,)),
    "mnli": pairs("MNLI", GOSSIPED, (0.1, 0.02)),
    "mnli-alone": pairs("MNLI", {ALONE: alone()}, (0.1,)),
    "qqp": pairs("QQP", GOSSIPED | {ALONE: alone()}, (0.1,)),
}
STUDIES: dict[str, Callable[[Path, int], Tree]] = {
    "methods": methods,
    "ring": elsewhere(LORA_METHODS, ["ring"], judge=False),
    "sparsity": elsewhere(FACTOR_METHODS, [{"kind": "random", "p": p} for p in (0.5, 0.02)]),
    "drift": drift,
    "dtype": dtype,
    **PAIRS,
}


def read(study: str) -> Tree:
    return json.loads((RESULTS / f"study-{study}.json").read_text())


def run(study: str, tree: Tree, outcomes: OutcomeLines | None = None) -> Comparison:
    """Start the grid, or go on with it; with ``outcomes`` what is finished is known by these alone."""
    folder = PLACE / study

    @contextmanager
    def watch(status):
        print(f"{study}: cell {status.number} of {status.trials}, {status.trial}", flush=True)
        yield lambda event: None

    callbacks = Callbacks(watch, outcomes=outcomes)
    if outcomes is not None:
        shutil.rmtree(folder, ignore_errors=True)
    elif (folder / "grid.yaml").is_file():
        return resume_grid(folder, lambda stored: load_grid(tree), callbacks)
    return start_grid(load_grid(tree), folder, callbacks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*study_grids.STUDIES, *STUDIES])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, on text pairs {PAIR_ROUNDS}, where it is not given")
    options = parser.parse_args()
    study, data = options.study, options.data
    assert set(LORA_METHODS) <= REGISTRY.keys()
    if study in study_grids.STUDIES:
        tree = study_grids.STUDIES[study](data)
    else:
        tree = STUDIES[study](data, options.rounds or (PAIR_ROUNDS if study in PAIRS else ROUNDS))
    result = run(study, tree, OutcomeLines(study, data) if study in study_grids.STUDIES else None)
    found = result.as_json()
    written = {"date": str(date.today()), "facts": run_facts(load_config(tree["base"]))}
    written |= {"grid": without_folder(tree, data), "rows": found["rows"]}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"study-{study}.json").write_text(json.dumps(written, indent=1) + "\n")
    insert(page(study), f"study-{study}", (result.folder / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
