"""Peak memory and seconds per round for many clients on MiniLM, rank 8.

    python bench/memory.py --clients 250 500 1000 --out bench/results/memory.json

Each size runs in a process of its own (the peak of a process never falls), one round of one step of two rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from markers import insert

WORDS = [
    "data.max_length=32",
    "partition.kind=iid",
    "topology.kind=ring",
    "algorithm.name=dec-lora",
    "train.rounds=2",
    "train.local_steps=1",
    "train.batch=2",
    "eval.rows=2",
    "data.eval_per_class=1",
    "eval.every=2",
]


def one(clients: int) -> dict:
    from peerlora import load_config, read_events, simulate
    from peerlora.runs.metrics import summarise

    with tempfile.TemporaryDirectory() as folder:
        result = simulate(load_config(None, [*WORDS, f"clients={clients}"]), Path(folder) / "run")
        seconds = summarise(read_events(result.run))["seconds"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rounds = result.summary["rounds"]
    per_round = {name: seconds[name] / rounds for name in ("train", "mix", "diagnostics")}
    return {"clients": clients, "peak_bytes": peak, "seconds_per_round": per_round}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--out", type=Path, default=Path("bench/results/memory.json"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    rows = []
    for clients in options.clients:
        command = [sys.executable, __file__, "--one", str(clients)]
        rows.append(
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        )
        print(f"{clients} clients: {rows[-1]['peak_bytes'] / 1e9:.2f} GB, {rows[-1]['seconds_per_round']}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")
    insert(Path("docs/results/speed-and-memory.md"), "memory", table(rows))


def table(rows: list[dict]) -> str:
    lines = ["| clients | peak memory | mixing, seconds a round |", "| --- | --- | --- |"]
    for row in rows:
        peak, mix = row["peak_bytes"] / 1e9, row["seconds_per_round"]["mix"]
        lines.append(f"| {row['clients']} | {peak:.2f} GB | {mix:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
