"""The section of a config that says on what machines a run's clients are computed."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from peerlora.config.base import Positive, Section

_SECONDS_MOST = 604_800  # seconds; a week


class ClusterConfig(Section):
    """Workers of a Ray cluster, each with a block of clients; it does not change what is computed."""

    engine: Literal["ray"] = "ray"
    """What starts and connects workers."""
    address: str | None = None
    """Of a running cluster: auto, host:port or ray://host:port; null: one that is started on this machine."""
    workers: Positive = 2
    """Processes that compute, each with the base model once."""
    cpus_per_worker: Positive = 1
    """Cores and threads of each; they stand in for `threads` of the run."""
    gpus_per_worker: Annotated[float, Field(ge=0, le=16)] = 0.0
    """GPUs of each: a whole number, or below 1 a part of one that several workers share; with `device: cuda`."""

    timeout: Annotated[float, Field(gt=0, le=_SECONDS_MOST)] = 900.0
    """Seconds without an answer after which a worker counts as lost; a round and an evaluation must take less."""
    wait: Annotated[float, Field(ge=0, le=_SECONDS_MOST)] = 600.0
    """Seconds to wait for machines where one has left and the others have too few cores or GPUs to go on."""
    retries: Annotated[int, Field(ge=0, le=1000)] = 3
    """How often a run, or a cell of a comparison, is taken up again after workers were lost."""

    @field_validator("gpus_per_worker")
    @classmethod
    def _divides_or_counts(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("expected a part of one GPU, or a whole number of them")
        return value


def asked_or_stored(asked: Any, stored: Any) -> ClusterConfig | None:
    """Return the section of the config, or of the grid, that a resumption asks for; where it has none, the stored one.

    A section that is asked for as null counts: it means this process.
    """
    return asked.cluster if "cluster" in asked.model_fields_set else stored.cluster
