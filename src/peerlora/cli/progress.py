"""Progress of a run, as one live table on a terminal and plain lines elsewhere, and the tables at its end."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from peerlora.display import format_bytes, format_fixed, format_now
from peerlora.runs.events import (
    CaughtUp,
    Evaluated,
    Event,
    Joined,
    NeighbourChanged,
    Resumed,
    RoundDone,
    RunStarted,
    Warned,
)
from peerlora.runs.further_scores import describe_best, describe_further
from peerlora.runs.metrics import scores_of, worst_of
from peerlora.runs.privacy_summary import describe_privacy

if TYPE_CHECKING:
    from peerlora.experiments.demo import DemoReport


@contextmanager
def stop_on_interrupt(*signals: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end the run after its round, with a checkpoint; the second one ends it at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("\nstopping after this round; press Ctrl-C again to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in signals or (signal.SIGINT,)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """Shows a run's events; a context manager that owns the live table.

    On a terminal the table has the latest round, with a bar of the rounds done below it, and every evaluation stays as
    a line above it; elsewhere there are plain lines.
    ``timestamps``: lines begin with the time, where there is no table.
    """

    def __init__(self, title: str = "", timestamps: bool = False):
        self.title, self.timestamps, self.indent = title, timestamps, "" if timestamps else "  "
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, transient=True) if self.console.is_terminal else None
        self.started: RunStarted | None = None
        self.evaluated: Evaluated | None = None
        self.bytes_sent = 0
        self.first_round: int | None = None
        self.began = self.printed = time.monotonic()

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, RunStarted):
            self.started, self.began = event, time.monotonic()
            self.title = self.title or event.method
        elif isinstance(event, Evaluated):
            self.evaluated = event
            if self.live:
                self._line(self._describe_scores(event))
        elif isinstance(event, RoundDone):
            self.first_round = event.round if self.first_round is None else self.first_round
            self.bytes_sent += event.bytes_sent
            self._round(event)
        for line in describe_event(event, self._name, self.title):
            if not (self.live and isinstance(event, RunStarted | Joined)):
                self._line(line)

    def _name(self, client: int) -> str:
        return (self.started.names.get(str(client)) if self.started else None) or f"client {client}"

    def _round(self, event: RoundDone) -> None:
        if self.live:
            self.live.update(self._shown(event))
        elif time.monotonic() - self.printed > 2:
            self.printed = time.monotonic()
            self._line(self.indent + ", ".join(f"{name} {value}" for name, value in self._facts(event).items()))

    def _facts(self, event: RoundDone) -> dict[str, str]:
        rounds = self.started.rounds if self.started else None
        done = event.round + 1 - (self.first_round or 0)
        facts = {
            "round": f"{event.round + 1}" + (f"/{rounds}" if rounds else ""),
            "loss": format_fixed(event.mean_loss),
            "consensus A/B": "/".join(format_fixed(each, ".2e") for each in (event.consensus_A, event.consensus_B)),
            "contacts": str(event.contacts) + (f", missed {len(event.missed)}" if event.missed else ""),
            "sent": format_bytes(self.bytes_sent, fixed=True),
        }
        facts |= self._scores(self.evaluated) if self.evaluated else {}
        if event.virtual_seconds == event.virtual_seconds:
            facts["virtual"] = f"{event.virtual_seconds:.1f} s"
        if rounds:
            left = (time.monotonic() - self.began) / done * (rounds - event.round - 1)
            facts["left"] = f"{left:.0f} s"
        return facts

    def _scores(self, event: Evaluated) -> dict[str, str]:
        """Mean and worst client; which client is the worst is not known where the run's start is not."""
        worst = None if self.started is None else min if self.started.higher_is_better else max
        own = _without_nan(event.own)
        facts = {"mean client": f"{mean(own):.3f}", **({"worst": f"{worst(own):.3f}"} if worst else {})}
        if personal := _without_nan(event.personal):
            facts["own rows"] = f"{mean(personal):.3f}"
        if (relayed := _without_nan(event.relayed)) and worst:
            facts["relayed mean/worst"] = f"{mean(relayed):.3f}/{worst(relayed):.3f}"
        return facts

    def _describe_scores(self, event: Evaluated) -> str:
        metric = self.started.metric if self.started else "score"
        scores = ", ".join(f"{name} {value}" for name, value in self._scores(event).items())
        return f"{self.indent}after {event.round} rounds, {metric} on {event.rows} rows: {scores}"

    def _shown(self, event: RoundDone) -> RenderableType:
        """The latest round as a table, and how far the run is."""
        facts = self._facts(event)
        table = Table(*facts, title=self.title)
        table.add_row(*facts.values())
        if self.started is None:
            return table
        return Group(table, ProgressBar(total=self.started.rounds, completed=event.round + 1, width=60))

    def _line(self, text: str) -> None:
        stamp = "" if self.live or not self.timestamps else f"{format_now()} "
        self.console.print(stamp + text, highlight=False, markup=False, soft_wrap=True)


def describe_event(event: Event, name: Callable[[int], str], title: str) -> list[str]:
    """Describe an event that is worth lines of its own; ``name``: of a client; ``title``: of the run."""
    if isinstance(event, RunStarted):
        lines = [f"{title}: {event.clients} clients, {event.rounds} rounds, {event.threads} threads"]
        if event.held:
            me = event.names.get(str(event.held[0])) or f"client {event.held[0]}"
            lines.append(f"this is {me}; consensus is that of its neighbourhood, of no more")
        return lines + event.notes
    if isinstance(event, Warned):
        return [f"warning: {event.message}"]
    if isinstance(event, Resumed):
        return [f"going on after round {event.round}"]
    if isinstance(event, Joined):
        return [f"beginning with {', '.join(map(name, event.reached)) or 'nobody'}"]
    if isinstance(event, NeighbourChanged):
        return [f"{name(event.client)}: {event.kind}" + (f" ({event.detail})" if event.detail else "")]
    if isinstance(event, CaughtUp):
        how = f" with the state of {name(event.client)}" if event.pulled else ""
        return [f"fell behind; going on from round {event.round} to {event.to}{how}"]
    return []


def _without_nan(values: Sequence[float]) -> list[float]:
    """The values of clients that have one: attackers have none, and nobody a loss in a round without
    training: then NaN; empty of no clients."""
    known = [value for value in values if not math.isnan(value)]
    return known or [math.nan] * bool(values)


def print_summary(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Print one line per run: its results, its cost and its folder."""
    metric = rows[0][1]["metric"]
    relayed = any("relayed_mean" in scores_of(summary) for _, summary in rows)
    models = "of the averaged model, and of the relayed ones" if relayed else "and of the averaged model"
    table = Table(title=f"{metric} of each client's own model, {models}", title_justify="left")
    timed = any(summary.get("virtual_seconds") is not None for _, summary in rows)
    names = ["", "mean", "worst", "averaged", *(["relayed", "worst relayed"] if relayed else [])]
    for name in (*names, "consensus", "sent", "seconds", *(["virtual s"] if timed else [])):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True, min_width=len(name))
    for name, summary in rows:
        reached = scores_of(summary)
        table.add_row(
            name,
            format_fixed(reached["own_mean"]),
            format_fixed(worst_of(summary)),
            format_fixed(reached["averaged"]),
            *([format_fixed(reached.get(f"relayed_{each}")) for each in ("mean", "worst")] if relayed else []),
            format_fixed(summary["consensus"]["product"], ".2e"),
            format_bytes(summary["bytes_sent"], fixed=True),
            format_fixed(summary["seconds"]["total"], ".1f"),
            *([format_fixed(summary["virtual_seconds"], ".1f")] if timed else []),
        )
    console = Console(width=None if sys.stdout.isatty() else 110)  # a file has no width to keep to
    console.print(table)
    for name, summary in rows:
        console.print(f"{name}: {_contacts(summary['last_contact'])}", highlight=False, soft_wrap=True)
    for name, summary in rows:
        lines = (*describe_further(summary["metric"], summary), *describe_best(summary))
        for line in (*lines, *describe_privacy(summary.get("privacy"))):
            console.print(f"{name}: {line}", highlight=False, markup=False, soft_wrap=True)
        if deployed := summary.get("deployed"):
            console.print(f"{name}: the {deployed} models are deployed", highlight=False, markup=False, soft_wrap=True)
        console.print(f"{name}: {summary['run']}", highlight=False, markup=False, soft_wrap=True)


def _contacts(last: list[int | None] | None) -> str:
    if last is None:
        return "the links of each round were not written down"
    if all(t is None for t in last):
        return "no client had contact"
    if len(last) > 20:
        met = [t for t in last if t is not None]
        return f"last contacts between round {min(met)} and {max(met)}, {len(last) - len(met)} clients never"
    return "last contact of client 0, 1, ... in round " + ", ".join("never" if t is None else str(t) for t in last)


def print_demo(report: DemoReport) -> None:
    """Print the demo's rows and findings."""
    print_summary([(row.name, row.summary) for row in report.rows])
    console = Console()
    for line in report.findings:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"report: {report.report}", highlight=False, markup=False, soft_wrap=True)
