"""What the stacked client axis saves flow policies: a round of all clients together, against one by one.

    python bench/flow_speed.py --clients 4 10 30 --batches 16 64

The loop has one learner per client, which acts, remembers and trains alone, by the same code.  Both do the same rounds
in turns, and what counts is the processor's time, since machines are busy; a ratio is that of the medians.  The table
goes to bench/results and between the markers ``flow-speed`` of docs/results/speed-and-memory.md.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from markers import insert
from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.experiments.markdown import markdown_table
from peerlora.runtime.compose import compose
from peerlora.runtime.policy import load_policy
from peerlora.train.base import LocalPlan

TREE = {
    "task": {"kind": "flow-policy", "env": "point-mass"},
    "algorithm": "swfp",
    "topology": "ring",
    "online": {"critic_rounds": 0},
    "threads": 1,
}


def measure(config: RunConfig, repeats: int) -> dict:
    """Seconds of processor time of a round's local work, together and one by one, and their ratio."""
    torch.set_num_threads(config.threads or 1)
    resources = load_policy(config)
    together = [compose(config, resources=resources)]
    alone = [compose(config, resources=resources, clients=[client]) for client in range(config.clients)]
    seconds: dict[str, list[float]] = {"together": [], "one by one": []}
    for repeat in range(repeats + 1):
        for name, federations in (("together", together), ("one by one", alone))[:: 1 if repeat % 2 else -1]:
            began = time.process_time()
            for federation in federations:
                with federation.learner.round(repeat):
                    federation.learner.fit(federation.start, LocalPlan("AB", turn=repeat))
            if repeat:  # the first warms up
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    return {
        "clients": config.clients,
        "batch": config.train.batch,
        "repeats": repeats,
        "seconds": medians,
        "ratio": medians["one by one"] / medians["together"],
    }


def table(found: list[dict]) -> str:
    """One line per number of clients and batch."""
    lines = [
        [
            str(each["clients"]),
            str(each["batch"]),
            *(f"{1e3 * each['seconds'][name]:.0f} ms" for name in ("together", "one by one")),
            f"{each['ratio']:.1f}",
        ]
        for each in found
    ]
    return markdown_table(["clients", "batch", "together", "one by one", "ratio"], lines)


def main() -> None:
    """Measure every number of clients at every batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 10, 30])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("words", nargs="*", help="settings to change, such as online.episodes=8; then nothing is kept")
    given = parser.parse_args()
    found = []
    for clients in given.clients:
        for batch in given.batches:
            tree = TREE | {"clients": clients, "train": {"batch": batch}}
            found.append(measure(load_config(tree, given.words), given.repeats))
            print(found[-1], flush=True)
    print(table(found))
    if not given.words:
        Path("bench/results/flow_speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        insert(Path("docs/results/speed-and-memory.md"), "flow-speed", table(found))


if __name__ == "__main__":
    main()
