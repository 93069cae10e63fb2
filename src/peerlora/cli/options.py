"""Arguments that several commands take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

if TYPE_CHECKING:
    from peerlora.config.exchange import ExportedModel


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


def chosen_texts(text: list[str] | None) -> tuple[str, ...]:
    """Check the columns that ``--text`` names.  Raises ConfigError for one that is named twice, and for three."""
    from peerlora.errors import ConfigError

    found = text or []
    if len(found) > 2:
        raise ConfigError(f"--text given {len(found)} times; a row has one text, or two for pairs")
    if len(set(found)) < len(found):
        raise ConfigError(f"--text {found[0]} given twice; name one column, or two different ones for pairs")
    return tuple(found)


def chosen_model(command: str, client: int | None, average: bool, model: str | None) -> "ExportedModel | None":
    """Check which of a run's models is asked for; None: the one that the run deploys.  Raises ConfigError."""
    from peerlora.config.exchange import ExportedModel
    from peerlora.errors import ConfigError

    models = get_args(ExportedModel)
    if model is not None and model not in models:
        raise ConfigError(f"--model {model} given; expected one of {', '.join(models)}")
    if (client is None) != (average or model == "averaged"):
        raise ConfigError(f"{command} needs exactly one of --client I and --average (which --model averaged is, too)")
    if average and model in ("own", "relayed", "best"):
        raise ConfigError(f"--average and --model {model} given; a client's {model} model needs --client I")
    return cast("ExportedModel | None", model)
