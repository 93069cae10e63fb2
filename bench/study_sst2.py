"""The first study: what gossip buys on SST-2 with skewed labels, and how ADF-LoRA compares with Dec-LoRA.

    python bench/study_sst2.py --data FOLDER --out bench/results/sst2.json

FOLDER holds SST-2's train.parquet and validation.parquet.  Each method's learning rate is chosen from one grid, with
one seed and the full budget, on training rows that are set aside (never on the reported split).  Finished cells are
kept in the output file, so that the study can be stopped and gone on with.  At the end the table is written between
the markers ``sst2`` of docs/results/sst2.md.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path

from markers import insert
from peerlora.config.loading import load_config
from peerlora.experiments.demo import pool_clients
from peerlora.runs.resume import run_facts
from peerlora.runtime.simulate import simulate

METHODS = {
    "local": ["algorithm.name=local"],
    "dec-lora": ["algorithm.name=dec-lora"],
    "adf-lora, T = 1": ["algorithm.name=adf-lora", "algorithm.interval=1"],
    "adf-lora, T = 5": ["algorithm.name=adf-lora", "algorithm.interval=5"],
    "all data in one place": ["algorithm.name=local"],
}
RATES = (1e-3, 2e-3, 5e-3)
SEEDS = (0, 1, 2)


def cell_config(data: Path, method: str, rate: float, seed: int, search: bool, rounds: int):
    tree = {
        "data": {
            "train": f"parquet:{data / 'train.parquet'}",
            "eval": None if search else f"parquet:{data / 'validation.parquet'}",
            "holdout": 0.005,
            "text": ["sentence"],
            "label": "label",
            "max_length": 64,
        },
        "task": {"labels": ["negative", "positive"]},
        "partition": {"kind": "shares", "shares": [[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]], "counts": [3, 3, 4]},
        "topology": {"kind": "random", "p": 0.1},
        "train": {"rounds": rounds, "local_steps": 5, "batch": 8, "lr": rate},
        "eval": {"every": rounds},
        "checkpoint": {"every": rounds},
        "seed": seed,
        "threads": 1,
    }
    config = load_config(tree, METHODS[method])
    return pool_clients(config) if method == "all data in one place" else config


def run_cell(config) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(config, Path(folder) / "run").summary
    return {name: summary[name] for name in ("accuracy", "consensus", "bytes_sent", "seconds", "metric")}


def run_cells(cells: dict, path: Path, wanted: dict, workers: int, run=run_cell) -> None:
    """Fill in what is missing, one thread each, and write the file after every cell."""
    missing = {key: config for key, config in wanted.items() if key not in cells}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(run, config): key for key, config in missing.items()}
        for job in as_completed(jobs):
            key = jobs[job]
            cells[key] = job.result()
            config = wanted[key]
            study = {"facts": run_facts(config), "config": told(config), "cells": cells}
            path.write_text(json.dumps(study, indent=1) + "\n")
            print(key, cells[key]["accuracy"], f"{cells[key]['seconds']['total']:.0f} s", flush=True)


def told(config) -> dict:
    """The config without this machine's paths."""
    tree = config.model_dump(mode="json")
    for name in ("train", "eval"):
        tree["data"][name] = tree["data"][name] and Path(tree["data"][name]).name
    return tree


def run_study(data: Path, path: Path, rounds: int, workers: int) -> None:
    cells = json.loads(path.read_text())["cells"] if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    search = {
        f"search|{method}|{rate}|0": cell_config(data, method, rate, 0, True, rounds)
        for method in METHODS
        for rate in RATES
    }
    run_cells(cells, path, search, workers)
    final = {}
    for seed in SEEDS:
        for method in METHODS:
            rate = best_rate(cells, method)
            final[f"final|{method}|{rate}|{seed}"] = cell_config(data, method, rate, seed, False, rounds)
    run_cells(cells, path, final, workers)


def best_rate(cells: dict, method: str) -> float:
    return max(RATES, key=lambda rate: cells[f"search|{method}|{rate}|0"]["accuracy"]["own_mean"])


def render(path: Path) -> str:
    """The study's table in Markdown: mean over seeds and (standard deviation)."""
    study = json.loads(path.read_text())
    lines = [
        "| method | rate | mean client | worst client | averaged model | consensus of B·A | sent, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        rate = best_rate(study["cells"], method)
        runs = [study["cells"][f"final|{method}|{rate}|{seed}"] for seed in SEEDS]
        found = [spread([run["accuracy"][name] for run in runs]) for name in ("own_mean", "own_min", "averaged")]
        product = statistics.mean(run["consensus"]["product"] for run in runs)
        sent = statistics.mean(run["bytes_sent"] for run in runs) / 1e6
        lines.append(f"| {method} | {rate:g} | {' | '.join(found)} | {product:.3g} | {sent:.1f} |")
    facts = study["facts"]
    train = study["config"]["train"]
    lines.append(
        f"\nBudget: {train['rounds']} rounds x {train['local_steps']} steps; seeds {SEEDS}; rates searched: {RATES}; "
        f"torch {facts['versions']['torch']}, {facts['threads']} threads, {date.today()}."
    )
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("bench/results/sst2.json"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="cells at a time, one thread each")
    options = parser.parse_args()
    run_study(options.data, options.out, options.rounds, options.workers)
    insert(Path("docs/results/sst2.md"), "sst2", render(options.out))
    print(render(options.out))
