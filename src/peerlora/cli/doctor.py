"""``peerlora doctor``."""

from typing import Annotated

import typer

from peerlora.cli.options import Overrides
from peerlora.cli.peer import Identity, Listen, Members


def command(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="the run's config, as at all sites")],
    identity: Identity,
    members: Members,
    words: Overrides = None,
    wait: Annotated[float, typer.Option("--wait", help="seconds that neighbours have to answer")] = 10.0,
    listen: Listen = None,
) -> None:
    """Say what would go wrong at this site before it does; exit code 1 if anything would."""
    from rich.console import Console

    from peerlora.config.loading import load_config
    from peerlora.runtime.peer.preflight import examine

    console, bad = Console(width=None if Console().is_terminal else 200), False
    for finding in examine(load_config(config, words or []), identity, members, wait, listen):
        bad = bad or finding.level == "problem"
        mark = {"good": "ok     ", "advice": "advice ", "problem": "PROBLEM"}[finding.level]
        do = f"\n        -> {finding.do}" if finding.do else ""
        console.print(f"{mark} {finding.what}{do}", highlight=False, markup=False, soft_wrap=True)
    if bad:
        raise typer.Exit(1)
