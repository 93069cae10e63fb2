"""MLflow, at its own tracking address."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerlora.runs.resume import flatten
from peerlora.runs.trackers.base import Ending, TrackedRun
from peerlora.runs.trackers.names import PLAIN, tidy_names
from peerlora.runs.trackers.series import final_values

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_LONGEST = 500  # characters of a parameter that every server takes
_TAG = "peerlora.id"


class MLflow:
    """One run of the experiment; ``MLFLOW_TRACKING_URI`` says where, as for every user of MLflow."""

    def begin(self, run: TrackedRun) -> None:
        """Create the run, or open the one with the same id again; log those parameters that it does not have yet."""
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self.client = MlflowClient()
        found = self.client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self.client.create_experiment(run.project)
        earlier = self.client.search_runs([experiment], f"tags.`{_TAG}` = '{run.id}'", max_results=1)
        if earlier:
            self.id, logged = earlier[0].info.run_id, earlier[0].data.params
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {**run.tags, _TAG: run.id, **({"group": run.group} if run.group else {})}
            self.id, logged = self.client.create_run(experiment, tags=tags, run_name=run.name).info.run_id, {}
        self._log_config(run.config, logged)

    def _log_config(self, config: Mapping[str, Any], logged: Mapping[str, Any]) -> None:
        """Log a config; parameters in ``logged`` are kept, since MLflow takes no other value of one."""
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        named = tidy_names(flatten(config), PLAIN).items()
        values = {name: (each if isinstance(each, str) else json.dumps(each))[:_LONGEST] for name, each in named}
        params = [Param(name, value) for name, value in values.items() if name not in logged]
        for first in range(0, len(params), 100):  # of one request
            self.client.log_batch(self.id, params=params[first : first + 100])
        self.client.log_dict(self.id, dict(config), "config.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics of one step."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in tidy_names(values, PLAIN).items()]
        for first in range(0, len(metrics), 1000):  # of one request
            self.client.log_batch(self.id, metrics=metrics[first : first + 1000])

    def finish(self, ending: Ending, summary: Mapping[str, Any], adapters: Path | None) -> None:
        """Log the summary as metrics and as a file, the adapters as artifacts, and end the run."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        if summary:
            values, now = final_values(flatten({"scores": summary.get("scores", {})}).items()), int(time.time() * 1000)
            named = tidy_names({f"final/{name}": each for name, each in values.items()}, PLAIN).items()
            self.client.log_batch(self.id, [Metric(name, each, now, 0) for name, each in named])
            self.client.log_dict(self.id, dict(summary), "summary.json")
        if adapters is not None:
            self.client.log_artifacts(self.id, str(adapters), "adapters")
        self.client.set_terminated(self.id, _STATUS[ending])
