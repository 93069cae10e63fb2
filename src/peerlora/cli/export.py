"""``peerlora export``."""

from pathlib import Path
from typing import Annotated

import typer

from peerlora.cli.options import AsJson, chosen_model, print_json


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
    with_base: Annotated[
        bool, typer.Option("--with-base", help="with the base model in the folder, so that pipelines load it")
    ] = False,
    json: AsJson = False,
) -> None:
    """Write one client's adapter, or the average, as a folder that PEFT loads."""
    which = chosen_model("export", client, average, model)
    from peerlora.runtime.model_choice import ModelChoice

    choice = ModelChoice(client, which, rank, exact)
    if with_base:
        from peerlora.runtime.whole_model import export_with_base

        export_with_base(run, to, choice)
    else:
        from peerlora.runtime.export import export_from_run

        export_from_run(run, to, choice)
    written = {"run": str(run), "client": client, "to": str(to)} | ({"model": model} if model else {})
    print_json(written) if json else print(f"wrote {to}")
