"""What goes with what: which methods can have their exchange wrapped, and on which graphs.

Checked when a run is composed and shown by ``peerlora methods``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from peerlora.algorithms.choco import REASON, REQUIRES
from peerlora.errors import CompositionError
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.config.run import RunConfig
    from peerlora.topology.schedule import Topology

Wrapper = Literal["codec", "robust", "attack", "label-flip"]
"""What may stand between a method and its exchange; attack: any that changes what is sent."""

PLAIN = ("dec-lora", "adf-lora", "tad-lora", "rolora", "ffa-lora", "fedit", "fedsa-lora", "dsgd", "dfedavg", "dfedavgm")
PLAIN += ("dfedsam", "fedprox", "fedspeed", "dfedadmm", "dfedadmm-sam")
"""Methods that mix adapters once a round, and nothing else: any wrapper fits."""
ATTACKED = (*PLAIN, "decaf", "flexlora", "hetlora", "fedrot-lora", "lora-fair", "rac-lora", "k-gt", "d2")
"""Methods that send models as they are and go on from what arrives, so that clients can attack and go on unharmed."""

_NOTHING = {"local": "it exchanges nothing"}
_NO_ROUNDS = dict.fromkeys(("aedfl", "ad-psgd"), "its clients keep no common rounds")
_LAYERS = {"salf": "it sends some layers, and which ones they are"}
_SELF_REPORTED = {"flood": "a client says itself how much it counts, which a liar would use"}
_MERGING = ("flora", "fedex-lora", "fedhl")
_OWN_RULE = (*_MERGING, "decaf", "flexlora", "hetlora", "fedrot-lora", "lora-fair", "rac-lora", "consensus-admm")
_SUMS = ("sgp", "push-diging")
_REPLICAS = "compressed gossip keeps replicas of one set of adapters, and of nothing else"

REFUSED: dict[Wrapper, dict[str, str]] = {
    "codec": {
        **_NOTHING | _NO_ROUNDS | _LAYERS,
        **dict.fromkeys(_OWN_RULE, "it needs what each neighbour sent, and with a codec receivers know averages only"),
        **dict.fromkeys(_SUMS, f"the mass has to arrive as it was sent, along with its share, and {_REPLICAS}"),
        "k-gt": f"x and z cross together, and {_REPLICAS}",
        "d2": "it adds up what every mixing moved, and what a codec leaves out can make that grow without bound",
        "choco": "it has a codec of its own",
        "flood": f"its weights follow the clients' confidence, which crosses along, and {_REPLICAS}",
    },
    "robust": {
        **_NOTHING | _NO_ROUNDS | _LAYERS | _SELF_REPORTED,
        **dict.fromkeys(_OWN_RULE, "it combines what arrives by a rule of its own"),
        **dict.fromkeys(_SUMS, "what it mixes are shares of a sum, and a rule that leaves any out loses their mass"),
        "k-gt": "its corrections sum to zero only where mixing keeps the mean, which robust rules give up",
        "d2": "it undoes what the last mixing did, which has to be linear",
        "choco": "its receivers know averages of their neighbours only, and a robust rule has to see each of them",
    },
    "attack": {
        **_NOTHING | _NO_ROUNDS | _LAYERS | _SELF_REPORTED,
        **dict.fromkeys(_SUMS, "it sends shares of a sum, and an attack on models would leave their mass alone"),
        **dict.fromkeys(_MERGING, "an attacker would merge its own lie for good, and could not go on from the truth"),
        "consensus-admm": "it takes from its neighbours how far they are, and an attacker goes on from their average",
        "choco": "its messages are compressed differences, no models; dec-lora with exchange.codec can be attacked",
    },
    "label-flip": _SELF_REPORTED,
}
"""By wrapper, why a method cannot do with it."""


def refusal(name: str, wrapper: Wrapper) -> str | None:
    """Why the method registered under this name does not go with a wrapper; None where it does."""
    if wrapper != "label-flip" and name not in (ATTACKED if wrapper == "attack" else PLAIN):
        return REFUSED[wrapper].get(name, "its exchange is more than one mixing of adapters a round")
    return REFUSED[wrapper].get(name)


def training_limits(method: object) -> tuple[str | None, str | None, str | None]:
    """Why a method takes one local step only, why SGD only, and why it had better have SGD; None where it does not."""
    one_step, only, preferred = (getattr(method, key, None) for key in ("one_step", "sgd_only", "sgd_preferred"))
    return one_step, only, preferred


def not_with(name: str, method: object) -> dict[str, str]:
    """What a config may ask for that a method does not go with, and why; of its topology see ``requires``."""
    flip, attack = refusal(name, "label-flip"), refusal(name, "attack")
    one_step, only, preferred = training_limits(method)
    found = {
        "exchange.codec": refusal(name, "codec"),
        "exchange.robust": refusal(name, "robust"),
        "adversary": flip or attack and f"all but label-flip: {attack}",
        "train.local_steps > 1": one_step,
        "train.optimizer=adamw": only or preferred and f"only warned of: {preferred}",
    }
    return {what: reason for what, reason in found.items() if reason}


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
    _check_methods(config, name)
    if codec and (missing := REQUIRES.missing(topology.properties)):
        raise CompositionError(
            f"exchange.codec needs a mixing matrix that is {' and '.join(missing)}: {REASON}; use a fixed undirected "
            "graph without drop-outs, such as topology=ring"
        )
    if robust:
        _check_robust(robust, topology)


def _check_methods(config: RunConfig, name: str) -> None:
    codec, robust, adversary = config.exchange.codec, config.exchange.robust, config.adversary
    if codec and (reason := refusal(name, "codec")):
        raise _refused("exchange.codec", config, reason, f"one of {', '.join(PLAIN)}")
    if robust and (reason := refusal(name, "robust")):
        raise _refused("exchange.robust", config, reason, f"one of {', '.join(PLAIN)}")
    if adversary and (reason := refusal(name, "label-flip")):
        raise _refused("adversary", config, reason, "dec-lora")
    if adversary and adversary.attack != "label-flip" and (reason := refusal(name, "attack")):
        raise _refused(f"adversary.attack={adversary.attack}", config, reason, "attack=label-flip, or dec-lora")


def _refused(what: str, config: RunConfig, reason: str, instead: str) -> CompositionError:
    return CompositionError(f"{what} cannot be used with {config.algorithm.name}: {reason}; use {instead}")


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
