"""A run = one RunConfig = one YAML file; dotted ``key=value`` words override single settings."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from peerlora.config.cluster import ClusterConfig
from peerlora.config.exchange import AdversaryConfig, ExchangeConfig
from peerlora.config.policy import POLICY_DEFAULTS, policy_contradiction
from peerlora.config.privacy import PrivacyConfig
from peerlora.config.recipes import RECIPES, Settings, fill, site_contradiction
from peerlora.config.sections import (
    AdapterConfig,
    AlgorithmConfig,
    CheckpointConfig,
    ClockConfig,
    DataConfig,
    DirichletPartition,
    EnvironmentPartition,
    EvalConfig,
    ModelConfig,
    OnlineConfig,
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
from peerlora.config.task_kinds import TaskKind, task_kind
from peerlora.config.tracking import TrackConfig
from peerlora.plugins import METHODS


class RunConfig(Section):
    """Everything that decides a run's result."""

    recipe: Literal["sparse"] | None = None
    """Settings for a kind of federation, where the config does not give its own; sparse: clients that meet rarely."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = DirichletPartition(kind="dirichlet")
    """How rows are divided: iid, dirichlet, shares, column or quantity; own at a real site; environment: no rows."""
    clients: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Participants; each trains on its own rows only."""
    topology: TopologyConfig = RandomGraph(kind="random")
    """Who exchanges with whom: random (a new graph every round), ring, torus, path, star, complete and others."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    exchange: ExchangeConfig = ExchangeConfig()
    adversary: AdversaryConfig | None = None
    """Clients that attack, to see what a method makes of them; null: nobody does."""
    train: TrainConfig = TrainConfig()
    online: OnlineConfig = OnlineConfig()
    privacy: PrivacyConfig | None = None
    """Differential privacy of rows or clients, such as {epsilon: 8}; null: none is promised."""
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    clock: ClockConfig | None = None
    """Virtual time: {speed: [1, 0.1, ...], deadline: 30}; null: count rounds only."""
    peer: PeerConfig = PeerConfig()
    cluster: ClusterConfig | None = None
    """Compute on workers of a cluster: {workers: 4, gpus_per_worker: 1}; null: in one process."""
    track: TrackConfig = TrackConfig()
    device: Literal["cpu", "cuda"] = "cpu"
    """Where clients train; cuda: one NVIDIA GPU (not yet measured)."""
    threads: Positive | None = None
    """CPU threads; null: one per core that the process may use, found at the start and kept by a resumed run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides every random draw; the same seed on the same machine gives the same result, bit for bit."""

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

    @field_validator("track", mode="before")
    @classmethod
    def _words_are_trackers(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        return {"to": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _take_policy_defaults(self):
        """What a flow policy needs in another way than a model of rows, where the config does not say."""
        if task_kind(self.task.kind).acts:
            for name, settings in POLICY_DEFAULTS.items():
                self._fill(name, settings)
            if "partition" not in self.model_fields_set:
                object.__setattr__(self, "partition", EnvironmentPartition(kind="environment"))
        return self

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
        kind = task_kind(self.task.kind)
        if self.partition.kind == "own" and kind.has_names and not self.task.labels:
            raise ValueError(
                "partition.kind=own needs task.labels: a site may lack a class, and all must number them alike; list "
                "the class names in one order at all sites"
            )
        if flaw := policy_contradiction(self) or self._misfit(kind):
            raise ValueError(flaw)
        if self.train.class_weights != "none" and not kind.has_classes:
            raise ValueError(
                f"train.class_weights weighs classes, which task.kind={self.task.kind} has none of; use "
                "train.class_weights=none"
            )
        if self.train.label_prior != "none" and not kind.has_classes:
            raise ValueError(
                f"train.label_prior={self.train.label_prior} adjusts class logits, which task.kind={self.task.kind} "
                "has none of; use train.label_prior=none"
            )
        return self

    def _misfit(self, kind: TaskKind) -> str | None:
        """What of the rows and of the evaluation does not fit the task; None if all does."""
        if self.task.labels and not kind.has_names:
            return f"task.labels names classes, which task.kind={kind.name} has none of; drop it"
        return self.data.contradiction(kind) or self._ungenerated(kind) or self.eval.contradiction(kind)

    def _ungenerated(self, kind: TaskKind) -> str | None:
        """Why ``eval.generate`` cannot be had; None if it can."""
        wanted = self.eval.generate
        if wanted is None:
            return None
        if not kind.is_chat:
            return f"eval.generate given; task.kind={kind.name} writes no answers; remove it, or use task.kind=chat"
        if self.data.loss_on != "answers":
            return f"eval.generate given; data.loss_on={self.data.loss_on} does not tell answers apart; use answers"
        if wanted.client >= self.clients:
            last = self.clients - 1
            return f"eval.generate.client={wanted.client} given; {self.clients} clients are numbered 0 to {last}"
        return None

    @model_validator(mode="after")
    def _take_defaults(self, info: ValidationInfo):
        """Settings that were not given become those of the recipe, then the method's own defaults of ``train``.

        It comes last, since it imports the method: a wrong setting is refused before anything heavy is loaded.
        """
        if flaw := site_contradiction(self):
            raise ValueError(flaw)
        for name, settings in self.recipe_settings.items():
            self._fill(name, settings)
        open_ones = self.train.model_fields_set < TrainConfig.model_fields.keys()
        if open_ones and (info.context or {}).get("train_defaults", True):
            method = METHODS.find(self.algorithm.name)
            self._fill("train", {} if method is None else method.traits.own_train_defaults())
        if flaw := self.train.contradiction():
            raise ValueError(flaw)
        return self

    @property
    def recipe_settings(self) -> Settings:
        """What the recipe sets where the config gives nothing else, by section; empty without a recipe."""
        if self.recipe is None:
            return {}
        method = METHODS.find(self.algorithm.name)
        own = {} if method is None else method.traits.own_train_defaults()
        relays = self._may_relay() and method is not None and method.traits.refusal("relay") is None
        return RECIPES[self.recipe](self, own, relays)

    def _may_relay(self) -> bool:
        """Whether a recipe may relay: not beside a codec or secure sums, which exclude it, nor among attackers.

        A robust rule protects the mixing only, so relayed models would hold what it keeps out.
        """
        exchange = self.exchange
        return not (exchange.codec or exchange.secure or exchange.robust or self.adversary)

    def _fill(self, name: str, settings: Mapping[str, Any]) -> None:
        """Take these settings of a section where it was not given others."""
        section = getattr(self, name)
        if settings.keys() - section.model_fields_set:
            object.__setattr__(self, name, fill(section, settings))  # frozen, and not yet handed out
            self.__pydantic_fields_set__.add(name)

    @property
    def ranks(self) -> list[int]:
        """The rank of every client."""
        return self.adapter.rank if isinstance(self.adapter.rank, list) else [self.adapter.rank] * self.clients

    @property
    def batches(self) -> list[int]:
        """The rows per step of every client."""
        return self.train.batch if isinstance(self.train.batch, list) else [self.train.batch] * self.clients

    @property
    def training_samples(self) -> int:
        """The rows that all clients together train on in a whole run, each as often as it is used."""
        return self.train.training_rounds * self.train.minibatches * sum(self.batches)

    def to_yaml(self) -> str:
        """The whole config, defaults written out, in the order of the sections."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
