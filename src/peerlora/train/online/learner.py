"""The learner of flow policies: every client acts in its own environment, and all train in one stacked model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.config.online import OnlineConfig
from peerlora.config.train import TrainConfig
from peerlora.errors import CompositionError, DivergenceError
from peerlora.lora.adapters import Adapters, AdapterSpec, Block
from peerlora.lora.attach import StackedModel
from peerlora.lora.layer_order import columns_reached, depth_of
from peerlora.randomness import derive
from peerlora.train.backward_depth import TrainableColumns
from peerlora.train.base import LocalPlan, Scores
from peerlora.train.closure import Closure, autograd_views, flat_gradients
from peerlora.train.local_rules import ClientRows, LocalStep
from peerlora.train.local_training import LocalTraining
from peerlora.train.online.episodes import ClientEnvironments, Episodes
from peerlora.train.online.flow import FLOW, FlowPolicy, twin_values
from peerlora.train.online.lessons import Lessons, make_lessons, stacked_actions
from peerlora.train.online.losses import Head, critic_losses, policy_losses, step_targets
from peerlora.train.online.measures import SAMPLES, measure_policies
from peerlora.train.online.replay import Replay
from peerlora.train.online.rollout import Explorer, returns
from peerlora.train.online.task import FlowPolicyTask
from peerlora.train.optim import Moments, step
from peerlora.tree import equal_rows

_DIVERGED = 10.0  # times the largest value that rewards allow, beyond which a critic has lost them


class OnlineLearner(LocalTraining):
    """The Learner of flow policies: it acts, remembers, and takes local steps on critic and blocks.

    A fit begins with ``online.episodes`` episodes of every client that trains, whose policy explores.  Its local steps
    draw from the replay buffer; all targets come from the policy with which the fit began.  Whoever trains together,
    each client's draws are its own.
    """

    task = FlowPolicyTask()

    def __init__(
        self,
        model: StackedModel,
        environments: ClientEnvironments,
        numbers: Sequence[int],
        settings: TrainConfig,
        online: OnlineConfig,
        horizon: int,
        seed: int,
    ):
        settings = settings.model_copy(update={"head_rate": online.critic_rate})  # the critic is the head
        super().__init__(settings, numbers)
        assert isinstance(model.base, FlowPolicy) and isinstance(settings.batch, int)
        self.model, self.policy, self.environments = model, model.base, environments
        self.online, self.horizon, self.seed, self.batch = online, horizon, seed, settings.batch
        self.explorer = Explorer(environments, horizon, online.episodes)
        weight = next(self.policy.parameters())
        shape = self.policy.config
        self.replay = Replay(len(self._numbers), online.replay, shape.observation, shape.action, weight.dtype)
        self.target: Float[Tensor, "client head"] | None = None
        """The critics that follow those of the clients; None before the first fit."""

    def _counts_layers(self, plan: LocalPlan) -> bool:
        return True

    def _groups(
        self, spec: AdapterSpec, blocks: tuple[Block, ...], plan: LocalPlan, per_layer_moments: bool
    ) -> Iterator[tuple[ClientRows, TrainableColumns]]:
        """All clients that train, with the columns of the critic and of the flow's blocks whose turn it is."""
        assert plan.depth is None and plan.row_weights is None, "refused before"
        if not self._round.clients:
            return
        every = columns_reached(spec, blocks, depth_of(spec), True)
        numbers = {1, *(depth_of(spec) - block for block in self._turns(plan))}  # counted from the head down
        active = {name: own for name, own in every.items() if int(name.partition(":")[2]) in numbers}
        yield self._round.clients, TrainableColumns(active, active)

    def _turns(self, plan: LocalPlan) -> list[int]:
        """The flow's blocks that train, or 0 of a net: none while the critic trains alone."""
        blocks = self.policy.config.blocks if self.policy.config.actor == FLOW else 1
        if self._round.t < self.online.critic_rounds or self.online.policy == "cloned":
            return []
        return list(range(blocks)) if plan.turn is None else [plan.turn % blocks]

    def _take_steps(
        self, x: Adapters, clients: ClientRows, columns: TrainableColumns, moments: Moments, plan: LocalPlan
    ) -> Float[Tensor, " client"]:
        """All local steps of some clients, in place on ``x.flat`` and ``moments``; returns their mean losses."""
        self._bind(x)
        self._explore(x, clients)
        lessons, active, turns = self._lessons(clients), columns.full, self._turns(plan)
        critic, start = x.spec.columns("head"), x.flat.clone()
        target, seen = self._targets(x)[clients], []
        views = autograd_views(x, active)
        self.model.bind(x.spec, views, x.scaling, x.merged)
        head = {slot.name: view for slot, view in zip(x.spec.slots, views, strict=True) if slot.block == "head"}
        for k in range(self.settings.local_steps):
            followed = dict(zip(head, _split(target, head), strict=True))
            minibatches = [self._minibatch(lessons, at, head, followed, turns) for at in self._places(k)]
            trained = [view for view in views if view.requires_grad]
            closure = Closure(minibatches, trained, [], repeats=plan.rule is not None)
            at = LocalStep(x.flat, start, active, clients, partial(flat_gradients, x, closure, active))
            found = at.gradient() if plan.rule is None else plan.rule.gradient(at)
            step(self.settings, self._round.rate, x.flat, found, moments, active)
            target.lerp_(x.flat[:, critic], self.online.target_rate)
            assert closure.losses is not None, "a rule has to look at the minibatch"
            seen.append(closure.losses)
        seen.append(x.flat.abs().amax(1))
        self._targets(x)[clients] = target
        self._bind(x)
        self._measure(lessons, clients)
        losses = self._mean_losses(seen, clients)
        self._require_sane_critics(head, lessons, clients)
        return losses

    def _targets(self, x: Adapters) -> Float[Tensor, "client head"]:
        """The critics that follow; at first they are those that all clients begin with."""
        if self.target is None:
            self.target = x.flat[:1, x.spec.columns("head")].repeat(len(self._numbers), 1)
        return self.target

    def _bind(self, x: Adapters) -> None:
        """Let the policies act with these adapters, in passes that need no gradients."""
        self.model.bind_adapters(x)
        if self.settings.fast:
            self.model.form_weights()

    def _explore(self, x: Adapters, clients: ClientRows) -> None:
        """Let the clients act with the policies that are bound, and remember what happened."""
        shape = (self.explorer.episodes, self.horizon, self.policy.config.action)
        noise, wandering = (self._normal(purpose, clients, shape, x.flat) for purpose in ("actions", "exploration"))
        seeds = [self._derived("episodes", i) for i in clients]
        numbers = [self._numbers[i] for i in clients]
        level = exploration(self.online, self.settings, self._round.t)
        self.replay.add(clients, self.explorer.explore(self.act, numbers, seeds, noise, level * wandering))

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions of the policies that are bound; leaves [client, row, ...]."""
        return stacked_actions(self.policy, observation, noise)

    def _lessons(self, clients: ClientRows) -> Lessons:
        """All minibatches of a fit, one after another, with what the policies that are bound do in them."""
        rows = self.settings.local_steps * self.settings.accumulate * self.batch
        seen = self.replay.draw(clients, [self._generator("replay", i) for i in clients], rows)
        noise = self._normal("flow", clients, (rows, self.policy.config.action), seen.action)
        return make_lessons(self.policy, seen, noise)

    def _places(self, k: int) -> list[slice]:
        """The rows of the minibatches of local step ``k``."""
        several, size = self.settings.accumulate, self.batch
        return [slice(at * size, (at + 1) * size) for at in range(k * several, (k + 1) * several)]

    def _minibatch(
        self, lessons: Lessons, rows: slice, head: Head, target: Head, turns: Sequence[int]
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """The losses of a minibatch at the adapters that are bound when it is called; its targets are fixed now."""
        part = lessons.part(rows)
        targets = step_targets(self.online, part, head, target, turns, self.policy.config.actor)

        def losses() -> tuple[Tensor, Tensor]:
            own = critic_losses(head, part, targets)
            own = own + policy_losses(self.policy, self.online, part, targets)
            return own, torch.ones_like(own)

        return losses

    def _measure(self, lessons: Lessons, clients: ClientRows) -> None:
        """Tell the round's stats how far the policies have moved, on the last minibatch."""
        noise = self._normal("spread", clients, (SAMPLES, self.policy.config.action), lessons.following)
        last = lessons.part(self._places(self.settings.local_steps - 1)[-1])
        for name, values in measure_policies(self.policy, last, noise).items():
            self._round.stats.measures[name] = values.tolist()

    def _require_sane_critics(self, head: Head, lessons: Lessons, clients: ClientRows) -> None:
        """Raise DivergenceError where a critic values actions far beyond all that rewards allow."""
        with torch.no_grad():
            last = lessons.part(self._places(self.settings.local_steps - 1)[-1]).seen
            values = twin_values(head, last.observation, last.action).abs().mean((0, 2))
        largest = self.online.reward_scale * self.replay.largest_reward(clients) / (1 - self.online.discount)
        bad = (values > _DIVERGED * largest.clamp_min(1.0)).nonzero()
        if len(bad):
            row = int(bad[0, 0])
            raise DivergenceError(
                f"the critic of client {self._numbers[clients[row]]} values actions at {float(values[row]):.3g} in "
                f"round {self._round.jobs[clients[row]] + 1}; the largest reward and online.discount="
                f"{self.online.discount:g} allow {float(largest[row]):.3g}; lower train.lr (now "
                f"{self.settings.lr:g}), online.critic_rate or online.discount, or set train.clip"
            )

    @torch.no_grad()
    def evaluate(self, x: Adapters, data: Episodes, batch: int, metrics: Sequence[str] = ()) -> Scores:
        """See ``Learner``: the mean return of every client's policy in these episodes, ``batch`` of them at a time."""
        if x.clients > 1 and equal_rows(x):
            return self.evaluate(x.rows(slice(0, 1)), data, batch, metrics).repeat(x.clients)
        self._bind(x)
        parts = [data.take(np.arange(at, min(at + batch, len(data)))) for at in range(0, len(data), batch)]
        found = np.concatenate([returns(self.act, x.clients, part, x.flat) for part in parts], axis=1)
        more = {name: _METRICS[name](found, data) for name in metrics}
        return Scores(found.mean(1), -found.mean(1), len(data), more)

    def score(self, x: Adapters, measure: Any, batch: int = 64) -> Float[Tensor, "client row"]:
        """See ``Learner``; raises CompositionError, since no client has rows."""
        raise CompositionError("clients of task.kind=flow-policy have no rows to score; use algorithm.name=dec-lora")

    def _generator(self, purpose: str, client: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._derived(purpose, client))

    def _derived(self, purpose: str, client: int) -> int:
        return derive(self.seed, f"policy {purpose}", client=self._numbers[client], round=self._round.jobs[client])

    def _normal(self, purpose: str, clients: ClientRows, shape: Sequence[int], like: Tensor) -> Tensor:
        """[client, *shape] standard normal, each client's by its own generator."""
        drawn = [torch.randn(*shape, generator=self._generator(purpose, i), dtype=torch.float64) for i in clients]
        return torch.stack(drawn).to(like.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """See ``Learner``: the optimiser's memory, the replay buffers and the critics that follow."""
        kept = {f"replay.{name}": value for name, value in self.replay.state_dict().items()}
        return super().state_dict() | kept | ({} if self.target is None else {"target": self.target})

    def load_state_dict(self, saved: Mapping[str, Tensor], trained: Sequence[str]) -> None:
        """See ``Learner``."""
        super().load_state_dict(saved, trained)
        kept = {name.removeprefix("replay."): value for name, value in saved.items() if name.startswith("replay.")}
        if kept:
            self.replay.load_state_dict(kept)
        self.target = saved["target"].clone() if "target" in saved else None


def exploration(online: OnlineConfig, train: TrainConfig, t: int) -> float:
    """The standard deviation of exploration in round ``t``: from ``noise`` linearly to ``noise_end``."""
    last = max(train.training_rounds - 1, 1)
    return online.noise + (online.noise_end - online.noise) * min(t / last, 1.0)


def share_of_optimum(found: Float[np.ndarray, "policy episode"], data: Episodes) -> Float[np.ndarray, " policy"]:
    """The optimal over the reached costs, in (0, 1], where every return is a cost and the optimum is known."""
    return data.optimal_returns().sum() / found.sum(1)


_METRICS = {"share-of-optimum": share_of_optimum}


def _split(flat: Float[Tensor, "client head"], like: Head) -> list[Tensor]:
    """Columns of the flat buffer as the tensors of a head, in its order."""
    parts = flat.split([each[0].numel() for each in like.values()], dim=1)
    return [part.view_as(each) for part, each in zip(parts, like.values(), strict=True)]
