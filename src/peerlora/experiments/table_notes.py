"""How to read the tables of a comparison, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from peerlora.experiments.comparison import MAIN, Comparison
from peerlora.experiments.inference import LEVEL, POWER, smallest_sign_flip_p
from peerlora.experiments.measures import FEW_EVALUATIONS, UNRELAYED
from peerlora.experiments.rate_search import RELAYED
from peerlora.experiments.statistics import Design
from peerlora.experiments.tables import MARKED, NOT_DISTINGUISHABLE, UNEQUAL_SIGN, gauge_marker, shown_measures
from peerlora.train.online.task import FlowPolicyTask


def table_notes(result: Comparison) -> list[str]:
    """How to read the table."""
    return [
        _scores(result),
        *_mixed(result),
        *_columns(result),
        *_gauges(result),
        *_differences(result),
        *_work(result),
        *_rates(result),
    ]


def difference_notes(result: Comparison) -> list[str]:
    """How to read a table of differences alone."""
    return [*_differences(result), *_work(result)]


def mark_notes(result: Comparison) -> list[str]:
    """The notes without which a table in a terminal would be misread: its signs, and what its seeds can show."""
    signs = [*_gauges(result), *_alike(result)]
    return [*_mixed(result), *signs, *_design(result), *_work(result), *result.warnings]


def _scores(result: Comparison) -> str:
    metrics = result.metrics or {"metric": True}
    names = ", ".join(f"{name} ({'higher' if higher else 'lower'} is better)" for name, higher in metrics.items())
    text = (
        f"{names}: mean over seeds ± standard deviation over seeds (divisor "
        "n - 1). Mean client, worst client and averaged model are of the last evaluation, on all rows"
    )
    if "best round" not in shown_measures(result):
        return f"{text}."
    return (
        f"{text}; the best round is the best mean client of any evaluation, where there are more than "
        f"{FEW_EVALUATIONS}, chosen on the rows it is reported on, so it flatters."
    )


def _mixed(result: Comparison) -> Iterator[str]:
    if result.mixed:
        yield (
            "The column metric says what a row's scores are: compare rows of the same metric only. A row whose "
            "baseline is of another metric has no differences."
        )


COLUMNS = {
    "relayed client": (
        "Relayed client: of the average that a client makes of the newest adapters that it has heard of, which is what "
        "it deploys unless exchange.relay.deploy is own."
    ),
    "personalised client": (
        "Personalised client: of its own model, on rows of its own that were held out (eval.own), or in its own "
        "environment."
    ),
    "best rounds of clients": (
        "Best rounds of clients: the mean over clients of the value by which eval.select kept each one's best "
        "adapters; where that was on the rows that are reported, it flatters."
    ),
}
"""What a column shows that not every table has."""


def _columns(result: Comparison) -> Iterator[str]:
    shown = shown_measures(result)
    yield from (sentence for name, sentence in COLUMNS.items() if name in shown)


def further_differences(result: Comparison) -> str:
    """What stands above the table of further differences."""
    return f"Of further measures, the differences to {', '.join(result.baseline.values())}:"


def _gauges(result: Comparison) -> Iterator[str]:
    if any(gauge_marker(line, name) for line in result.lines for name in shown_measures(result)):
        yield MARKED


def _differences(result: Comparison) -> Iterator[str]:
    if not result.baseline:
        return
    yield (
        "Differences are paired by seed. In brackets, from 3 seeds on: the 95 % t interval of the mean difference. It "
        "is about the mean over seeds of this task, model and budget, and assumes that differences are roughly normal; "
        "about other tasks, models or budgets it says nothing. p: of the two-sided paired t test, adjusted by Holm "
        "over the rows of this table that have the baseline's work, for each measure."
    )
    if any(name in line.differences for line in result.lines for name in UNRELAYED):
        yield "Relayed models are set against the baseline's relayed ones, or its own where it relays nothing."
    yield from _alike(result)
    yield from _design(result)
    seeds = [line.differences[MAIN].seeds for line in result.lines if MAIN in line.differences]
    if seeds:
        yield (
            f"The sign-flip test, in {result.details}, assumes no normality; with {max(seeds)} seeds its p is "
            f"{smallest_sign_flip_p(max(seeds)):.2g} at least."
        )


def _alike(result: Comparison) -> Iterator[str]:
    if any(gap.distinguishable is False for line in result.lines for gap in line.differences.values()):
        yield NOT_DISTINGUISHABLE


def _design(result: Comparison) -> Iterator[str]:
    if result.design is not None:
        yield design_sentence(result.design)


def design_sentence(design: Design) -> str:
    """What a table's seeds can be expected to show, in a sentence."""
    first = f"Holm's first level, {LEVEL:g} / {design.tests} rows" if design.tests > 1 else f"{LEVEL:g}"
    return (
        f"Smallest difference of the {design.measure} that {design.seeds} seeds can show: {design.detectable:.3f}, "
        f"found with {POWER * 100:g} % probability at {first}, where paired differences have the standard deviation "
        f"seen here ({design.deviation:.3f})."
    )


def _work(result: Comparison) -> Iterator[str]:
    unequal = [f"{line.setting}: {line.unequal_work}" for line in result.ranked if line.unequal_work]
    if unequal:
        yield (
            f"{UNEQUAL_SIGN.strip()} Unequal work, so not ranked, below the others: row gradients (training rows, each "
            f"as often as a step takes its gradient) other than the baseline's by over 1 %. {'. '.join(unequal)}."
        )


def _rates(result: Comparison) -> Iterator[str]:
    if result.searches:
        yield f"Each rate was searched {_searched_where(result)}, at the same budget; the table of rates is below."
    if any(line.rate_from for line in result.lines):
        yield "A rate 'of' another setting was searched there: both agree on what search.each of the grid names."
    if any(each.edge for each in result.searches):
        yield (
            "At the edge: the best rate that was tried, or the one that is taken, is the lowest or the highest of its "
            "group, so that one beyond may be better, and the row's place may be that of its rate."
        )
    yield from result.warnings


def rates_title(result: Comparison) -> str:
    """What the table of searched rates shows."""
    relayed = any(each.measure == RELAYED for each in result.searches)
    models = ", of relayed models where these are deployed" if relayed else ""
    return f"{result.metric or 'metric'} of the mean client by learning rate, {_searched_where(result)}{models}"


def _searched_where(result: Comparison) -> str:
    """What the search of rates is scored on, which is never what is reported."""
    rows, environments = "on training rows set aside", "in environments of seeds that are not reported"
    if FlowPolicyTask.metric not in result.metrics:
        return rows
    return f"{rows}, policies {environments}" if result.mixed else environments


def rate_notes(result: Comparison) -> list[str]:
    """How to read the table of searched rates."""
    sentences = [
        f"{rates_title(result)}, after the same number of rounds: mean ± standard deviation over the search's seeds."
    ]
    if any(each.taken != each.best for each in result.searches):
        sentences.append(
            "Where the best rate is not taken, the one taken is worse by no more than the standard error, and more "
            "groups have it among such rates."
        )
    return sentences
