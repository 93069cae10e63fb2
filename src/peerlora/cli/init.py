"""``peerlora init``."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    train: Annotated[str, typer.Option("--train", help="your training data: a parquet, CSV or JSONL file")],
    to: Annotated[Path, typer.Option("--to", help="the config file to write")] = Path("peerlora.yaml"),
) -> None:
    """Look at a data file and write a commented config for it."""
    from peerlora.runtime.template import write_template

    guessed = write_template(train, to)
    print(f"wrote {to}: text {guessed.text}, label {guessed.label}, {guessed.kind}")
    print(f"read it, then run: peerlora train {to}")
