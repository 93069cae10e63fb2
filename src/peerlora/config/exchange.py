"""The ``exchange`` section of a config: what is sent in place of full vectors, and how what arrives is combined."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, field_validator

from peerlora.config.base import Positive, Section

ExportedModel = Literal["own", "relayed", "averaged", "best"]
"""A client's own adapter, its relayed average, the average of all clients' own, or its own of its best round."""
Share = Annotated[float, Field(gt=0, le=1)]


class CodecBase(Section):
    """What all codecs have in common."""

    default_gamma: ClassVar[float] = 0.3
    gamma: Share | None = None
    """Step towards the neighbours; null: the codec's own (1 for identity and cast, 0.1 for random-k, else 0.3)."""

    @property
    def step(self) -> float:
        """gamma, or the codec's own."""
        return self.default_gamma if self.gamma is None else self.gamma


class IdentityCodec(CodecBase):
    """Everything, as it is."""

    default_gamma: ClassVar[float] = 1.0
    kind: Literal["identity"]


class CastCodec(CodecBase):
    """Everything, in half precision."""

    default_gamma: ClassVar[float] = 1.0
    kind: Literal["cast"]
    dtype: Literal["bf16", "fp16"] = "bf16"
    """Half precision of this kind."""


class TopKCodec(CodecBase):
    """The largest entries of every tensor, with their places."""

    kind: Literal["top-k"]
    share: Share = 0.1
    """Share of the entries of each tensor."""


class RandomKCodec(CodecBase):
    """Random entries of every tensor, the same for all clients of a round, so that no places are sent."""

    default_gamma: ClassVar[float] = 0.1
    kind: Literal["random-k"]
    share: Share = 0.1
    """Share of the entries of each tensor."""


class SignCodec(CodecBase):
    """One bit for each entry, and the mean size of each tensor's entries."""

    kind: Literal["sign"]


class QSGDCodec(CodecBase):
    """Entries rounded at random to `levels` steps up to each tensor's norm."""

    kind: Literal["qsgd"]
    levels: Annotated[int, Field(ge=1, le=127)] = 7
    """Steps between zero and the norm."""


CodecConfig = Annotated[
    IdentityCodec | CastCodec | TopKCodec | RandomKCodec | SignCodec | QSGDCodec, Field(discriminator="kind")
]
CODEC = TypeAdapter(CodecConfig)


class TrimmedMean(Section):
    """In every coordinate the mean without the `drop` largest and smallest of what arrived and the own value."""

    kind: Literal["trimmed-mean"]
    drop: Positive = 1
    """Values left out on each side; it needs more than 2 `drop` clients, oneself counted."""


class Median(Section):
    """In every coordinate the median of what arrived and the own value."""

    kind: Literal["median"]


class Clipped(Section):
    """ClippedGossip: no neighbour can pull further than `radius`."""

    kind: Literal["clipped-gossip"]
    radius: Annotated[float, Field(ge=0)] | None = None
    """Largest distance that counts; null: that of the neighbour after the `drop` farthest."""
    drop: Positive = 1
    """Farthest neighbours that set no radius; it needs more than `drop` neighbours."""


class Balance(Section):
    """BALANCE: only near models count, measured by the own update since the start; the distance allowed shrinks."""

    kind: Literal["balance"]
    gamma: Annotated[float, Field(gt=0)] = 2.0
    """Allowed distance at the start over the norm of the own update; 2: an opposite update of equal length."""
    kappa: Annotated[float, Field(ge=0)] = 1.0
    """How fast the allowed distance shrinks: by exp(-kappa) over the run."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the own model."""


class GeometricMedian(Section):
    """RFA: the point with the smallest sum of distances, by smoothed Weiszfeld steps."""

    kind: Literal["rfa"]
    steps: Positive = 8
    """Weiszfeld steps."""
    smoothing: Annotated[float, Field(gt=0)] = 0.1
    """Smallest distance that a step divides by."""


class Krum(Section):
    """The one model that is nearest to most others."""

    kind: Literal["krum"]
    drop: Positive = 1
    """Attackers that may be among one client's neighbours; it needs `drop` + 2 neighbours."""


RobustConfig = Annotated[TrimmedMean | Median | Clipped | Balance | GeometricMedian | Krum, Field(discriminator="kind")]


class CacheConfig(Section):
    """A cache in which each client keeps the newest adapter of every client that it has heard of."""

    keep: Positive | None = None
    """Entries of other clients that a client keeps, the newest ones; null: all."""
    max_age: Annotated[int, Field(ge=0)] | None = None
    """Rounds; older entries are dropped and not passed on, so that a departed client ages out; null: none is."""
    weights: Literal["uniform", "rows", "age"] = "uniform"
    """Weights of the entries: uniform, rows (training rows of the origins), or age: 1 / (1 + age in rounds)."""


class RelayConfig(CacheConfig):
    """Relayed adapters: each client also keeps the newest adapter of every client that it has heard of."""

    average: Literal["products", "factors"] = "products"
    """products: the average of the updates B A, cut to each client's rank by SVD; factors: entry by entry."""
    deploy: Literal["own", "relayed"] = "relayed"
    """Which model is written as a client's PEFT folder: the relayed average, or its own."""


class ExchangeConfig(Section):
    """How values are sent and combined; all null: every vector in full, averaged with W."""

    codec: CodecConfig | None = None
    """Compressed gossip: identity, cast, top-k, random-k, sign or qsgd; null: full vectors."""
    robust: RobustConfig | None = None
    """Against attackers: trimmed-mean, median, clipped-gossip, balance, rfa or krum; null: the average."""
    relay: RelayConfig | None = None
    """Clients pass on each other's newest adapters and deploy their average; {}: the defaults; null: they do not."""
    secure: bool = False
    """Secure sums: a receiver learns the weighted sum of its neighbours' adapters and none of them; docs/privacy.md."""

    @field_validator("codec", "robust", mode="before")
    @classmethod
    def _word_is_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("relay", mode="before")
    @classmethod
    def _true_is_the_defaults(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value


class AdversaryConfig(Section):
    """Clients that attack; their results are left out of means, worst clients and the averaged model."""

    clients: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | Positive = 1
    """Their numbers; or how many, then drawn by the seed."""
    attack: Literal["sign-flip", "label-flip", "gaussian", "alie", "ipm", "dissensus"] = "sign-flip"
    """What attackers send, or learn from (label-flip)."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """Size of the attack; null: 1 (sign-flip, gaussian, dissensus), 0.5 (ipm), or the quantile (alie)."""
