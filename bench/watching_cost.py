"""What a run that is watched pays for it: processor time of the live page and of each tracker, per second of the run.

    python bench/watching_cost.py --rounds 8

Every case is a run of its own, in a process of its own: MiniLM, ten clients, 5 steps of 8 rows a round, an evaluation
in every fifth round.  Trackers work on threads of the run, the page and what trackers start are processes beside it;
processor time is counted in each, since seconds of a clock would also be those of other work.  What starting takes is
apart: it does not grow with the run.  Writes bench/results/watching_cost.json, from which bench/performance_page.py
writes its table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WORDS = [
    "clients=10",
    "threads=1",
    "data.max_length=32",
    "topology.kind=ring",
    "algorithm.name=dec-lora",
    "train.local_steps=5",
    "train.batch=8",
    "eval.every=5",
    "eval.rows=100",
]
CASES = {"page": [], "tensorboard": ["tensorboard"], "mlflow": ["mlflow"], "wandb": ["wandb"], "trackio": ["trackio"]}
TICK = os.sysconf("SC_CLK_TCK")
RESULTS = Path("bench/results/watching_cost.json")


class Meter:
    """Processor time that trackers take in this process: to begin and end, and in rounds.

    Counted are the sink, on the run's thread, and all other threads, since a run of one thread has none of its own
    between its start and its end; libraries of trackers have.
    """

    def __init__(self) -> None:
        self.sink = self.calls = 0.0  # the sink in rounds; calls of trackers that are no rounds
        self.before = self.others = 0.0  # all other threads, up to the start of the run, and in it

    def wrap(self) -> None:
        """Count from now on."""
        from peerlora.runs.events import RunFinished, RunStarted
        from peerlora.runs.trackers.feed import Call, TrackerFeed
        from peerlora.runs.trackers.tracking import Tracking

        take, make = Tracking.__call__, TrackerFeed._make

        def taking(tracking: Tracking, event) -> None:
            if isinstance(event, RunStarted):
                self.before = time.process_time() - time.thread_time()
            began = time.thread_time()
            take(tracking, event)
            if not isinstance(event, RunStarted | RunFinished):
                self.sink += time.thread_time() - began

        def making(feed: TrackerFeed, call: Call) -> bool:
            began = time.thread_time()
            taken = make(feed, call)
            self.calls += 0.0 if call.point else time.thread_time() - began
            return taken

        Tracking.__call__, TrackerFeed._make = taking, making

    def end(self) -> dict[str, float]:
        """What was counted, on the run's thread."""
        others = time.process_time() - time.thread_time() - self.before
        return {"once": self.calls, "rounds": self.sink + max(0.0, others - self.calls)}


@contextmanager
def page_of(folder: Path, found: dict[str, float]) -> Iterator[None]:
    """Serve the page of a folder to one reader; processor time of its process before the first round, and after."""
    words = ["watch", "--wait", "--parent", str(os.getpid()), "--", str(folder)]
    page = subprocess.Popen([sys.executable, "-m", "peerlora", *words], stderr=subprocess.PIPE, text=True)
    log = folder / "events.jsonl"

    def read() -> None:
        assert page.stderr is not None
        address = next(line for line in page.stderr if line.startswith("watch: ")).split()[1]
        with suppress(OSError), urllib.request.urlopen(address + "events") as stream:
            while stream.readline():
                if "once" not in found and log.is_file() and b'"type":"RoundDone"' in log.read_bytes():
                    found["once"] = seconds_of(page.pid)

    threading.Thread(target=read, daemon=True).start()
    yield
    time.sleep(2)  # seconds until it has read the last round
    found["rounds"] = seconds_of(page.pid) - found["once"]
    page.terminate()
    page.wait()


def seconds_of(process: int) -> float:
    """Processor time of a process, user and system."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def one(case: str, rounds: int) -> dict[str, float]:
    """Run one case in this process."""
    from peerlora import load_config, simulate

    meter, page = Meter(), dict[str, float]()
    meter.wrap()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "TRACKIO_DIR": f"{folder}/trackio"}
        config = load_config(None, [*WORDS, f"train.rounds={rounds}", f"track=[{','.join(CASES[case])}]"])
        out = Path(folder) / "run"
        if case == "page":
            with page_of(out, page):
                simulate(config, out, report=False)
        else:
            simulate(config, out, report=False)
        run, counted = time.thread_time(), meter.end()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
    if case == "page":
        return {"run": run, **page}
    return {"run": run, **counted, "processes": children.ru_utime + children.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(one(arguments.case, arguments.rounds)))
        return
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for case in arguments.cases:
        words = [sys.executable, __file__, "--case", case, "--rounds", str(arguments.rounds)]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(f"{case}: {found[case]}", file=sys.stderr)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
