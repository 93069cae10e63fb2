"""What the prior-adjusted loss buys, alone and under gossip, and where it fails.

    python bench/study_label_prior.py --data FOLDER --out bench/results/label_prior.json

FOLDER holds glue/sst2 and extra/ag_news, each with train.parquet and validation.parquet.  The learning rate of every
method and prior is chosen from one grid with one seed on training rows that are set aside, for SST-2 at p = 0.1 and for
AG News at concentration 0.1; a pooled target takes the rate of the uniform one.  ``--only WORD`` runs the parts whose
name holds a word.  Finished cells are kept in the output file, so that the study can be stopped and gone on with.  At
the end the tables are written between the markers ``label-prior`` of docs/results/label-prior.md.

Parts: ``sst2 p`` over gossip and none; ``sst2 skew`` over the skew; ``sst2 absent`` where six clients hold one label
only; ``sst2 shifted`` where the network's own proportions are 70/30; ``agnews`` on four labels; ``sst2 24,000 rows``
with 2.5 times the rounds.  Every cell also has the recall of each label, from which the table takes the accuracy on
rows in the network's own proportions, and the expected calibration error.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np

from calibration import calibration_error, recalls
from markers import insert
from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.runs.resume import run_facts
from peerlora.runs.store import RunStore
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import build_trainer
from study_sst2 import run_cells, spread

METHODS = {
    "local": "algorithm.name=local",
    "dec-lora": "algorithm.name=dec-lora",
    "adf-lora": "algorithm.name=adf-lora",
}
RATES = (2e-3, 5e-3)
SEEDS = (0, 1, 2)
GOSSIP = (0.5, 0.1, 0.02)


def sst2(shares: list[list[float]], counts: list[int], p: float = 0.1) -> dict:
    return {
        "place": "glue/sst2",
        "data": {"text": ["sentence"]},
        "labels": ["negative", "positive"],
        "partition": {"kind": "shares", "shares": shares, "counts": counts},
        "p": p,
    }


def agnews(concentration: float) -> dict:
    return {
        "place": "extra/ag_news",
        "data": {"text": ["text"], "max_length": 32},  # the headline and the first sentence
        "labels": ["world", "sports", "business", "technology"],
        "partition": {"kind": "dirichlet", "concentration": concentration},
        "p": 0.1,
    }


def skew(share: float) -> list[list[float]]:
    return [[share, 1 - share], [1 - share, share], [0.5, 0.5]]


PARTS: dict[str, dict] = {
    **{f"sst2 p={p:g}": sst2(skew(0.9), [3, 3, 4], p) for p in GOSSIP},
    **{f"sst2 skew={share:g}": sst2(skew(share), [3, 3, 4]) for share in (0.7, 0.99)},
    "sst2 absent": sst2(skew(1.0), [3, 3, 4]),
    "sst2 shifted": sst2(skew(0.9), [6, 1, 3]),
    **{f"agnews concentration={c:g}": agnews(c) for c in (0.1, 0.5)},
    **{f"sst2 24,000 rows p={p:g}": sst2(skew(0.9), [3, 3, 4], p) for p in (0.1, 0.02)},
}
LONG = {"sst2 24,000 rows p=0.1": ("local", "dec-lora"), "sst2 24,000 rows p=0.02": ("adf-lora",)}
"""Parts with 2.5 times the rounds, and their methods: at this budget a plain loop was measured before."""
UNEVEN = ("sst2 shifted", "agnews concentration=0.1", "agnews concentration=0.5")
"""Where the network's own proportions are not uniform, so that a pooled target is another one."""
SEARCHED = {"sst2": "sst2 p=0.1", "agnews": "agnews concentration=0.1"}


def cell_config(data: Path, name: str, method: str, prior: str, rate: float, seed: int, search: bool, rounds: int):
    part = PARTS[name]
    place = data / part["place"]
    tree = {
        "data": {
            "train": f"parquet:{place / 'train.parquet'}",
            "eval": None if search else f"parquet:{place / 'validation.parquet'}",
            "holdout": 0.005 if name.startswith("sst2") else 0.05,
            "label": "label",
            "max_length": 64,
            "eval_per_class": 400 // len(part["labels"]),
            **part["data"],
        },
        "task": {"labels": part["labels"]},
        "partition": part["partition"],
        "topology": {"kind": "random", "p": part["p"]},
        "train": {"rounds": rounds, "local_steps": 5, "batch": 8, "lr": rate, "label_prior": prior, "dtype": "bf16"},
        "eval": {"every": rounds},
        "checkpoint": {"every": rounds},
        "seed": seed,
        "threads": 1,
    }
    if name in LONG:
        tree["train"]["rounds"] = longer(rounds)
    return load_config(tree, [METHODS[method]])


def longer(rounds: int) -> int:
    """The rounds of the parts in ``LONG``."""
    return rounds * 5 // 2


def conditions(only: str) -> Iterator[tuple[str, str, str]]:
    """Part, method and prior; the long parts last.  Without gossip p makes no difference, and nothing can be pooled."""
    for name in PARTS:
        if only not in name:
            continue
        for method in LONG.get(name) or usual(name):
            yield from ((name, method, prior) for prior in ("none", "uniform"))
            if method != "local" and name in UNEVEN:
                yield name, method, "pooled"


def usual(name: str) -> list[str]:
    """The methods of a part: adf-lora only over p, clients alone at one p only."""
    over_p = [f"sst2 p={p:g}" for p in GOSSIP]
    left_out = {"adf-lora"} if name not in over_p else set() if name == SEARCHED["sst2"] else {"local"}
    return [method for method in METHODS if method not in left_out]


def run_cell(config: RunConfig) -> dict:
    federation = compose(config)
    with tempfile.TemporaryDirectory() as folder:
        with RunStore.create(Path(folder) / "run", config.to_yaml(), run_facts(config)) as store:
            result = build_trainer(federation, store).run()
        summary, adapters = result.summary, result.adapters
    labels, pooled = federation.eval_data.labels, federation.partition.counts.sum(0)
    own = federation.learner.logits(adapters, federation.eval_data, config.eval.batch)
    found = np.array([recalls(logits, labels) for logits in own])
    return {name: summary[name] for name in ("accuracy", "consensus", "bytes_sent", "seconds", "metric")} | {
        "recalls": found.tolist(),
        "pooled": pooled.tolist(),
        "shifted": (found @ (pooled / pooled.sum())).tolist(),
        "calibration_error": [calibration_error(logits, labels) for logits in own],
    }


def searched(name: str) -> str:
    return next(part for start, part in SEARCHED.items() if name.startswith(start))


def key(kind: str, *words: object) -> str:
    return "|".join(map(str, (kind, *words)))


def best_rate(cells: dict, name: str, method: str, prior: str) -> float:
    where, prior = searched(name), "uniform" if prior == "pooled" else prior
    return max(RATES, key=lambda rate: cells[key("search", where, method, prior, rate)]["accuracy"]["own_mean"])


def run_study(data: Path, path: Path, rounds: int, workers: int, only: str) -> None:
    cells = json.loads(path.read_text())["cells"] if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = list(conditions(only))
    choices = {(searched(name), method, prior) for name, method, prior in wanted if prior != "pooled"}
    search = {
        key("search", *choice, rate): cell_config(data, *choice, rate, 0, True, rounds)
        for choice in sorted(choices)
        for rate in RATES
    }
    run_cells(cells, path, search, workers, run_cell)
    final = {
        key("final", *choice, seed): cell_config(data, *choice, best_rate(cells, *choice), seed, False, rounds)
        for seed in SEEDS
        for choice in wanted
    }
    run_cells(cells, path, final, workers, run_cell)


def render(path: Path, rounds: int) -> str:
    """One table per part that has two seeds or more: mean over its finished seeds and (standard deviation)."""
    study = json.loads(path.read_text())
    cells, lines = study["cells"], []
    for name in PARTS:
        rows = [row for row in conditions("") if row[0] == name]
        seeds = [seed for seed in SEEDS if all(key("final", *row, seed) in cells for row in rows)]
        if len(seeds) > 1:
            told = f"**{name}**" + ("" if len(seeds) == len(SEEDS) else f" (so far of {len(seeds)} seeds)")
            lines += [told, "", *TABLE, *(table_row(cells, *row, seeds=seeds) for row in rows), ""]
    train, torch = study["config"]["train"], study["facts"]["versions"]["torch"]
    lines.append(
        f"Budget: {rounds} rounds ({longer(rounds)} where the name says 24,000 rows) x {train['local_steps']} steps x "
        f"{train['batch']} rows x 10 clients; seeds {SEEDS}; rates searched: {RATES}; torch {torch}, {date.today()}."
    )
    return "\n".join(lines) + "\n"


TABLE = (
    "| method | label prior | rate | mean client | worst client | averaged | in the network's proportions | ECE |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def table_row(cells: dict, name: str, method: str, prior: str, seeds: Sequence[int]) -> str:
    runs = [cells[key("final", name, method, prior, seed)] for seed in seeds]
    found = [spread([run["accuracy"][what] for run in runs]) for what in ("own_mean", "own_min", "averaged")]
    found += [spread([float(np.mean(run[what])) for run in runs]) for what in ("shifted", "calibration_error")]
    return f"| {method} | {prior} | {best_rate(cells, name, method, prior):g} | {' | '.join(found)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("bench/results/label_prior.json"))
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--only", default="", help="parts whose name holds this")
    options = parser.parse_args()
    run_study(options.data, options.out, options.rounds, options.workers, options.only)
    text = render(options.out, options.rounds)
    insert(Path("docs/results/label-prior.md"), "label-prior", text)
    print(text)
