"""Pages of reports: HTML that holds all it needs, and asks nothing of a network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from peerlora.display import Cell, format_number
from peerlora.files import write_atomically
from peerlora.runs.events import plain

if TYPE_CHECKING:
    from peerlora.runs.figures import Key, Picture

_DATA = '<script type="application/json" class="data">'


def write_page(path: Path, title: str, body: Iterable[str]) -> Path:
    """Write one HTML page; ``body`` is HTML, ``title`` is not yet escaped."""
    parts = [part for part in body if part]
    charts = any(_DATA in part for part in parts)  # else the script has nothing to draw
    style = (_asset("uPlot.min.css") if charts else "") + _asset("report.css")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{style}</style>'
    script = [f"<script>{_asset(name)}</script>" for name in ("uPlot.iife.min.js", "report.js") if charts]
    top = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>'
    parts = [top, f"<h1>{escape(title)}</h1>", *parts, "</main>", *script, "</body></html>\n"]
    write_atomically(path, "\n".join(parts).encode(errors="replace"))
    return path


def picture_html(picture: Picture) -> str:
    """Render a figure with title, legend and note."""
    legend = "".join(_legend_entry(key) for key in picture.legend)
    shape = ' class="square"' if picture.square else ""
    return (
        f"<figure{shape}><figcaption>{escape(picture.title)}</figcaption>"
        + (f'<div class="legend">{legend}</div>' if legend else "")
        + f'<div class="scroll">{picture.svg}</div>'
        + (f"{_DATA}{_json(picture.chart.as_json())}</script>" if picture.chart else "")
        + (f'<p class="note">{escape(picture.note)}</p>' if picture.note else "")
        + "</figure>"
    )


def table_html(rows: Sequence[Sequence[Cell]], head: Sequence[str] = ()) -> str:
    """Render a table whose first column names the row; numbers are set to the right."""
    number = ["", *[" class=number"] * len(head)]
    top = "".join(f'<th scope="col"{kind}>{escape(word)}</th>' for kind, word in zip(number, head, strict=False))
    lines = []
    for name, *cells in rows:
        numbers = "".join(f"<td class=number>{escape(format_number(cell))}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(format_number(name))}</th>{numbers}</tr>')
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _legend_entry(key: Key) -> str:
    """``band``: what the legend that the page's script makes has no entry for."""
    return f"<span{' class=band' * (key.style == 'band')}>{_swatch(key)}{escape(key.label)}</span>"


def _swatch(key: Key) -> str:
    """A small drawing of the line or area that a legend entry stands for."""
    shape = {
        "band": f'<rect width="14" height="12" x="4" fill="{key.colour}" fill-opacity="0.8"/>',
        "thin": f'<path d="M0 6h22" stroke="{key.colour}" stroke-width="1"/>',
        "dashed": f'<path d="M0 6h22" stroke="{key.colour}" stroke-width="2.4" stroke-dasharray="6 3"/>',
        "thick": f'<path d="M0 6h22" stroke="{key.colour}" stroke-width="2.6"/>',
    }[key.style]
    return f'<svg width="22" height="12" aria-hidden="true">{shape}</svg>'


def _asset(name: str) -> str:
    return files("peerlora.runs").joinpath("assets", name).read_text(encoding="utf-8")


def _json(tree: object) -> str:
    """As JSON that stands in HTML: no text of a user can end the element."""
    return json.dumps(plain(tree), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
