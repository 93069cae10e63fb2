"""A point mass in the plane that is pushed to a goal: linear dynamics and quadratic costs, so the optimum is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from peerlora.errors import ConfigError
from peerlora.train.online.environments import POINT_MASS, Controller, EnvironmentFacts, Outcome, Values

ATTRIBUTES = {"goal_x": 0.0, "goal_y": 0.0, "mass": 1.0, "damping": 0.5, "force": 2.0}
"""Attribute -> nominal value: where the goal is, the mass, the friction and the push of an action of 1."""
DT = 0.2  # seconds of a step
EFFORT = 0.3  # cost of a unit of squared action, in units of squared distance
HORIZON = 20  # steps of an episode
FACTS = EnvironmentFacts(POINT_MASS, observation=4, action=2, horizon=HORIZON)


class PointMass:
    """Episodes of a double integrator with friction; a client's goal is not observed, its rewards tell of it.

        x' = x + dt y,    y' = y + dt (force u - damping y) / mass,    reward -dt (|x - goal|^2 + EFFORT |u|^2)

    Observed are x and y, [2] each.  x begins uniformly in [-1, 1]^2, at rest.  No episode ends before its time.
    """

    facts = FACTS

    def __init__(self, episodes: int, values: Values):
        nominal = {name: np.full(episodes, value) for name, value in ATTRIBUTES.items()}
        self.values = {**nominal, **values}
        self.goal = np.stack([self.values["goal_x"], self.values["goal_y"]], axis=1)
        self.state = np.zeros((episodes, 4))

    def reset(self, seeds: Sequence[int]) -> Float[np.ndarray, "episode observation"]:
        """See ``Environment``."""
        starts = np.stack([np.random.default_rng(seed).uniform(-1, 1, 2) for seed in seeds])
        self.state = np.concatenate([starts, np.zeros_like(starts)], axis=1)
        return self.state

    def step(self, actions: Float[np.ndarray, "episode action"]) -> Outcome:
        """See ``Environment``."""
        place, speed = self.state[:, :2], self.state[:, 2:]
        reward = -DT * (np.square(place - self.goal).sum(1) + EFFORT * np.square(actions).sum(1))
        force, damping, mass = (self.values[name][:, None] for name in ("force", "damping", "mass"))
        self.state = np.concatenate([place + DT * speed, speed + DT * (force * actions - damping * speed) / mass], 1)
        never = np.zeros(len(actions), dtype=bool)
        return Outcome(reward, self.state, never, never, self.state)

    def gains(self, horizon: int) -> tuple[Float[np.ndarray, "step episode 2"], Float[np.ndarray, "episode 2 2"]]:
        """The Riccati recursion of one axis: ``u_t = -gains[t] (x - goal, y)``, and the costs' matrix at the start.

        Both axes have the same; actions are not bounded.
        """
        force, damping, mass = (self.values[name] for name in ("force", "damping", "mass"))
        A = np.zeros((len(mass), 2, 2))
        A[:, 0, 0], A[:, 0, 1], A[:, 1, 1] = 1.0, DT, 1.0 - DT * damping / mass
        B = np.stack([np.zeros_like(mass), DT * force / mass], axis=1)[:, :, None]
        Q, P = DT * np.diag([1.0, 0.0]), np.zeros_like(A)
        gains = []
        for _ in range(horizon):
            PB = P @ B
            gain = (PB.swapaxes(1, 2) @ A) / (DT * EFFORT + B.swapaxes(1, 2) @ PB)
            P = Q + A.swapaxes(1, 2) @ P @ (A - B @ gain)
            gains.append(gain[:, 0])
        return np.stack(gains[::-1]), P

    def optimal_returns(self, seeds: Sequence[int], horizon: int) -> Float[np.ndarray, " episode"]:
        """The largest return of every episode if actions had no bounds: no policy in [-1, 1] reaches more."""
        state, (_, P) = self.reset(seeds), self.gains(horizon)
        errors = np.stack([state[:, :2] - self.goal, state[:, 2:]], axis=2)  # [episode, axis, (error, speed)]
        return -np.einsum("eai,eij,eaj->e", errors, P, errors)


def check_values(values: Values, each: int = 1) -> None:
    """Raise ConfigError for values, [environment] by attribute, with which a mass moves as none does.

    ``each``: environments of a client, one client after another.  A step of ``DT`` seconds multiplies the
    speed by ``1 - DT damping / mass``.
    """
    environments = max((len(own) for own in values.values()), default=0)
    nominal = {name: np.full(environments, value) for name, value in ATTRIBUTES.items()}
    mass, damping, force = (({**nominal, **values})[name] for name in ("mass", "damping", "force"))
    wrong = (mass <= 0) | (damping < 0) | (force <= 0) | (DT * damping > 2 * mass)
    if wrong.any():
        i = int(wrong.argmax())
        which = "" if each == 1 else f", environment {i},"
        raise ConfigError(
            f"partition: the {POINT_MASS} of client {i // each}{which} has mass={mass[i]:g}, damping={damping[i]:g}, "
            f"force={force[i]:g}; expected mass and force above 0, and damping from 0 to {2 / DT:g} times the mass"
        )


def point_mass_controller(horizon: int = HORIZON) -> Controller:
    """The first of the optimal gains on the nominal point mass, clipped: a scripted policy."""
    gains, _ = PointMass(1, {}).gains(horizon)

    def act(observation: Float[np.ndarray, "episode observation"]) -> Float[np.ndarray, "episode action"]:
        errors = np.stack([observation[:, :2], observation[:, 2:]], axis=2)
        return np.clip(-errors @ gains[0, 0], -1, 1)

    return act
