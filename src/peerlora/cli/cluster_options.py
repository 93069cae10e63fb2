"""Arguments that say on which workers a command computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from peerlora.config.cluster import ClusterConfig

Cluster = Annotated[
    str | None, typer.Option("--cluster", help="ray: compute on workers of a Ray cluster; none: in this process")
]
Address = Annotated[
    str | None, typer.Option("--address", help="of a running cluster: auto, host:port or ray://host:port")
]
Workers = Annotated[int | None, typer.Option("--workers", help="processes that compute")]
CpusPerWorker = Annotated[int | None, typer.Option("--cpus-per-worker", help="cores and threads of each")]
GpusPerWorker = Annotated[float | None, typer.Option("--gpus-per-worker", help="GPUs of each")]


def cluster_settings(engine: str | None, stored: ClusterConfig | None, **given: Any) -> ClusterConfig | None:
    """The settings that the options ask for, on top of those ``stored`` in a config; None: in this process.

    Raises ConfigError for options that contradict each other or are out of range.
    """
    from pydantic import ValidationError

    from peerlora.config.cluster import ClusterConfig
    from peerlora.errors import ConfigError

    asked = {name: value for name, value in given.items() if value is not None}
    if engine not in (None, "ray", "none"):
        raise ConfigError(f"--cluster {engine} given; expected ray or none")
    if engine == "none" or (engine is None and stored is None):
        if asked:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
            raise ConfigError(f"{names} given; this belongs to --cluster ray")
        return None
    try:
        return ClusterConfig.model_validate({**(stored.model_dump() if stored else {}), **asked})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name} {first['input']} given; {first['msg'].lower()}") from None
