"""What a real peer tells a Prometheus server, from its events."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from peerlora.display import utc_now
from peerlora.environment import need_extra
from peerlora.network.base import REASONS
from peerlora.runs.events import (
    CaughtUp,
    Evaluated,
    Event,
    Joined,
    NeighbourChanged,
    Resumed,
    RoundDone,
    RunFinished,
    RunStarted,
    Warned,
)

Ends = Mapping[str, datetime | None]
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600)  # seconds, upper bounds of the histograms' buckets


class PeerMetrics:
    """An event sink with the metrics of one real peer, in a registry of its own.

    ``folder`` is where the free disk space is measured.  Raises ExtraMissing without prometheus-client.
    """

    def __init__(self, folder: Path, ends: Callable[[], Ends] = dict, clock: Callable[[], datetime] = utc_now):
        need_extra("metrics")
        from prometheus_client import CollectorRegistry  # pyright: ignore[reportMissingImports]

        self.registry = CollectorRegistry()
        self.ends, self.clock = ends, clock
        self.names: dict[int, str] = {}
        self.metric = "metric"
        self.state = "starting"
        """starting, running or finished."""
        self._build()
        self.disk.set_function(lambda: shutil.disk_usage(_existing(folder)).free)
        for what in ("the certificate", "the member list"):
            self.validity.labels(what.removeprefix("the ").replace(" ", "-")).set_function(
                lambda what=what: self._seconds_left(what)
            )

    def _build(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram, Info  # pyright: ignore[reportMissingImports]

        def made(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **options: Any) -> Any:
            return kind(f"peerlora_{name}", text, labels, registry=self.registry, **options)

        self.info = made(Info, "run", "The run that this site takes part in.")
        self.round = made(Gauge, "round", "Finished rounds.")
        self.rounds = made(Gauge, "rounds_planned", "Rounds of the run.")
        self.lag = made(Gauge, "lag_rounds", "Rounds by which the foremost neighbour was ahead in the latest round.")
        self.loss = made(Gauge, "loss", "Mean training loss of the latest round that trained.")
        self.score = made(Gauge, "score", "Latest evaluation of the own model.", ("metric",))
        self.bytes = made(Counter, "sent_bytes", "Bytes of messages sent.")
        self.train = made(Histogram, "train_seconds", "Seconds of local steps per round.", buckets=_SECONDS)
        self.exchange = made(Histogram, "exchange_seconds", "Seconds of exchange per round.", buckets=_SECONDS)
        self.missed = made(Counter, "missed_links", "Planned links that were not used.", ("neighbour", "reason"))
        self.refusals = made(Counter, "refusals", "Refusals by either side.", ("neighbour", "reason"))
        self.up = made(Gauge, "neighbour_up", "1 while a neighbour is connected.", ("neighbour",))
        self.skipped = made(Counter, "skipped_rounds", "Rounds left out after falling behind.")
        self.warnings = made(Counter, "warnings", "Warnings of this site.")
        before = "before, when the rounds of this process began; NaN until then"
        contact = f"When a round last had contact to a neighbour; {before}."
        self.contact = made(Gauge, "last_contact_timestamp_seconds", contact)
        self.success = made(Gauge, "last_round_timestamp_seconds", f"When a round was last finished; {before}.")
        for gauge in (self.contact, self.success):
            gauge.set(math.nan)  # 0 would be a round in 1970, and an alarm
        self.validity = made(Gauge, "validity_left_seconds", "Time until it ends; NaN: never.", ("of",))
        self.disk = made(Gauge, "disk_free_bytes", "Free space where the run is written.")

    def __call__(self, event: Event) -> None:
        """Count one event."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, Resumed):
            self.round.set(event.round)
        elif isinstance(event, Joined):
            self.state = "running"
            for gauge in (self.contact, self.success):
                gauge.set(self.clock().timestamp())
            for client in event.reached:
                self.up.labels(self._name(client)).set(1)
        elif isinstance(event, RoundDone):
            self._round(event)
        elif isinstance(event, Evaluated) and event.own and math.isfinite(event.own[0]):
            self.score.labels(self.metric).set(event.own[0])
        elif isinstance(event, NeighbourChanged):
            self._neighbour(event)
        elif isinstance(event, CaughtUp):
            self.skipped.inc(event.to - event.round)
        elif isinstance(event, Warned):
            self.warnings.inc()
        elif isinstance(event, RunFinished):
            self.state = "finished"

    def _start(self, event: RunStarted) -> None:
        self.names = {int(client): name for client, name in event.names.items()}
        self.metric = event.metric
        self.rounds.set(event.rounds)
        self.info.info({"method": event.method, "site": self._name(event.held[0]) if event.held else ""})

    def _round(self, event: RoundDone) -> None:
        now = self.clock().timestamp()
        self.round.set(event.round + 1)
        self.lag.set(math.nan if event.behind is None else event.behind)
        self.bytes.inc(event.bytes_sent)
        self.train.observe(event.seconds_train)
        self.exchange.observe(event.seconds_mix)
        self.success.set(now)
        if event.contacts:
            self.contact.set(now)
        if event.loss and math.isfinite(event.loss[0]):
            self.loss.set(event.loss[0])
        for client, reason in event.missed.items():
            self.missed.labels(self._name(int(client)), reason.partition(":")[0][:60]).inc()

    def _neighbour(self, event: NeighbourChanged) -> None:
        name = self._name(event.client)
        if event.kind in ("up", "down"):
            self.up.labels(name).set(event.kind == "up")
        elif event.kind == "refused":
            reason = event.detail.partition(":")[0]  # the rest may be another site's words
            self.refusals.labels(name, reason if reason in REASONS else "unknown-reason").inc()

    def _name(self, client: int) -> str:
        return self.names.get(client, str(client))

    def _seconds_left(self, what: str) -> float:
        end = self.ends().get(what)
        return math.nan if end is None else (end - self.clock()).total_seconds()


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(each for each in (folder, *folder.resolve().parents) if each.is_dir())
