"""How much of what a padded graph computes is padding, for shuffled batches and for batches by length, on SST-2.

python bench/padding.py ../shared/data/glue/sst2/train.parquet
"""

import sys
from pathlib import Path

import numpy as np

from peerlora.config.loading import load_config
from peerlora.data.batches import Shards
from peerlora.data.partition import partition
from peerlora.runtime.resources import load_resources

STEPS, ROUNDS = 10, 20


def main() -> None:
    rows = f"parquet:{Path(sys.argv[1])}"
    config = load_config({"data": {"train": rows, "text": ["sentence"], "label": "label"}, "clients": 10})
    data = load_resources(config).train_data
    shards = partition(config.partition, data, config.clients, config.seed).shards
    for batch in (8, 16, 32):
        told = []
        for by_length in (False, True):
            own = Shards(data, shards, [batch] * config.clients, range(config.clients), config.seed, by_length)
            told.append(f"{'by length' if by_length else 'shuffled'} {_share(own, together=1):.0%} alone")
            told.append(f"{_share(own, together=config.clients):.0%} with all clients in a graph")
        print(f"batch {batch}: real tokens " + ", ".join(told))


def _share(shards: Shards, together: int) -> float:
    """Real tokens as a share of all that rectangles of so many clients hold."""
    lengths, real, computed = shards.data.lengths, 0, 0
    for t in range(ROUNDS):
        drawn = np.array([shards.rows(client, t, STEPS) for client in shards.clients])  # [client, step, row]
        graphs = lengths[drawn].transpose(1, 0, 2).reshape(STEPS, len(drawn) // together, -1)
        real += int(graphs.sum())
        computed += int((graphs.max(2) * graphs.shape[2]).sum())
    return real / computed


if __name__ == "__main__":
    main()
