"""``peerlora show``."""

from pathlib import Path
from typing import Annotated

import typer

from peerlora.cli.words import AsJson, print_json


def command(run: Annotated[Path, typer.Argument(help="a run's folder")], json: AsJson = False) -> None:
    """Show how a run stands: its progress, its results, its files."""
    from peerlora.runs.report import summarise

    summary = summarise(run)
    if json:
        print_json(summary)
        return
    from peerlora.cli.progress import print_summary

    print_summary([(summary["method"], summary)])
