"""What the graph changes: the same clients, shards and seeds on a ring, a complete and a random graph.

    python examples/compare_topologies.py MODEL ROWS OUT [key=value ...]

Arguments as in own_data.py; OUT gets one run folder per topology.
"""

import sys
from pathlib import Path

from peerlora import build_topology, load_config, simulate
from peerlora.runtime.resources import load_resources

TOPOLOGIES = {
    "ring": {"kind": "ring"},
    "complete": {"kind": "complete"},
    "random": {"kind": "random", "p": 0.3},
}


def main(model: str, rows: str, out: str, *words: str):
    settings = {
        "model": {"source": model},
        "data": {"train": rows, "eval": None, "text": ["text"], "label": "label"},
        "partition": {"kind": "dirichlet", "concentration": 0.5},
        "clients": 8,
        "algorithm": {"name": "dec-lora"},
        "train": {"rounds": 30, "local_steps": 5, "batch": 8},
    }
    configs = {name: load_config(settings | {"topology": chosen}, words) for name, chosen in TOPOLOGIES.items()}
    resources = load_resources(configs["ring"])  # read and tokenise once
    print(f"{'topology':10} {'rho':>6} {'mean':>6} {'worst':>6} {'consensus':>10} {'MB sent':>8}")
    for name, config in configs.items():
        summary = simulate(config, Path(out) / name, resources=resources).summary
        rho = build_topology(config.topology, config.clients, config.seed).rho()
        reached, apart = summary["scores"], summary["consensus"]["product"]
        print(
            f"{name:10} {rho:6.3f} {reached['own_mean']:6.3f} {reached['own_min']:6.3f} "
            f"{apart:10.2e} {summary['bytes_sent'] / 1e6:8.2f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
