"""Rounds until nodes agree, by the number of nodes, from the mixing alone; and seconds of a round of many nodes.

    python bench/consensus_time.py --nodes 100 1000 10000 100000 1000000 --out bench/results/consensus_time.json

Nodes begin with independent normal numbers.  A round is ``x <- W x`` with Metropolis weights; no model is trained.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np

from peerlora.topology.sparse import (
    random_regular_links,
    ring_links,
    rounds_to_agree,
    sparse_metropolis,
    sparse_rho,
    torus_links,
)

LEFT = 0.1  # share of the disagreement norm at which rounds are counted
MOST = 3000  # rounds; a ring needs about 2,000 from independent numbers, however large it is
SCALARS = 4
RHO_NODES = 1100  # beyond, the eigenvalues of a ring lie too close together for Lanczos


def graphs(nodes: int) -> dict:
    side = round(math.sqrt(nodes))
    return {
        "ring": (ring_links(nodes), nodes),
        "torus": (torus_links(side), side * side),
        "random 4-regular": (random_regular_links(nodes, 4, np.random.default_rng(nodes)), nodes),
        "random 8-regular": (random_regular_links(nodes, 8, np.random.default_rng(nodes)), nodes),
    }


def consensus(nodes: int) -> list[dict]:
    found = []
    for name, (links, count) in graphs(nodes).items():
        W = sparse_metropolis(links, count)
        start = np.random.default_rng(0).standard_normal((count, SCALARS))
        began = time.perf_counter()
        rounds, _ = rounds_to_agree(W, start, LEFT, MOST)
        seconds = time.perf_counter() - began
        rho = sparse_rho(W) if count <= RHO_NODES else None
        found.append({"graph": name, "nodes": count, "rounds": rounds, "rho": rho, "seconds": seconds})
    return found


def mixing(nodes: int, scalars: int, columns: int) -> dict:
    """One round of all scalars in fp32, a strip of columns at a time: two strips are in memory."""
    W = sparse_metropolis(random_regular_links(nodes, 4, np.random.default_rng(0)), nodes).astype(np.float32)
    strip = np.random.default_rng(0).standard_normal((nodes, columns), dtype=np.float32)
    began = time.perf_counter()
    for _ in range(0, scalars, columns):
        W @ strip
    return {"nodes": nodes, "scalars": scalars, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--mixing", type=int, nargs=2, metavar=("NODES", "SCALARS"), default=[100_000, 10_000])
    parser.add_argument("--out", type=Path, default=Path("bench/results/consensus_time.json"))
    arguments = parser.parse_args()
    found = {"left": LEFT, "consensus": [each for nodes in arguments.nodes for each in consensus(nodes)]}
    found["mixing"] = mixing(*arguments.mixing, columns=200)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    for each in found["consensus"]:
        print(f"{each['graph']:>18} {each['nodes']:>9,} nodes: {each['rounds']} rounds, rho {each['rho']}")
    print(f"mixing: {found['mixing']}")


if __name__ == "__main__":
    main()
