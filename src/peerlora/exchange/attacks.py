"""Clients that attack: what they send in place of their adapters.

They know everything: the honest clients' models of this round, W, and the common start.  Sources of the attacks: ALIE,
Baruch et al. 2019, arXiv 1902.06156; IPM, Xie et al. 2019, arXiv 1903.03936; dissensus, He et al. 2022, arXiv
2202.01545.  Models are attacked by their update since the common start ``x_0``, as (-A, -B) would be the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.config.exchange import AdversaryConfig
from peerlora.errors import CompositionError, ConfigError
from peerlora.exchange.combine import CombineRule
from peerlora.exchange.wrapper import ExchangeWrapper
from peerlora.lora.adapters import Adapters
from peerlora.randomness import numpy_generator, torch_generator
from peerlora.topology.storage import Matrix, as_dense, dense_rows
from peerlora.tree import tree_map


@dataclass(frozen=True)
class AttackContext:
    """What an attack may use."""

    x: Float[Tensor, "client parameter"]
    """All clients' true models."""
    base: Float[Tensor, " parameter"]
    """The common start."""
    W: Float[Tensor, "client client"]
    attackers: Sequence[int]
    scale: float | None
    noise: Callable[[int], torch.Generator]
    """Of one client in this round."""

    @property
    def own(self) -> Float[Tensor, "attacker parameter"]:
        """The attackers' true models."""
        return self.x[list(self.attackers)]

    @property
    def honest(self) -> Float[Tensor, "honest parameter"]:
        """The others'."""
        return self.x[[i for i in range(len(self.x)) if i not in self.attackers]]

    def strength(self, default: float) -> float:
        """``scale``, or the attack's own."""
        return default if self.scale is None else self.scale


def sign_flip(context: AttackContext) -> Tensor:
    """``x_0 - scale (x - x_0)``: the own update turned round."""
    return context.base - context.strength(1.0) * (context.own - context.base)


def gaussian(context: AttackContext) -> Tensor:
    """``x + scale`` times standard normal noise."""
    drawn = [
        torch.randn(context.x.shape[1], generator=context.noise(i), dtype=torch.float64) for i in context.attackers
    ]
    return context.own + context.strength(1.0) * torch.stack(drawn).to(context.x)


def alie(context: AttackContext) -> Tensor:
    """``mean - z std`` of the honest models, coordinate by coordinate: a little is enough.

    z is the normal quantile of ``(n - b - s) / (n - b)`` with ``s = floor(n / 2 + 1) - b``: as far out as the honest
    clients that are needed for a majority.
    """
    b = len(context.attackers)
    z = context.strength(alie_quantile(len(context.x), b))
    honest = context.honest
    return (honest.mean(0) - z * honest.std(0, correction=0)).expand(b, -1)


def alie_quantile(clients: int, attacking: int) -> float:
    """ALIE's z for so many attackers among so many clients; at 0 or below they send no worse than the honest mean."""
    honest = clients - attacking
    share = (honest - (clients // 2 + 1 - attacking)) / honest
    return NormalDist().inv_cdf(min(0.99, max(0.01, share)))


def ipm(context: AttackContext) -> Tensor:
    """``x_0 - scale`` times the honest mean update: its inner product with theirs is negative."""
    return (context.base - context.strength(0.5) * (context.honest.mean(0) - context.base)).expand(
        len(context.attackers), -1
    )


def dissensus(context: AttackContext) -> Tensor:
    """``x_b - scale sum_k w_bk (x_k - x_b)``: away from where the neighbours are.

    Differs: the paper sends every receiver another message; here a client says the same to all.
    """
    pull = context.W[list(context.attackers)].to(context.x) @ context.x - context.own
    return context.own - context.strength(1.0) * pull


ATTACKS: dict[str, Callable[[AttackContext], Tensor]] = {
    "sign-flip": sign_flip,
    "gaussian": gaussian,
    "alie": alie,
    "ipm": ipm,
    "dissensus": dissensus,
}
"""label-flip is not among them: it changes what a client learns from, and then what it sends is true."""


def attackers(config: AdversaryConfig | None, clients: int, seed: int) -> tuple[int, ...]:
    """The numbers of the clients that attack.

    Raises ConfigError where there is no such client, or nobody honest is left.
    """
    if config is None:
        return ()
    wanted = config.clients
    count = wanted if isinstance(wanted, int) else len(set(wanted))
    if count >= clients or not isinstance(wanted, int) and max(wanted) >= clients:
        raise ConfigError(
            f"adversary.clients={wanted} given; expected less than all of the {clients} clients, numbered 0 to "
            f"{clients - 1}"
        )
    if isinstance(wanted, int):
        wanted = numpy_generator(seed, "adversary").choice(clients, wanted, replace=False).tolist()
    return tuple(sorted(set(wanted)))


def flipped_labels(labels: np.ndarray, rows: np.ndarray, classes: int) -> np.ndarray:
    """The labels with those of some rows turned round: class c becomes ``classes - 1 - c``."""
    changed = labels.copy()
    changed[rows] = classes - 1 - labels[rows]
    return changed


class Adversarial(ExchangeWrapper):
    """An Exchange in which some clients send what an attack makes of everybody's models.

    An attacker itself goes on from the plain average of the true models around it, whatever it has sent.
    """

    def __init__(self, peers: Any, config: AdversaryConfig, who: Sequence[int], start: Adapters, seed: int):
        super().__init__(peers)
        self.attack, self.scale = ATTACKS[config.attack], config.scale
        self.who, self.start, self.seed = list(who), start, seed

    def mix(self, x: Any, target: str | None = None) -> Any:
        """Mix with attacked adapters; all other leaves are true."""
        true: dict[str, Adapters] = {}

        def attacked(name: str, leaf: Any) -> Any:
            if not isinstance(leaf, Adapters):
                return leaf
            true[name] = leaf
            return self._sent(leaf)

        def own_goes_on(name: str, leaf: Any) -> Any:
            return self._own_goes_on(true[name], leaf) if name in true else leaf

        mixed = self.peers.mix(tree_map(attacked, x, leaf=_LEAVES), target)
        return tree_map(own_goes_on, mixed, leaf=_LEAVES)

    def combine(self, x: Adapters, rule: CombineRule, merged: bool = False) -> Adapters:
        """Combines what is sent."""
        return self._own_goes_on(x, self.peers.combine(self._sent(x), rule, merged))

    def mix_cached(self, x: Adapters) -> Adapters:
        """Average a cache into which attackers send what the attack makes; all around an attacker count alike."""
        around = as_dense(self.peers.graph.adjacency) | np.eye(self.peers.graph.clients, dtype=bool)
        W = around / around.sum(axis=1, keepdims=True)
        return self._own_goes_on(x, self.peers.mix_cached(self._sent(x, W)), W)

    def mix_differences(self, x: Adapters, sent: Any) -> Tensor:
        """Refused: the message is already made."""
        raise CompositionError("choco cannot be attacked; use dec-lora with exchange.codec, or attack=label-flip")

    def _sent(self, x: Adapters, W: Matrix | None = None) -> Adapters:
        """What crosses; ``W``: weights of who is around, those of the round by default."""
        shared, places = x.spec.shared, self.start.spec.columns_of(x.spec)
        context = AttackContext(
            x.flat[:, shared],
            self.start.flat[0, places],
            torch.from_numpy(as_dense(self.peers.graph.W if W is None else W)),
            self.who,
            self.scale,
            lambda client: torch_generator(self.seed, "attack", client=client, round=self.peers.t),
        )
        flat = x.flat.clone()
        flat[self.who, shared] = self.attack(context)
        return replace(x, flat=flat)

    def _own_goes_on(self, x: Adapters, mixed: Adapters, W: Matrix | None = None) -> Adapters:
        flat, shared = mixed.flat.clone(), x.spec.shared
        own = dense_rows(self.peers.graph.W if W is None else W, self.who)
        flat[self.who, shared] = torch.from_numpy(own).to(x.flat) @ x.flat[:, shared]
        return replace(mixed, flat=flat)


_LEAVES = (Adapters, Tensor)
