"""AEDFL: combine whatever has arrived, the staler the lighter, and train and send fewer and fewer components."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from peerlora.algorithms.asynchronous import FIXED_GRAPH, AsynchronousGossip
from peerlora.algorithms.traits import Traits
from peerlora.errors import ConfigError
from peerlora.lora.adapters import Adapters, AdapterSpec
from peerlora.lora.rank_components import component_norms, components, coordinates, largest

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange, Mailbox, Message, Vectors
    from peerlora.exchange.payload import Shapes
    from peerlora.exchange.schema import Schema


@dataclass(frozen=True)
class AEDFLState:
    """A client's adapters and which of its rank-one components it holds: component k of a layer is b_k a_k."""

    x: Adapters
    held: Bool[Tensor, "client component"]
    """Components that it trains and sends, layer by layer."""
    scores: Float[Tensor, "client component"]
    """``|b_k| |a_k|``, averaged with the neighbours'."""


@dataclass(frozen=True)
class AEDFL(AsynchronousGossip):
    """Train, push, then combine the newest message of each neighbour that has come since the last time:

        w~_ij = w_ij xi(tau_ij),  xi(tau) = (1 + tau)^-sigma, none where tau > cutoff;  the rest of 1 is the own weight,
        x_i,c += sum_j w~_ij m_jc (x_j,c - x_i,c),  m_jc: client j holds what coordinate c belongs to.

    Sparse training: of all rank-one components a client holds those with the largest ``|b_k| |a_k|`` (averaged with
    the neighbours' before the cut), a share that falls from 1 to ``density`` over the first ``ramp`` jobs.  What it
    does not hold it neither trains nor sends; the values stay in its model and follow neighbours that do hold it.

    Source: Liu, Che, Zhou, Jin, Dai, Dou, Valduriez 2023, "AEDFL", arXiv 2312.10935: inspired by the abstract, the
    formulas are ours.  ``staleness=fedasmu`` follows Ji Liu et al., FedASMU (AAAI 2024), as a re-implementation of
    others gives it: s = lambda / sqrt(t) (1 + tau)^-sigma + iota, xi = mu s / (1 + mu s), t the own jobs done.
    Differs: FedASMU adapts lambda, sigma, iota online; here they are 1, sigma, 0, and mu is 1.  Rows of w~ sum to one,
    columns don't: the mean over clients moves towards those whose messages are fresh.
    """

    sigma: float = 0.5
    """How fast weight falls with staleness; 0: not at all."""
    cutoff: int | None = 20
    """Largest staleness that is used; null: any."""
    staleness: Literal["polynomial", "fedasmu"] = "polynomial"
    density: float = 0.5
    """Share of the components that is held in the end; 1: dense."""
    ramp: int = 10
    """Jobs of a client until then."""
    refresh: int = 5
    """Jobs of a client between two choices of what it holds."""
    interval: int = 0
    """Jobs between two switches of the active factor; 0: both train."""
    traits: ClassVar = Traits(
        source="inspired by AEDFL, arXiv 2312.10935; formulas ours",
        trains="A and B, or in turn by `interval`; no common rounds",
        mixes="held components of A and B, lighter when stale",
        sends="pushes",
        sends_gradients=False,
        requires=FIXED_GRAPH,
        newest_only=True,
        fresh_optimizer="the moments of a component that is not held would decay (density < 1)",
    )

    def __post_init__(self):
        super().__post_init__()
        if not (self.sigma >= 0 and (self.cutoff is None or self.cutoff >= 0)):
            raise ConfigError(
                f"algorithm.sigma={self.sigma:g}, cutoff={self.cutoff} given; expected at least 0, else stale messages "
                "would count more than fresh ones"
            )
        if not (0 < self.density <= 1 and self.ramp >= 0 and self.refresh >= 1):
            raise ConfigError(
                f"algorithm.density={self.density:g}, ramp={self.ramp}, refresh={self.refresh} given; expected a "
                "density above 0 and at most 1, ramp at least 0 and refresh at least 1 jobs"
            )

    @property
    def fresh_optimizer(self) -> str | None:
        """Why the optimiser's memory cannot be kept."""
        return None if self.density == 1 else self.traits.fresh_optimizer

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """Of job ``t``: values of the held components (and a mixed head), which they are, and all scores.

        Where layers differ in width the number of values depends on which are held; this is that of the first ones.
        """
        held = torch.zeros(1, components(x.spec), dtype=torch.bool)
        held[:, : self.kept(t, x.spec)] = True
        return _vectors(x, _values(x.spec, held))

    def incoming(self, x: Adapters, claimed: Shapes) -> Schema:
        """As many values as are claimed: how many it must be follows from what the sender holds."""
        most, shape = x.spec.shared.stop, claimed.get("values", ())
        return _vectors(x, min(shape[0], most) if len(shape) == 1 else most)

    def flaw(self, x: Adapters, payload: Vectors) -> str | None:
        """A value for every coordinate that the sender holds."""
        given, expected = len(payload["values"]), _values(x.spec, payload["held"][None])
        return None if given == expected else f"{given} values given, {expected} expected for what is held"

    def start(self, x: Adapters, peers: Exchange) -> AEDFLState:
        """Everything is held."""
        held = torch.ones(x.clients, components(x.spec), dtype=torch.bool, device=x.flat.device)
        return AEDFLState(x, held, torch.zeros_like(held, dtype=x.flat.dtype))

    def coordinates(self, state: AEDFLState) -> Bool[Tensor, "client parameter"] | None:
        """What a client holds."""
        return None if self.density == 1 else coordinates(state.x.spec, state.held)

    def on_job(self, state: AEDFLState, before: Adapters, trained: Adapters, mailbox: Mailbox) -> AEDFLState:
        """The result is pushed as it is; averages come before the next job."""
        scores = component_norms(trained)
        mailbox.push(packed(trained, state.held, scores))
        return replace(state, x=trained, scores=scores)

    def before_job(self, state: AEDFLState, mailbox: Mailbox) -> AEDFLState:
        """Combine what has arrived; every ``refresh`` jobs choose what is held."""
        received = [each for each in mailbox.poll() if self.cutoff is None or each.staleness <= self.cutoff]
        state = combined(state, received, self.weights(received, mailbox))
        if mailbox.version % self.refresh == 0:
            state = replace(state, held=largest(state.scores, self.kept(mailbox.version, state.x.spec)))
        return state

    def weights(self, received: list[Message], mailbox: Mailbox) -> list[float]:
        """``w~_ij`` of every message; what is left of 1 is the receiver's own."""
        return [float(mailbox.weights[each.sender]) * self.xi(each.staleness, mailbox.version) for each in received]

    def xi(self, tau: int, version: int) -> float:
        """The share of its weight that a message of this staleness keeps; ``version``: the receiver's jobs done."""
        fresh = (1 + tau) ** -self.sigma
        if self.staleness == "polynomial":
            return fresh
        s = fresh / max(1, version) ** 0.5
        return s / (1 + s)

    def kept(self, job: int, spec: AdapterSpec) -> int:
        """How many components a client holds after so many jobs, at least one."""
        share = self.density if job >= self.ramp else 1 - (1 - self.density) * job / self.ramp
        return max(1, round(share * components(spec)))

    def model(self, state: AEDFLState) -> Adapters:
        """The adapters, with every component."""
        return state.x


def _values(spec: AdapterSpec, held: Bool[Tensor, "1 component"]) -> int:
    """How many a client sends that holds these components."""
    return int(coordinates(spec, held)[0, spec.shared].sum())


def _vectors(x: Adapters, values: int) -> Schema:
    count = components(x.spec)
    named = {"values": ((values,), x.flat.dtype), "held": ((count,), torch.bool)}
    return named | {"scores": ((count,), x.flat.dtype)}


def packed(x: Adapters, held: Bool[Tensor, "client component"], scores: Float[Tensor, "client component"]) -> Vectors:
    """One client's message."""
    sent = coordinates(x.spec, held)[0, x.spec.shared]
    return {"values": x.flat[0, x.spec.shared][sent], "held": held[0].clone(), "scores": scores[0].clone()}


def combined(state: AEDFLState, received: list[Message], weights: list[float]) -> AEDFLState:
    """One client's average with what it received, coordinate by coordinate over those who hold it."""
    x, shared = state.x, state.x.spec.shared
    own, scores = x.flat[0, shared], state.scores
    flat = x.flat.clone()
    for each, weight in zip(received, weights, strict=True):
        theirs = coordinates(x.spec, each.payload["held"][None])[0, shared]
        flat[0, shared][theirs] += weight * (each.payload["values"] - own[theirs])
        scores = scores + weight * (each.payload["scores"] - state.scores)
    return replace(state, x=replace(x, flat=flat), scores=scores)
