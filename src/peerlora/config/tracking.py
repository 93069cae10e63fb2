"""Where the numbers of a run go beside its folder: experiment trackers."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from peerlora.config.base import Section

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
KEEPS_FILES: tuple[Tracker, ...] = ("wandb", "mlflow", "trackio")
"""Trackers that keep files beside numbers."""


class TrackConfig(Section):
    """Experiment trackers that show a run while it goes on; each is an optional part of peerlora."""

    to: list[Tracker] = []
    """tensorboard, wandb, mlflow, trackio: any of them; `track: [mlflow]` is short for `track: {to: [mlflow]}`."""
    project: Annotated[str, Field(min_length=1, max_length=100)] = "peerlora"
    """The project of wandb and trackio, the experiment of mlflow."""
    group: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """Runs that belong together, such as those of one comparison; null: `peer.run` for real peers, else none."""
    adapters: bool = False
    """Upload the adapters at the end, where the tracker keeps files: wandb, mlflow, trackio."""

    @model_validator(mode="after")
    def _can_keep(self):
        if self.adapters and not set(self.to) & set(KEEPS_FILES):
            raise ValueError(
                f"adapters=true given, but {', '.join(self.to) or 'no tracker'} keeps no files; "
                "add wandb, mlflow or trackio to track.to"
            )
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"to={self.to} names a tracker twice; name each once")
        return self
