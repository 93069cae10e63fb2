"""Sums over the whole network that come out the same, to the last bit, on every client."""

from __future__ import annotations

from itertools import count
from math import ceil, log

import numpy as np
from jaxtyping import Float
from torch import Tensor

from peerlora.errors import CompositionError, DataError
from peerlora.exchange.base import Exchange
from peerlora.topology.graphs import is_connected
from peerlora.topology.schedule import Topology

LARGEST = 2**31  # that a sum may be: it is exact up to here
MOST_ROUNDS = 20_000  # of gossip before round 0


def network_sum(own: Float[Tensor, "client part"], peers: Exchange, topology: Topology) -> Float[Tensor, "client part"]:
    """The sum over all clients of whole numbers that are not negative.

    They are gossiped in rounds -R to -1: W is doubly stochastic, so they approach their mean, and R is such that N
    times it rounds to the sum exactly.  What a neighbour sees are averages; in the first round the numbers themselves.
    Raises DataError where the sum over parts is too large for that.
    """
    x = own.double()
    for t in range(-gossip_rounds(topology), 0):
        peers.begin(t)
        x = peers.mix({"sum": x})["sum"]
    total = (topology.clients * x).round()
    if float(total.sum(1).max()) > LARGEST:
        raise DataError(f"the network holds more than {LARGEST} of what is summed; use fewer rows")
    return total


def gossip_rounds(topology: Topology) -> int:
    """R, from what every client can work out alone; CompositionError where gossip doesn't reach everybody.

    The smallest with ``N max_ij |P_ij - 1/N| LARGEST < 1/2`` for the product P of the rounds' W; for a static W a
    sufficient one, from ``|P - J| <= rho^R``.
    """
    if topology.clients == 1:
        return 0
    _check_reach(topology)
    allowed = 0.5 / (topology.clients * LARGEST)
    static = topology.properties.static
    rounds = _static_rounds(topology.rho(), allowed) if static else _drawn_rounds(topology, allowed)
    if rounds > MOST_ROUNDS:
        raise _refused(f"gossip over this {topology.config.kind} graph takes more than {MOST_ROUNDS} rounds to agree")
    return rounds


def _static_rounds(rho: float, allowed: float) -> int:
    if rho >= 1:
        return MOST_ROUNDS + 1
    return ceil(log(allowed) / log(rho)) if rho > 0 else 1


def _drawn_rounds(topology: Topology, allowed: float) -> int:
    product = np.eye(topology.clients)
    for rounds in count(1):
        product = product @ topology.at(-rounds).W
        if np.abs(product - 1 / topology.clients).max() < allowed or rounds > MOST_ROUNDS:
            return rounds
    raise AssertionError("count() has no end")


def _check_reach(topology: Topology) -> None:
    if not topology.properties.doubly_stochastic:
        raise _refused("its mixing matrix is not doubly stochastic, so gossip doesn't sum")
    if topology.graph is not None and not is_connected(topology.graph):
        raise _refused(f"the {topology.config.kind} graph is disconnected, so no client hears of all")


def _refused(reason: str) -> CompositionError:
    return CompositionError(
        f"a sum over the whole network is needed (train.label_prior=pooled), but {reason}; use "
        "train.label_prior=uniform, or another topology"
    )
