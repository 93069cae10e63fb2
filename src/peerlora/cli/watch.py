"""``peerlora watch``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import subprocess
    from threading import Thread

_PATIENCE = 5.0  # seconds that the page's process has to end
Watch = Annotated[bool, typer.Option("--watch", help="show the run on a page of this machine; see peerlora watch")]


def command(
    run: Annotated[Path, typer.Argument(help="folder of a run, of launched peers, of a comparison, or of a demo")],
    open: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free")] = 0,
    host: Annotated[str, typer.Option("--host", help="address to open; others than the loopback show it to all")] = (
        "127.0.0.1"
    ),
    wait: Annotated[bool, typer.Option("--wait", help="the folder may not be there yet")] = False,
    parent: Annotated[int | None, typer.Option("--parent", hidden=True, help="process to end with")] = None,
) -> None:
    """Show a run on a page while it goes on; also a stopped or finished one, launched peers, a comparison or a demo."""
    import sys

    from peerlora.runs.live.process import end_with
    from peerlora.runs.live.server import PageServer
    from peerlora.runs.live.source import source_of, wait_for

    if parent is not None:
        end_with(parent)
    if wait:
        wait_for(run)
    server = PageServer(source_of(run, _planned), host, port)
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
def watched(wanted: bool, folder: Path | None, piped: bool = False) -> Iterator[None]:
    """Serve the page of a folder from a process of its own within the block, so that it slows nothing down.

    The process ends with this one, also where this one is killed.  ``piped``: what it says goes through this process'
    own ``sys.stderr``.
    """
    if not wanted or folder is None:
        yield
        return
    import os
    import subprocess
    import sys

    from peerlora.environment import need_extra

    need_extra("watch")
    words = ["watch", "--wait", "--parent", str(os.getpid()), "--", str(folder)]
    page = subprocess.Popen(
        [sys.executable, "-m", "peerlora", *words],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE if piped else None,
        start_new_session=True,  # a Ctrl-C is for the run
    )
    passing = _pass_on(page) if piped else None
    try:
        yield
    finally:
        end_process(page)
        if passing is not None:
            passing.join(_PATIENCE)


def end_process(process: subprocess.Popen[bytes], patience: float = _PATIENCE) -> None:
    """End a process: ask it to, and kill it where it has not ended after ``patience`` seconds."""
    import subprocess

    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _pass_on(process: subprocess.Popen[bytes]) -> Thread:
    """Start a thread that prints what a process says on its stderr."""
    import sys
    from threading import Thread

    def copy() -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                print(line.decode(errors="replace").rstrip("\n"), file=sys.stderr)

    thread = Thread(target=copy, name="watch", daemon=True)
    thread.start()
    return thread
