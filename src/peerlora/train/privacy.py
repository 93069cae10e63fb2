"""Differential privacy in local training: sampled rows, clipped gradients, noise, and how often each was spent.

Row level is DP-SGD (Abadi et al. 2016, arXiv 1607.00133): rows sampled one by one, gradients clipped row by row, noise
on their sum, a denominator that does not depend on the draw.  Client level is the clipped and noised change of a round
of DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963), without a server: every client adds noise of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.config.privacy import PrivacyConfig
from peerlora.errors import CompositionError
from peerlora.lora.adapters import Adapters, mask_ranks
from peerlora.runs.privacy_ledger import Release
from peerlora.train.accounting import spent_epsilon
from peerlora.train.local_rules import ClientRows, Gradients
from peerlora.train.optim import norms
from peerlora.train.private_draws import PrivateDraws, SystemDraws

_TINY = 1e-6  # joins a norm that is divided by, as in torch's and opacus' clipping


@dataclass(frozen=True)
class Guarantee:
    """What one client is promised, and by which noise."""

    rows: int
    """Training rows of its shard."""
    rate: float
    """Probability with which each of its rows is in a step; 1 at client level."""
    noise: float
    """Noise multiplier."""
    delta: float
    releases: int
    """Noisy gradients, or changes, of all rounds together; with ``privacy.epsilon`` there are no more."""

    @property
    def expected_rows(self) -> float:
        """Rows of a step, on average: the fixed denominator."""
        return self.rate * self.rows


class PrivateTraining:
    """Makes what the clients held here learn from private rows differentially private, and counts what it costs.

    ``clients``: their numbers, by which draws are told apart.  ``steps``: local steps of a round.
    """

    def __init__(
        self,
        settings: PrivacyConfig,
        clients: Sequence[int],
        guarantees: Sequence[Guarantee],
        draws: PrivateDraws,
        steps: int,
    ):
        self.settings, self.clients, self.guarantees, self.draws = settings, clients, guarantees, draws
        self.by_row = settings.unit == "row"
        self.releases = [0] * len(clients)
        """[client] noisy releases so far."""
        self.record: Callable[[Sequence[Release]], None] = lambda releases: None
        """Called with what the jobs of a round will release, before any of it is made."""
        self._per_job = steps if self.by_row else 1
        self._exhausted: list[int] = []

    @property
    def repeatable(self) -> bool:
        """Whether noise comes from seeds, so that a repeated round gives what it gave, and nothing is promised."""
        return not isinstance(self.draws, SystemDraws)

    def admit(self, clients: ClientRows, jobs: Sequence[int]) -> ClientRows:
        """Those of these clients whose budget allows a job of local steps, which is counted before it begins."""
        admitted = [i for i in clients if self._affords_job(i)]
        ended = [self.clients[i] for i in clients if i not in admitted]
        self._exhausted += [client for client in ended if client not in self._exhausted]
        if admitted:
            self.record([Release(self.clients[i], jobs[i], self._per_job) for i in admitted])
        for i in admitted:
            self.releases[i] += self._per_job
        return admitted

    def refuse(self, does: str) -> NoReturn:
        """Raise CompositionError for what a method ``does`` with private rows beside gradients of them."""
        raise CompositionError(
            f"the method {does}, which no noise of privacy covers; drop privacy, or use another method, such as "
            "algorithm.name=dec-lora"
        )

    def _affords_job(self, i: int) -> bool:
        return self.settings.epsilon is None or self.releases[i] + self._per_job <= self.guarantees[i].releases

    @property
    def exhausted(self) -> tuple[int, ...]:
        """The numbers of clients that were not admitted, in the order in which that came."""
        return tuple(self._exhausted)

    def spent(self) -> dict[str, list[float]]:
        """[client] epsilon and releases so far."""
        epsilons = [
            spent_epsilon(each.noise, each.rate, releases, each.delta, self.settings.accountant)
            for each, releases in zip(self.guarantees, self.releases, strict=True)
        ]
        return {"epsilon": epsilons, "releases": [float(each) for each in self.releases]}

    def load_state_dict(self, saved: Mapping[str, Any], recorded: Iterable[tuple[int, int]]) -> None:
        """Go on from a checkpoint's ``saved`` count and the ``recorded`` (client, releases) of all that ever ran.

        What a run did after its checkpoint counts, too, since it may have been sent; seeded noise gives it again.
        """
        self.releases = list(saved.get("releases", [0] * len(self.clients)))
        self._exhausted = list(saved.get("exhausted", []))
        if self.repeatable:
            return
        total = dict.fromkeys(self.clients, 0)
        for client, releases in recorded:
            total[client] = total.get(client, 0) + releases
        self.releases = [max(own, total[client]) for own, client in zip(self.releases, self.clients, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"releases": list(self.releases), "exhausted": list(self._exhausted)}

    # --- rows

    def sample(self, i: int, job: int, shard: Int[np.ndarray, " row"], steps: int, parts: int) -> list[np.ndarray]:
        """Rows of each local step of a job, every row with the client's rate, in ``parts`` pieces; some are empty."""
        drawn = self.draws.uniform(len(shard), "privacy rows", self.clients[i], job)
        steps_rows = [shard[next(drawn) < self.guarantees[i].rate] for _ in range(steps)]
        return [piece for rows in steps_rows for piece in np.array_split(rows, parts)]

    def add_gradient_noise(self, x: Adapters, sums: Gradients, at: PrivateStep) -> Gradients:
        """Mean gradients from clipped sums: noise is added, and the result divided by the expected number of rows."""
        noise = self._noise(x, at, f"privacy step {at.step}")
        expected = [self.guarantees[i].expected_rows for i in at.clients]
        divisor = torch.tensor(expected, dtype=x.flat.dtype, device=x.flat.device)[:, None]
        return {name: (sums[name] + noise[:, columns]) / divisor for name, columns in at.active.items()}

    # --- clients

    def release_change(self, x: Adapters, before: Float[Tensor, "client parameter"], at: PrivateStep) -> None:
        """Clip what a round has changed since ``before``, and add noise, in place."""
        change = {name: x.flat[:, columns] - before[:, columns] for name, columns in at.active.items()}
        factor = clip_factor(norms(change), self.settings.clip)[:, None]
        noise = self._noise(x, at, "privacy round")
        for name, columns in at.active.items():
            x.flat[:, columns] = before[:, columns] + factor * change[name] + noise[:, columns]

    def _noise(self, x: Adapters, at: PrivateStep, purpose: str) -> Float[Tensor, "client parameter"]:
        """Noise in the active columns, none elsewhere and none beyond a client's rank."""
        noise = torch.zeros(x.flat.shape, dtype=x.flat.dtype)
        places = torch.cat([torch.arange(columns.start, columns.stop) for columns in at.active.values()])
        for own, i in zip(noise, at.clients, strict=True):
            drawn = self.draws.normal(len(places), purpose, self.clients[i], at.jobs[i])
            own[places] = torch.from_numpy(self.guarantees[i].noise * self.settings.clip * drawn).to(noise.dtype)
        return mask_ranks(replace(x, flat=noise.to(x.flat.device))).flat


@dataclass(frozen=True)
class PrivateStep:
    """Where noise is added: which columns of which clients, and by which draws."""

    active: Mapping[str, slice]
    clients: ClientRows
    """Rows of the client axis held here."""
    jobs: Sequence[int]
    """Of every client held here, the number that decides its draws."""
    step: int = 0


def clip_factor(lengths: Float[Tensor, " vector"], largest: float) -> Float[Tensor, " vector"]:
    """What vectors of these lengths are multiplied by to be no longer than ``largest``."""
    return (largest / (lengths + _TINY)).clamp_max(1.0)
