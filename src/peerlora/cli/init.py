"""``peerlora init``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peerlora.cli.options import AsJson, chosen_texts, print_json

if TYPE_CHECKING:
    from peerlora.data.guess import Candidate

_SHOWN = 6  # candidates
_MANY = 20  # epochs, from which on the budget is worth a second line


def command(
    train: Annotated[
        str,
        typer.Option(
            "--train", help="your training data: a parquet, CSV or JSONL file, a folder of them, or of images"
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="the config file to write; must be new")] = Path("peerlora.yaml"),
    label: Annotated[
        str | None, typer.Option("--label", help="the column with the label, or none; default: guessed")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="a column of text; twice for pairs; default: guessed")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="the base model, as in model.source")] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="what is learned, as in task.kind, e.g. chat; default: guessed")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="write out a recipe's settings: sparse, for clients that meet rarely"),
    ] = None,
    json: AsJson = False,
) -> None:
    """Look at a data file and write a commented config for it."""
    from peerlora.data.first_config import write_template

    first = write_template(train, to, label, list(chosen_texts(text)), model, recipe, task)
    guess = first.guess
    if json:
        print_json({**asdict(guess), "epochs": first.epochs, "to": str(to)})
        return
    if guess.columns:
        columns = ", ".join(f"{role} {name}" for role, name in guess.columns.items())
        print(f"wrote {to}: {columns}; {guess.kind}")
        if guess.label is None:
            others = "--text NAME trains on all tokens of a column, --label NAME classifies, --task KIND does another"
            print(f"{guess.kind}: {guess.reason}; {others}")
        else:
            print(f"label {guess.label}: {guess.reason}; --label NAME takes another")
    else:
        print(f"wrote {to}: text {', '.join(guess.text)}; label {guess.label or 'none'}; {guess.kind}")
        print(f"label {guess.label or 'none'}: {guess.reason}; --label NAME takes another, --text NAME another text")
    for candidate in guess.candidates[:_SHOWN]:
        print(f"  {_described(candidate)}")
    print(f"budget: {first.budget}; {'lower train.rounds for less' if first.epochs > _MANY else 'see train.rounds'}")
    print(f"read it, then run: peerlora train {to}")


def _described(candidate: Candidate) -> str:
    values = ", ".join(f"{_short(value)} ({rows} rows)" for value, rows in candidate.counts.items())
    more = candidate.different - len(candidate.counts)
    return f"{_short(candidate.name)}: {values}{f' and {more} more values' if more > 0 else ''}"


def _short(value: str) -> str:
    line = "".join(letter if letter.isprintable() else "?" for letter in value)
    return line if len(line) <= 30 else f"{line[:30]}..."
