"""``peerlora init``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from peerlora.cli.options import AsJson, print_json


def command(
    train: Annotated[str, typer.Option("--train", help="your training data: a parquet, CSV or JSONL file")],
    to: Annotated[Path, typer.Option("--to", help="the config file to write; must be new")] = Path("peerlora.yaml"),
    json: AsJson = False,
) -> None:
    """Look at a data file and write a commented config for it."""
    from peerlora.data.guess import write_template

    guess = write_template(train, to)
    if json:
        print_json({**asdict(guess), "to": str(to)})
        return
    print(f"wrote {to}: text {', '.join(guess.text)}; label {guess.label or 'none'}; {guess.kind}")
    print(f"read it, then run: peerlora train {to}")
