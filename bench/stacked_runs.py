"""Would runs that differ only in their seed train faster in one graph than one after another?

    python bench/stacked_runs.py

Three runs of ten clients against one of thirty, CPU time of the local steps and the mixing, one thread, in turns.  What
a run spends beside these (evaluation above all) gains nothing, since it is stacked over clients as it is.  The table
goes between the markers ``stacked-runs`` of docs/results/speed-and-memory.md.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

from markers import insert
from speed import VARIANTS, Shape, Stacked, federation, machine

RUNS, CLIENTS, STEPS = 3, 10, 2
SHAPES = [(2, 16), (4, 32), (8, 32)]


def measure(repetitions: int) -> list[dict]:
    """One row per shape and number format: the ratio of each turn."""
    torch.set_num_threads(1)
    cells = [(batch, tokens, variant) for batch, tokens in SHAPES for variant in ("fp32", "bf16")]
    works = {
        (*cell, clients): Stacked(federation(Shape(clients, *cell[:2], steps=STEPS), VARIANTS[cell[2]].words))
        for cell in cells
        for clients in (CLIENTS, RUNS * CLIENTS)
    }
    spent = {key: [] for key in works}
    for t in range(repetitions + 1):
        for key, work in works.items():
            began = time.process_time()
            work.round(t)
            if t:  # the first warms up
                spent[key].append(time.process_time() - began)
    rows = []
    for cell in cells:
        turns = zip(spent[*cell, CLIENTS], spent[*cell, RUNS * CLIENTS], strict=True)
        gains = [RUNS * alone / together for alone, together in turns]
        rows.append({"batch": cell[0], "tokens": cell[1], "variant": cell[2], "gains": gains})
    return rows


def render(rows: list[dict]) -> str:
    """For docs/results/speed-and-memory.md."""
    lines = ["| rows a step | tokens a row | base | gain (range) |", "| --- | --- | --- | --- |"]
    for row in rows:
        gains = row["gains"]
        told = f"{median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
        lines.append(f"| {row['batch']} | {row['tokens']} | {row['variant']} | {told} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bench/results/stacked_runs.json"))
    options = parser.parse_args()
    found = {"machine": machine(), "runs": RUNS, "clients": CLIENTS, "rows": measure(options.repetitions)}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    insert(Path("docs/results/speed-and-memory.md"), "stacked-runs", render(found["rows"]))
    print(render(found["rows"]))
