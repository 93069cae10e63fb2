"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated, Any

import typer


def _in_order(words: list[str] | None) -> list[str] | None:
    """Checked before a command begins; the config module is imported only where words were given."""
    if not words:
        return words
    from peerlora.config.loading import in_order

    return in_order(words)


def split_config(words: list[str] | None) -> tuple[str | None, list[str]]:
    """Take a first word without '=' for the config file; the others are settings to change in it."""
    first, others = (words[0], words[1:]) if words and "=" not in words[0] else (None, words)
    return first, _in_order(others) or []


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="settings to change, e.g. train.rounds=50", callback=_in_order),
]
Out = Annotated[Path | None, typer.Option("--out", help="folder to write to; must be new or empty")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as one JSON object on the last line")]


def print_json(result: Any) -> None:
    """One line that other programs can read."""
    import json

    print(json.dumps(result, allow_nan=False))
