"""Trackio: local, or at the server that its own settings name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerlora.runs.resume import flatten
from peerlora.runs.trackers.base import Ending, TrackedRun
from peerlora.runs.trackers.names import READABLE, tidy_names
from peerlora.runs.trackers.series import final_values


class Trackio:
    """One run of trackio, which knows runs by their names: the name here ends with the run's id."""

    def begin(self, run: TrackedRun) -> None:
        """Open the run, or the one of the same name again."""
        import trackio  # pyright: ignore[reportMissingImports]

        self.id = run.id[:8]
        self.run = trackio.init(
            project=run.project,
            name=f"{run.name}-{self.id}",
            group=run.group,
            config=json.loads(json.dumps(run.config)),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one step."""
        self.run.log(tidy_names(values, READABLE), step=step)

    def finish(self, ending: Ending, summary: Mapping[str, Any], adapters: Path | None) -> None:
        """Log the summary's scores, which trackio has no other place for, and the adapters; finish the run."""
        scores = final_values((f"final/{name}", each) for name, each in flatten(summary.get("scores", {})).items())
        if scores:
            self.run.log(tidy_names(scores, READABLE), step=int(summary.get("rounds", 0)))
        if adapters is not None:
            self.run.log_artifact(str(adapters), name=f"adapters-{self.id}", type="model")
        self.run.finish()
