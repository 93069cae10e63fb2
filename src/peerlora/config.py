"""A run = one RunConfig = one YAML file; dotted ``key=value`` words override single settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from peerlora.errors import ConfigError, nearest
from peerlora.exchange.settings import AdversaryConfig, CodecConfig, ExchangeConfig, RobustConfig
from peerlora.sections import (
    TRAIN_DEFAULTS,
    AdapterConfig,
    AlgorithmConfig,
    CheckpointConfig,
    ClockConfig,
    DataConfig,
    DirichletPartition,
    EvalConfig,
    ModelConfig,
    PartitionConfig,
    PeerConfig,
    Positive,
    RandomGraph,
    Section,
    SharesPartition,
    TaskConfig,
    TopologyConfig,
    TrainConfig,
)


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
    exchange: ExchangeConfig = ExchangeConfig()
    adversary: AdversaryConfig | None = None
    """Clients that attack, to see what a method makes of them; null: nobody does."""
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    clock: ClockConfig | None = None
    """Virtual time; null: rounds only."""
    peer: PeerConfig = PeerConfig()
    device: Literal["cpu", "cuda"] = "cpu"
    """Where clients train; cuda: one NVIDIA GPU."""
    threads: Positive | None = None
    """CPU threads; null: the cores that this process may use, found at the start and kept by a resumed run."""
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

    @model_validator(mode="before")
    @classmethod
    def _as_the_method_trains(cls, tree: Any) -> Any:
        """Settings of ``train`` that were not given, where the method has defaults of its own."""
        if not isinstance(tree, dict):
            return tree
        algorithm, train = tree.get("algorithm"), tree.get("train") or {}
        name = algorithm.get("name") if isinstance(algorithm, dict) else algorithm
        own = TRAIN_DEFAULTS.get(name, {}) if isinstance(name, str) else {}
        return {**tree, "train": {**own, **train}} if own and isinstance(train, dict) else tree

    @model_validator(mode="after")
    def _one_per_client(self):
        lists = {"adapter.rank": self.adapter.rank, "train.batch": self.train.batch}
        if self.clock:
            lists |= {"clock.speed": self.clock.speed, "clock.bandwidth": self.clock.bandwidth}
        for name, value in lists.items():
            if isinstance(value, list) and len(value) != self.clients:
                raise ValueError(
                    f"{name} lists {len(value)} values for {self.clients} clients; give one number or one each"
                )
        gone = next((each for each in (self.clock.away if self.clock else ()) if each.client >= self.clients), None)
        if gone:
            raise ValueError(
                f"clock.away names client {gone.client}; {self.clients} clients are numbered 0 to {self.clients - 1}"
            )
        if isinstance(self.partition, SharesPartition) and sum(self.partition.counts) != self.clients:
            raise ValueError(
                f"partition.counts add up to {sum(self.partition.counts)}, clients is {self.clients}; make them equal"
            )
        if self.partition.kind == "own" and self.task.kind == "classification" and not self.task.labels:
            raise ValueError(
                "partition.kind=own needs task.labels: a site may lack a class, and all must number them alike; list "
                "the class names in one order at all sites"
            )
        if self.task.kind != "causal-lm" and self.data.label is None:
            raise ValueError(f"task.kind={self.task.kind} needs data.label, the column with the label")
        if self.train.label_prior != "none" and self.task.kind != "classification":
            raise ValueError(
                f"train.label_prior={self.train.label_prior} adjusts class logits, which task.kind={self.task.kind} "
                "has none of; use train.label_prior=none"
            )
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
        known = _siblings(model, where)
        return f"unknown key {path!r}{nearest(where[-1], known)}; expected one of {', '.join(known)}"
    if error["type"] == "union_tag_invalid":
        kind = error["ctx"]["tag"]
        known = [word.strip(" '") for word in error["ctx"]["expected_tags"].split(",")]
        return f"{path}.kind {kind!r} is unknown{nearest(kind, known)}; expected one of {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path or 'config'}: {given!r} given; {message[0].lower()}{message[1:]}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation, a union or an optional one say, names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _by_tag(kinds: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """The models of a union that a ``kind`` tells apart, by kind."""
    return {tag: model for model in kinds for tag in get_args(model.model_fields["kind"].annotation)}


_UNIONS = (PartitionConfig, TopologyConfig, CodecConfig, RobustConfig)
_TAGS = {tag for union in _UNIONS for tag in _by_tag(_models(union))}


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
            kinds = _models(node.model_fields[part].annotation)
            node = kinds[0] if len(kinds) == 1 else _by_tag(kinds)
    return list(node.model_fields) if hasattr(node, "model_fields") else list(node)
