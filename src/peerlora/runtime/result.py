"""What a finished run gives a script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from peerlora.lora.adapters import Adapters


@dataclass(frozen=True)
class Result:
    """A finished run."""

    summary: dict[str, Any]
    """What ``peerlora train --json`` prints."""
    run: Path
    """The run folder, with events, metrics, report and a PEFT folder per client."""
    load: Callable[[], Adapters] = field(repr=False)
    """Gives ``adapters``."""
    load_relayed: Callable[[], Adapters | None] = field(default=lambda: None, repr=False)
    """Gives ``relayed``."""
    load_best: Callable[[], Adapters | None] = field(default=lambda: None, repr=False)
    """Gives ``best``."""

    @cached_property
    def adapters(self) -> Adapters:
        """Every client's own final adapter."""
        return self.load()

    @cached_property
    def relayed(self) -> Adapters | None:
        """Every client's relayed average; None where nothing is relayed."""
        return self.load_relayed()

    @cached_property
    def best(self) -> Adapters | None:
        """Every client's adapter of its best evaluation; None without ``eval.select``."""
        return self.load_best()

    @property
    def metrics(self):
        """The long metrics table (client, round, metric, value) as a pyarrow Table."""
        import pyarrow.parquet as pq

        return pq.read_table(self.run / "metrics.parquet")
