"""Weights & Biases, online or offline as its own settings say."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerlora.runs.store import WANDB_FOLDER
from peerlora.runs.trackers.base import Ending, TrackedRun
from peerlora.runs.trackers.names import PLAIN, tidy_names

_EXIT = {"finished": 0, "stopped": 130, "failed": 1}
_NO_PROJECT = re.compile(r"[/\\#?%:]")  # what the name of a project must not have
_LONGEST_NAME, _LONGEST_TAG = 128, 64  # characters


class Wandb:
    """One run of wandb; its x axis is the series ``round``.

    Without an API key it stays offline, in ``wandb/`` of the run folder, for ``wandb sync``: there is nobody who could
    answer its question for one.
    """

    def begin(self, run: TrackedRun) -> None:
        """Open the run, or the one of the same id again."""
        import wandb  # pyright: ignore[reportMissingImports]

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        _wait_for_a_new_second(run)
        self.run = wandb.init(
            project=_NO_PROJECT.sub("-", run.project),
            id=run.id,
            name=run.name[:_LONGEST_NAME],
            group=run.group,
            config=dict(run.config),
            tags=[tag[:_LONGEST_TAG] for tag in run.tags.values()],
            dir=run.folder,
            resume="allow" if mode == "online" else None,  # offline, the id alone joins the parts when they are synced
            reinit="create_new",
            mode=mode,
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, disable_git=True, save_code=False
            ),
        )
        self.run.define_metric("round", hidden=True)
        self.run.define_metric("*", step_metric="round")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a line of history."""
        self.run.log({"round": step, **tidy_names(values, PLAIN)})

    def finish(self, ending: Ending, summary: Mapping[str, Any], adapters: Path | None) -> None:
        """Update the summary, log the adapters as an artifact of type model, and finish the run."""
        import wandb  # pyright: ignore[reportMissingImports]

        if summary:
            self.run.summary.update(dict(summary))
        if adapters is not None:
            artifact = wandb.Artifact(f"adapters-{self.run.id}", type="model")
            artifact.add_dir(str(adapters))
            self.run.log_artifact(artifact)
        self.run.finish(exit_code=_EXIT[ending])


def _wait_for_a_new_second(run: TrackedRun) -> None:
    """Parts of one run are told apart by the second they began in; of two in one second, the later would be lost."""
    while any(run.folder.glob(f"{WANDB_FOLDER}/*-{time.strftime('%Y%m%d_%H%M%S')}-{run.id}")):
        time.sleep(0.05)
