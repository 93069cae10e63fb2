"""What cutting a backward pass saves: seconds of a local step by depth, against the full pass, interleaved.

    python bench/salf_backward.py --out bench/results/salf_backward.json

MiniLM-L6, rank 8 on query and value, head trained, so L = 7 layers: the head and six blocks.  In every repetition each
depth takes the same local steps of the same rows, in an order that turns; a ratio is that of the medians.
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
from peerlora.lora.layer_order import depth_of
from peerlora.runtime.compose import compose
from peerlora.train.backward_depth import BackwardDepth
from peerlora.train.base import LocalPlan

WORDS = [
    "data.max_length=64",
    "partition.kind=iid",
    "algorithm.name=salf",
    "train.local_steps=1",
    "train.batch=16",
    "clients=4",
    "threads=1",
]


def measure(config: RunConfig, repeats: int) -> dict:
    """Seconds by forward pass and depth, and their ratios to the full depth."""
    torch.set_num_threads(config.threads or 1)
    found = {}
    for path in ("packed", "padded"):
        fast = config.train.model_copy(update={"fast": path == "packed"})
        federation = compose(config.model_copy(update={"train": fast}))
        learner, x = federation.learner, federation.start
        layers = depth_of(x.spec)
        ones = torch.ones(x.clients, layers, dtype=torch.float64)
        seconds: dict[int, list[float]] = {depth: [] for depth in range(1, layers + 1)}
        for repeat in range(repeats + 1):
            for turn in range(layers):
                depth = 1 + (repeat + turn) % layers
                with learner.round(repeat):
                    began = time.perf_counter()
                    learner.fit(x, LocalPlan("AB", depth=BackwardDepth(torch.full((x.clients,), depth), ones)))
                if repeat:  # the first warms up
                    seconds[depth].append(time.perf_counter() - began)
        medians = {depth: statistics.median(own) for depth, own in seconds.items()}
        found[path] = {"seconds": medians, "ratio": {d: own / medians[layers] for d, own in medians.items()}}
    return found


def render(found: dict) -> str:
    lines = ["| layers reached | packed, share of a full step | padded, share of a full step |", "| --- | --- | --- |"]
    for depth in found["packed"]["ratio"]:
        lines.append(f"| {depth} | {found['packed']['ratio'][depth]:.2f} | {found['padded']['ratio'][depth]:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/salf_backward.json"))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    found = json.loads(json.dumps(measure(load_config(None, WORDS), options.repeats)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    insert(Path("docs/results/speed-and-memory.md"), "salf-backward", render(found))
    print(render(found))
