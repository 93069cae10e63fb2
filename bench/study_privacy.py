"""Studies of methods under differential privacy: who learns most at which epsilon, and what noise does to products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study_base import LEARNED, Study, Tree, base, grid, row
from study_tasks import FACTORS

EPSILONS: dict[str, Any] = {"2": 2, "4": 4, "8": 8, "inf": None}
SEEDS = [0, 1, 2]
BATCH = 64
"""Rows of a step, on average: eight times those of the other studies, since noise does not grow with them."""
ROUNDS = {"sst2": 15, "agnews": 12}
"""A client of SST-2, with some 5,960 rows, sees each 0.8 times, one of AG News, with some 500, 7.7 times."""
MEETING = 0.1
"""Probability that two clients meet in a round."""
TRAINED = {**LEARNED, "label_prior": "none"}
"""The recipe's training without the loss that knows label counts, which privacy refuses."""


def private(method: Any, epsilon: float | None) -> Tree:
    """A row: method and epsilon, without noise and clipping where there is none."""
    kept = {**TRAINED, "batch": BATCH}
    return row(method, **kept) | ({} if epsilon is None else {"privacy": {"epsilon": epsilon}})


def private_rows(task: str) -> Study:
    """Methods by epsilon, each with a rate of its own; those without noise are what it costs."""

    def parts(data: Path) -> list[Tree]:
        common = base(task, data, MEETING, ROUNDS[task])
        systems = {
            f"{name}, epsilon = {told}": private(method, epsilon)
            for name, method in FACTORS.items()
            for told, epsilon in EPSILONS.items()
        }
        found = grid(task, common, systems)
        each = [name for name in found["search"]["each"] if not name.startswith("privacy")]
        return [found | {"seeds": SEEDS, "search": found["search"] | {"each": [*each, "privacy.epsilon"]}}]

    return Study(parts, "privacy.md", {"system": "dec-lora, epsilon = inf"})


STUDIES: dict[str, Study] = {f"privacy-{task}": private_rows(task) for task in ("sst2", "agnews")}


def product_noise(
    a: float, b: float, d_out: int, d_in: int, rank: int, deviation_A: float, deviation_B: float
) -> dict[str, float]:
    """The mean squared norm of what noise on the factors adds to B A, by term.

    ``a`` and ``b``: squared norms of A [rank, d_in] and B [d_out, rank]; noise is independent in all entries.  With one
    factor frozen its deviation is 0, and the quadratic term with it.
    """
    return {
        "B": deviation_B**2 * d_out * a,
        "A": deviation_A**2 * d_in * b,
        "quadratic": deviation_A**2 * deviation_B**2 * rank * d_in * d_out,
    }


def noise_cross_term(clients: int, d_out: int, d_in: int, rank: int, deviation_A: float, deviation_B: float) -> float:
    """The mean cross-term that noise alone makes of clients with equal factors: E |mean(B A) - mean(B) mean(A)|^2.

    ``cov / N`` of N clients, with the sample covariance of their noise: (N - 1) / N^2 times the quadratic term.
    """
    term = product_noise(0, 0, d_out, d_in, rank, deviation_A, deviation_B)["quadratic"]
    return (clients - 1) / clients**2 * term
