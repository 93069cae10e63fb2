"""Files of a comparison: results.parquet, table.csv, table.md, table.tex, figures, report.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from peerlora.config.run import RunConfig
from peerlora.experiments.comparison import Comparison
from peerlora.experiments.latex import latex
from peerlora.experiments.markdown import markdown
from peerlora.experiments.rate_search import RateSearch
from peerlora.experiments.statistics import Outcome, compare, find_metrics, to_long_rows
from peerlora.experiments.tables import csv_text
from peerlora.files import atomic_file, write_atomically
from peerlora.runs.write_failures import describe_write_failures


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the failure of a write in a comparison's folder into a RunError that says how it goes on."""
    with describe_write_failures(folder, lambda: f"go on: peerlora compare --resume {folder}"):
        yield


def write_results(
    folder: Path,
    outcomes: Sequence[Outcome],
    searched: Sequence[Outcome],
    baseline: Mapping[str, str],
    grid: str,
    configs: Mapping[str, RunConfig],
    published: str | None,
    searches: Sequence[RateSearch] = (),
    warnings: Sequence[str] = (),
) -> Comparison:
    """Write every file; ``outcomes`` may be of a grid that is not finished.

    ``grid`` is its YAML, ``configs`` one config per setting, ``published`` the paper to compare with, ``searches`` what
    the runs in ``searched`` came to, ``warnings`` what readers should know.
    """
    from peerlora.experiments.figures import comparison_figures
    from peerlora.experiments.paper_figures import write_figures
    from peerlora.experiments.report import write_grid_report

    ended = [each for each in outcomes if each.measures or each.diverged]
    metrics = find_metrics([*outcomes, *searched])
    result = Comparison(folder, compare(ended, baseline), metrics, baseline, searches, warnings)
    with writing(folder):
        write_parquet(folder / "results.parquet", outcomes, searched)
        write_atomically(folder / "table.csv", csv_text(result))
        write_atomically(folder / "table.md", markdown(result))
        write_atomically(folder / "table.tex", latex(result))
        pictures = comparison_figures(outcomes, next(iter(result.baseline), None))
        write_grid_report(result, outcomes, searched, pictures, grid, configs, published)
        write_figures(folder, pictures)  # last: one that fails costs nothing else
    return result


def write_parquet(path: Path, outcomes: Sequence[Outcome], searched: Sequence[Outcome]) -> None:
    """Write the long table: axes, purpose (report or search), seed, learning rate, client, round, metric, value."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    axes = list(outcomes[0].labels) if outcomes else []
    types = [(axis, pa.string()) for axis in axes]
    types += [("purpose", pa.string()), ("seed", pa.int64()), ("learning rate", pa.float64())]
    types += [("client", pa.int32()), ("round", pa.int32()), ("metric", pa.string()), ("value", pa.float64())]
    lines = [*to_long_rows(outcomes, "report"), *to_long_rows(searched, "search")]
    columns = {
        name: pa.array([line[name] for line in lines], kind, from_pandas=kind == pa.float64()) for name, kind in types
    }
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
