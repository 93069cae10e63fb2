"""``peerlora export``."""

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from peerlora.cli.options import AsJson, print_json


def command(
    run: Annotated[Path, typer.Argument(help="a finished run's folder")],
    to: Annotated[Path, typer.Option("--to", help="the PEFT folder to write; must be new or empty")],
    client: Annotated[int | None, typer.Option("--client", help="the client whose adapter to export")] = None,
    average: Annotated[bool, typer.Option("--average", help="export the average of all clients")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="own, relayed, averaged or best; by default the one that is deployed"),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="a relayed model with no cut, of a larger rank")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="cut to this rank; the card tells the error")] = None,
    json: AsJson = False,
) -> None:
    """Write one client's adapter, or the average, as a folder that PEFT loads."""
    from peerlora.config.exchange import ExportedModel
    from peerlora.errors import ConfigError

    models = get_args(ExportedModel)
    if model is not None and model not in models:
        raise ConfigError(f"--model {model} given; expected one of {', '.join(models)}")
    if (client is None) != (average or model == "averaged"):
        raise ConfigError("export needs exactly one of --client I and --average (which --model averaged is, too)")
    if average and model in ("own", "relayed", "best"):
        raise ConfigError(f"--average and --model {model} given; a client's {model} model needs --client I")
    from peerlora.runtime.export import export_from_run

    export_from_run(run, to, client, rank, cast("ExportedModel | None", model), exact)
    told = {"run": str(run), "client": client, "to": str(to)} | ({"model": model} if model else {})
    print_json(told) if json else print(f"wrote {to}")
