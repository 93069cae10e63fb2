"""Named entities from words with tags, learned by clients that keep their texts.

    python examples/tag_words.py MODEL ROWS OUT [key=value ...]

MODEL is a hub id, a local folder or packaged:NAME.
ROWS is a parquet or JSONL file with a list of words in `tokens` and a list of as many tags in `tags` or `ner_tags`.
"""

import sys

from peerlora import load_config, simulate


def main(model: str, rows: str, out: str, *words: str):
    settings = {
        "model": {"source": model},
        "task": {"kind": "token-classification"},
        "data": {"train": rows, "max_length": 128},
        "partition": {"kind": "iid"},
        "clients": 4,
        "topology": {"kind": "random", "p": 0.3},
        "algorithm": {"name": "adf-lora", "interval": 5},
        "train": {"rounds": 30, "local_steps": 5, "batch": 8},
    }
    reached = simulate(load_config(settings, words), out).summary
    print(f"{reached['metric']}: mean client {reached['scores']['own_mean']:.3f}, averaged", end=" ")
    print(f"{reached['scores']['averaged']:.3f}; PEFT folders in {out}/adapters")


if __name__ == "__main__":
    main(*sys.argv[1:])
