"""What a schedule of the rate, further metrics and best rounds take of a run's processor time.

    python bench/extras_cost.py [--rounds 6] [--out bench/results/extras.json]

MiniLM, ten clients on one thread, 5 steps of 8 rows a round, and, which is as often as it can be, an evaluation of all
models on 100 rows in every round, with every metric of classes and `eval.select`.  The functions that compute them are
timed in one run, in processor time of its thread, which other work on the machine does not change much.
`bench/performance_page.py` writes what was found into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peerlora.config.loading import load_config
from peerlora.config.metrics import metrics_of
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.runs.events import Event, RunStarted
from peerlora.runtime.simulate import simulate

SHAPE = {"clients": 10, "local_steps": 5, "batch": 8, "rows": 100}
WORDS = [
    f"clients={SHAPE['clients']}",
    f"train.local_steps={SHAPE['local_steps']}",
    f"train.batch={SHAPE['batch']}",
    f"eval.rows={SHAPE['rows']}",
    "threads=1",
    "data.max_length=32",
    "data.eval_per_class=20",
    "topology.kind=ring",
    "algorithm.name=dec-lora",
]
EXTRAS = ["train.schedule=cosine", "train.warmup=1", "eval.every=1", "eval.select={}"]
TIMED = {
    "schedule": ["train.local_training.rate", "runtime.trainer.rate"],
    "metrics": [f"train.client_outcomes.{name}" for name in ("margins_of", "compute_metric", "counts_by_name")],
    "best rounds": ["runtime.selection.BestRounds.offer"],
}
"""What is asked for -> the names by which a run calls what computes it."""
TARGET = 0.01
"""The share of a run that a schedule and metrics may take together."""


class Stopwatch:
    """Processor time of a thread in some functions, and how often they were called."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which adds what it takes."""

        def call(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.thread_time() - began
                self.calls += 1

        return call


@contextmanager
def timed_extras() -> Iterator[dict[str, Stopwatch]]:
    """Time the functions of every extra while this is open."""
    watches = {name: Stopwatch() for name in TIMED}
    with ExitStack() as open_ones:
        for name, places in TIMED.items():
            for place in places:
                replaced = patch(f"peerlora.{place}", autospec=False)
                original, _ = replaced.get_original()
                replaced.new = watches[name].timed(original)
                open_ones.enter_context(replaced)
        yield watches


def measure(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Seconds of each extra and of the whole run, from its start to the end of its last round's evaluation."""
    began, ended = 0.0, 0.0

    def listen(event: Event) -> None:
        nonlocal began, ended
        if isinstance(event, RunStarted):
            began = time.thread_time()
        ended = time.thread_time()

    with timed_extras() as watches:
        simulate(config, folder, sinks=[listen], report=False)
    silent = [name for name, watch in watches.items() if not watch.calls]
    if silent:
        raise SystemExit(f"{', '.join(silent)}: nothing was called; the names in TIMED are out of date")
    extras = {name: {"seconds": watch.seconds, "calls": watch.calls} for name, watch in watches.items()}
    return {"run": ended - began, "rounds": config.train.rounds, "extras": extras}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("bench/results/extras.json"))
    asked = parser.parse_args()
    metrics = metrics_of(task_kind("classification"))
    words = [*WORDS, *EXTRAS, f"eval.metrics=[{', '.join(metrics)}]", f"train.rounds={asked.rounds}"]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(load_config(None, words), Path(folder) / "run")
    found |= {"shape": SHAPE, "metrics": len(metrics), "target": TARGET}
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
