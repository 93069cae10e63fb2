"""How fast the live page is in a browser: from its address to the curves, and from a finished round to their update.

    python bench/live_page.py --clients 1000 --rounds 500

The log of a run is written, all but its last rounds; ``peerlora watch`` reads it, and headless Chromium opens the page.
Then the last rounds are appended one by one.  First paint is that of the browser; curves are there when the last figure
has been drawn.  What an update takes is the page's own ``lastDrawing``: reading its state and drawing all figures, on
the thread that also answers the pointer.  Writes bench/results/live_page.json, from which bench/performance_page.py
writes its section.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peerlora.runs.events import Evaluated, Event, RoundDone, RunStarted, to_json

RESULTS = Path("bench/results/live_page.json")
TARGETS = {"first_paint": 1000.0, "update": 100.0}
"""Milliseconds."""
SEEN = """
new MutationObserver((_, self) => {
  if (!document.querySelector("#bytes .uplot")) return;
  self.disconnect();
  queueMicrotask(() => { window.curvesAt = performance.now(); });
}).observe(document, { childList: true, subtree: true });
"""


def events(clients: int, rounds: int) -> list[Event]:
    """A run on a ring: losses and scores of all clients, some of them absent."""
    partition = {"names": ["a", "b"], "counts": [[5, client % 7 + 1] for client in range(clients)]}
    start: list[Any] = ["2026-01-01T00:00:00+00:00", "adf-lora", clients, rounds, "accuracy", True, 7, 2, {}, partition]
    found: list[Event] = [RunStarted(*start, {"kind": "ring"}, 10, [])]
    links = [[client, (client + 1) % clients] for client in range(clients)]
    for t in range(rounds):
        if t % 5 == 0:
            own = [0.3 + 0.5 * t / rounds + 0.002 * (client % 50) for client in range(clients)]
            found.append(Evaluated(t, 50, own, 0.7, [1.0] * clients, 1.0, 0.1, False))
        loss = [2.0 - t / rounds + 0.01 * (client % 30) for client in range(clients)]
        numbers: list[Any] = [0.1, 0.2, 0.3 / (t + 1), 0.02, 0.01, 0.5]
        sent: list[Any] = [links, len(links), 1000, 2000 * len(links), 0.5, 0.1, 0.01]
        found.append(RoundDone(t, loss, *numbers, *sent, absent=[t % clients]))
    return found


def append(folder: Path, some: list[Event]) -> None:
    """Add events to the log of a run folder, in one piece."""
    with open(folder / "events.jsonl", "a") as log:
        log.write("".join(to_json(event) + "\n" for event in some))


@contextmanager
def watched(folder: Path) -> Iterator[str]:
    """The address of a folder's page."""
    words = [sys.executable, "-m", "peerlora", "watch", str(folder)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        yield next(line for line in process.stderr if line.startswith("watch: ")).split()[1]
    finally:
        process.terminate()
        process.wait()


def until(page: Any, expression: str, seconds: float = 120.0) -> None:
    """Wait for an expression of the page to become true."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        if time.monotonic() > end:
            raise SystemExit(f"{expression} did not become true within {seconds:g} s")
        page.wait_for_timeout(10)


def measure(clients: int, rounds: int, updates: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of first paints, curves, updates and delays."""
    from playwright.sync_api import sync_playwright

    found = events(clients, rounds)
    last = [place for place, event in enumerate(found) if isinstance(event, RoundDone)][-updates:]
    with tempfile.TemporaryDirectory() as place, sync_playwright() as play:
        folder = Path(place) / "run"
        folder.mkdir()
        (folder / "config.yaml").write_text("")
        (folder / "run.json").write_text("{}")
        append(folder, found[: last[0]])
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with watched(folder) as address:
            paints, curves = [], []
            page = browser.new_page()
            page.goto(address)  # until the server has read the log
            until(page, f"state.rounds.size >= {rounds - updates}")
            for _ in range(repeats):
                page.close()
                page = browser.new_page()
                page.add_init_script(SEEN)
                page.goto(address)
                until(page, f"window.curvesAt !== undefined && state.rounds.size >= {rounds - updates}")
                paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
                curves.append(page.evaluate("window.curvesAt"))
            drawings, delays = update(page, folder, found, last)
        browser.close()
    numbers = {"first_paint": paints, "curves": curves, "update": drawings, "delay": delays}
    return {name: {"median": statistics.median(each), "most": max(each)} for name, each in numbers.items()}


def update(page: Any, folder: Path, found: list[Event], last: list[int]) -> tuple[list[float], list[float]]:
    """Append the last rounds one by one; milliseconds of each drawing, and from the line in the log until then."""
    drawings, delays = [], []
    for place, end in zip(last, [*last[1:], len(found)], strict=True):
        size = page.evaluate("delete window.lastDrawing && state.rounds.size")
        begun = time.perf_counter()
        append(folder, found[place:end])
        until(page, f"state.rounds.size > {size} && window.lastDrawing !== undefined")
        delays.append(1e3 * (time.perf_counter() - begun))
        drawings.append(page.evaluate("window.lastDrawing"))
    return drawings, delays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="times that the page is opened")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    numbers = measure(options.clients, options.rounds, options.updates, options.repeats)
    machine = {"cores": os.cpu_count(), "load": max(before, os.getloadavg()[0])}
    result = {**vars(options), "targets": TARGETS, "machine": machine, "milliseconds": numbers}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
