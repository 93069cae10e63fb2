"""``peerlora compare``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peerlora.cli.cluster_options import Address, Cluster, CpusPerWorker, GpusPerWorker, Workers, cluster_settings
from peerlora.cli.options import AsJson, Out, print_json, split_config
from peerlora.cli.watch import Watch, watched

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from peerlora.config.cluster import ClusterConfig
    from peerlora.experiments.comparison import Comparison
    from peerlora.experiments.grid import GridConfig
    from peerlora.experiments.runner import GridStatus
    from peerlora.runs.events import Event


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GRID.yaml] [key=value ...]",
            help="a grid file; settings of the base (train.rounds=50) or of the grid (seeds=[0,1]) to change in it",
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="adf-lora or tad-lora: a paper's protocol")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="of a preset: small (half an hour on 2 cores) or full")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="of a preset: folder with sst2/train.parquet, sst2/validation.parquet")
    ] = None,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="go on with the comparison in this folder")] = None,
    watch: Watch = False,
    json: AsJson = False,
    cluster: Cluster = None,
    address: Address = None,
    workers: Workers = None,
    cpus: CpusPerWorker = None,
    gpus: GpusPerWorker = None,
) -> None:
    """Run methods, topologies, tasks and seeds against each other; one table, one report."""
    from peerlora.cli.progress import stop_on_interrupt
    from peerlora.errors import ConfigError
    from peerlora.runs.store import new_folder

    source, overrides = split_config(words)
    if resume is not None and out is not None:
        raise ConfigError(f"--out {out} and --resume {resume} given; a comparison stays in its folder, drop --out")
    expected = _expected(source, overrides, preset, budget, data)
    if resume is None and expected is None:
        raise ConfigError("compare needs a GRID.yaml, --preset adf-lora or tad-lora, or --resume DIR")
    section = _cluster_section(resume, expected, overrides)
    settings = cluster_settings(
        cluster, section, address=address, workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus
    )
    if watch and out is None and resume is None:
        out = new_folder("compare")  # known before the run begins
    with watched(watch, resume or out), stop_on_interrupt() as stop, ExitStack() as opened:
        from peerlora.experiments.grid import search_warnings
        from peerlora.experiments.runner import Callbacks, resume_grid, start_grid

        progress = GridProgress()
        pool = None
        if settings is not None:
            from peerlora.experiments.trial_pool import trial_pools

            pool = opened.enter_context(trial_pools(settings, progress.warn_again))
        callbacks = Callbacks(progress, stop, pool=pool)
        for warning in search_warnings(expected) if expected is not None else ():
            progress.warn(warning)
        if resume is not None:
            result = resume_grid(resume, lambda stored: expected or _changed(stored, overrides), callbacks)
        else:
            assert expected is not None
            result = start_grid(expected.model_copy(update={"cluster": settings}), out, callbacks)
    _print(result)
    if json:
        print_json(result.as_json())


def _expected(
    source: str | None, words: Sequence[str], preset: str | None, budget: str | None, data: Path | None
) -> GridConfig | None:
    """The grid that the command line asks for; None where it names none."""
    from peerlora.errors import ConfigError
    from peerlora.experiments.grid import load_grid
    from peerlora.experiments.presets import preset as named

    if preset is not None and source is not None:
        raise ConfigError(f"{source} and --preset {preset} given; a comparison has one grid, drop one")
    if preset is not None:
        return load_grid(named(preset, budget or "full", data), words)
    for option, value in (("--budget", budget), ("--data", data)):
        if value is not None:
            raise ConfigError(f"{option} {value} belongs to --preset adf-lora or tad-lora; name one")
    return load_grid(source, words) if source is not None else None


def _cluster_section(resume: Path | None, expected: GridConfig | None, words: Sequence[str]) -> ClusterConfig | None:
    """The section ``cluster`` that is asked for, else that of the grid in the folder that is resumed.

    None also where that folder has no grid, which the resumption refuses.
    """
    from peerlora.config.cluster import asked_or_stored
    from peerlora.experiments.grid import load_grid

    if resume is None or not (resume / "grid.yaml").is_file():
        return expected and expected.cluster
    stored = load_grid(resume / "grid.yaml")
    return asked_or_stored(expected or _changed(stored, words), stored)


def _changed(stored: GridConfig, words: Sequence[str]) -> GridConfig:
    from peerlora.experiments.grid import load_grid

    return load_grid(stored.model_dump(mode="json"), words)


class GridProgress:
    """Prints one line per trial; on a terminal the line of the current one follows its rounds."""

    def __init__(self):
        from rich.console import Console

        self.console = Console(stderr=True)
        self.began: tuple[float, int] | None = None  # time, and the work finished before
        self.warned: set[str] = set()

    @contextmanager
    def __call__(self, status: GridStatus) -> Iterator[Callable[[Event], None]]:
        """Report one trial."""
        from rich.live import Live

        self.began = self.began or (time.monotonic(), status.done)
        head = f"cell {status.number} of {status.trials}: {status.trial}"
        live = Live(console=self.console, transient=True) if self.console.is_terminal else None
        if live is None:
            self._print_line(head + self._format_left(status, 0))
        with live or nullcontext():
            yield lambda event: self._show(event, status, head, live)
        if live is not None:
            self._print_line(head)

    def warn(self, message: str) -> None:
        """Print a warning, once."""
        if message not in self.warned:
            self.warned.add(message)
            self._print_line(f"warning: {message}")

    def warn_again(self, message: str) -> None:
        """Print a warning, each time that it is given."""
        self._print_line(f"warning: {message}")

    def _show(self, event: Event, status: GridStatus, head: str, live: Live | None) -> None:
        from rich.text import Text

        from peerlora.runs.events import Resumed, RoundDone, Warned

        if isinstance(event, Warned):  # once: many trials have the same shards
            self.warn(event.message)
        elif isinstance(event, Resumed):
            self._print_line(f"going on after round {event.round}")
        elif isinstance(event, RoundDone) and live is not None:
            done = event.round + 1
            left = self._format_left(status, status.own * done // status.rounds)
            live.update(Text(f"{head}, round {done} of {status.rounds}{left}"))

    def _format_left(self, status: GridStatus, own: int) -> str:
        """Format the time left at the speed of this process; ``own``: work done in the current trial."""
        now, (began, before) = status.done + own, self.began or (0.0, 0)
        if now <= before:
            return ""
        left = (time.monotonic() - began) / (now - before) * (status.total - now)
        return f" (about {left / 60:.0f} min left)" if left >= 90 else f" (about {left:.0f} s left)"

    def _print_line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _print(result: Comparison) -> None:
    from rich.console import Console

    from peerlora.experiments.table_notes import mark_notes, rates_title
    from peerlora.experiments.tables import column_names, rate_columns, rate_rows, row_cells

    console = Console(width=None if sys.stdout.isatty() else 200)  # a file has no width to keep to
    title = f"{result.metric}, {len(result.lines)} settings"
    rows = [row_cells(result, line, brief=True) for line in result.ranked]
    console.print(_table(title, column_names(result, brief=True), rows))
    if result.searches:
        console.print(_table(rates_title(result), rate_columns(result.searches), rate_rows(result.searches)))
    for note in mark_notes(result):
        console.print(note, highlight=False, markup=False)
    console.print(f"report: {result.folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for word in head:
        table.add_column(Text(word))
    for row in rows:
        table.add_row(*map(Text, row))  # as text: brackets would be read as markup
    return table
