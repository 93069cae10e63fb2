"""The comparison of runs at equal cost: their evaluations with bytes and virtual seconds, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from peerlora.algorithms import method_class
from peerlora.config.run import RunConfig
from peerlora.experiments.inference import holm
from peerlora.experiments.markdown import markdown_table
from peerlora.experiments.statistics import Difference, pair_differences
from peerlora.experiments.tables import ALIKE_SIGN, NOT_DISTINGUISHABLE, format_difference, format_p
from peerlora.runs.events import Evaluated, Event, RoundDone
from peerlora.runs.metrics import evaluations, select_events

UPLINK = 1e6
"""Bytes a virtual second of every client, where a run has no clock; a gradient of a minibatch then takes 1 s."""
SLACK = 1.05
"""Of a budget: so much may be spent, for runs do not end on the byte."""


@dataclass(frozen=True)
class Look:
    """One evaluation after training began, and what the run had spent by then."""

    round: int
    bytes: float
    """Of all clients."""
    seconds: float
    """Virtual."""
    mean: float
    """Over clients."""
    worst: float


def follow(events: Sequence[Event], config: RunConfig) -> list[Look]:
    """Make the looks of a finished run; a score is higher where it is better."""
    done = select_events(events, RoundDone)
    sent = [0.0, *accumulate(float(each.bytes_sent) for each in done)]
    found = []
    for score in evaluations(events):
        own = np.array(score.own)
        if score.round and not np.isnan(own).all():
            seconds = score.virtual_seconds if config.clock else uniform_seconds(config, score.round, sent[score.round])
            spent = (score.round, sent[score.round], seconds)
            found.append(Look(*spent, float(np.nanmean(own)), float(np.nanmin(own))))
    return found


def uniform_seconds(config: RunConfig, rounds: int, sent: float) -> float:
    """Return the virtual seconds that a clock of equal clients would have counted, an upload being the mean of all.

    A clock that waits for all changes no bit of a run, so it need not have been there.
    """
    gradients = method_class(config.algorithm.name).traits.gradients
    return rounds * config.train.minibatches * gradients + sent / config.clients / UPLINK


def only_of(events: Sequence[Event], clients: Sequence[int]) -> list[Event]:
    """Return a run's events with the scores of these clients only."""
    return [_of_clients(each, clients) if isinstance(each, Evaluated) else each for each in events]


def _of_clients(score: Evaluated, clients: Sequence[int]) -> Evaluated:
    lists = {name: getattr(score, name) for name in ("own", "own_loss", "relayed", "relayed_loss")}
    return replace(score, **{name: [values[i] for i in clients] for name, values in lists.items() if values})


def last_within(looks: Sequence[Look], seconds: float = float("inf"), sent: float = float("inf")) -> Look | None:
    """Return the last look that a budget allows; None where there is none."""
    return next((look for look in reversed(looks) if look.seconds <= seconds and look.bytes <= sent), None)


Runs = Mapping[str, Mapping[int, Sequence[Look]]]
"""Row -> seed -> looks; none of a run that diverged."""
_HEAD = ("system", "rounds", "virtual s", "sent, MB", "mean (worst) client at its end", "at the fewest bytes")


def cost_table(runs: Runs, baseline: str) -> str:
    """Write mean and worst client at the end, at the fewest bytes that any row sent, and at the baseline's time.

    Of every row the seeds count in which it has looks.  Rows that sent nothing set no limit of bytes.
    """
    runs = {row: {seed: looks for seed, looks in own.items() if looks} for row, own in runs.items()}
    least = _limits([{seed: own[-1].bytes for seed, own in each.items()} for each in runs.values()])
    limit = _limits([{seed: own[-1].seconds for seed, own in runs[baseline].items()}])
    in_time = {
        row: {seed: last_within(looks, seconds=limit[seed]) for seed, looks in own.items() if seed in limit}
        for row, own in runs.items()
    }
    gaps = adjusted_gaps(in_time, baseline)
    head = [*_HEAD, f"at the virtual time of {baseline}", "difference then", "p (Holm)"]
    lines = []
    for row, own in runs.items():
        ends = [looks[-1] for looks in own.values()]
        bought = [last_within(looks, sent=least[seed]) for seed, looks in own.items() if seed in least]
        scores = [_told(ends), _told(bought), _told(list(in_time[row].values()))]
        against = ["baseline", "–"] if row == baseline else _difference(gaps[row])
        lines.append([row, *_spent(ends), *scores, *against])
    seeds = sorted({seed for own in runs.values() for seed in own})
    alike = f" {NOT_DISTINGUISHABLE}" if any(gap and gap.distinguishable is False for gap in gaps.values()) else ""
    return f"{markdown_table(head, lines)}\nAt equal cost, {_over(seeds)}: {NOTE}{alike}{_lacking(runs, seeds)}\n"


def adjusted_gaps(in_time: Mapping[str, Mapping[int, Look | None]], baseline: str) -> dict[str, Difference | None]:
    """Row -> its difference to the baseline's mean client, p adjusted by Holm over the rows; None without a seed."""
    scores = {row: {seed: look.mean for seed, look in own.items() if look} for row, own in in_time.items()}
    found = {row: pair_differences(own, scores[baseline]) for row, own in scores.items() if row != baseline}
    adjusted = holm({row: gap.p for row, gap in found.items() if gap is not None and gap.p is not None})
    return {row: gap and replace(gap, p_holm=adjusted.get(row)) for row, gap in found.items()}


def _over(seeds: Sequence[int]) -> str:
    return f"over seeds {', '.join(map(str, seeds))}"


def _lacking(runs: Runs, seeds: Sequence[int]) -> str:
    """A sentence that says which rows have fewer seeds; empty where none has."""
    fewer = [(row, sorted(own)) for row, own in runs.items() if len(own) < len(seeds)]
    ended = "; ".join(f"{row} {_over(own) if own else 'in none'}" for row, own in fewer)
    return f" Where runs diverged, only those count that ended: {ended}." if ended else ""


def _limits(spent: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Seed -> the least that was spent above nothing, with the slack; without seeds in which nothing was."""
    by_seed: dict[int, list[float]] = {}
    for seed, value in (each for own in spent for each in own.items() if each[1] > 0):
        by_seed.setdefault(seed, []).append(value)
    return {seed: SLACK * min(values) for seed, values in by_seed.items()}


def _spent(ends: Sequence[Look]) -> list[str]:
    """Rounds, virtual seconds and megabytes; dashes of a row without a run that ended."""
    if not ends:
        return ["–"] * 3
    return [str(ends[0].round), _mean([end.seconds for end in ends], 1), _mean([end.bytes for end in ends], 1e6)]


NOTE = (
    f"the last evaluation before a run had spent the budget ({SLACK - 1:.0%} more allowed); '–': none by then. A rate "
    "that falls has not fallen to its end at such an evaluation, so a run whose own rounds fill the budget has an "
    "advantage. In brackets behind a difference the 95 % t interval, paired by seed; p: of the two-sided paired t "
    "test, adjusted by Holm over the rows of this table."
)


def _mean(values: Sequence[float], unit: float) -> str:
    return f"{np.mean(values) / unit:.{0 if unit == 1 else 2}f}"


def _told(looks: Sequence[Look | None]) -> str:
    known = [look for look in looks if look is not None]
    if not known or len(known) < len(looks):
        return "–"
    means = [look.mean for look in known]
    spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
    return f"{np.mean(means):.3f}{spread} ({np.mean([look.worst for look in known]):.3f})"


def _difference(gap: Difference | None) -> list[str]:
    """A difference with its interval and sign, and its adjusted p."""
    if gap is None:
        return ["–", "–"]
    return [format_difference(gap) + (ALIKE_SIGN if gap.distinguishable is False else ""), format_p(gap.p_holm)]
