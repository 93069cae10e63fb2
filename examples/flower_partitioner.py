"""A partitioner of the flwr-datasets package divides the rows, just as it is.

    python examples/flower_partitioner.py MODEL ROWS OUT [key=value ...]

Arguments as in own_data.py.  Here every client holds two of the classes.
"""

import sys

from flwr_datasets.partitioner import PathologicalPartitioner

from peerlora import compose, load_config, simulate


def main(model: str, rows: str, out: str, *words: str):
    settings = {
        "model": {"source": model},
        "data": {"train": rows, "eval": None, "text": ["text"], "label": "label"},
        "clients": 3,
        "topology": {"kind": "ring"},
        "train": {"rounds": 30, "local_steps": 5, "batch": 8},
    }
    config = load_config(settings, words)

    def partitioner():  # each run needs a fresh one, since a partitioner keeps the data it has divided
        return PathologicalPartitioner(config.clients, partition_by="label", num_classes_per_partition=2, seed=1)

    report = compose(config, partitioner=partitioner()).partition.report()  # who would hold what; nothing is written
    for client, counts in enumerate(report["counts"]):
        print(f"client {client}: {dict(zip(report['names'], counts, strict=True))}")
    result = simulate(config, out, partitioner=partitioner())
    print(f"mean client {result.summary['accuracy']['own_mean']:.3f}, run folder {result.run}")


if __name__ == "__main__":
    main(*sys.argv[1:])
