"""Episodes of many policies at once: with exploration, to learn from, and without, to be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.errors import DivergenceError
from peerlora.randomness import derive
from peerlora.train.online.environment_names import build_environment
from peerlora.train.online.environments import Environment, Outcome
from peerlora.train.online.episodes import ClientEnvironments, Episodes
from peerlora.train.online.replay import Transitions

Act = Callable[[Tensor, Tensor], Tensor]
"""(observation, noise), both [client, episode, ...] -> actions in [-1, 1]."""


class Explorer:
    """Lets clients act in their own environments, so many episodes in each side by side."""

    def __init__(self, environments: ClientEnvironments, horizon: int, episodes: int):
        self.environments, self.horizon = environments, horizon
        self._in_each, self.episodes = episodes, episodes * environments.each
        """``episodes``: of a client, in all its environments."""
        self._made: tuple[tuple[int, ...], Environment] | None = None

    @torch.no_grad()
    def explore(
        self,
        act: Act,
        clients: Sequence[int],
        seeds: Sequence[int],
        noise: Float[Tensor, "client episode step action"],
        wandering: Float[Tensor, "client episode step action"],
    ) -> Transitions:
        """The transitions of one round, [client, episode * step]; an episode that ends before its time begins anew.

        ``seeds``: per client that of its starts.  ``noise``: what the flow begins with.  ``wandering`` is added to
        actions, which are clipped again.
        """
        environment, each = self._environment(clients), self.episodes
        observation = environment.reset([derive(seed, f"episode {i}") for seed in seeds for i in range(each)])
        split, steps = (len(clients), each), []
        for t in range(self.horizon):
            states = to_tensor(observation, noise).unflatten(0, split)
            action = (act(states, noise[:, :, t]) + wandering[:, :, t]).clamp(-1.0, 1.0)
            found = _step(environment, action.flatten(0, 1))
            after = (
                to_tensor(part, noise).unflatten(0, split) for part in (found.reward, found.reached, found.terminal)
            )
            steps.append((states, action, *after))
            observation = found.observation
        return Transitions(*(torch.stack(part, dim=2).flatten(1, 2) for part in zip(*steps, strict=True)))

    def _environment(self, clients: Sequence[int]) -> Environment:
        """The environments of these clients, kept for the next round, whose clients are mostly the same."""
        if self._made is None or self._made[0] != tuple(clients):
            values = self.environments.of(clients, self._in_each)
            made = build_environment(self.environments.env, len(clients) * self.episodes, values)
            self._made = tuple(clients), made
        return self._made[1]


@torch.no_grad()
def returns(act: Act, policies: int, episodes: Episodes, like: Tensor) -> Float[np.ndarray, "policy episode"]:
    """Every policy's return in every episode, without exploration, until it ends or its time is up.

    All policies of an episode begin with the same start and see the same noise, which its seed decides.
    """
    environment, total = episodes.environment(policies), np.zeros((policies, len(episodes)))
    observation = environment.reset(list(episodes.seeds) * policies)
    noise = episode_noise(episodes, environment.facts.action, like)
    going = np.ones_like(total, dtype=bool)
    for t in range(episodes.horizon):
        states = to_tensor(observation, like).unflatten(0, total.shape)
        action = act(states, noise[:, t].expand(policies, -1, -1))
        found = _step(environment, action.flatten(0, 1))
        total += np.where(going, found.reward.reshape(total.shape), 0.0)
        going &= ~found.ended.reshape(total.shape)
        observation = found.observation
        if not going.any():
            break
    return total


@torch.no_grad()
def record(act: Act, episodes: Episodes, like: Tensor) -> Float[np.ndarray, "episode step observation"]:
    """What one policy observes in these episodes, without exploration; an episode that ends begins anew."""
    environment = episodes.environment(1)
    observation, seen = environment.reset(list(episodes.seeds)), []
    noise = episode_noise(episodes, environment.facts.action, like)
    for t in range(episodes.horizon):
        seen.append(observation)
        action = act(to_tensor(observation, like)[None], noise[None, :, t])
        observation = _step(environment, action[0]).observation
    return np.stack(seen, axis=1)


def _step(environment: Environment, actions: Float[Tensor, "episode action"]) -> Outcome:
    """Let every episode take an action; raises DivergenceError for what an environment tells in no finite numbers."""
    with np.errstate(all="ignore"):  # what comes of it is looked at
        found = environment.step(actions.double().numpy())
    if not (np.isfinite(found.reward).all() and np.isfinite(found.reached).all()):
        if not bool(actions.isfinite().all()):
            return found  # it is the policy that diverged, which its loss will tell
        raise DivergenceError(
            f"{environment.facts.name} gives rewards or observations that are not finite; choose other values of its "
            "attributes (partition.vary, partition.values), or a shorter online.horizon"
        )
    return found


def episode_noise(episodes: Episodes, actions: int, like: Tensor) -> Float[Tensor, "episode step action"]:
    """What the flow begins with at every step of every episode, standard normal."""
    generators = [torch.Generator().manual_seed(seed) for seed in episodes.seeds]
    shape = (episodes.horizon, actions)
    return torch.stack([torch.randn(shape, generator=each, dtype=torch.float64) for each in generators]).to(like)


def to_tensor(values: np.ndarray, like: Tensor) -> Tensor:
    """Of an environment, in the precision of the policy."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.dtype)
