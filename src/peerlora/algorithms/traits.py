"""What a method declares about itself: its paper, what it needs, and which wrappers of the exchange it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.config.privacy import Unit

Operator = Literal["none", "product-sum", "sum-product", "both"]
"""How a method averages adapters, in the words of arXiv 2508.01348.

product-sum (PS) averages the factors and multiplies the averages.  sum-product (SP) averages the products and, where it
sends factors on, factors the average again.  Both: one factor is common to all clients, so the two are the same.
"""
Wrapper = Literal["codec", "robust", "attack", "label-flip", "relay", "secure"]
"""What may stand between a method and its exchange; attack: any that changes what is sent; secure: secure sums."""
Sends = Literal["adapters", "models", "cached", "merges", "sums", "replicas", "layers", "pushes", "nothing", "other"]
"""What a method's messages hold, which decides the wrappers that fit unless the method says otherwise.

adapters: mixed once a round, and nothing else; any wrapper fits.  models: as they are, and clients go on from what
arrives, so that they can attack and go on unharmed.  cached: models, which receivers keep and pass on.  merges: models
that receivers merge for good.  sums: shares of a sum, with their mass.  replicas: compressed differences.  layers: some
layers, and which ones.  pushes: messages at times of the sender's own.  other: refused by every wrapper but flipped
labels.  Adapters and models can be relayed, unless a factor stays at home that differs from client to client.
"""

ONE_FACTOR = "it sends one factor, and the other differs from client to client, so that what is sent is no model"
RAW_GRADIENTS = "it sends mean gradients beside the change of a round, and noise covers that change alone"
"""Why a method cannot protect a client as a whole; row by row it can, where gradients have noise of their own."""
UNDECLARED_GRADIENTS = (
    "it does not declare whether its messages hold gradients of the local steps, which no noise covers "
    "(Traits.sends_gradients)"
)
IN_STEP = "its clients keep more than their adapters in step, and one that trains no more would bias the others"
"""Why a method refuses that one client alone ends its training, unless it has another reason."""
REPLICAS = "compressed gossip keeps replicas of one set of adapters, and of nothing else"
SGD = {"optimizer": "sgd", "lr": 0.1}
"""The defaults of ``train`` for a method that was made for SGD."""

_OWN_RULE: dict[Wrapper, str] = {
    "codec": "it needs what each neighbour sent, and with a codec receivers know averages only",
    "robust": "it combines what arrives by a rule of its own",
    "secure": "it needs what each neighbour sent, and with secure sums receivers know their weighted sum only",
}


def _all(reason: str) -> dict[Wrapper, str]:
    return {"codec": reason, "robust": reason, "attack": reason, "relay": reason, "secure": reason}


REASONS: dict[Sends, dict[Wrapper, str]] = {
    "adapters": {},
    "models": _OWN_RULE,
    "cached": {
        "codec": "its clients pass on whole adapters of others, and with a codec receivers know replicas only",
        "robust": "it averages what came over several links too, and a robust rule sees this round's neighbours only",
        "relay": "it keeps that cache itself, and its clients' models are the averages of it",
        "secure": "its clients keep and pass on each other's adapters, which secure sums hide",
    },
    "merges": {
        **_OWN_RULE,
        "attack": "an attacker would merge its own lie for good, and could not go on from the truth",
        "relay": "what clients have merged does not travel, and an adapter without it is no model",
    },
    "sums": {
        "codec": f"the mass has to arrive as it was sent, along with its share, and {REPLICAS}",
        "robust": "what it mixes are shares of a sum, and a rule that leaves any out loses their mass",
        "attack": "it sends shares of a sum, and an attack on models would leave their mass alone",
        "relay": "it sends shares of a sum, which are no models without their mass",
        "secure": "a sum that is given up, since a neighbour went away meanwhile, would lose the mass of all others",
    },
    "replicas": {
        "codec": "it has a codec of its own",
        "robust": "its receivers know averages of their neighbours only, and a robust rule has to see each of them",
        "attack": "its messages are compressed differences, no models; dec-lora with exchange.codec can be attacked",
        "relay": "its messages are compressed differences, no models",
        "secure": "its receivers build on what each neighbour sent before, which secure sums hide",
    },
    "layers": _all("it sends some layers, and which ones they are"),
    "pushes": _all("its clients keep no common rounds"),
    "nothing": _all("it exchanges nothing"),
    "other": _all("its exchange is more than one mixing of adapters a round"),
}
"""By what is sent, why a wrapper does not fit."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a method declares; the defaults are those of a method that averages factors entry by entry."""

    source: str
    """For people: the paper."""
    trains: str = "A and B"
    """For people: what a client trains in a round."""
    mixes: str = "A and B"
    """For people: what it exchanges with its neighbours."""
    operator: Operator = "product-sum"
    """What its exchange averages: factors, products, or nothing."""
    sends: Sends = "other"
    refuses: Mapping[Wrapper, str] = field(default_factory=dict)
    """Reasons of its own, by wrapper; they replace those that follow from ``sends``."""
    requires: Properties = Properties(row_stochastic=True, column_stochastic=True)
    """Properties that the topology must have; checked when a run is composed."""
    topology_reason: str | None = None
    """Why it requires them."""
    unequal_ranks: str | None = "it averages factors entry by entry, which needs one shape"
    """None where clients may have different ranks, else the reason why not."""
    train_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ``train`` where the config does not give them."""
    one_step: str | None = None
    """Why it takes one local step only."""
    sgd_only: str | None = None
    """Why it cannot use AdamW."""
    sgd_preferred: str | None = None
    """Why a run with AdamW is warned."""
    fresh_optimizer: str | None = None
    """Why the optimiser's memory cannot outlast a round, with the default settings."""
    quiet: str | None = None
    """Why there can be no rounds at the end that exchange without training."""
    own_loop: str | None = None
    """Why a training loop of the user's own cannot take its local steps, where nothing else says so."""
    training_end: str | None = None
    """Why one client alone cannot end its training, where the state is the adapters and nothing else says so."""
    gradients: int = 1
    """Of a minibatch, in one local step: what a step costs on the virtual clock."""
    looks_at_rows: str | None = None
    """How it sees own rows other than by gradients, so that no noise covers them; None: all else is post-processing."""
    sends_gradients: bool | None = None
    """Whether messages hold gradients of the local steps, and not only what follows from their outcome.  None: not
    declared, and then nobody's whole data can be protected, unless adapters or nothing are what it sends."""
    own_gauge: bool = False
    """Whether it leaves clients' factors in coordinates (gauges) of their own, so that their mean says little: where it
    factors averaged products anew, or turns factors towards each receiver."""
    merges_into: Literal["base", "reference"] | None = None
    """Where a client's sum of low-rank products goes: its base model, or beside its adapters; None: it has none."""
    newest_only: bool = False
    """Whether of several waiting messages of one sender only the newest counts (without common rounds)."""
    positive_vectors: tuple[str, ...] = ()
    """Vectors of a message, by name, that a receiver refuses unless they are above zero."""
    local_only: tuple[str, ...] = ()
    """Vectors of the state, by name, that never leave their client."""
    flow_policies_only: bool = False
    """Whether it learns task.kind=flow-policy and nothing else."""

    def refusal(self, wrapper: Wrapper) -> str | None:
        """Why the method does not go with a wrapper; None where it does."""
        return self.refuses.get(wrapper) or REASONS[self.sends].get(wrapper)

    def own_train_defaults(self) -> dict[str, Any]:
        """``train_defaults``, and a fresh optimiser in every round where its memory cannot outlast one."""
        fresh = {"optimizer_state": "round"} if self.fresh_optimizer else {}
        return {**fresh, **self.train_defaults}

    def quiet_refusal(self) -> str | None:
        """Why rounds without training are refused; None where they are not."""
        return self.quiet or ("its clients keep no common rounds" if self.sends == "pushes" else None)

    def privacy_refusal(self, unit: Unit) -> str | None:
        """Why rows, or clients, cannot be protected by differential privacy; None where they can."""
        if self.flow_policies_only:
            return "its clients learn from episodes, and have no rows"
        if unit == "client":
            return self.looks_at_rows or self._gradients_sent()
        twice = "it takes two gradients of each minibatch, and the second would need noise of its own"
        return self.looks_at_rows or (twice if self.gradients > 1 else None)

    def _gradients_sent(self) -> str | None:
        """Why messages hold what the noise on the change of a round does not cover; None where they do not."""
        if self.sends_gradients is None and self.sends not in ("adapters", "nothing"):
            return UNDECLARED_GRADIENTS
        return RAW_GRADIENTS if self.sends_gradients else None

    def own_loop_refusal(self) -> str | None:
        """Why a training loop of the user's own cannot take its local steps; None where it can."""
        if self.flow_policies_only:
            return "its clients train the blocks of flow policies in turn, and a loop trains all of its model"
        if self.sends == "pushes":
            return "its clients keep no common rounds, and a loop exchanges at the end of its own"
        if self.merges_into:
            return "it merges products into the base model, which belongs to the loop"
        if self.gradients > 1:
            return "it looks at each minibatch at two places, and a loop shows it at one"
        return self.own_loop

    def not_with(self) -> dict[str, str]:
        """What a config may ask for that the method does not go with, and why; of its topology see ``requires``."""
        flip, attack, preferred = self.refusal("label-flip"), self.refusal("attack"), self.sgd_preferred
        found = {
            "exchange.codec": self.refusal("codec"),
            "exchange.robust": self.refusal("robust"),
            "exchange.relay": self.refusal("relay"),
            "exchange.secure": self.refusal("secure"),
            "adversary": flip or attack and f"all but label-flip: {attack}",
            "train.local_steps > 1": self.one_step,
            "train.quiet": self.quiet_refusal(),
            "peerlora.join": self.own_loop_refusal(),
            "train.optimizer=adamw": self.sgd_only or preferred and f"only warned of: {preferred}",
            "privacy.unit=row": self.privacy_refusal("row"),
            "privacy.unit=client": self.privacy_refusal("client"),
        }
        return {what: reason for what, reason in found.items() if reason}

    def required(self) -> list[str]:
        """The properties in ``requires``, in words."""
        return [each.name.replace("_", " ") for each in fields(self.requires) if getattr(self.requires, each.name)]
