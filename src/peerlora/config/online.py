"""The section ``online``, and the partition of environments: how clients of ``task.kind=flow-policy`` act and learn."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from peerlora.config.base import PositiveFloat, Rate, Section


class OnlineConfig(Section):
    """How a flow policy acts in its environment and learns from it; for task.kind=flow-policy only."""

    policy: Literal["flow", "steered", "one-step", "cloned"] = "flow"
    """What is fine-tuned: the flow; a net that steers its noise; a one-step net distilled from it; or nothing."""
    episodes: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Episodes in each of a client's environments at the start of every round, side by side."""
    horizon: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """Steps of an episode; null: those of the environment."""
    evaluated: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Episodes of every environment in an evaluation."""
    demonstrations: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Episodes of the scripted controller on the nominal environment, from which the policy is pre-trained."""
    pretraining: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    """Steps of flow matching on them, of all blocks at once, each on its own slice of time."""
    replay: Annotated[int, Field(ge=1, le=10_000_000)] = 20_000
    """Transitions that a client keeps; the oldest go first."""
    noise: Annotated[float, Field(ge=0)] = 0.2
    """Standard deviation of what is added to actions, in [-1, 1], where clients explore; at the start."""
    noise_end: Annotated[float, Field(ge=0)] = 0.05
    """The same in the last training round; it falls linearly."""
    discount: Rate = 0.95
    """Gamma, per step of the environment."""
    reward_scale: PositiveFloat = 1.0
    """The critic learns rewards times this; returns are told without it."""
    critic_rounds: Annotated[int, Field(ge=0)] = 5
    """Rounds at the start in which the critic trains alone."""
    critic_rate: PositiveFloat = 1.0
    """The critic's learning rate, as a multiple of train.lr."""
    target_rate: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Share by which the target critic follows the critic after each local step."""
    beta: PositiveFloat = 1.0
    """The trust region: a sweep over all blocks is one proximal step of this size; of one-step, FQL's 1 / (2 alpha)."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Tau, the weight of the entropy of actions; above zero for at most three action dimensions."""
    normalize: bool = True
    """Divide the critic's gradient by the mean size of its values in the minibatch, so that beta has no unit."""

    @model_validator(mode="after")
    def _noise_falls(self):
        if self.noise_end > self.noise:
            raise ValueError(
                f"online.noise_end={self.noise_end:g} is above online.noise={self.noise:g}, which falls to it; lower it"
            )
        return self


class EnvironmentPartition(Section):
    """Of flow-policy: every client acts in environments of its own, in which some attributes have other values."""

    kind: Literal["environment"]
    vary: dict[str, tuple[float, float]] = {}
    """Attribute -> lowest and highest value; each environment's is drawn uniformly from the seed."""
    values: dict[str, list[float]] = {}
    """Attribute -> one value per environment, those of client 0 first."""
    each: Annotated[int, Field(ge=1, le=1000)] = 1
    """Environments of each client; with clients=1 all are in one place."""

    @model_validator(mode="after")
    def _once(self):
        for name, (low, high) in self.vary.items():
            if low > high:
                raise ValueError(f"vary.{name}=[{low:g}, {high:g}] given; expected the lowest value first")
        if both := sorted(self.vary.keys() & self.values.keys()):
            raise ValueError(f"{both[0]} stands in vary and in values; keep one of them")
        return self
