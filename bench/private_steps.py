"""What differential privacy of rows costs per local step: ordinary and private steps of the same clients, by turns.

    python bench/private_steps.py [--clients 1 10] [--turns 15] [--steps 4] [--words adapter.head=mixed]

MiniLM, a batch of 16 rows of at most 32 tokens, one thread.  The private ones draw rows and noise from seeds, or from
the system's generator.  Seconds are the processor's, of this process, so that what others compute counts little.
Writes bench/results/private_steps.json and the line in docs/privacy.md.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import torch

from markers import insert
from speed import Shape, Stacked, federation, interleaved, ratio

RESULTS = Path("bench/results/private_steps.json")
BATCH, TOKENS = 16, 32
WAYS = {
    "plain": (),
    "seeded": ("privacy.noise=1", "privacy.generator=seeded"),
    "system": ("privacy.noise=1", "privacy.generator=system"),
}
GOAL = 1.3  # times an ordinary step


def measure(clients: int, steps: int, turns: int, words: list[str]) -> dict[str, Any]:
    """Milliseconds of a client's step in each way, and the ratios to the ordinary one, after a first round of each."""
    shape = Shape(clients, BATCH, TOKENS, steps=steps)
    ways = {name: Stacked(federation(shape, [*own, *words])) for name, own in WAYS.items()}
    for way in ways.values():
        way.round(0)
    taken = interleaved({name: way.round for name, way in ways.items()}, turns)
    return {
        "clients": clients,
        "ms": {name: 1e3 * median(each.cpu for each in own) / steps / clients for name, own in taken.items()},
        "ratio": {name: ratio(taken[name], taken["plain"], "cpu") for name in WAYS if name != "plain"},
    }


def line(whole: dict[str, Any]) -> str:
    """The sentence of docs/privacy.md."""
    told = []
    for each in whole["of"]:
        ways = [
            f"{own['median']:.2f} times with {name} noise ({own['least']:.2f} to {own['most']:.2f})"
            for name, own in each["ratio"].items()
        ]
        who = "one client" if each["clients"] == 1 else f"{each['clients']} clients in one graph"
        told.append(f"of {who} {' and '.join(ways)}, of {each['ms']['plain']:.0f} ms")
    return (
        f"A private step takes, in processor time of an ordinary one (MiniLM, batch {whole['batch']}, "
        f"{whole['tokens']} tokens, one thread): {'; '.join(told)} (median, least and most of {whole['turns']} turns "
        f"of {whole['steps']} steps, load {whole['load']:.0f} when it began, `bench/private_steps.py`)."
    )


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--words", nargs="*", default=[])
    parser.add_argument("--only-print", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    found = [measure(clients, asked.steps, asked.turns, asked.words) for clients in asked.clients]
    whole = {"batch": BATCH, "tokens": TOKENS, "steps": asked.steps, "turns": asked.turns, "load": load}
    whole |= {"goal": GOAL, "of": found}
    print(json.dumps(whole, indent=1))
    print(text := line(whole))
    if not asked.only_print:
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        insert(Path("docs/privacy.md"), "private-steps", text)


if __name__ == "__main__":
    main()
