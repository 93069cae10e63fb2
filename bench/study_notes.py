"""What stands below a study's table: its runs against another row, tuned settings, machines, rows to come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from peerlora.experiments.comparison import MAIN, Comparison
from peerlora.experiments.markdown import markdown_table
from peerlora.experiments.table_notes import difference_notes
from peerlora.experiments.tables import COMPARED, difference_columns, difference_rows, rate_columns, rate_rows
from study_base import Tree
from study_tuning import Tried


def further_table(result: Comparison) -> str:
    """The differences of the same runs to another row, of all measures that have any, with their own adjusted p."""
    measures = (MAIN, *COMPARED)
    title = f"The same runs, set against {', '.join(result.baseline.values())}:"
    table = markdown_table(difference_columns(result, measures), difference_rows(result, measures))
    return "\n".join([title, "", table, *difference_notes(result), ""])


def tuning_table(tried: Tried) -> str:
    """Every rate of every value of every tuned setting, with what it reached."""
    rows = [each for own in tried.values() for _, each in sorted(own.items())]
    if not rows:
        return ""
    note = "Tuned on rows set aside, each value at rates of its own; the value whose best rate reached most is taken."
    return f"\n{markdown_table(rate_columns(rows), rate_rows(rows))}{note}\n"


def dtype_note(grids: Sequence[Tree]) -> str:
    """The precision of the base model, where it is another than fp32."""
    found = sorted({tree["base"]["train"].get("dtype", "fp32") for tree in grids} - {"fp32"})
    return f"The base model is in {found[0]} in all rows, adapters and optimiser in fp32.\n" if found else ""


def machine_note(runs: Sequence[Mapping[str, Any]]) -> str:
    """On which kinds of machine a table's runs were computed."""
    kinds = Counter(each["machine"] for each in runs)
    where = ", ".join(f"{kind} ({count:,} run{'s' * (count > 1)})" for kind, count in kinds.most_common())
    differ = " Kinds of machines round differently, which long runs make visible." if len(kinds) > 1 else ""
    return f"Computed on: {where}, those of the search included.{differ}\n"


def missing_note(rows: Sequence[str]) -> str:
    """Which rows a table lacks."""
    return f"Not in the table yet, since their runs have not all finished: {'; '.join(rows)}.\n" if rows else ""
