"""What a run reached, in words, and every client's own results."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peerlora.display import Cell
from peerlora.runs.events import Evaluated, Event, RoundDone, RunStarted
from peerlora.runs.metrics import evaluations, last_contact, select_events


def describe_outcome(start: RunStarted, events: Sequence[Event]) -> list[str]:
    """Describe where the clients' models began, where they are, and who is worst; nothing before an evaluation."""
    scores = [score for score in evaluations(events) if _known(score.own)]
    if not scores:
        return []
    last = scores[-1]
    names, worst = _clients(start), _worst(start, last)
    text = f"{start.metric} of the mean client: {_mean(last.own):.3f}"
    before = [score for score in scores[:-1] if score.rows == last.rows or score.round == 0][:1]
    if before and last.round:
        text += f" after round {last.round}, {_mean(before[0].own):.3f} after round {before[0].round}"
        text += f" (then on {before[0].rows:,} rows, now on {last.rows:,})" if before[0].rows != last.rows else ""
    if len(last.own) > 1:
        text += f"; worst is {names[worst]} with {last.own[worst]:.3f}"
    if math.isfinite(last.averaged) and len(last.own) > 1:
        text += f"; the averaged model has {last.averaged:.3f}"
    return [f"{text}."]


def client_rows(start: RunStarted, events: Sequence[Event]) -> tuple[list[str], list[list[Cell]]]:
    """(head, rows) of a table with one row per client, the worst own model first; columns without a value are left out.

    Scores are written with three decimals.
    """
    scores, done = evaluations(events), select_events(events, RoundDone)
    last, names = scores[-1] if scores else None, _clients(start)
    counts = start.partition.get("counts") or []
    met = None if start.held else last_contact(events, start.clients)
    columns: dict[str, list[Cell]] = {
        "rows": [sum(each) for each in counts] if len(counts) == len(names) else [],
        start.metric: _fixed(last.own) if last else [],
        f"{start.metric}, relayed": _fixed(last.relayed) if last else [],
        f"{start.metric}, own rows": _fixed(last.personal) if last else [],
        "best round": list(last.best_rounds) if last else [],
        "training loss": _fixed(_latest_losses(done, len(names))),
        "last exchange": ["never" if each is None else f"round {each}" for each in met or []],
    }
    shown = {name: values for name, values in columns.items() if len(values) == len(names)}
    order = sorted(range(len(names)), key=lambda client: _rank(start, last, client))
    return ["client", *shown], [[names[client], *(shown[name][client] for name in shown)] for client in order]


def _clients(start: RunStarted) -> list[str]:
    held = start.held or range(start.clients)
    return [start.names.get(str(client)) or f"client {client}" for client in held]


def _rank(start: RunStarted, last: Evaluated | None, client: int) -> float:
    value = last.own[client] if last and client < len(last.own) else math.nan
    return math.inf if math.isnan(value) else value if start.higher_is_better else -value


def _worst(start: RunStarted, last: Evaluated) -> int:
    return min(range(len(last.own)), key=lambda client: _rank(start, last, client))


def _latest_losses(done: Sequence[RoundDone], clients: int) -> list[float]:
    """Every client's training loss of the last round in which it trained."""
    found = [math.nan] * clients
    for each in done:
        found = [new if math.isfinite(new) else old for new, old in zip(each.loss, found, strict=False)]
    return found


def _fixed(values: Sequence[float]) -> list[Cell]:
    return [f"{value:.3f}" if math.isfinite(value) else None for value in values]


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    known = _known(values)
    return sum(known) / len(known)
