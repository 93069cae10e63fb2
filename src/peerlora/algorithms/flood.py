"""FLood: rows that look out of distribution count more at home, clients that look so count less abroad."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.algorithms.gossip import IN_TURN, Stateful
from peerlora.algorithms.traits import REPLICAS, Traits
from peerlora.config.task_kinds import task_kind
from peerlora.errors import CompositionError, ConfigError
from peerlora.lora.adapters import Adapters
from peerlora.topology.properties import Properties
from peerlora.train.base import LocalPlan
from peerlora.train.row_scores import measure, row_weights

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.topology.schedule import Topology
    from peerlora.train.base import Learner
    from peerlora.train.tasks import Task

_SELF_REPORTED = "a client says itself how much it counts, which a liar would use"
_LARGEST = 20.0  # |exponent| of a confidence: e^20 to one is as good as ignoring a client


@dataclass(frozen=True)
class FLoodState:
    """What a FLood client remembers."""

    x: Adapters
    w: Float[Tensor, " client"]
    """Mass of x (push-sum); sums to the sum of c."""
    c: Float[Tensor, " client"]
    """The own confidence of the last scoring; push-sum: as far as w stands for it."""
    scores: Float[Tensor, "client row"]
    """Of the own rows, where they are used for several rounds."""


@dataclass(frozen=True)
class FLood(Stateful):
    """In round t, with E the score of a row under the model with which the round began, r its rank in the shard:

    rows:    ``v = 1 + alpha sigmoid((r - q) / tau)``, over the batch's mean of v; K local steps on the weighted loss
    clients: ``c_i = exp(-beta mean_i(E) / tau_c)``, E under the model after them, as target weights of the mixing

    ``metropolis``: Metropolis-Hastings weights for c, lazy where the topology is; ``push-sum``: u = w x and w are
    mixed, with c as masses; columns of W that sum to 1 are enough, so links may go one way.  Both aim at
    ``sum_i c_i x_i / sum_i c_i``, the objective ``sum_i c_i f_i``.  ``renormalised``: rows ``w_ij c_j`` over their sum,
    a one-round trust whose limit is *another* mean (biased).  c is what a client says of itself.

    Source: FLood, arXiv 2602.01039: inspired by the abstract (pseudo-OOD rows weigh more in the loss, clients are
    weighted by OOD confidence); score, weights and thresholds were not found and are ours.
    Differs: decentralised; the reference is the client's own mixed model; ``c^beta`` in place of an interpolation with
    1, since that needs the network's mean of c.
    """

    alpha: float = 1.0
    """How much more the strangest rows count; 0: all rows count alike."""
    q: float = 0.75
    """The rank at which the extra weight is half of alpha."""
    tau: float = 0.1
    """Width of that step."""
    hard: bool = False
    """1 + alpha above rank q, 1 below."""
    score: Literal["auto", "energy", "max-softmax", "entropy", "nll"] = "auto"
    """auto: energy for classification, else nll, the row's own loss per token."""
    temperature: float = 1.0
    """T of the energy."""
    every: int = 1
    """Rounds that a scoring of the shard serves, for rows and for confidence; who comes later counts as 1 until one."""
    beta: float = 0.5
    """0: all clients count alike; 1: by their whole confidence."""
    tau_c: float = 1.0
    """Temperature of the confidence."""
    mixing: Literal["metropolis", "push-sum", "renormalised"] = "metropolis"
    traits: ClassVar = Traits(
        source="inspired by FLood, arXiv 2602.01039; formulas ours",
        trains=IN_TURN,
        mixes="A and B, weighted by the clients' confidence",
        refuses={
            "codec": f"its weights follow the clients' confidence, which crosses along, and {REPLICAS}",
            "robust": _SELF_REPORTED,
            "attack": _SELF_REPORTED,
            "secure": "its weights follow the clients' confidence, which senders do not know of each other",
            "label-flip": _SELF_REPORTED,
        },
        topology_reason="of its mixings push-sum alone, with beta above 0, can do with one-way links",
        looks_at_rows="it scores its own rows, and weighs them and itself by the scores",
        own_loop="it weighs and scores rows, which only the loop has",
        positive_vectors=("c",),
        local_only=("scores",),  # of the own rows one by one; w and c go out with messages
    )

    def __post_init__(self):
        super().__post_init__()
        if not (self.alpha >= 0 and 0 <= self.q <= 1 and self.tau > 0 and self.temperature > 0 and self.tau_c > 0):
            raise ConfigError(
                f"algorithm.alpha={self.alpha:g}, q={self.q:g}, tau={self.tau:g}, temperature={self.temperature:g}, "
                f"tau_c={self.tau_c:g} given; expected at least 0, between 0 and 1, and above 0"
            )
        if not 0 <= self.beta <= 1 or self.every < 1:
            raise ConfigError(f"algorithm.beta={self.beta:g}, every={self.every} given; expected 0 to 1 and at least 1")

    @property
    def relaxed_requires(self) -> Properties | None:
        """Masses have to be handed on whole, and no more; without confidence x itself is averaged."""
        return Properties(column_stochastic=True) if self.beta and self.mixing == "push-sum" else None

    def prepared(self, topology: Topology, rounds: int) -> tuple[FLood, tuple[str, ...]]:
        """As it is, unless its weights have another base than the topology's."""
        if self.beta and self.mixing == "metropolis" and topology.config.weights != "metropolis":
            raise CompositionError(
                f"flood with mixing=metropolis replaces Metropolis weights, the topology has "
                f"{topology.config.weights}; use topology.weights=metropolis, or algorithm.mixing=push-sum"
            )
        biased = "flood mixes by renormalised rows: the limit is not the confidence-weighted mean (biased)"
        return self, (biased,) if self.beta and self.mixing == "renormalised" else ()

    def check_task(self, kind: str) -> None:
        """Raise CompositionError for a score that the task has no logits for."""
        if not task_kind(kind).has_classes and self.score not in ("auto", "nll"):
            raise CompositionError(
                f"flood: algorithm.score={self.score} needs class logits, task.kind={kind} has none; use score=nll"
            )

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """A, B and a mixed head, and one number."""
        if not self.beta:
            return x.message()
        return {f"x.{name}": what for name, what in x.message().items()} | {"c": ((), torch.float64)}

    def start(self, x: Adapters, peers: Exchange) -> FLoodState:
        """Everybody counts alike, nothing is scored."""
        ones = torch.ones(x.clients, dtype=torch.float64, device=x.flat.device)
        return FLoodState(x, ones, ones, ones[:, None][:, :0])

    def round(self, t: int, state: FLoodState, learner: Learner, peers: Exchange) -> FLoodState:
        """One round."""
        scores, weights, due = state.scores, None, t % self.every == 0
        if self.alpha:
            if due or not scores.shape[1]:
                scores = self.scores(state.x, learner)
            weights = row_weights(scores, self.alpha, self.q, self.tau, self.hard)
        trained = learner.fit(state.x, LocalPlan(self.active(t), row_weights=weights))
        kept = scores if self.every > 1 else state.scores
        if not self.beta:
            return FLoodState(peers.mix(trained), state.w, state.c, kept)
        c = self.confidence(self.scores(trained, learner)).to(state.c) if due else state.c
        return self._exchanged(replace(state, scores=kept), trained, c, peers)

    def quiet_round(self, t: int, state: FLoodState, learner: Learner, peers: Exchange) -> FLoodState:
        """With the confidence of the last scoring: a new one would need a look at the rows."""
        if not self.beta:
            return replace(state, x=peers.mix(state.x))
        return self._exchanged(state, state.x, state.c, peers)

    def _exchanged(
        self, state: FLoodState, trained: Adapters, c: Float[Tensor, " client"], peers: Exchange
    ) -> FLoodState:
        """The state after an exchange with these confidences."""
        if self.mixing == "push-sum":
            return push_masses(state, trained, c, peers)
        return replace(state, x=aimed(trained, c, peers, self.mixing == "metropolis"), c=c)

    def on_rejoin(self, own: FLoodState, taken: FLoodState) -> FLoodState:
        """A real peer that fell behind takes over a neighbour's model; masses and scores are its own."""
        return replace(own, x=taken.x)

    def scores(self, x: Adapters, learner: Learner) -> Float[Tensor, "client row"]:
        """E of every client's own rows."""
        task = cast("Task", learner.task)
        usual = "energy" if task.kind.has_classes else "nll"
        chosen = usual if self.score == "auto" else self.score
        return learner.score(x, measure(chosen, task, self.temperature))

    def confidence(self, scores: Float[Tensor, "client row"]) -> Float[Tensor, " client"]:
        """``exp(-beta mean(E) / tau_c)``."""
        return (-self.beta * scores.nanmean(1) / self.tau_c).clamp(-_LARGEST, _LARGEST).exp()


def aimed(x: Adapters, c: Float[Tensor, " client"], peers: Exchange, exact: bool) -> Adapters:
    """One mixing with target weights c: Metropolis-Hastings, or ``sum_j w_ij c_j x_j / sum_j w_ij c_j``."""
    if exact:
        return peers.mix({"x": x, "c": c}, target="c")["x"]
    mixed = peers.mix({"x": scaled(x, c), "c": c})
    return scaled(mixed["x"], 1 / mixed["c"])


def push_masses(state: FLoodState, trained: Adapters, c: Float[Tensor, " client"], peers: Exchange) -> FLoodState:
    """Hand on u and w; what c has changed by, and what training has moved x by, goes in with the weight c.

    Of a falling c at most half of the present mass is taken back in a round, so that w stays above zero; the rest
    waits.  The sum of w is that of the confidences that have gone in.
    """
    change = torch.maximum(c - state.c, -state.w / 2)
    now, mass = state.c + change, state.w + change
    x = state.x.flat
    u = scaled(state.x, state.w).flat + scaled(replace(trained, flat=trained.flat - x), now).flat
    u = u + scaled(state.x, change).flat
    mixed = peers.mix({"x": trained.with_shared(u[:, trained.spec.shared]), "c": mass})
    return FLoodState(scaled(mixed["x"], 1 / mixed["c"]), mixed["c"], now, state.scores)


def scaled(x: Adapters, by: Float[Tensor, " client"]) -> Adapters:
    """Every client's exchanged columns times a number of its own."""
    return x.with_shared(x.flat[:, x.spec.shared] * by[:, None].to(x.flat))
