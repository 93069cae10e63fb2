"""What happens when half of the clients are slow: wait for them, go on without them, or let nobody wait.

    python examples/stragglers.py MODEL ROWS OUT [key=value ...]

Arguments as in own_data.py.  Half of the clients take ten times as long.  All four runs last about as long on the
virtual clock; OUT gets a run folder each and stragglers.svg, the mean client by virtual seconds.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from peerlora import load_config, read_events, simulate
from peerlora.runs.metrics import evaluated_within
from peerlora.runs.pictures import metric_curves, virtual_seconds
from peerlora.runtime.resources import load_resources

CLIENTS, SLOW = 8, 10
WAYS = {  # rounds in the time of one that waits for all: everybody's, and as many jobs as there are clients
    "wait": ("dec-lora", 1),
    "deadline": ("dec-lora", round(SLOW / 1.2)),
    "aedfl": ("aedfl", round((1 + 1 / SLOW) * SLOW / 2)),
    "ad-psgd": ("ad-psgd", round((1 + 1 / SLOW) * SLOW / 2)),
}


def main(model: str, rows: str, out: str, *words: str):
    settings = {
        "model": {"source": model},
        "data": {"train": rows, "eval": None, "text": ["text"], "label": "label"},
        "clients": CLIENTS,
        "topology": "ring",
        "train": {"rounds": 6, "local_steps": 5, "batch": 8},
        "clock": {"step": 0.1, "speed": [1.0] * (CLIENTS // 2) + [1 / SLOW] * (CLIENTS // 2), "bandwidth": 1e7},
    }
    base = load_config(settings, words)
    resources = load_resources(base)  # read and tokenise once
    job = base.train.local_steps * 0.1
    found = {}
    for way, (method, times) in WAYS.items():
        changes = [f"algorithm.name={method}", f"train.rounds={times * base.train.rounds}", f"eval.every={times}"]
        changes += [f"clock.deadline={1.2 * job}"] if way == "deadline" else []
        found[way] = simulate(load_config(settings, [*words, *changes]), Path(out) / way, resources=resources)
    budget = min(result.summary["virtual_seconds"] for result in found.values())
    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.add_subplot(xlabel="virtual seconds", ylabel="accuracy, mean client")
    print(f"{'':10} {'seconds':>8} {'mean':>6} {'worst':>6} {'MB sent':>8}   mean client after {budget:.1f} s")
    for way, result in found.items():
        events, reached = read_events(result.run), result.summary["scores"]
        curve, then = metric_curves(events, virtual_seconds), evaluated_within(events, seconds=budget)
        axes.plot(curve.rounds, curve.clients.mean(1), label=way)
        told = f"{reached['own_mean']:6.3f} {reached['own_min']:6.3f} {result.summary['bytes_sent'] / 1e6:8.2f}"
        print(f"{way:10} {result.summary['virtual_seconds']:8.1f} {told}   {sum(then.own) / len(then.own):.3f}")
    axes.legend()
    drawing.savefig(Path(out) / "stragglers.svg")


if __name__ == "__main__":
    main(*sys.argv[1:])
