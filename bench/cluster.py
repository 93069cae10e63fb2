"""What a cluster on this machine costs and gains: ratios from interleaved runs of one process and two workers.

    python bench/cluster.py --repeats 3 --out bench/results/cluster.json

Needs Ray and two quiet cores, for twenty minutes; each part is written when it is done, and docs/cluster.md has a table
of all of them.  Rates are of rounds, start and end of a run left out; MiniLM, batches of 8, 32 tokens.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from markers import insert
from peerlora import load_config, read_events, simulate
from peerlora.config.cluster import ClusterConfig
from peerlora.experiments.grid import load_grid
from peerlora.experiments.runner import Callbacks, start_grid
from peerlora.experiments.trial_pool import trial_pools
from peerlora.runs.events import RoundDone
from peerlora.runtime.cluster.placement import Placement, place
from peerlora.runtime.cluster.ray_engine import RayEngine, RayGroup
from peerlora.runtime.cluster.rows import SwappedRows
from peerlora.runtime.cluster.worker import BlockWorker
from peerlora.topology.graphs import ring

PAGE = Path("docs/cluster.md")
TWO = ClusterConfig(workers=2)
WORDS = [
    "data.max_length=32",
    "partition.kind=iid",
    "topology.kind=ring",
    "algorithm.name=dec-lora",
    "clients=40",
    "train.batch=8",
    "train.local_steps=5",
    "eval.rows=2",
    "data.eval_per_class=1",
    "eval.every=100",
]


def rate(words: list[str], cluster: ClusterConfig | None) -> float:
    """Rounds a second of training and exchange, waiting for the slower worker included; the first round is left out."""
    with tempfile.TemporaryDirectory() as folder:
        simulate(load_config(None, words), Path(folder) / "run", cluster=cluster, report=False)
        rounds = [event for event in read_events(Path(folder) / "run") if isinstance(event, RoundDone)][1:]
    return len(rounds) / sum(event.seconds_train + event.seconds_mix for event in rounds)


def training(repeats: int, rounds: int) -> dict:
    """Two workers of one thread against one process of two threads."""
    words = [*WORDS, f"train.rounds={rounds}"]
    pairs = [(rate([*words, "threads=2"], None), rate(words, TWO)) for _ in range(repeats)]
    return {"one process": [one for one, _ in pairs], "two workers": [two for _, two in pairs], **ratio(pairs)}


def comparing(repeats: int) -> dict:
    """Twelve small cells on two workers of one thread against one process of one thread."""
    grid = load_grid(
        {
            "base": {
                "clients": 4,
                "threads": 1,
                "data": {"max_length": 32, "eval_per_class": 10},
                "train": {"rounds": 4, "local_steps": 4},
            },
            "axes": {"algorithm.name": ["dec-lora", "fedsa-lora", "ffa-lora", "rolora"]},
        }
    )
    pairs = []
    for _ in range(repeats):
        seconds = []
        for cluster in (None, TWO):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                if cluster is None:
                    start_grid(grid, Path(folder) / "out", Callbacks(silent))
                else:
                    with trial_pools(cluster, print) as pool:
                        start_grid(grid, Path(folder) / "out", Callbacks(silent, pool=pool))
                seconds.append(time.perf_counter() - began)
        pairs.append((1 / seconds[0], 1 / seconds[1]))
    return {"seconds": [[1 / one, 1 / two] for one, two in pairs], **ratio(pairs)}


@contextmanager
def silent(status):
    yield lambda event: None


def ratio(pairs: list[tuple[float, float]]) -> dict:
    found = [two / one for one, two in pairs]
    return {"ratio": statistics.median(found), "least": min(found), "most": max(found)}


class RowsWorker(BlockWorker):
    """Swaps random rows, without data and model."""

    def swap(self, placement: Placement, nodes: int, scalars: int, dense: bool, times: int) -> float:
        """Seconds of an exchange, the first one left out."""
        assert self.send is not None
        rows = SwappedRows(self.index, placement, nodes, self.inbox, self.send, 120.0)
        own = torch.ones(len(placement.blocks[self.index]), scalars)
        for number in range(times + 1):
            if number == 1:
                began = time.perf_counter()
            rows.all_rows(own) if dense else rows.rows_for(own, ring(placement.clients))
        return (time.perf_counter() - began) / times


def exchange_seconds(clients: int, scalars: int, times: int) -> dict:
    """Seconds of a round's exchange of two workers: of a ring, and of a graph that needs all rows."""
    placement = place([range(client, client + 1) for client in range(clients)], 2, ring(clients))
    found = {}
    with RayEngine(TWO, 4 * clients * scalars * 4) as engine:
        group = RayGroup(engine.ray, 2, TWO, RowsWorker)
        for name, dense in (("ring", False), ("all rows", True)):
            found[name] = max(group.call("swap", placement, group.nodes, scalars, dense, times))
            group.close()
            group = RayGroup(engine.ray, 2, TWO, RowsWorker)
        group.close()
    return {"clients": clients, "bytes per client": 4 * scalars, "seconds": found}


def start_seconds(repeats: int) -> list[float]:
    """Seconds until two workers of a cluster that is started here answer."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        with RayEngine(TWO, 0) as engine:
            group = engine.start(2, TWO)
            found.append(time.perf_counter() - began)
            group.close()
    return found


def table(found: dict) -> str:
    """What was measured, and what was asked for."""
    lines = ["| on two cores | measured | asked |", "| --- | --- | --- |"]
    asked = {
        "training": ("rate of two workers of one thread, of one process with two threads", "at least 0.9"),
        "comparing": ("rate of a comparison on two workers, of one process of one thread", "at least 1.7"),
    }
    for part, (what, least) in asked.items():
        if part in found:
            ratios = found[part]
            spread = f"{ratios['ratio']:.2f} ({ratios['least']:.2f} to {ratios['most']:.2f})"
            lines.append(f"| {what} | {spread} | {least} |")
    if "exchange" in found:
        own = found["exchange"]
        seconds = ", ".join(f"{name} {value:.2f} s" for name, value in own["seconds"].items())
        what = f"exchange of {own['clients']:,} clients of {own['bytes per client'] / 1e6:g} MB between two workers"
        lines.append(f"| {what} | {seconds} | |")
    if "start" in found:
        lines.append(f"| start of two workers | {min(found['start']):.1f} to {max(found['start']):.1f} s | |")
    return "\n".join(lines)


def main() -> None:
    parts = {
        "training": lambda: training(arguments.repeats, arguments.rounds),
        "comparing": lambda: comparing(arguments.repeats),
        "exchange": lambda: exchange_seconds(1000, 75_000, times=5),
        "start": lambda: start_seconds(arguments.repeats),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--out", type=Path, default=Path("bench/results/cluster.json"))
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for part in arguments.parts:
        found[part] = parts[part]()
        print(json.dumps({part: found[part]}, indent=1), flush=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    insert(PAGE, "cluster-costs", table(found))


if __name__ == "__main__":
    main()
