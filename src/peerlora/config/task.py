"""The section ``task``: what is learned."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from peerlora.config.base import Section
from peerlora.config.task_kinds import KINDS, task_kind

BlockCount = Annotated[int, Field(ge=1, le=64)]
Width = Annotated[int, Field(ge=2, le=4096)]


def _known_kind(name: Any) -> str:
    return task_kind(name).name


class TaskConfig(Section):
    """What is learned from the data."""

    kind: Annotated[str, BeforeValidator(_known_kind), Field(json_schema_extra={"enum": [*KINDS]})] = "classification"
    """What is learned; docs/data.md says what rows each task reads, docs/flow-policies.md what policies learn."""
    labels: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the classes, or of the tags of words, in order of their ids; null: read from the data."""
    env: str | None = None
    """Of flow-policy: point-mass, or a gymnasium id (or package:id) with Box actions, as Pendulum-v1; else null."""
    blocks: BlockCount = 4
    """Of flow-policy: N, the Euler steps of the flow, each a block with weights of its own."""
    width: Width = 64
    """Of flow-policy: units in each of the two hidden layers of a block, and of a critic."""
