"""The section ``privacy``: differential privacy of a client's rows, or of a client as a whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from peerlora.config.base import PositiveFloat, Section

Unit = Literal["row", "client"]
Accountant = Literal["rdp", "prv"]
Generator = Literal["system", "seeded"]

DELTA_POWER = 1.1  # 1 / rows**1.1, the delta of a client that is given none


class PrivacyConfig(Section):
    """Differential privacy by clipping and noise; each site has its own, as it may promise something else."""

    epsilon: PositiveFloat | None = None
    """What all rounds together may spend, for every client by its own number of rows; give it, or `noise`."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """Noise multiplier: the standard deviation of the noise is this times `clip`; give it, or `epsilon`."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The probability with which epsilon may not hold; null: 1 / rows^1.1 for each client."""
    clip: PositiveFloat = 1.0
    """Largest norm of a row's gradient, or with unit=client of a client's change in a round, over all that trains."""
    unit: Unit = "row"
    """What is protected: single rows in every local step (DP-SGD), or the client with all its rows in every round."""
    accountant: Accountant = "rdp"
    """How epsilon is counted: rdp (Renyi), or prv: some 10 % tighter, and seconds per client with its own rows."""
    generator: Generator | None = None
    """Source of noise and samples: system (cryptographic) or seeded; null: system at real peers, else seeded."""

    @model_validator(mode="after")
    def _one_of_two(self):
        given = [name for name in ("epsilon", "noise") if getattr(self, name) is not None]
        if len(given) != 1:
            what = "both given" if given else "neither given"
            raise ValueError(
                f"epsilon and noise: {what}; expected exactly one of them, for each follows from the other: "
                "privacy.epsilon=8, say"
            )
        return self

    def delta_of(self, rows: int) -> float:
        """The delta of a client with so many rows."""
        return self.delta if self.delta is not None else min(0.5, max(rows, 2) ** -DELTA_POWER)
