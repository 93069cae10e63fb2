"""Rounds until nodes agree, by the number of nodes, from the mixing alone; and seconds of a round of many nodes.

    python bench/consensus_time.py --nodes 100 1000 10000 100000 1000000
    python bench/consensus_time.py --nodes 1000000 --graphs ring        # anew, the others as they were measured

Nodes begin with independent normal numbers.  A round is ``x <- W x`` with Metropolis weights; no model is trained.  The
table and the figure of docs/results/consensus-time.md are made from what is measured.  A million nodes take 8 minutes,
and up to 23 GB, those of the exponential graph.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pydantic import TypeAdapter

from markers import insert
from peerlora.config.topology import TopologyConfig
from peerlora.topology.schedule import build_topology

LEFT = 0.1  # share of the disagreement norm at which rounds are counted
MOST = 3000  # rounds; a ring needs about 1,100 from independent numbers, however large it is
SCALARS = 4
GRAPHS = {
    "ring": {"kind": "ring"},
    "random 4-regular": {"kind": "random-regular", "degree": 4},
    "exponential": {"kind": "exponential"},
}
PAGE = Path("docs/results/consensus-time.md")
PICTURE = PAGE.with_suffix(".svg")


def rounds_to_agree(W, x: np.ndarray, left: float, most: int) -> int | None:
    """How many rounds ``x <- W x`` leave this share of the disagreement norm; None: not in ``most``."""
    started = np.linalg.norm(x - x.mean(axis=0))
    for done in range(most + 1):
        if np.linalg.norm(x - x.mean(axis=0)) <= left * started:
            return done
        x = W @ x
    return None


def consensus(nodes: int, graphs: Sequence[str]) -> list[dict]:
    found = []
    for name in graphs:
        topology = build_topology(TypeAdapter(TopologyConfig).validate_python(GRAPHS[name]), nodes, seed=0)
        began = time.process_time()
        rho = topology.rho()
        seconds_of_rho, began = time.process_time() - began, time.process_time()
        start = np.random.default_rng(0).standard_normal((nodes, SCALARS))
        rounds = rounds_to_agree(topology.at(0).W, start, LEFT, MOST)
        seconds = {"rho": seconds_of_rho, "rounds": time.process_time() - began}
        found.append({"graph": name, "nodes": nodes, "rounds": rounds, "gap": 1 - rho, "processor_seconds": seconds})
        print(f"{name:>18} {nodes:>9,} nodes: {rounds} rounds, 1 - rho = {1 - rho:.3g}, {seconds}", flush=True)
    return found


def mixing(nodes: int, scalars: int, columns: int) -> dict:
    """One round of all scalars in fp32, a strip of columns at a time: two strips are in memory."""
    settings = TypeAdapter(TopologyConfig).validate_python(GRAPHS["random 4-regular"])
    W = build_topology(settings, nodes, seed=0).at(0).W.astype(np.float32)
    strip = np.random.default_rng(0).standard_normal((nodes, columns), dtype=np.float32)
    began = time.process_time()
    for _ in range(0, scalars, columns):
        _ = W @ strip
    return {"nodes": nodes, "scalars": scalars, "processor_seconds": time.process_time() - began}


def table(found: dict) -> str:
    sizes = sorted({each["nodes"] for each in found["consensus"]})
    lines = ["| graph | " + " | ".join(f"{nodes:,} nodes" for nodes in sizes) + " |", "| --- |" + " --- |" * len(sizes)]
    for name in GRAPHS:
        own = {each["nodes"]: each for each in found["consensus"] if each["graph"] == name}
        cells = [f"{own[nodes]['rounds'] or f'> {MOST}'} ({own[nodes]['gap']:.2g})" for nodes in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    mixed = found["mixing"]
    lines += [
        "",
        f"One round of {mixed['nodes']:,} nodes x {mixed['scalars']:,} scalars on the 4-regular graph takes "
        f"{mixed['processor_seconds']:.1f} seconds of one core.",
    ]
    return "\n".join(lines)


def draw(found: dict) -> None:
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for name in GRAPHS:
        own = [each for each in found["consensus"] if each["graph"] == name and each["rounds"] is not None]
        axes.loglog([each["nodes"] for each in own], [each["rounds"] for each in own], marker="o", label=name)
    axes.set_xlabel("nodes")
    axes.set_ylabel(f"rounds until {LEFT:.0%} is left")
    axes.legend(frameon=False)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--mixing", type=int, nargs=2, metavar=("NODES", "SCALARS"), default=[100_000, 10_000])
    parser.add_argument("--out", type=Path, default=Path("bench/results/consensus_time.json"))
    arguments = parser.parse_args()
    before = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"consensus": []}
    new = [each for nodes in arguments.nodes for each in consensus(nodes, arguments.graphs)]
    measured = {(each["nodes"], each["graph"]): each for each in [*before["consensus"], *new]}
    found: dict = {"left": LEFT, "consensus": [measured[key] for key in sorted(measured)]}
    found["mixing"] = mixing(*arguments.mixing, columns=200)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"mixing: {found['mixing']}")
    insert(PAGE, "consensus-time", table(found))
    draw(found)


if __name__ == "__main__":
    main()
