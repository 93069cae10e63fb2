"""What the stacked client axis saves flow policies: seconds of a round of all clients together, against one by one.

    python bench/flow_speed.py --clients 10 --out bench/results/flow_speed.json

The loop has one learner per client, which acts, remembers and trains alone, by the same code.  Both do the same rounds
in turns, so that a busy machine slows both; a ratio is that of the medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
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
    """Seconds of a round's local work, together and one by one, and their ratio."""
    torch.set_num_threads(config.threads or 1)
    resources = load_policy(config)
    together = [compose(config, resources=resources)]
    alone = [compose(config, resources=resources, clients=[client]) for client in range(config.clients)]
    seconds: dict[str, list[float]] = {"together": [], "one by one": []}
    for repeat in range(repeats + 1):
        for name, federations in (("together", together), ("one by one", alone))[:: 1 if repeat % 2 else -1]:
            began = time.perf_counter()
            for federation in federations:
                with federation.learner.round(repeat):
                    federation.learner.fit(federation.start, LocalPlan("AB", turn=repeat))
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    return {
        "clients": config.clients,
        "repeats": repeats,
        "seconds": medians,
        "ratio": medians["one by one"] / medians["together"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 10, 30])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("words", nargs="*", help="settings to change, such as online.episodes=8")
    given = parser.parse_args()
    found = [measure(load_config(TREE | {"clients": clients}, given.words), given.repeats) for clients in given.clients]
    for each in found:
        print(f"{each['clients']} clients: {each['ratio']:.1f} times as fast together", each["seconds"])
    if given.out:
        given.out.write_text(json.dumps({"settings": given.words, "found": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
