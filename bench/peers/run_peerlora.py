"""peerlora's own simulation of the same work, with its normal settings: checkpoints and diagnostics included.

    run_peerlora.py WORK ANSWER THREADS

The evaluation during the rounds and the report at the end are left out: no other runner has them.
"""

import json
import tempfile
import time
from pathlib import Path

from local import LAUNCHED, arguments
from safetensors.torch import load_file, save_file
from work import load_settings


class Clock:
    """Notes when the first round begins and when the last one ends."""

    def __init__(self):
        self.began = self.ended = 0.0

    def __call__(self, event) -> None:
        """Listen to the run."""
        kind = type(event).__name__
        if kind == "Evaluated" and not event.final:
            self.began = time.time()
        elif kind == "RoundDone":
            self.ended = time.time()


def run(folder: Path, out: Path, threads: int) -> None:
    from peerlora import simulate

    job = json.loads((folder / "job.json").read_text())
    clock = Clock()
    with tempfile.TemporaryDirectory() as home:
        result = simulate(load_settings(folder, job, threads), Path(home) / "run", sinks=[clock], report=False)
        save_adapters(result.run / "adapters", job["nodes"], out.with_suffix(".safetensors"))
    summary = result.summary
    answer = {
        "startup_seconds": clock.began - LAUNCHED,
        "round_seconds": clock.ended - clock.began,
        "rounds": summary["rounds"],
        "accuracy_mean": summary["scores"]["own_mean"],
        "accuracy_worst": summary["scores"]["own_min"],
        "bytes": summary["bytes_sent"],
        "bytes_kind": "encoded",
        "note": "its end holds a PEFT folder per node",
    }
    out.write_text(json.dumps(answer))


def save_adapters(adapters: Path, nodes: int, to: Path) -> None:
    """All nodes' PEFT folders as one file, in the form that the other runners write."""
    found = {}
    for i in range(nodes):
        tensors = load_file(adapters / f"client-{i:02d}" / "adapter_model.safetensors")
        found |= {f"{i}.{name}": value for name, value in tensors.items()}
    save_file(found, str(to))


if __name__ == "__main__":
    place, answer, (count,) = arguments()
    run(place, answer, int(count))
