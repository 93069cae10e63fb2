"""The loop that anybody would write: one PEFT model, the nodes' adapters put into it in turn, averages by hand."""

import time
from pathlib import Path

from local import Work, arguments, mean_of, ring_bytes, write_answer


def run(folder: Path, out: Path) -> None:
    work = Work(folder)
    nodes = range(work.job["nodes"])
    states = [work.start() for _ in nodes]
    began = time.time()
    for t in range(work.job["rounds"]):
        states = [work.train(states[i], i, t) for i in nodes]
        states = [mean_of(states, row) for row in work.W.tolist()]
    write_answer(out, work, states, began, time.time(), ring_bytes(work), "computed")


if __name__ == "__main__":
    run(*arguments()[:2])
