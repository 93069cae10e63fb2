"""Each client's best evaluation: its adapters are kept, and a client may end its training when no better one comes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from peerlora.config.metrics import higher_is_better
from peerlora.config.run import RunConfig
from peerlora.lora.adapters import Adapters
from peerlora.runtime.relayed_export import deployed
from peerlora.tree import leaves, own_copy, put_row, rebuild, rows_of

if TYPE_CHECKING:
    from peerlora.train.base import AnyTask


@dataclass(frozen=True)
class Selection:
    """By what evaluations are compared: ``eval.select``, with what it leaves open filled in."""

    metric: str
    mode: str
    """max or min"""
    rows: str
    """common or own"""
    of: str
    """The scores that are compared, as an Evaluation names them: those of the models that are deployed."""

    @property
    def model(self) -> str:
        """Whose adapters are kept: own or relayed."""
        return "relayed" if self.of.endswith("relayed") else "own"

    @classmethod
    def of_run(cls, config: RunConfig, task: AnyTask) -> Selection | None:
        """The one of a run; None where nothing is selected."""
        select = config.eval.select
        if select is None:
            return None
        metric = select.metric or task.metric
        higher = task.higher_is_better if metric == task.metric else higher_is_better(metric)
        mode = select.mode or ("max" if higher else "min")
        names = {("common", "own"): "own", ("common", "relayed"): "relayed"}
        names |= {("own", "own"): "personal", ("own", "relayed"): "personal_relayed"}
        return cls(metric, mode, select.rows, names[select.rows, deployed(config)])

    def describe(self) -> dict[str, str]:
        """For a run's first event."""
        return {"metric": self.metric, "mode": self.mode, "rows": self.rows, "model": self.model}


class BestRounds:
    """Every client's best evaluation so far, by a rule that each follows alone: a strictly better value counts.

    A client whose last ``patience`` evaluations were none is ``stopped``: for good, and its best is looked for on.
    A value that is NaN says nothing, and does not count; a client without any other keeps its newest adapters.
    ``honest``: the clients that follow the rule, by their rows.
    """

    def __init__(self, selection: Selection, patience: int | None, clients: Sequence[int], honest: Sequence[int]):
        self.selection, self.patience, self.clients, self.honest = selection, patience, list(clients), list(honest)
        self.values = np.full(len(clients), np.nan)
        self.rounds, self.waited = [0] * len(clients), [0] * len(clients)
        self.stopped: set[int] = set()
        """Numbers of the clients that train no more."""
        self.x: Adapters | None = None
        """[client] the adapters of its best evaluation."""

    def offer(self, done: int, values: np.ndarray, x: Adapters, last: bool = False) -> list[int]:
        """Compare the evaluation after ``done`` rounds; return the clients that train no more from now on.

        ``last``: no training follows, so it ends nobody's.
        """
        if self.x is None:
            self.x = own_copy(x)
        better = self._better(values)
        for row in range(len(self.clients)):
            if not np.isnan(values[row]):
                self.waited[row] = 0 if better[row] else self.waited[row] + 1
            if better[row]:
                self.values[row], self.rounds[row] = values[row], done
                put_row(self.x, row, rows_of(x, row))
        waiting = self.patience is not None and not last
        ended = [self.clients[row] for row in self.honest if waiting and self.waited[row] >= (self.patience or 0)]
        fresh = [client for client in ended if client not in self.stopped]
        self.stopped.update(fresh)
        return fresh

    def _better(self, values: np.ndarray) -> np.ndarray:
        sign = 1 if self.selection.mode == "max" else -1
        return np.isnan(self.values) | (sign * values > sign * self.values)

    def as_fields(self) -> dict[str, Any]:
        """The fields of the event that tells of an evaluation."""
        shown = np.full(len(self.clients), np.nan)
        shown[self.honest] = self.values[self.honest]
        return {"best_rounds": list(self.rounds), "best": shown.tolist(), "stopped": sorted(self.stopped)}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps: the adapters, and facts as JSON knows them."""
        facts = {"values": self.values.tolist(), "rounds": self.rounds, "waited": self.waited}
        return {} if self.x is None else leaves(self.x), facts | {"stopped": sorted(self.stopped)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], like: Adapters) -> None:
        """Restore it; ``like``: adapters of that layout."""
        self.values = np.array([math.nan if each is None else each for each in facts["values"]], dtype=float)
        self.rounds, self.waited = list(facts["rounds"]), list(facts["waited"])
        self.stopped = set(facts["stopped"])
        self.x = rebuild(own_copy(like), dict(tensors))


def stop_notice(clients: Sequence[int], done: int, patience: int, selection: Selection) -> str:
    """Say who trains no more, and why."""
    one = len(clients) == 1
    who = f"client {clients[0]} trains" if one else f"clients {', '.join(map(str, clients))} train"
    waited = "1 evaluation" if patience == 1 else f"{patience} evaluations"
    return (
        f"{who} no more after round {done} and {'goes' if one else 'go'} on mixing: {waited} without a better "
        f"{selection.metric} on the {selection.rows} rows (eval.patience)"
    )
