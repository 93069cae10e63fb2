"""A rank-one regression, Y = X a b^T without noise: RoLoRA solves it, FFA-LoRA cannot, since it never trains A.

python examples/rolora_toy.py FIGURE.svg
"""

import sys
from dataclasses import replace

import torch
from matplotlib.figure import Figure

from peerlora.algorithms import build_algorithm
from peerlora.config.loading import parse_spec
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import AdapterSpec, LayerSpec, initial_adapters
from peerlora.topology.schedule import build_topology

CLIENTS, ROWS, D_IN, D_OUT, ROUNDS, STEPS, RATE = 10, 40, 8, 5, 60, 5, 0.1


class Regression:  # every client's own rows, and a learner that takes plain gradient steps
    def __init__(self, generator):
        a, b = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (D_IN, D_OUT))
        self.X = torch.randn(CLIENTS, ROWS, D_IN, generator=generator, dtype=torch.float64)
        self.Y = (self.X @ (a / a.norm()))[..., None] * (b / b.norm())

    def fit(self, x, train):
        x = replace(x, flat=x.flat.clone())
        A, B = x.A["layer"], x.B["layer"]
        for _ in range(STEPS):
            slope = (self.X @ A.mT @ B.mT - self.Y).mT @ self.X * (2 / ROWS)  # of the loss, in the product B A
            A.sub_(RATE * B.mT @ slope) if train == "A" else B.sub_(RATE * slope @ A.mT)
        return x

    def loss(self, x):  # of every client's model on everybody's rows
        missed = self.X.flatten(0, 1) @ x.A["layer"].mT @ x.B["layer"].mT - self.Y.flatten(0, 1)
        return float(missed.square().sum(2).mean())


def main(figure: str):
    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.add_subplot(yscale="log", xlabel="round", ylabel="loss, mean client")
    for method, graph in [(method, graph) for method in ("ffa-lora", "rolora") for graph in ("complete", "ring")]:
        generator, spec = torch.Generator().manual_seed(0), AdapterSpec((LayerSpec("layer", D_IN, D_OUT),), 1, 1.0)
        learner, losses = Regression(generator), []
        x = initial_adapters(spec, [1] * CLIENTS, {}, generator, torch.float64)
        algorithm, topology = build_algorithm(method, {}), build_topology(parse_spec(graph), CLIENTS, 0)
        peers = StackedExchange(topology, range(CLIENTS))
        for t in range(ROUNDS):
            peers.begin(t)
            x = algorithm.round(t, x, learner, peers)  # pyright: ignore[reportArgumentType]
            losses.append(learner.loss(x))
        axes.plot(losses, label=f"{method}, {graph}")
        print(f"{method:9} {graph:9} {losses[-1]:.3e}")
    axes.legend()
    drawing.savefig(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
