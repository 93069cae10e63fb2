"""A quadratic in a full-rank matrix, at step 1/L: LoRA diverges, one frozen factor stalls, RAC-LoRA's chain arrives.

python examples/rac_toy.py FIGURE.svg
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

CLIENTS, D_IN, D_OUT, RANK, ROUNDS, CHAIN = 6, 12, 6, 2, 200, {"chain": 1, "settle": 0}
ROWS = [("dec-lora", "complete", {}), ("ffa-lora", "complete", {}), ("rac-lora", "complete", CHAIN)]
ROWS += [("rac-lora", "ring", {"chain": 1, "settle": 1}), ("rac-lora", "ring", {**CHAIN, "mix_merged": True})]


def weights(x):  # every client's update: its factors and what it has merged
    return x.B["layer"] @ x.A["layer"] + (x.merged.layers["layer"].weight() if x.merged is not None else 0)


class Quadratic:  # client i wants its own target, near a common one, and takes a gradient step; L = 1
    def __init__(self, generator):
        common, own = (torch.randn(n, D_OUT, D_IN, generator=generator, dtype=torch.float64) for n in (1, CLIENTS))
        self.target, self.curvature = 5 * common + 0.1 * own, torch.linspace(0.3, 1, D_IN, dtype=torch.float64)

    def fit(self, x, train):
        A, B, slope = x.A["layer"], x.B["layer"], (weights(x) - self.target) * self.curvature
        step_B = slope @ A.mT @ torch.linalg.inv(A @ A.mT) if train == "B" else slope @ A.mT  # 1/L in the weight
        return replace(x, flat=x.flat - torch.cat([(B.mT @ slope * (train != "B")).flatten(1), step_B.flatten(1)], 1))

    def loss(self, x):  # of every client's model on everybody's targets, above the best possible
        return float(((weights(x) - self.target.mean(0)).square() * self.curvature).sum((1, 2)).mean()) / 2


def main(figure: str):
    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.add_subplot(yscale="log", xlabel="round", ylabel="loss above the optimum", ylim=(1e-12, 1e4))
    for method, graph, settings in ROWS:
        generator, spec = torch.Generator().manual_seed(0), AdapterSpec((LayerSpec("layer", D_IN, D_OUT),), RANK, 2.0)
        peers = StackedExchange(build_topology(parse_spec(graph), CLIENTS, 0), range(CLIENTS))
        learner, algorithm, losses = Quadratic(generator), build_algorithm(method, settings), []
        x = algorithm.start(initial_adapters(spec, [RANK] * CLIENTS, {}, generator, torch.float64), peers)
        for t in range(ROUNDS):
            peers.begin(t)
            x = algorithm.round(t, x, learner, peers)  # pyright: ignore[reportArgumentType]
            losses.append(learner.loss(x))
        axes.plot(losses, label=(label := f"{method} {graph}" + " mix_merged" * ("mix_merged" in settings)))
        print(f"{label:25} {losses[-1]:.3e}")
    drawing.legend(loc="outside upper center", ncols=2)
    drawing.savefig(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
