"""Texts with several labels each, such as topics or keywords, learned by clients that keep their texts.

    python examples/several_labels.py MODEL ROWS OUT [key=value ...]

MODEL is a hub id, a local folder or packaged:NAME.
ROWS is a parquet or JSONL file with a text in `text` and a list of labels in `labels`, [] for none.
"""

import json
import sys
from pathlib import Path

from peerlora import load_config, simulate


def main(model: str, rows: str, out: str, *words: str):
    settings = {
        "model": {"source": model},
        "task": {"kind": "multi-label"},
        "data": {"train": rows, "text": ["text"], "label": "labels", "max_length": 128},
        "partition": {"kind": "iid"},
        "clients": 4,
        "topology": {"kind": "random", "p": 0.3},
        "algorithm": {"name": "adf-lora", "interval": 5},
        "train": {"rounds": 30, "local_steps": 5, "batch": 8},
    }
    reached = simulate(load_config(settings, words), out).summary
    named = json.loads((Path(out) / "adapters" / "average" / "labels.json").read_text(encoding="utf-8"))["id2label"]
    print(f"labels {', '.join(named.values())}; {reached['metric']}: mean client", end=" ")
    print(f"{reached['scores']['own_mean']:.3f}, averaged {reached['scores']['averaged']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
