"""What goes with what: which methods can have their exchange wrapped, and on which graphs.

One table, checked when a run is composed and shown by ``peerlora methods``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from peerlora.algorithms.choco import REASON, REQUIRES
from peerlora.errors import CompositionError
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.config import RunConfig
    from peerlora.topology.schedule import Topology

Wrapper = Literal["codec", "robust"]

PLAIN = ("dec-lora", "adf-lora", "tad-lora", "rolora", "ffa-lora", "fedit", "fedsa-lora", "dsgd", "dfedavg", "dfedavgm")
PLAIN += ("dfedsam", "fedprox", "fedspeed", "dfedadmm", "dfedadmm-sam")
"""Methods that mix adapters once a round, and nothing else: any wrapper fits."""

_RULE = "it combines what arrives by a rule of its own"
_MASS = "what it mixes are shares of a sum, whose mass has to arrive as it was sent"
REFUSED: dict[str, str] = {
    "local": "it exchanges nothing",
    **dict.fromkeys(("decaf", "flexlora", "hetlora", "fedrot-lora", "lora-fair", "flora", "fedex-lora"), _RULE),
    **dict.fromkeys(("rac-lora", "fedhl", "consensus-admm"), _RULE),
    "k-gt": "its corrections sum to zero only if the mixing is linear and exact",
    "d2": "it undoes what the last mixing did, which has to be linear and exact",
    "sgp": _MASS,
    "push-diging": _MASS,
    "choco": "it has a codec of its own, and its receivers know averages only",
}
"""Why a method refuses both wrappers."""
_NO_ROUNDS = "its clients keep no common rounds"
REFUSED |= dict.fromkeys(("aedfl", "ad-psgd"), _NO_ROUNDS) | {"salf": "it sends some layers, and which ones they are"}
_SELF_REPORTED = "a client says itself how much it counts, which a liar would use"
REFUSED["flood"] = _SELF_REPORTED
ATTACKED = {*PLAIN, *REFUSED} - {"local", "choco", "salf", "aedfl", "ad-psgd", "flood"}
"""Methods whose adapters cross as they are, so that attackers can change them."""


def refusal(name: str) -> str | None:
    """Why the exchange of the method registered under this name cannot be wrapped; None where it can."""
    return None if name in PLAIN else REFUSED.get(name, "its exchange is more than one mixing of adapters a round")


def check_wrappers(config: RunConfig, name: str, topology: Topology) -> None:
    """Refuse codecs, robust rules and attackers where they cannot work.

    ``name`` is the method's own, not an alias.  Raises CompositionError with the reason and an alternative.
    """
    codec, robust = config.exchange.codec, config.exchange.robust
    if codec and robust:
        raise CompositionError(
            "exchange.codec and exchange.robust exclude each other: with a codec receivers know averages of their "
            "neighbours only, and a robust rule has to see each of them; use one"
        )
    for key, used in (("codec", codec), ("robust", robust)):
        if used and (reason := refusal(name)):
            raise CompositionError(
                f"exchange.{key} cannot be used with {config.algorithm.name}: {reason}; use one of {', '.join(PLAIN)}"
            )
    if codec and (missing := REQUIRES.missing(topology.properties)):
        raise CompositionError(
            f"exchange.codec needs a mixing matrix that is {' and '.join(missing)}: {REASON}; use a fixed undirected "
            "graph without drop-outs, such as topology=ring"
        )
    if robust:
        _check_robust(robust, topology)
    if config.adversary and name == "flood":
        raise CompositionError(f"adversary cannot be used with flood: {_SELF_REPORTED}; use dec-lora")
    attack = config.adversary.attack if config.adversary else "label-flip"
    if attack != "label-flip" and name not in ATTACKED:
        raise CompositionError(
            f"adversary.attack={attack} changes the adapters that are mixed, and {config.algorithm.name} mixes none as "
            "they are; use attack=label-flip, or dec-lora, with exchange.codec if you want one"
        )


def _check_robust(robust: Any, topology: Topology) -> None:
    if missing := Properties(neighbours_only=True).missing(topology.properties):
        raise CompositionError(
            f"exchange.robust needs a mixing matrix that reaches {' and '.join(missing)}, for a rule sees neighbours; "
            "use topology.weights=metropolis"
        )
    if topology.directed:
        raise CompositionError(
            "exchange.robust needs links that go both ways, for who hears from few cannot tell whom to trust; use an "
            "undirected graph, such as topology=complete"
        )
    drop = getattr(robust, "drop", 0)
    least = {"trimmed-mean": 2 * drop, "krum": drop + 2, "clipped-gossip": drop + 1}.get(robust.kind, 0)
    if not topology.properties.static or getattr(robust, "radius", None) is not None:
        return  # who has too few neighbours in a round keeps its own
    degrees = topology.at(0).degrees
    if degrees.min() < least:
        client = int(np.argmin(degrees))
        raise CompositionError(
            f"exchange.robust.kind={robust.kind} with drop={drop} needs {least} neighbours, client {client} has "
            f"{degrees[client]} on this {topology.config.kind}; use a denser graph, such as topology=complete, or "
            "kind=median"
        )
