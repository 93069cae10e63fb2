"""TensorBoard: event files in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerlora.runs.resume import flatten
from peerlora.runs.store import TENSORBOARD_FOLDER
from peerlora.runs.trackers.base import Ending, TrackedRun
from peerlora.runs.trackers.names import READABLE, tidy_names
from peerlora.runs.trackers.series import final_values


class TensorBoard:
    """Writes ``tensorboard/`` in the run folder, so that ``tensorboard --logdir runs`` shows all runs."""

    def begin(self, run: TrackedRun) -> None:
        """Open an event file; points of rounds that a resumed run does again are purged."""
        from torch.utils.tensorboard import SummaryWriter

        self.run = run
        purge = None if run.resumed is None else run.resumed + 1
        self.writer = SummaryWriter(str(run.folder / TENSORBOARD_FOLDER), purge_step=purge, flush_secs=10)
        if run.resumed is None:
            self.writer.add_text("config", _code(json.dumps(run.config, indent=2)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar per series."""
        for name, value in tidy_names(values, READABLE).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, ending: Ending, summary: Mapping[str, Any], adapters: Path | None) -> None:
        """Add the summary as text, and settings with the main scores for the page HPARAMS."""
        if summary:
            self.writer.add_text("summary", _code(json.dumps(summary, indent=2)))
            settings = {name: _setting(value) for name, value in flatten(self.run.config).items()}
            found = flatten(summary.get("scores", {})).items()
            scores = final_values((f"final/{name}", value) for name, value in found)
            named = tidy_names(settings, READABLE), tidy_names(scores, READABLE)
            self.writer.add_hparams(*named, run_name=".")
        self.writer.close()


def _setting(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _code(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())  # the page reads Markdown
