"""What settings mean together where clients act in environments (``task.kind=flow-policy``), and where none does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peerlora.config.base import Section
from peerlora.config.online import OnlineConfig
from peerlora.config.sections import DataConfig, EnvironmentPartition, ModelConfig, TaskConfig
from peerlora.config.task_kinds import task_kind

if TYPE_CHECKING:
    from peerlora.config.run import RunConfig

SCRIPTED = "scripted"
"""``model.source`` of a policy that is pre-trained on scripted demonstrations."""
POLICY_DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"source": SCRIPTED},
    "adapter": {"head": "private"},
    "eval": {"own": True},
}
"""Defaults of a flow policy, by section."""
_NO_ROWS = "a flow policy learns from episodes and reads no rows"
_PLAIN_BASE = "the layers of a flow policy are small, and all of them are adapted as they are"


def policy_contradiction(config: RunConfig) -> str | None:
    """What cannot hold together, in one sentence that says what to do; None where all can."""
    if not task_kind(config.task.kind).acts:
        return _of_rows(config)
    return _of_policy(config) or next(_without_meaning(config), None)


def _of_rows(config: RunConfig) -> str | None:
    """Settings of policies where the task has rows."""
    changed = [name for name in ("env", "blocks", "width") if _differs(config.task, name, TaskConfig)]
    if changed:
        return f"task.{changed[0]} is a setting of task.kind=flow-policy, task.kind={config.task.kind} given; drop it"
    if isinstance(config.partition, EnvironmentPartition):
        return (
            f"partition=environment is for task.kind=flow-policy, task.kind={config.task.kind} given; use another "
            "partition, such as dirichlet"
        )
    if config.online != OnlineConfig():
        return f"online is a section of task.kind=flow-policy, task.kind={config.task.kind} given; drop it"
    return None


def _of_policy(config: RunConfig) -> str | None:
    if config.task.env is None:
        return "task.kind=flow-policy needs task.env, an environment: point-mass, or a gymnasium id such as Pendulum-v1"
    if not isinstance(config.partition, EnvironmentPartition):
        return (
            f"partition.kind={config.partition.kind} divides rows, and {_NO_ROWS}; use partition.kind=environment, "
            "with vary, or drop it"
        )
    needed = config.clients * config.partition.each
    for name, values in config.partition.values.items():
        if len(values) != needed:
            each = "" if config.partition.each == 1 else f" with {config.partition.each} environments each"
            return (
                f"partition.values.{name} lists {len(values)} values for {config.clients} clients{each}; give {needed}"
            )
    if config.adapter.head == "frozen":
        return "adapter.head=frozen leaves the critic untrained; use adapter.head=private, or mixed to exchange it"
    if config.train.head_rate != 1:
        return f"train.head_rate={config.train.head_rate:g} is of heads; the rate of a critic is online.critic_rate"
    if config.train.dtype not in ("fp32", "fp64"):
        return f"train.dtype={config.train.dtype} is for large base models; a flow policy takes fp32 or fp64"
    if config.device != "cpu":
        return f"device={config.device} given; environments step on the CPU: use device=cpu"
    if not config.eval.own:
        return "eval.own=false hides a client's return in its own environment; drop it"
    if config.online.policy != "cloned" and config.online.critic_rounds >= config.train.training_rounds:
        return (
            f"online.critic_rounds={config.online.critic_rounds} leaves the policy none of the "
            f"{config.train.training_rounds} rounds that train; lower it, or raise train.rounds"
        )
    return next(_unread(config.online), None)


def _unread(online: OnlineConfig) -> Iterator[str]:
    """Settings that the policy which acts does not read."""
    unread = {"one-step": ("entropy",), "steered": ("entropy", "beta"), "cloned": ("entropy", "beta", "normalize")}
    for name in unread.get(online.policy, ()):
        if _differs(online, name, OnlineConfig):
            yield f"online.{name} is not read with online.policy={online.policy}; drop it, or use online.policy=flow"


def _without_meaning(config: RunConfig) -> Iterator[str]:
    """Settings that a flow policy could only ignore."""
    if config.data != DataConfig():
        yield f"the section data names rows, and {_NO_ROWS}; drop it"
    for name in ("revision", "quantize", "dropout"):
        if _differs(config.model, name, ModelConfig):
            yield f"model.{name} is for base models of rows; {_PLAIN_BASE}; drop it"
    for name in ("dropout", "targets", "modules_to_save"):
        if _differs(config.adapter, name, type(config.adapter)):
            yield f"adapter.{name} given; {_PLAIN_BASE}; drop it"
    if config.adapter.init not in ("default", "orthogonal"):
        yield f"adapter.init={config.adapter.init} changes the base; {_PLAIN_BASE}; use default or orthogonal"
    if config.train.epochs is not None:
        yield f"train.epochs counts passes over rows, and {_NO_ROWS}; use train.rounds"
    if config.privacy is not None:
        yield f"privacy clips the gradients of rows, and {_NO_ROWS}; drop the section"
    for name in ("batches", "block"):
        if _differs(config.train, name, type(config.train)):
            yield f"train.{name} is about rows of different lengths, and {_NO_ROWS}; drop it"
    if isinstance(config.train.batch, list):
        yield "train.batch lists sizes, and the minibatches of policies share one; give one number"
    if config.adversary and config.adversary.attack == "label-flip":
        yield f"adversary.attack=label-flip flips labels, and {_NO_ROWS}; use another attack, such as sign-flip"


def _differs(section: Section, name: str, kind: type[Section]) -> bool:
    return getattr(section, name) != kind.model_fields[name].get_default()
