"""``peerlora merge``."""

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from peerlora.cli.options import AsJson, chosen_model, print_json


def command(
    run: Annotated[Path, typer.Argument(help="a finished run's folder")],
    to: Annotated[Path, typer.Option("--to", help="the model folder to write; must be new or empty")],
    client: Annotated[int | None, typer.Option("--client", help="the client whose model to write")] = None,
    average: Annotated[bool, typer.Option("--average", help="write the model of the average of all clients")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="own, relayed, averaged or best; by default the one that is deployed"),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="precision of the files: fp32, bf16 or fp16")] = "fp32",
    json: AsJson = False,
) -> None:
    """Write a whole model, base and adapter in one, for programs that know no adapters."""
    from peerlora.errors import ConfigError

    which = chosen_model("merge", client, average, model)
    from peerlora.runtime.model_choice import ModelChoice
    from peerlora.runtime.whole_model import Precision, merge_from_run

    if dtype not in get_args(Precision):
        raise ConfigError(f"--dtype {dtype} given; expected one of {', '.join(get_args(Precision))}")
    merge_from_run(run, to, ModelChoice(client, which), cast(Precision, dtype))
    print_json({"run": str(run), "client": client, "to": str(to)}) if json else print(f"wrote {to}")
