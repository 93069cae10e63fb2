"""The task ``flow-policy``: actions in an environment, measured by the return of an episode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peerlora.config.task_kinds import KINDS, TaskKind


@dataclass(frozen=True)
class FlowPolicyTask:
    """The sum of an episode's rewards, without discount; the loss is its negative."""

    kind: ClassVar[TaskKind] = KINDS["flow-policy"]
    metric: ClassVar[str] = "return"
    higher_is_better: ClassVar[bool] = True
