"""A comparison as a LaTeX table in the style of booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peerlora.experiments.comparison import Comparison
from peerlora.experiments.table_notes import table_notes
from peerlora.experiments.tables import column_names, row_cells

_SIGNS = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "·": r"$\cdot$",
    "−": "$-$",
    "–": "--",
    "Σ": r"$\Sigma$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_SPECIAL = re.compile("|".join(map(re.escape, _SIGNS)))


def latex(result: Comparison) -> str:
    r"""Write the table for people as a ``tabular``, its notes as comments; it needs ``\usepackage{booktabs}``."""
    head, rows = column_names(result, brief=True), [row_cells(result, line, brief=True) for line in result.ranked]
    lines = ["% needs \\usepackage{booktabs}; written by peerlora compare"]
    lines += [f"% {' '.join(note.split())}" for note in table_notes(result)]
    lines += [f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", _row(head), r"\midrule"]
    return "\n".join([*lines, *map(_row, rows), r"\bottomrule", r"\end{tabular}"]) + "\n"


def escape_latex(text: str) -> str:
    """Write what has a meaning in LaTeX, and the signs of the tables, so that it is shown as it is."""
    return _SPECIAL.sub(lambda found: _SIGNS[found.group()], " ".join(text.split()))


def _row(cells: Sequence[str]) -> str:
    r"""Write one row; what ``\\`` or ``\midrule`` before it would take for an option or a star is kept apart."""
    text = " & ".join(map(escape_latex, cells)) + r" \\"
    return "{}" + text if text.startswith(("[", "*")) else text
