"""``peerlora privacy``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peerlora.cli.options import AsJson, Overrides, print_json

if TYPE_CHECKING:
    from rich.table import Table

_LISTED = 20  # clients of one table
_COLUMNS = {"rows": "rows", "sampling rate": "rate", "noise": "noise", "delta": "delta", "releases": "releases"}


def command(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="a config with a section privacy")],
    words: Overrides = None,
    client: Annotated[int | None, typer.Option("--client", help="one client, as a real peer; else all")] = None,
    json: AsJson = False,
) -> None:
    """Say before any training what a config promises: noise, epsilon by round, what other choices would give."""
    from peerlora.config.loading import load_config
    from peerlora.runtime.privacy_plan import plan_privacy

    found = plan_privacy(load_config(config, words or []), client)
    print_json(found) if json else _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    planned = found["planned"]
    title = (
        f"privacy of each {found['unit']}: clip {found['clip']:g}, accountant {found['accountant']}, noise "
        f"{found['generator']} ({found['guarantee']})"
    )
    names = [str(client) for client in found["clients"]]
    columns = {word: planned[name] for word, name in _COLUMNS.items()}
    rounds = {f"round {each['round']}": each["epsilon"] for each in found["by_round"]}
    console = Console(width=None if sys.stdout.isatty() else 110)  # a file has no width to keep to
    console.print(title, highlight=False, markup=False)
    console.print(_table("", "client", names, columns), _table("epsilon by round", "client", names, rounds))
    if len(names) > _LISTED:
        console.print(f"and {len(names) - _LISTED} clients more", highlight=False)
    console.print(_choices(found["choices"]))
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)


def _choices(choices: list[dict[str, Any]]) -> Table:
    """Epsilon by batch and rounds, or by rounds alone."""
    batches, rounds = (list(dict.fromkeys(each[name] for each in choices)) for name in ("batch", "rounds"))
    known = {(each["batch"], each["rounds"]): each["epsilon"] for each in choices}
    columns = {f"{each} rounds": [known[batch, each] for batch in batches] for each in sorted(rounds)}
    title = "epsilon with the same noise, of the client that spends most"
    return _table(title, "batch", ["any" if batch is None else str(batch) for batch in batches], columns)


def _table(title: str, first: str, rows: Sequence[str], columns: Mapping[str, Sequence[float | None]]) -> Table:
    """A table of numbers, of the first rows."""
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for name in (first, *columns):
        table.add_column(name, justify="right", no_wrap=True)
    for place, row in list(enumerate(rows))[:_LISTED]:
        table.add_row(row, *(_text(values[place]) for values in columns.values()))
    return table


def _text(value: float | None) -> str:
    return "no bound" if value is None else str(value) if isinstance(value, int) else f"{value:.3g}"
