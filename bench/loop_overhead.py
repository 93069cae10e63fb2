"""What taking part costs a training loop per optimiser step, outside exchanges: bare loop and joined loop, interleaved.

    python bench/loop_overhead.py [--method adf-lora] [--layers 48] [--steps 400] [--turns 5]

The loop has no forward pass: it sets gradients and steps, so that what is measured is not lost in a model's own time.
A method that corrects gradients, such as dfedadmm, does it in every step.
Prints microseconds of the loop's thread per step, which do not count when others compute: of the bare loop, of the
joined one, and their difference, as medians over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.transport.memory import MemoryNetwork
from peerlora.runtime.peer.join import JoinedPeer
from peerlora.runtime.peer.site import Site
from peerlora.runtime.peer.train import train_peer


class Layers(nn.Module):
    """As many linear layers as a model adapts."""

    def __init__(self, count: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(count))


def seconds_per_step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, after) -> float:
    """Of so many steps on gradients that are there."""
    for value in parameters:
        value.grad = torch.ones_like(value) if value.requires_grad else None
    began = time.thread_time()
    for _ in range(steps):
        optimizer.step()
        after()
    return (time.thread_time() - began) / steps


def measure(method: str, layers: int, steps: int, turns: int, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds per step of every turn: bare and joined."""
    torch.manual_seed(0)
    targets = [f"layers.{i}" for i in range(layers)]
    model = get_peft_model(Layers(layers), LoraConfig(r=8, target_modules=targets))
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    config = {
        "clients": 1,
        "topology": "complete",
        "algorithm": {"name": method},
        "peer": {"join": 1},
    }
    config["train"] = {"rounds": 2, "local_steps": steps * turns * 2}
    bare, joined = [], []
    with EventLoopThread() as thread:
        network = MemoryNetwork(["site-0"])

        def run(config, *, loop):
            return train_peer(
                config, Site(0, {0: "site-0"}, "run"), network.transport("site-0"), thread, folder, loop=loop
            )

        other = torch.optim.SGD(parameters, lr=0.0)
        with JoinedPeer(model, optimizer, config, run) as peer:
            for _ in range(turns):
                bare.append(seconds_per_step(other, parameters, steps, lambda: None))
                joined.append(seconds_per_step(optimizer, parameters, steps, peer.step))
        thread.call(network.close())
    return bare, joined


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="adf-lora")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bare, joined = measure(asked.method, asked.layers, asked.steps, asked.turns, Path(folder) / "run")
    pairs = [1e6 * (after - before) for before, after in zip(bare, joined, strict=True)]
    print(
        f"{asked.method}, {asked.layers} layers: bare {1e6 * statistics.median(bare):.0f} us a step, joined "
        f"{1e6 * statistics.median(joined):.0f} us, taking part {statistics.median(pairs):.0f} us "
        f"({min(pairs):.0f} to {max(pairs):.0f} in {asked.turns} turns)"
    )


if __name__ == "__main__":
    main()
