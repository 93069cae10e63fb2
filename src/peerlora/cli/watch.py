"""``peerlora watch``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Watch = Annotated[bool, typer.Option("--watch", help="show the run on a page of this machine; see peerlora watch")]


def command(
    run: Annotated[Path, typer.Argument(help="folder of a run, of launched peers, or of a comparison")],
    open: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free")] = 0,
    host: Annotated[str, typer.Option("--host", help="address to open; others than the loopback show it to all")] = (
        "127.0.0.1"
    ),
    wait: Annotated[bool, typer.Option("--wait", help="the folder may not be there yet")] = False,
) -> None:
    """Show a run on a page while it goes on; also a stopped or finished one, launched peers, or a comparison."""
    import sys

    from peerlora.runs.live.server import PageServer
    from peerlora.runs.live.source import is_comparison, source_of, wait_for

    if wait:
        wait_for(run)
    server = PageServer(source_of(run, _planned(run) if is_comparison(run) else ()), host, port)
    print(f"watch: {server.address}", file=sys.stderr, flush=True)
    if open:
        import webbrowser

        webbrowser.open(server.address)
    server.run()


def _planned(folder: Path) -> list[str]:
    """The folders of all trials of a comparison, also of those to come."""
    from peerlora.experiments.grid import load_grid
    from peerlora.experiments.trials import plan_trials

    return [trial.folder for trial in plan_trials(load_grid(folder / "grid.yaml")).trials]


@contextmanager
def watched(wanted: bool, folder: Path | None) -> Iterator[None]:
    """Serve the page of a folder from a process of its own within the block, so that it slows nothing down."""
    if not wanted or folder is None:
        yield
        return
    import subprocess
    import sys

    from peerlora.environment import need_extra

    need_extra("watch")
    page = subprocess.Popen(
        [sys.executable, "-m", "peerlora", "watch", str(folder), "--wait"],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is for the run
    )
    try:
        yield
    finally:
        page.terminate()
        page.wait()
