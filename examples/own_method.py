"""A method and a graph of your own, in one script: neighbours agree on A at half speed, over a ring of pairs.

    python examples/own_method.py MODEL ROWS OUT [key=value ...]

An installed package names the same things in its entry-point groups; see CONTRIBUTING.md and docs/guide.md.
"""

import sys
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

import peerlora
from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits
from peerlora.config.topology import Graph


@peerlora.register_method("half-step")
@dataclass(frozen=True)
class HalfStep(FactorGossip):
    """K local steps on A and B, then ``x_i <- (1 - share) x_i + share sum_j W_ij x_j``."""

    share: float = 0.5
    """Of the neighbours' average in the new adapters."""
    traits: ClassVar = Traits(source="this script", sends="adapters")

    def round(self, t, x, learner, peers):
        """One round."""
        x = learner.fit(x, "AB")
        return replace(x, flat=x.flat.lerp(peers.mix(x).flat, self.share))


class PairsGraph(Graph):
    """A ring whose clients also know the one opposite."""

    kind: Literal["ring-of-pairs"]
    opposite: bool = True


@peerlora.register_topology("ring-of-pairs", PairsGraph)
def pairs(settings, clients, seed):
    """A bool [client, client] array: who hears from whom."""
    distance = np.abs(np.subtract.outer(np.arange(clients), np.arange(clients)))
    graph = (distance == 1) | (distance == clients - 1)
    return graph | (distance == clients // 2) if settings.opposite else graph


if __name__ == "__main__":
    model, rows, out, *words = sys.argv[1:]
    tree = {"model": {"source": model}, "data": {"train": rows, "text": ["text"], "label": "label"}, "clients": 4}
    tree |= {"algorithm": {"name": "half-step", "share": 0.25}, "topology": "ring-of-pairs"}
    result = peerlora.simulate(peerlora.load_config(tree, words), out)
    accuracy = result.summary["scores"]["own_mean"]
    print(f"half-step of {peerlora.describe_algorithms()['half-step']['package']}: accuracy {accuracy:.3f}")
