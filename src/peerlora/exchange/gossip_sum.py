"""Sums over the whole network that come out the same, to the last bit, on every client."""

from __future__ import annotations

from itertools import count
from math import ceil, log

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from peerlora.config.train import NOT_POOLED, POOLED
from peerlora.environment import main_memory
from peerlora.errors import CompositionError, DataError, RunError
from peerlora.exchange.base import Exchange
from peerlora.exchange.schema import Schema
from peerlora.randomness import numpy_generator
from peerlora.topology.graphs import is_connected
from peerlora.topology.schedule import Topology
from peerlora.topology.storage import as_dense

LARGEST = 2**31  # that a sum may be: it is exact up to here
SUM = "sum"
"""Name of the vector that holds what is summed."""
MARKS = 2  # numbers that are known beforehand and summed along
_DOUBT = 0.25  # what a count may be off, by the marks, and still be rounded to the right one
MOST_ROUNDS = 20_000  # of gossip before round 0


def network_sum(
    own: Float[Tensor, "client part"], peers: Exchange, topology: Topology
) -> tuple[Float[Tensor, "client part"], int]:
    """Sum whole numbers that are not negative over all clients; also return the bytes that the gossip sent.

    They are gossiped in rounds -R to -1: W is doubly stochastic, so they approach their mean, and R is such that N
    times it rounds to the sum exactly.  What a neighbour sees are averages; in the first round the numbers themselves.
    Where columns alone sum to 1, as with links that go one way, a mass of 1 goes along and the ratio to it approaches
    the mean (push-sum).

    Links that fail meanwhile slow that down, or leave somebody out.  So marks travel along, numbers that everybody
    knows of everybody: how far their sum is from the known one tells how far that of the others may be.
    Raises DataError where the sum over parts is too large, RunError where links failed so that the sum is not known.
    """
    marks = known_marks(topology)
    x = torch.cat([own.double(), marks[list(peers.clients)].to(own.device)], dim=1)
    weighed = not topology.properties.doubly_stochastic
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if weighed else x
    sent = 0
    for t in range(-gossip_rounds(topology), 0):
        stats = peers.begin(t)
        x = peers.mix({SUM: x})[SUM]
        sent += stats.bytes_sent
    x = x[:, :-1] / x[:, -1:] if weighed else x
    found, sums = (topology.clients * x).split([own.shape[1], MARKS], dim=1)
    total = found.round()
    if float(total.sum(1).max()) > LARGEST:
        raise DataError(f"the network holds more than {LARGEST} of what is summed; use fewer rows")
    expected = marks.sum(0).to(sums.device)
    off = ((sums - expected) / expected).abs().amax(1) * topology.clients**0.5 * total.sum(1)
    if not bool((off < _DOUBT).all()) or bool((total < 0).any()):
        raise RunError(
            f"the sum over the network before round 0 ({POOLED}) is not known: links failed while it was gossiped, or "
            f"a site sent what are no counts; start all sites again, or use {NOT_POOLED}"
        )
    return total, sent


class NetworkSum:
    """``network_sum`` as a function of the clients' numbers alone, which counts what its gossip sends."""

    def __init__(self, peers: Exchange, topology: Topology):
        self.peers, self.topology, self.bytes_sent = peers, topology, 0

    def __call__(self, own: Float[Tensor, "client part"]) -> Float[Tensor, "client part"]:
        """Return the sum over all clients."""
        total, sent = network_sum(own, self.peers, self.topology)
        self.bytes_sent += sent
        return total


def known_marks(topology: Topology) -> Float64[Tensor, "all_clients mark"]:
    """Whole numbers that follow from the run's seed: those of every client, to be summed along with what is not known.

    Drawn, so that hardly any uneven mixing leaves the sums of all marks as they should be.
    """
    drawn = numpy_generator(topology.seed, "marks").integers(1, LARGEST // topology.clients, (topology.clients, MARKS))
    return torch.from_numpy(drawn).double()


def sum_schema(parts: int, topology: Topology) -> Schema:
    """What one client sends in each round of ``network_sum``."""
    mass = 0 if topology.properties.doubly_stochastic else 1
    return {SUM: ((parts + MARKS + mass,), torch.float64)}


def gossip_rounds(topology: Topology) -> int:
    """R, from what every client can work out alone; CompositionError where gossip doesn't reach everybody.

    The smallest with ``N max_ij |P_ij - 1/N| LARGEST < 1/20`` for the product P of the rounds' W, its rows divided by
    their sums, which are the masses; for a static doubly stochastic W a sufficient one, from ``|P - J| <= rho^R``.
    """
    if topology.clients == 1:
        return 0
    _check_reach(topology)
    allowed = 0.05 / (topology.clients * LARGEST)
    static = topology.properties.static and topology.properties.doubly_stochastic
    rounds = _static_rounds(topology.rho(), allowed) if static else _drawn_rounds(topology, allowed)
    if rounds > MOST_ROUNDS:
        raise _refused(f"gossip over this {topology.config.kind} graph takes more than {MOST_ROUNDS} rounds to agree")
    return rounds


def _static_rounds(rho: float, allowed: float) -> int:
    if rho >= 1:
        return MOST_ROUNDS + 1
    return ceil(log(allowed) / log(rho)) if rho > 0 else 1


def _drawn_rounds(topology: Topology, allowed: float) -> int:
    if (needed := 3 * 8 * topology.clients**2) > main_memory():  # a dense product, and what it takes to go on
        raise _refused(
            f"over links that change gossip of {topology.clients} clients is planned in {needed / 1e9:.3g} GB, more "
            "than this machine has"
        )
    product = np.eye(topology.clients)
    for rounds in count(1):
        product = product @ as_dense(topology.at(-rounds).W)
        share = product if topology.properties.doubly_stochastic else product / product.sum(axis=1, keepdims=True)
        if np.abs(share - 1 / topology.clients).max() < allowed or rounds > MOST_ROUNDS:
            return rounds
    raise AssertionError("count() has no end")


def _check_reach(topology: Topology) -> None:
    if not topology.properties.column_stochastic:
        raise _refused("the columns of its mixing matrix don't sum to 1, so gossip doesn't sum")
    if topology.graph is not None and not is_connected(topology.graph):
        raise _refused(f"the {topology.config.kind} graph is disconnected, so no client hears of all")


def _refused(reason: str) -> CompositionError:
    return CompositionError(
        f"a sum over the whole network is needed ({POOLED}), but {reason}; use {NOT_POOLED}, or another topology"
    )
