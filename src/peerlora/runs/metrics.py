"""Events as one long table (metrics.parquet), and the summary of a run."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from peerlora.files import atomic_file
from peerlora.runs.events import Evaluated, Event, RoundDone, RunStarted
from peerlora.runs.further_scores import best_scores, mean_and_worst, metric_scores, personal_scores
from peerlora.runs.privacy_summary import privacy_facts

Row = tuple[int | None, int, str, float]  # client (None: the whole run), finished rounds, metric, value
Kind = TypeVar("Kind", bound=Event)

PER_ROUND = (
    "consensus_A",
    "consensus_B",
    "consensus_product",
    "cross_term",
    "local_cross_term",
    "weak_mismatch",
    "strong_mismatch",
    "rho",
    "contacts",
    "bytes_per_edge",
    "bytes_sent",
    "seconds_train",
    "seconds_mix",
    "seconds_diagnostics",
)
"""The numbers of ``RoundDone`` that are about the whole run."""


def select_events(events: Iterable[Event], kind: type[Kind]) -> list[Kind]:
    """The events of one kind, in order."""
    return [event for event in events if isinstance(event, kind)]


def find_start(events: Iterable[Event]) -> RunStarted | None:
    """The run's first event, or None when it was killed before it wrote one."""
    return next(iter(select_events(events, RunStarted)), None)


def evaluations(events: Iterable[Event]) -> list[Evaluated]:
    """The evaluations by round; where two are of the same round, the later one, which is the one on all rows."""
    return [each for _, each in sorted({event.round: event for event in select_events(events, Evaluated)}.items())]


def rows(events: Iterable[Event]) -> Iterator[Row]:
    """Every number of a run.  ``round`` counts finished rounds here: the loss of round index 0 is in round 1."""
    events = list(events)
    start = find_start(events)
    held = start.held if start else []
    for done in select_events(events, RoundDone):
        for client, loss in zip(held or range(len(done.loss)), done.loss, strict=True):
            yield client, done.round + 1, "loss", loss
        for name in PER_ROUND:
            yield None, done.round + 1, name, float(getattr(done, name))
        if math.isfinite(done.virtual_seconds):
            yield None, done.round + 1, "virtual_seconds", done.virtual_seconds
            yield None, done.round + 1, "absent", float(len(done.absent))
        for name, value in done.measures.items():
            yield None, done.round + 1, name, float("nan") if value is None else float(value)
    for score in evaluations(events):
        for client, own, loss in zip(held or range(len(score.own)), score.own, score.own_loss, strict=True):
            yield client, score.round, "own", own
            yield client, score.round, "own_loss", loss
        if score.relayed:
            clients = held or range(len(score.relayed))
            for client, metric, loss in zip(clients, score.relayed, score.relayed_loss, strict=True):
                yield client, score.round, "relayed", metric
                yield client, score.round, "relayed_loss", loss
            yield None, score.round, "relayed_cut", score.relayed_cut
        yield from _further_rows(score, held)
        whole = {"averaged": score.averaged, "averaged_loss": score.averaged_loss}
        for name, value in {**whole, "eval_rows": score.rows, "eval_seconds": score.seconds}.items():
            yield None, score.round, name, float(value)


def _further_rows(score: Evaluated, held: Sequence[int]) -> Iterator[Row]:
    """Personalised scores, further metrics, and the best evaluations so far."""
    named: dict[str, Sequence[float]] = {
        "personal": score.personal,
        "personal_loss": score.personal_loss,
        "personal_relayed": score.personal_relayed,
        "personal_relayed_loss": score.personal_relayed_loss,
        "best": score.best,
        "best_round": score.best_rounds,
    }
    named |= {f"privacy_{name}": values for name, values in score.privacy.items()}
    named |= {f"{of}_{name}": values for of, further in score.metrics.items() for name, values in further.items()}
    for name, values in named.items():
        clients = [None] if name.startswith("averaged_") else held or range(len(values))
        for client, value in zip(clients if values else (), values, strict=True):
            yield client, score.round, name, float(value)


def evaluated_within(events: Iterable[Event], seconds: float = math.inf, sent: float = math.inf) -> Evaluated | None:
    """The last evaluation that a budget of virtual seconds and of bytes allows: how runs are compared at equal cost.

    None where no evaluation is known to lie within it; a run without a clock took no known time.
    """
    events, found = list(events), None
    spent = [0, *accumulate(done.bytes_sent for done in select_events(events, RoundDone))]
    for score in evaluations(events):
        in_time = seconds == math.inf or score.virtual_seconds <= seconds
        if in_time and spent[score.round] <= sent:
            found = score
    return found


def write_table(events: Iterable[Event], path: Path | str) -> None:
    """Write the table as parquet, in one step: client int32 or null, round int32, metric string, value float64.

    Values that are not a number become null.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    clients, rounds, metrics, values = list(zip(*rows(events), strict=True)) or ((), (), (), ())
    columns = {
        "client": pa.array(clients, pa.int32()),
        "round": pa.array(rounds, pa.int32()),
        "metric": pa.array(metrics, pa.string()),
        "value": pa.array(values, pa.float64(), from_pandas=True),
    }
    with atomic_file(Path(path)) as temporary:
        pq.write_table(pa.table(columns), temporary)


def round_links_written(edges: Sequence[Any] | None, contacts: int) -> bool:
    """Say whether a round's event lists the links used in it; where these are very many, it has only their number."""
    return edges is not None or not contacts


def links_written(events: Iterable[Event]) -> bool:
    """Say whether all rounds wrote their links down; else nobody knows who had contact last, or how often."""
    return all(round_links_written(done.edges, done.contacts) for done in select_events(events, RoundDone))


def last_contact(events: Sequence[Event], clients: int) -> list[int | None] | None:
    """Find per client the finished rounds at its last exchange, None: never; no list where a round lacks its links."""
    if not links_written(events):
        return None
    last: list[int | None] = [None] * clients
    for done in select_events(events, RoundDone):
        for client in {client for edge in done.edges or () for client in edge}:
            if client < clients:  # 0, where the first event is damaged
                last[client] = done.round + 1
    return last


def contact(events: Iterable[Event]) -> dict[str, float | int | None]:
    """Of one peer's rounds with a planned link, the share in which one was used, and how many since then had none.

    ``share`` is None where no link was planned.
    """
    used = [bool(done.contacts) for done in select_events(events, RoundDone) if done.contacts or done.missed]
    alone = next((number for number, each in enumerate(reversed(used)) if each), len(used))
    return {"share": sum(used) / len(used) if used else None, "alone": alone}


def link_uses(events: Iterable[Event]) -> dict[tuple[int, int], int] | None:
    """(smaller client, larger client) -> rounds in which they exchanged; None when no round wrote its links down."""
    written = [done.edges for done in select_events(events, RoundDone) if done.edges is not None]
    if not written:
        return None
    uses: dict[tuple[int, int], int] = {}
    for edges in written:
        for link in {(min(pair), max(pair)) for pair in edges}:  # both ways count once
            uses[link] = uses.get(link, 0) + 1
    return uses


def summarise(events: Sequence[Event]) -> dict[str, Any]:
    """Summarise a run from the events so far; None where there is no value yet.

    Keys: method, clients, rounds (finished), metric, higher_is_better, scores {own_mean, own_min, own_max, averaged} of
    that metric, consensus {A, B, product, cross_term}, bytes_sent, seconds {total, train, mix, diagnostics, eval},
    virtual_seconds, last_contact [client], which is None where a round lacks its links; of a real peer also contact
    {share, alone}, see ``contact``.  Where clients relay, scores also have relayed_mean, relayed_worst and relayed_cut,
    and deployed says which models become PEFT folders, own or relayed.  Further metrics, scores on clients' own rows
    and best evaluations: see ``further_scores``; privacy: see ``privacy_summary``; with secure sums also secure_sums
    {given_up}.
    The scores of every metric have the older name accuracy, too.
    """
    start, done, scores = find_start(events), select_events(events, RoundDone), evaluations(events)
    last = done[-1] if done else None
    clients = start.clients if start else 0
    seconds = {
        "train": sum(each.seconds_train for each in done),
        "mix": sum(each.seconds_mix for each in done),
        "diagnostics": sum(each.seconds_diagnostics for each in done),
        # one that a loop of the user's own has logged, has no seconds
        "eval": sum(each.seconds for each in select_events(events, Evaluated) if not math.isnan(each.seconds)),
    }
    score = scores[-1] if scores else None
    spread = _spread(score) | _relayed(score, start)
    spread |= personal_scores(score, start is None or start.higher_is_better)
    further, best, privacy = metric_scores(score), best_scores(score, start), privacy_facts(start, score)
    return {
        "method": start.method if start else None,
        "clients": clients,
        "rounds": last.round + 1 if last else 0,
        "metric": start.metric if start else None,
        "higher_is_better": start.higher_is_better if start else None,
        "scores": spread,
        "accuracy": spread,  # the older name, of every metric
        **({"deployed": start.deploys} if start and "relayed_mean" in spread else {}),
        **({"metrics": further} if further else {}),
        **({"best": best} if best else {}),
        **({"privacy": privacy} if privacy else {}),
        **({"secure_sums": {"given_up": sums_given_up(done)}} if start and start.secure_sums else {}),
        "consensus": {
            "A": last and _known(last.consensus_A),
            "B": last and _known(last.consensus_B),
            "product": last and _known(last.consensus_product),
            "cross_term": last and _known(last.cross_term),
        },
        "bytes_sent": sum(each.bytes_sent for each in done),
        "seconds": {"total": sum(seconds.values()), **seconds},
        "virtual_seconds": last.virtual_seconds if last and math.isfinite(last.virtual_seconds) else None,
        "last_contact": last_contact(events, clients),
        **({"contact": contact(events)} if start and start.held else {}),
    }


def sums_given_up(done: Sequence[RoundDone]) -> int:
    """Count the secure sums that did not come together in these rounds."""
    return sum(round(each.measures.get("sums_given_up", 0)) for each in done)


def scores_of(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scores in a summary, also in one of an older version, which called those of every metric accuracy."""
    return summary.get("scores") or summary.get("accuracy") or {}


def worst_of(summary: Mapping[str, Any]) -> float | None:
    """The worst client's score: the lowest, or the largest where lower is better."""
    higher = summary.get("higher_is_better")
    higher = summary.get("metric") != "loss" if higher is None else higher  # of an older version
    return scores_of(summary).get("own_min" if higher else "own_max")


def _relayed(score: Evaluated | None, start: RunStarted | None) -> dict[str, float | None]:
    """The scores of the relayed models; empty where there are none."""
    if score is None or not score.relayed:
        return {}
    mean, worst = mean_and_worst(score.relayed, start is None or start.higher_is_better)
    return {"relayed_mean": mean, "relayed_worst": worst, "relayed_cut": _known(score.relayed_cut)}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _spread(score: Evaluated | None) -> dict[str, float | None]:
    own = [value for value in score.own if not math.isnan(value)] if score else []
    return {
        "own_mean": sum(own) / len(own) if own else None,
        "own_min": min(own) if own else None,
        "own_max": max(own) if own else None,
        "averaged": score.averaged if score and not math.isnan(score.averaged) else None,
    }
