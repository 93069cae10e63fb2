"""``peerlora predict``."""

import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer

from peerlora.cli.options import AsJson, chosen_texts, print_json


def command(
    folder: Annotated[Path, typer.Argument(help="a folder of `peerlora merge` or `export`, or of a run's adapters/")],
    rows: Annotated[str, typer.Option("--rows", help="the rows to answer: a file, or kind:place as in data.train")],
    to: Annotated[Path | None, typer.Option("--to", help="a new file to write, one JSON object a line")] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="column of text, twice for pairs; by default those of the run")
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=1, help="most tokens of a row")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=100_000, help="rows at a time")] = 64,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", min=1, help="most tokens of an answer; 64 by default")
    ] = None,
    json: AsJson = False,
) -> None:
    """Answer rows: label names with probabilities, numbers, or continuations."""
    import json as writer

    from peerlora.errors import ConfigError
    from peerlora.files import atomic_file

    if to is not None and to.exists():
        raise ConfigError(f"--to {to} exists; choose a new file")
    texts = chosen_texts(text)
    from peerlora.runs.write_failures import describe_write_failures
    from peerlora.runtime.predict import check_answer_length, predict
    from peerlora.runtime.serving import load_served

    served = load_served(folder, texts, max_length)
    answers = predict(served, rows, batch, check_answer_length(served, new_tokens))

    def write(file: TextIO) -> int:
        done = 0
        for each in answers:
            file.write(f"{writer.dumps(each, ensure_ascii=False)}\n")
            done += 1
        return done

    if to is None:
        count = write(sys.stdout)
    else:
        with describe_write_failures(to.parent, lambda: "predict again"), atomic_file(to) as half:
            with half.open("w", encoding="utf-8") as file:
                count = write(file)
    if json:
        print_json({"folder": str(folder), "rows": count, "to": None if to is None else str(to)})
    elif to is not None:
        print(f"wrote {count} answers to {to}")
