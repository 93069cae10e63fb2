"""The section ``train``: local steps, their optimiser, and in which rounds clients learn with which rate."""

from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from peerlora.config.base import Batch, Positive, PositiveFloat, Rate, Section, Share

DECAY = 0.2  # share of the training rounds in which the rate of wsd declines, unless it is given


def _share_or_rounds(value: float) -> float:
    """Check that a number is a share below 1, or whole."""
    if value >= 1 and not value.is_integer():
        raise ValueError(
            f"{value:g} given; expected a share of the training rounds, below 1, or rounds, a whole number such as "
            f"{int(value)}"
        )
    return value


POOLED = "train.label_prior=pooled or train.class_weights=pooled"
"""What asks for a sum of label counts over the network, in messages that cannot know which of them."""
NOT_POOLED = "train.label_prior=uniform, train.class_weights=balanced"
"""What needs no such sum."""

ShareOrRounds = Annotated[float, Field(ge=0), AfterValidator(_share_or_rounds)]
"""Below 1 a share of the training rounds, else a number of rounds."""


class TrainConfig(Section):
    """How clients learn between two exchanges."""

    rounds: Positive = 100
    """Exchanges in all."""
    epochs: PositiveFloat | None = None
    """In place of `rounds`: how often clients train on as many rows as there are; null: as `rounds` says."""
    quiet: Rate = 0.0
    """Share of the rounds, at the end, in which clients exchange and do not train."""
    local_steps: Positive = 10
    """Optimiser steps of each client between two exchanges."""
    batch: Batch | list[Batch] = 16
    """Rows of a minibatch; or a list with one number per client."""
    accumulate: Batch = 1
    """Minibatches whose gradients are averaged for one step: `batch` times as many rows, in the memory of one batch."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw (torch's betas and epsilon) or sgd."""
    optimizer_state: Literal["round", "phase", "keep"] = "round"
    """When the optimiser's memory starts fresh: every round, at a switch of factors (phase), or never (keep)."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate, at its largest; the first setting to try other values of."""
    head_rate: PositiveFloat = 1.0
    """Learning rate of the head, and of further modules that train in full, as a multiple of `lr`."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """The rate over the training rounds: constant; linear or cosine: falling to `floor`; wsd: falling at the end."""
    warmup: ShareOrRounds = 0.0
    """In which the rate rises to `lr`, at the start: below 1 a share of the training rounds, else whole rounds."""
    floor: Rate = 0.0
    """Where a schedule leads, as a share of `lr`; not with constant."""
    decay: Share | None = None
    """Of wsd: share of the training rounds, at the end, in which the rate falls; null: 0.2, or what `warmup` leaves."""
    momentum: Rate = 0.0
    """Of sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of what trains: decoupled for AdamW, part of the gradient for SGD, as in torch."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm of one client, over everything it trains; null: no limit."""
    label_prior: Literal["none", "uniform", "pooled"] = "none"
    """uniform or pooled: a loss adjusted for each client's own label proportions; none: the plain loss."""
    class_weights: Literal["none", "balanced", "pooled"] | Annotated[list[PositiveFloat], Field(min_length=2)] = "none"
    """Weights of rows by class: balanced (a client's rare ones count more), pooled (those rare among all), one each."""
    batches: Literal["shuffled", "by-length"] = "shuffled"
    """shuffled, or by-length: a round's rows are sorted into batches of similar length, which saves padding."""
    dtype: Literal["fp32", "bf16", "fp64", "auto"] = "fp32"
    """fp32, fp64, bf16 (the frozen base and its activations; what trains stays in fp32), or auto: the faster here."""
    fast: bool = True
    """Use the speed paths that work for this model and machine; false: ordinary operations, to check a result."""
    block: Positive | None = None
    """Clients computed together in one graph; null: by the tokens of a step, on a GPU by its free memory."""
    max_seconds: PositiveFloat | None = None
    """Seconds after which the run ends, with the round under way, resumed ones included; null: after `rounds`."""

    @model_validator(mode="after")
    def _one_budget(self):
        if self.epochs is not None and "rounds" in self.model_fields_set:
            raise ValueError(
                f"rounds={self.rounds} and epochs={self.epochs:g} given, and each is the whole budget; drop one of them"
            )
        return self

    @property
    def quiet_rounds(self) -> int:
        """Rounds without training, at the end."""
        return share_of(self.quiet, self.rounds)

    @property
    def training_rounds(self) -> int:
        """Rounds with training; the schedule of the rate runs over these."""
        return self.rounds - self.quiet_rounds

    @property
    def warmup_rounds(self) -> int:
        """Training rounds in which the rate rises."""
        return int(self.warmup) if self.warmup >= 1 else share_of(self.warmup, self.training_rounds)

    @property
    def minibatches(self) -> int:
        """Minibatches that a client trains on between two exchanges."""
        return self.local_steps * self.accumulate

    @property
    def counts_classes(self) -> bool:
        """Whether the weights of classes follow from how many rows each has."""
        return self.class_weights in ("balanced", "pooled")

    @property
    def pooled(self) -> str | None:
        """The setting for which clients sum their label counts over the network; None where they keep these."""
        names = [name for name in ("label_prior", "class_weights") if getattr(self, name) == "pooled"]
        return f"train.{names[0]}=pooled" if names else None

    def is_quiet(self, t: int) -> bool:
        """Whether clients exchange without training in round ``t``, counted from 0."""
        return self.quiet_rounds > 0 and t >= self.training_rounds

    def contradiction(self) -> str | None:
        """What cannot hold together, in one sentence that says what to do; None where all can.

        It is asked once recipe and method have filled what was not given: what they fill may be what was missing.
        """
        if self.training_rounds < 1:
            return (
                f"train.quiet={self.quiet:g} leaves none of train.rounds={self.rounds} to train in; lower train.quiet, "
                "or raise train.rounds"
            )
        if self.counts_classes and self.label_prior != "none":
            return (
                f"train.class_weights={self.class_weights} and train.label_prior={self.label_prior} both make up for "
                "uneven labels; use one of them"
            )
        if self.floor and self.schedule == "constant":
            return (
                f"train.floor={self.floor:g} says where a falling rate ends, train.schedule=constant has none; use "
                "train.schedule=linear, cosine or wsd, or drop train.floor"
            )
        if self.decay is not None and self.schedule != "wsd":
            return (
                f"train.decay={self.decay:g} is a setting of train.schedule=wsd, train.schedule={self.schedule} given; "
                "use train.schedule=wsd, or drop train.decay"
            )
        return self._too_long_warmup() if self.epochs is None else None  # of epochs, the rounds are not yet known

    def _too_long_warmup(self) -> str | None:
        """What is wrong with a warm-up that leaves no rounds for the rest, and what to do; None where it fits."""
        rounds, warmup, decay = self.training_rounds, Decimal(repr(self.warmup)), Decimal(repr(self.decay or 0.0))
        if self.warmup > rounds:
            return (
                f"train.warmup={self.warmup:g} rounds are more than the {rounds} in which clients train; give fewer, "
                "or a share such as train.warmup=0.1"
            )
        if (warmup if warmup < 1 else warmup / rounds) + decay > 1:
            return (
                f"train.warmup={self.warmup:g} and train.decay={self.decay:g} are more than all training rounds, "
                f"{rounds}; lower one of them"
            )
        return None


def share_of(share: float, rounds: int) -> int:
    """So many of these rounds, half of one rounded up; exact for the decimal number that was given."""
    return int((Decimal(repr(share)) * rounds).to_integral_value(ROUND_HALF_UP))
