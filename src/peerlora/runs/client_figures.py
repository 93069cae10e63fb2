"""Figures of who holds what, and of who exchanged with whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
from matplotlib.collections import LineCollection

from peerlora.runs.chart import Sheet
from peerlora.runs.figures import AVERAGED, INK, MEAN, OTHER, PALETTE, Key, Picture, add_axes, svg_figure

MANY_BARS = 60  # clients in the bar chart
MANY_LINKS = 2000  # links drawn; a browser is slow beyond


def labels_figure(name: str, title: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> Picture:
    """Stacked bars: the rows of each label that a client holds.  At most 60 clients; rare labels are put together."""
    table = np.asarray(counts, dtype=float).reshape(len(counts), -1)
    shown, labels = table[:MANY_BARS], [str(each) for each in names]
    kept = sorted(np.argsort(-table.sum(0), kind="stable")[: len(PALETTE)])
    parts = [(labels[column], shown[:, column], PALETTE[place]) for place, column in enumerate(kept)]
    if len(kept) < table.shape[1]:
        rest = shown.sum(1) - shown[:, kept].sum(1)
        parts.append((f"{table.shape[1] - len(kept)} other labels", rest, OTHER))
    with svg_figure(name, title) as (figure, out):
        axes = add_axes(figure, "rows", "client")
        bottom = np.zeros(len(shown))
        for _, height, colour in parts:
            axes.bar(range(len(shown)), height, bottom=bottom, color=colour, width=0.8, linewidth=0)
            bottom += height
        axes.set_xlim(-0.7, len(shown) - 0.3)
    note = f"The first {MANY_BARS} of {len(table)} clients." if len(table) > MANY_BARS else ""
    legend = [Key(label, colour, "band") for label, _, colour in parts]
    rows = [[client, *held] for client, held in enumerate(table.astype(int).tolist())]
    return Picture(title, out.getvalue(), legend, note, chart=Sheet(["client", *labels], rows))


def graph_figure(name: str, title: str, clients: int, uses: Mapping[tuple[int, int], int], rounds: int) -> Picture:
    """Clients on a circle; a link is the wider and darker, the more rounds used it.  Unlinked clients are hollow."""
    most = max(uses.values(), default=0)
    # Ties are broken by a checksum: by number, all drawn links would be those of the first clients.
    busiest = sorted(uses.items(), key=lambda item: (-item[1], crc32(f"{item[0]}".encode())))[:MANY_LINKS]
    angles = np.pi / 2 - 2 * np.pi * np.arange(clients) / max(clients, 1)  # client 0 on top, then clockwise
    spots = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    share = np.array([count for _, count in busiest], float) / max(most, 1)
    linked = np.isin(np.arange(clients), [client for link in uses for client in link])
    with svg_figure(name, title, size=(4.6, 4.6)) as (figure, out):
        axes = figure.add_subplot()
        axes.set(xlim=(-1.22, 1.22), ylim=(-1.22, 1.22), aspect="equal")
        axes.axis("off")
        if busiest:
            ends = [spots[list(link)] for link, _ in busiest]
            strength = min(1.0, (300 / len(busiest)) ** 0.5)  # else a thousand links are one dark disc
            widths, alpha = strength * (0.4 + 3.0 * share), strength * (0.2 + 0.65 * share)
            axes.add_collection(LineCollection(ends, linewidths=widths, colors=MEAN, alpha=alpha))
        size = max(4.0, 110.0 / max(1, clients / 12))
        axes.scatter(*spots.T, s=size, c=np.where(linked, AVERAGED, "#ffffff"), edgecolors=AVERAGED, zorder=2)
        for client in range(clients if clients <= MANY_BARS else 0):
            axes.text(*(1.13 * spots[client]), str(client), ha="center", va="center", fontsize=8, color=INK)
    note = f"The wider a link, the more rounds used it; the busiest was used in {most} of {rounds} rounds."
    if len(uses) > MANY_LINKS:
        note += f" The {MANY_LINKS} most used of {len(uses)} links are drawn."
    if not linked.all():
        note += f" Without any contact (hollow): {clients - int(linked.sum())}."
    rows = [[*link, count] for link, count in sorted(uses.items(), key=lambda item: (-item[1], item[0]))]
    return Picture(title, out.getvalue(), [], note, square=True, chart=Sheet(["client", "with", "rounds"], rows))
