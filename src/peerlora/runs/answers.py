"""What models answered, as a part of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from peerlora.display import format_fixed
from peerlora.runs.events import Event, Generated
from peerlora.runs.metrics import select_events


def answers_html(events: Sequence[Event]) -> str:
    """Render the last answers beside the expected ones; nothing where a run wrote none."""
    generated = select_events(events, Generated)
    if not generated or not generated[-1].answers:
        return ""
    last = generated[-1]
    names = {"prompt": "prompt", "expected": "expected", "own": f"client {last.client}", "averaged": "averaged model"}
    shown = [name for name in names if name in last.answers[0]]
    head = "".join(f"<th>{escape(names[name])}</th>" for name in shown)
    lines = "".join(_line(row, shown) for row in last.answers)
    note = "; ".join(_scores(names[model], own) for model, own in last.scores.items())
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    cut = f" {last.cut} rows were not asked: their answers are cut at data.max_length." if last.cut else ""
    return f"<h2>Answers</h2><p>Greedy, after round {last.round}.{cut}</p>{table}" + (
        f'<p class="note">{escape(note)}.</p>' if note else ""
    )


def _line(row: Mapping[str, str], shown: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{escape(row.get(name, ''))}</td>" for name in shown) + "</tr>"


def _scores(model: str, scores: Mapping[str, float]) -> str:
    return f"{model}: " + ", ".join(f"{name} {format_fixed(value)}" for name, value in scores.items())
