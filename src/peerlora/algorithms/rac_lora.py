"""RAC-LoRA: a chain of blocks, each training one factor against a random frozen one and merging the product."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.algorithms.flora import growth
from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import IN_STEP, REASONS, Traits
from peerlora.errors import ConfigError
from peerlora.exchange.combine import Combined, Received
from peerlora.lora.adapter_init import redrawn
from peerlora.lora.adapters import Block
from peerlora.lora.merged import Merged, Update
from peerlora.lora.product import norms2
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.lora.adapters import Adapters
    from peerlora.topology.schedule import Topology
    from peerlora.train.base import Learner

_LEFT = 0.1  # share of the disagreement norm that may be merged, where the topology says how fast it falls
_NOTHING = 1e-9  # rho of a graph on which one mixing ends all disagreement, up to rounding
_LONGEST = 2  # rounds without training per round with it, at most (less one, for an even number of mixings)


@dataclass(frozen=True)
class RACLoRA(FactorGossip):
    """A block: draw A at random, the same for all, and freeze it; B starts at zero; ``chain`` rounds of K local steps
    on B and ``B_i <- sum_j W_ij B_j``; ``settle`` rounds of mixing alone; then ``weight_i += s B_i A``; the next block.

    Side "left" draws and freezes B and trains A.  A block's directions are random, so a chain reaches every update,
    where one frozen factor reaches those of its own rank only (FFA-LoRA).  With common A the mixing averages products.

    What is merged never meets again, so a disagreement that is merged stays for good: that is what ``settle`` is for.
    By default the topology chooses it, such that a tenth of the disagreement norm is left, or twice ``chain`` mixings
    are made if that is less, and such that a block mixes an even number of times after its last step: along an
    eigenvector of W with a negative eigenvalue an odd power has the wrong sign, and clients would run away from each
    other.  With other data on every client each still drifts towards its own optimum, slowly.  ``mix_merged`` avoids
    all that: frozen factors are common, so the merged ones can be mixed too, for messages that grow with the chain.

    Source: "RAC-LoRA", arXiv 2410.08305, as others describe it: random frozen factor, chain of merges; Fed-RAC-LoRA
    (shared frozen factor, server averages the other, merges) is this method on the complete graph with settle=0.
    Differs (ours): everything decentralised, which means settle and its rule; entries of A as in PEFT's start, of a B
    that is frozen uniform by its rows, 1/sqrt(d_out), where that rule would take 1/sqrt(r); the product is scaled by
    alpha/rank, where the code of an author (hammoudhasan/RACLora) scales by alpha and keeps the optimiser's state at a
    merge: here train.optimizer_state decides, and forgets it by default.
    """

    chain: int = 5
    """Training rounds of a block."""
    settle: int | None = None
    """Rounds of mixing without training before a merge; null: chosen from the topology."""
    mix_merged: bool = False
    """Mix the factors of earlier blocks as well, in every round; settle is 0 unless it is given."""
    side: Literal["right", "left"] = "right"
    """Which factor is drawn and frozen: right is A, left is B."""
    traits: ClassVar = Traits(
        source="RAC-LoRA, arXiv 2410.08305",
        trains="B against a random A (or A against a random B), merged every `chain` rounds",
        mixes="the factor that trains",
        operator="both",
        sends="models",
        sends_gradients=False,
        refuses={"relay": REASONS["merges"]["relay"]},
        requires=Properties(row_stochastic=True, column_stochastic=True, neighbours_only=True),
        training_end=IN_STEP,
        merges_into="base",
    )

    def __post_init__(self):
        if self.chain < 1 or (self.settle is not None and self.settle < 0):
            raise ConfigError(
                f"algorithm.chain={self.chain}, algorithm.settle={self.settle} given; expected at least 1 and 0"
            )

    @property
    def active(self) -> Block:
        """The factor that trains."""
        return "B" if self.side == "right" else "A"

    @property
    def settles(self) -> bool:
        """Whether blocks have rounds without training; on some graphs the topology asks for none."""
        return self.settle > 0 if self.settle is not None else not self.mix_merged

    @property
    def period(self) -> int:
        """Rounds of a block."""
        return self.chain + (self.settle or 0)

    def prepared(self, topology: Topology, rounds: int) -> tuple[RACLoRA, tuple[str, ...]]:
        """With ``settle`` chosen, and why."""
        if self.mix_merged or self.settle is not None:
            risk = "" if self.mix_merged or (self.settle or 0) % 2 else growth(topology)
            return self, ((f"rac-lora merges what clients mixed an odd number of times{risk}",) if risk else ())
        rho, longest = topology.rho(), _LONGEST * self.chain - 1
        mixings = _mixings(rho)
        settle = min(mixings - 1, longest) if mixings else longest  # the last training round mixes too
        return replace(self, settle=settle), (
            f"rac-lora mixes {settle} rounds without training before a merge: with rho = {rho:.4f} about "
            f"{rho ** (settle + 1):.2g} of the disagreement norm of the last local steps is left and stays for good; "
            f"a tenth would take {mixings - 1 if mixings else 'endless'} rounds, at most {longest} are taken; "
            "algorithm.settle sets another number, algorithm.mix_merged=true mixes what was merged as well",
        )

    def trained_rounds(self, rounds: int) -> int:
        """``chain`` of every block, of which the last one may be cut short."""
        blocks, rest = divmod(rounds, self.period)
        return blocks * self.chain + min(rest, self.chain)

    def merged_columns(self, rank: int, senders: int, rounds: int) -> int:
        """One adapter's rank per finished block."""
        return rank * ((rounds - 1) // self.period)

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """The trained factor, a mixed head, and merged factors if they are mixed; frozen ones follow from the seed."""
        earlier = {f".{name}": (tuple(own.shape[1:]), own.dtype) for name, own in self.moving(x).items()}
        return x.select(self.active, "head").message() | earlier

    def start(self, x: Adapters, peers: Exchange) -> Adapters:
        """Nothing merged but the adapter that the run starts from, if it does."""
        x = x.with_empty_merges()
        return x.fold() if x.select("B").flat.any() else x

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round.  A merge is made when the next block begins: until then the block's factors can be looked at."""
        block, place = divmod(t, self.period)
        if place == 0:
            x = x.fold() if block > 0 else x
            x = redrawn(x, "A" if self.side == "right" else "B", peers.shared_random("frozen factor"))
        return self._exchanged(learner.fit(x, self.active) if place < self.chain else x, peers)

    def quiet_round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """The block goes on: what is merged is not mixed again, and a new block would have nothing to mix."""
        return self._exchanged(x, peers)

    def _exchanged(self, x: Adapters, peers: Exchange) -> Adapters:
        """Mix the trained factor, and what was merged where that is mixed too."""
        frozen = {name: factor[0].double() for name, factor in (x.A if self.side == "right" else x.B).items()}
        sent = replace(x.select(self.active, "head"), merged=None)
        x = x.with_blocks(peers.combine(sent, partial(measured_mean, frozen=frozen)))
        moving = self.moving(x)
        return self.moved(x, peers.mix(moving)) if moving else x

    def moving(self, x: Adapters) -> dict[str, Tensor]:
        """What is mixed of earlier blocks.  Their products are averaged exactly: the other factors are common."""
        if not self.mix_merged or x.merged is None:
            return {}
        return {name: getattr(own, self._kind(own)) for name, own in x.merged.layers.items() if not own.empty}

    def moved(self, x: Adapters, mixed: Mapping[str, Tensor]) -> Adapters:
        """With that in its place."""
        assert x.merged is not None
        updates = {name: replace(own, **{self._kind(own): mixed[name]}) for name, own in x.merged.layers.items()}
        return replace(x, merged=Merged(updates))

    def _kind(self, own: Update) -> str:
        return "dense" if own.dense.shape[2] else "left" if self.side == "right" else "right"


def _mixings(rho: float) -> int | None:
    """How many mixings leave a tenth of the disagreement: one that leaves none, else an even number; None: none do."""
    if rho >= 1:
        return None
    if rho < _NOTHING:
        return 1
    needed = math.ceil(math.log(_LEFT) / math.log(rho)) if rho > _LEFT else 1
    return needed + needed % 2


def measured_mean(received: Received, frozen: Mapping[str, Float[Tensor, "row column"]]) -> Combined:
    """The average, and how far the products ``s B_j A`` that reached a receiver were apart: weighted mean square."""
    W, scaling = received.weights, received.scaling
    disagreement = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    for layer, factor in frozen.items():
        right = layer in received.own.B
        own = received.B(layer) if right else received.A(layer)
        off = (own - (W[..., None, None] * own).sum(1, keepdim=True)).flatten(0, 1)
        common = factor.expand(len(off), -1, -1)
        size2 = norms2(off, common) if right else norms2(common, off)
        disagreement += (W * scaling.square() * size2.view_as(W)).sum(1)
    return Combined(received.average(), {"residual_disagreement": disagreement})
