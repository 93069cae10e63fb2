"""Figures of flow policies: the moves of each block of the point mass, and traces of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peerlora.display import Cell
from peerlora.runs.events import Event, PolicyShown, RunStarted
from peerlora.runs.metrics import select_events

if TYPE_CHECKING:
    from peerlora.runs.figures import Picture

_MANY = 60  # clients whose values are told


def policy_pictures(events: Sequence[Event]) -> list[Picture]:
    """Draw what the run's last policy does; nothing where it is no flow policy."""
    shown = select_events(events, PolicyShown)[-1:]
    found = [_fields_figure(each) for each in shown if each.fields]
    return found + [_traces_figure(each) for each in shown if each.traces]


def environment_rows(start: RunStarted) -> list[tuple[str, Cell]]:
    """Tell the environments of a flow policy's clients, and the values in which they differ."""
    if "environment" not in start.partition:
        return []
    values = "; ".join(
        f"{name} {', '.join(f'{value:.4g}' for value in own[:_MANY])}"
        for name, own in start.partition["values"].items()
    )
    each = start.partition.get("each", 1)
    whose = "by client" if each == 1 else f"by environment, {each} of each client"
    return [("environment", f"{start.partition['environment']}, {whose}: {values or 'the same for all'}")]


def _fields_figure(shown: PolicyShown) -> Picture:
    """One panel per block, from the noise to the action: how it moves actions, by where the mass is at rest."""
    import numpy as np

    from peerlora.runs.chart import Sheet
    from peerlora.runs.figures import MEAN, Picture, svg_figure

    title = f"How each block moves actions of the {shown.model} policy, by place"
    width = min(len(shown.fields), 8)
    with svg_figure("policy-fields", title, size=(7.4, 7.4 / width + 0.3)) as (figure, out):
        for number, moves in enumerate(shown.fields[:width]):
            axes = figure.add_subplot(1, width, number + 1)
            x, y, right, up = np.array(moves, float).T
            axes.quiver(x, y, right, up, color=MEAN, angles="xy", pivot="mid")
            axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])
            axes.set_xlabel(f"block {number}")
    note = "The point mass is at rest; arrows are means over noise, and each panel has a scale of its own."
    more = f" The first {width} of {len(shown.fields)} blocks are drawn." if len(shown.fields) > width else ""
    rows = [[block, *move] for block, moves in enumerate(shown.fields) for move in moves]
    sheet = Sheet(["block", "x", "y", "action x", "action y"], rows)
    return Picture(title, out.getvalue(), [], note + more, chart=sheet)


def _traces_figure(shown: PolicyShown) -> Picture:
    """One line per client: an episode in its environment."""
    from peerlora.runs.chart import Chart, Line
    from peerlora.runs.figures import Key, Picture, add_axes, line_colours, svg_figure

    title = f"An episode of the {shown.model} policy in the clients' environments"
    colours = list(line_colours(len(shown.traces)))
    with svg_figure("policy-traces", title, size=(7.4, 2.6)) as (figure, out):
        axes = add_axes(figure, shown.shown, "step")
        for values, colour in zip(shown.traces.values(), colours, strict=True):
            axes.plot(range(len(values)), values, color=colour, linewidth=1.4)
    legend = [Key(f"client {client}", colour, "thick") for client, colour in zip(shown.traces, colours, strict=True)]
    traces = zip(legend, shown.traces.values(), strict=True)
    lines = [Line(key.label, key.colour, "thick", range(len(values)), values) for key, values in traces]
    return Picture(title, out.getvalue(), legend, chart=Chart(lines, "step", shown.shown))
