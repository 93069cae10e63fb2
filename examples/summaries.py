"""Summaries by a model with an encoder and a decoder, such as T5, learned by clients that keep their documents.

    python examples/summaries.py MODEL ROWS OUT [key=value ...]

MODEL is a hub id such as google-t5/t5-small, or a local folder.
ROWS is a parquet, CSV or JSONL file with a text in `document` (or `article`, `prompt`, ...) and what is to be written
for it in `summary` (or `highlights`, `completion`, ...).
"""

import sys

from peerlora import load_config, read_events, simulate
from peerlora.runs.events import Evaluated


def main(model: str, rows: str, out: str, *words: str):
    settings = {
        "model": {"source": model},
        "task": {"kind": "sequence-to-sequence"},
        "data": {"train": rows, "max_length": 256},
        "partition": {"kind": "iid"},
        "clients": 4,
        "topology": {"kind": "random", "p": 0.3},
        "algorithm": {"name": "adf-lora", "interval": 5},
        "train": {"rounds": 30, "local_steps": 5, "batch": 4},
    }
    simulate(load_config(settings, words), out)
    first, *_, last = (event for event in read_events(out) if isinstance(event, Evaluated))
    print(f"loss per token of held-out summaries {first.averaged:.3f}, after training {last.averaged:.3f}")
    print(f"PEFT folders in {out}/adapters; peerlora merge {out} --average --to summariser writes a whole model")


if __name__ == "__main__":
    main(*sys.argv[1:])
