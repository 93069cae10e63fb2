"""Peak memory and processor time of rounds of up to 10,000 clients: MiniLM, rank 4, one step of two rows.

    python bench/many_clients.py --clients 1000 10000 --topologies ring random-regular

Each run is a process of its own (the peak of a process never falls) of one thread, on texts of five random words.
Processor time, since the machine may be busy; the first round is left out.  10,000 clients take some 7 minutes.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from markers import insert

WORDS = [
    "data.text=[text]",
    "data.label=label",
    "data.max_length=8",
    "partition.kind=iid",
    "algorithm.name=dec-lora",
    "adapter.rank=4",
    "train.rounds=3",
    "train.local_steps=1",
    "train.batch=2",
    "eval.rows=2",
    "eval.every=100",
    "threads=1",
]
PAGE = Path("docs/results/speed-and-memory.md")


def write_rows(path: Path, count: int) -> Path:
    drawn, words = random.Random(0), "good bad fine dull great poor film plot cast scene slow sharp warm cold".split()
    rows = [{"text": " ".join(drawn.choices(words, k=5)), "label": drawn.choice(["pos", "neg"])} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(clients: int, topology: str) -> dict:
    from peerlora import load_config, simulate
    from peerlora.runs.events import RoundDone

    moments = []

    def sink(event):
        if isinstance(event, RoundDone):
            moments.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        train, held_out = (
            write_rows(Path(folder) / "train.jsonl", 2 * clients),
            write_rows(Path(folder) / "eval.jsonl", 4),
        )
        data = [f"data.train=jsonl:{train}", f"data.eval=jsonl:{held_out}"]
        config = load_config(None, [*WORDS, *data, f"clients={clients}", f"topology.kind={topology}"])
        simulate(config, Path(folder) / "run", sinks=[sink], report=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rounds = [later - earlier for earlier, later in pairwise(moments)]
    return {"clients": clients, "topology": topology, "peak_bytes": peak, "processor_seconds": rounds}


def table(rows: list[dict]) -> str:
    lines = [
        "| clients | topology | peak memory | processor seconds of a round, per 1,000 clients |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = sum(row["processor_seconds"]) / len(row["processor_seconds"]) / row["clients"] * 1000
        lines.append(f"| {row['clients']:,} | {row['topology']} | {row['peak_bytes'] / 1e9:.2f} GB | {seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--topologies", nargs="+", default=["ring", "random-regular"])
    parser.add_argument("--out", type=Path, default=Path("bench/results/many_clients.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(int(options.one[0]), options.one[1])))
        return
    rows = []
    for topology in options.topologies:
        for clients in options.clients:
            command = [sys.executable, __file__, "--one", str(clients), topology]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            rows.append(json.loads(told))
            print(rows[-1], flush=True)
    options.out.write_text(json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")
    insert(PAGE, "many-clients", table(rows))


if __name__ == "__main__":
    main()
