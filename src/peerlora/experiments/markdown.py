"""A comparison as Markdown: its table, how to read it, and the learning rates that were searched."""

from __future__ import annotations

from collections.abc import Sequence

from peerlora.experiments.comparison import Comparison
from peerlora.experiments.table_notes import further_differences, rate_notes, table_notes
from peerlora.experiments.tables import (
    COMPARED,
    column_names,
    difference_columns,
    difference_rows,
    rate_columns,
    rate_rows,
    row_cells,
)


def markdown(result: Comparison) -> str:
    """Write the tables, each with its notes."""
    text = markdown_table(column_names(result), [row_cells(result, line) for line in result.ranked])
    if rows := difference_rows(result, COMPARED):
        text += f"\n{further_differences(result)}\n\n" + markdown_table(difference_columns(result, COMPARED), rows)
    text += "\n" + "\n".join(table_notes(result)) + "\n"
    if result.searches:
        text += "\n" + markdown_table(rate_columns(result.searches), rate_rows(result.searches))
        text += "\n" + "\n".join(rate_notes(result)) + "\n"
    return text


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table, one line per row."""
    lines = [_row(head), "|" + " --- |" * len(head), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
