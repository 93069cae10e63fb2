"""SWFP: the blocks of a flow policy train one after another, and all of them are mixed; a reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.gossip import Scheduled
from peerlora.algorithms.traits import Traits
from peerlora.config.task_kinds import task_kind
from peerlora.errors import CompositionError, ConfigError
from peerlora.lora.layer_order import blocks_of
from peerlora.train.base import LocalPlan

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class SWFP(Scheduled):
    """Block ``floor(t / turn) mod N`` of a flow policy trains in round t, by a proximal step; all blocks are mixed.

    Source: inspired by the abstract of the Stepwise Flow Policy, "Iterative Refinement of Flow Policies in Probability
    Space for Online Reinforcement Learning", arXiv 2510.15388: Euler steps as small blocks that are fine-tuned one
    after another, each by one Jordan-Kinderlehrer-Otto step.  Neither full text nor code is public.
    Differs: it cannot be told.  The loss, the critic and all settings are ours (``train.online.proximal``), and so is
    the federation: frozen blocks are mixed, too, so that they agree, as ADF-LoRA mixes the frozen factor.
    """

    interval: int | None = None
    """Sweeps over all N blocks between two switches of the active factor, so that every block trains both; null: both
    train in every round."""
    turn: int = 1
    """Rounds in which one block trains before the next does."""
    traits: ClassVar = Traits(
        source="inspired by SWFP, arXiv 2510.15388; formulas ours",
        trains="one block of the flow, in turn, and the critic; with `interval` B or A of it",
        mixes="A and B of all blocks",
        sends="adapters",
        flow_policies_only=True,
        train_defaults={"optimizer_state": "keep", "local_steps": 30, "batch": 64, "lr": 3e-3},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.turn < 1:
            raise ConfigError(f"algorithm.turn: {self.turn} given; expected at least 1 round")

    def rounds_of_phase(self, blocks: int) -> int | None:
        """Rounds of ``interval`` sweeps."""
        return self.interval and self.interval * self.turn * blocks

    def check_task(self, kind: str) -> None:
        """Only flow policies have blocks that take turns."""
        if not task_kind(kind).acts:
            raise CompositionError(
                f"swfp fine-tunes the blocks of flow policies, task.kind={kind} given; use task.kind=flow-policy with "
                "task.env, or algorithm.name=adf-lora"
            )

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        turn = t // self.turn
        sweep = turn // max(1, blocks_of(x.spec))
        return peers.mix(learner.fit(x, LocalPlan(self.active(sweep), turn=turn)))
