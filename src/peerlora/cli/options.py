"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated, Any

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="settings to change, e.g. train.rounds=50")
]
Out = Annotated[Path | None, typer.Option("--out", help="folder to write to; must be new or empty")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as one JSON object on the last line")]


def print_json(result: Any) -> None:
    """One line that other programs can read."""
    import json

    print(json.dumps(result, allow_nan=False))
