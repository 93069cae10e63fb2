"""``peerlora export``."""

from pathlib import Path
from typing import Annotated

import typer

from peerlora.cli.options import AsJson, print_json


def command(
    run: Annotated[Path, typer.Argument(help="a finished run's folder")],
    to: Annotated[Path, typer.Option("--to", help="the PEFT folder to write; must be new or empty")],
    client: Annotated[int | None, typer.Option("--client", help="the client whose adapter to export")] = None,
    average: Annotated[bool, typer.Option("--average", help="export the average of all clients")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="cut to this rank; the card tells the error")] = None,
    json: AsJson = False,
) -> None:
    """Write one client's adapter, or the average, as a folder that PEFT loads."""
    from peerlora.errors import ConfigError

    if (client is None) != average:
        raise ConfigError("export needs exactly one of --client I and --average")
    from peerlora.runtime.export import export_from_run

    export_from_run(run, to, client, rank)
    print_json({"run": str(run), "client": client, "to": str(to)}) if json else print(f"wrote {to}")
