"""Your model, your rows, PEFT folders back.

    python examples/own_data.py MODEL ROWS OUT [key=value ...]

MODEL is a hub id, a local folder or packaged:NAME.
ROWS is a parquet, CSV or JSONL file with columns `text` and `label`.
"""

import sys

from peerlora import load_config, simulate


def main(model: str, rows: str, out: str, *words: str):
    settings = {
        "model": {"source": model},
        "data": {"train": rows, "eval": None, "text": ["text"], "label": "label"},
        "partition": {"kind": "dirichlet", "concentration": 0.5},
        "clients": 4,
        "topology": {"kind": "random", "p": 0.3},
        "algorithm": {"name": "adf-lora", "interval": 5},
        "train": {"rounds": 30, "local_steps": 5, "batch": 8},
    }
    result = simulate(load_config(settings, words), out)
    reached = result.summary["scores"]
    print(f"mean client {reached['own_mean']:.3f}, worst {reached['own_min']:.3f}, averaged {reached['averaged']:.3f}")
    print(f"one PEFT folder per client, and the average: {result.run / 'adapters'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
