"""Who holds which training rows: every kind of partition is one function from labels and seed to each row's owner."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peerlora.config.sections import (
    ColumnPartition,
    DirichletPartition,
    IidPartition,
    PartitionConfig,
    QuantityPartition,
    SharesPartition,
)
from peerlora.data.dataset import Dataset
from peerlora.errors import ConfigError, DataError, nearest
from peerlora.plugins import PARTITIONS
from peerlora.randomness import numpy_generator

_TRIES = 10  # draws before rows are moved by hand to clients that got none
_ROW = "peerlora_row"  # the column that numbers rows inside a flwr-datasets partitioner


@dataclass(frozen=True)
class Partition:
    """The training rows of every client."""

    shards: tuple[np.ndarray, ...]
    """One int64 [row] array of ascending row numbers per client; disjoint, none empty."""
    names: tuple[str, ...]
    """Label names; () without classes."""
    counts: np.ndarray
    """int64 [client, label] rows of each label; [client, 1] rows without classes."""
    warnings: tuple[str, ...]
    """What a user should know before training, one sentence each."""

    def report(self) -> dict[str, Any]:
        """Who holds what, in plain lists: ``names`` [label] and ``counts`` [client][label] in rows."""
        return {"names": list(self.names or ("rows",)), "counts": self.counts.tolist(), "warnings": list(self.warnings)}


def partition(config: PartitionConfig | Any, train: Dataset, clients: int, seed: int) -> Partition:
    """Divide the training rows among ``clients``; pure in ``seed``.

    ``config`` is one of ``PartitionConfig``, or a fresh partitioner of ``flwr_datasets.partitioner``, which
    sees the labels, the row numbers and ``train.columns``, and draws by its own seed.
    Raises DataError: fewer rows than clients, label skew without classes, shares or columns that do not fit the data,
    a partitioner for another number of clients. ConfigError: a list in ``config`` of the wrong length.
    """
    if clients > len(train):
        raise DataError(f"{len(train)} training rows for {clients} clients; each needs at least one, use fewer clients")
    if hasattr(config, "load_partition"):
        shards = _shards_of(config, train, clients)
    elif (plugin := PARTITIONS.find(config.kind)) is not None:
        shards = _plugin_shards(config.kind, plugin.build(config, train.labels, clients, seed), len(train), clients)
    else:
        owner = _KINDS[config.kind](config, train, clients, numpy_generator(seed, "partition"))
        shards = _by_owner(owner, clients)
    counts = np.stack([count_labels(train, shard) for shard in shards])
    return Partition(shards, train.classes, counts, tuple(_warnings(counts, train)))


def own_rows(train: Dataset, client: int) -> Partition:
    """All rows are those of one client, at its own site."""
    shard = np.arange(len(train), dtype=np.int64)
    counts = count_labels(train, shard)[None]
    return Partition((shard,), train.classes, counts, tuple(_warnings(counts, train, [client])))


def _iid(config: IidPartition, train: Dataset, clients: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.arange(len(train)) % clients)


def _dirichlet(config: DirichletPartition, train: Dataset, clients: int, rng: np.random.Generator) -> np.ndarray:
    """Source: Yurochkin et al. 2019, Bayesian nonparametric federated learning of neural networks, arXiv 1905.12022.

    Differs: no client stays empty.
    """
    _need_classes(config.kind, train)
    have = count_labels(train, np.arange(len(train)))
    concentration = np.full(clients, config.concentration)

    def draw() -> np.ndarray:
        return np.stack([_apportion(rng.dirichlet(concentration), int(rows)) for rows in have], axis=1)

    return _leave_none_empty(_deal(_redrawn(draw), train, rng), clients, rng)


def _quantity(config: QuantityPartition, train: Dataset, clients: int, rng: np.random.Generator) -> np.ndarray:
    if config.sizes is not None:
        if len(config.sizes) != clients:
            raise ConfigError(f"partition.sizes lists {len(config.sizes)} sizes for {clients} clients; give one each")
        sizes = _apportion(np.array(config.sizes) / sum(config.sizes), len(train))
    else:
        concentration = np.full(clients, config.concentration)
        sizes = _redrawn(lambda: _apportion(rng.dirichlet(concentration), len(train))[:, None])[:, 0]
    return _leave_none_empty(rng.permutation(np.repeat(np.arange(clients), sizes)), clients, rng)


def _shares(config: SharesPartition, train: Dataset, clients: int, rng: np.random.Generator) -> np.ndarray:
    """Every client gets equally many rows, as many as the scarcest label allows; owner -1 is a row left over.

    Source: the label skew of Wang et al. 2025, arXiv 2511.18291.
    """
    _need_classes(config.kind, train)
    if sum(config.counts) != clients:
        raise ConfigError(f"partition.counts add up to {sum(config.counts)}, clients is {clients}; make them equal")
    shares, groups = np.array(config.shares), np.array(config.counts)
    if shares.shape[1] != len(train.classes):
        raise DataError(
            f"partition.shares gives {shares.shape[1]} numbers per row, the data have {len(train.classes)} labels "
            f"({', '.join(train.classes)}); give one number per label, in this order"
        )
    have = count_labels(train, np.arange(len(train)))
    wanted = _largest(shares, groups, have)
    if wanted.sum() == 0:
        ratio = np.divide(have, groups @ shares, out=np.full(len(have), np.inf), where=groups @ shares > 0)
        scarce = int(ratio.argmin())
        raise DataError(
            f"partition.shares asks for more of label {train.classes[scarce]!r} than its {have[scarce]} rows, "
            "even at one row per client; lower its share or use fewer clients"
        )
    return _deal(np.repeat(wanted, groups, axis=0), train, rng)


def _column(config: ColumnPartition, train: Dataset, clients: int, rng: np.random.Generator) -> np.ndarray:
    if config.column not in train.columns:
        known = train.columns
        raise DataError(
            f"partition.column={config.column} was not kept with the data{nearest(config.column, known)}; "
            f"kept are {', '.join(known) or 'none'}"
        )
    values, place, sizes = np.unique(train.columns[config.column], return_inverse=True, return_counts=True)
    if len(values) < clients:
        raise DataError(
            f"partition.column={config.column} has {len(values)} values for {clients} clients; "
            f"use at most {len(values)} clients"
        )
    order = np.arange(clients) if len(values) == clients else np.argsort(-sizes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(values))
    return rank[place] % clients


def _apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """``total`` in whole numbers proportional to ``shares`` (which sum to 1), by largest remainder; int64 [share]."""
    quotas = np.round(shares * total, 9)  # so that 0.1 + 0.2 ties with 0.3
    sizes = np.floor(quotas).astype(np.int64)
    left = total - int(sizes.sum())
    sizes[np.argsort(sizes - quotas, kind="stable")[:left]] += 1
    return sizes


def _largest(shares: np.ndarray, groups: np.ndarray, have: np.ndarray) -> np.ndarray:
    """Rows [group, label] of one client of each group, for the largest equal client size that ``have`` can serve."""
    demand = groups @ shares
    asked = demand > 0
    size = int(np.min(have[asked] / demand[asked]) + 1e-9)
    while True:
        wanted = np.stack([_apportion(row / row.sum(), size) for row in shares])
        # Rounding up for many clients at once can ask for more than there is.
        if (groups @ wanted <= have).all():
            return wanted
        size -= 1


def _deal(wanted: np.ndarray, train: Dataset, rng: np.random.Generator) -> np.ndarray:
    """Owners of rows, drawn at random so that client i gets ``wanted[i, label]`` of each label; -1: left over."""
    owner = np.full(len(train), -1, dtype=np.int64)
    for label, sizes in enumerate(wanted.T):
        members = rng.permutation(np.flatnonzero(train.labels == label))[: sizes.sum()]
        owner[members] = np.repeat(np.arange(len(sizes)), sizes)
    return owner


def _redrawn(draw: Callable[[], np.ndarray]) -> np.ndarray:
    """The first draw [client, ...] that leaves nobody empty, or the last one."""
    sizes = draw()
    for _ in range(_TRIES - 1):
        if (sizes.sum(axis=1) > 0).all():
            break
        sizes = draw()
    return sizes


def _leave_none_empty(owner: np.ndarray, clients: int, rng: np.random.Generator) -> np.ndarray:
    """Give each client without rows one random row of the client that is richest at that moment."""
    shards = list(_by_owner(owner, clients))
    richest = [(-len(shard), client) for client, shard in enumerate(shards)]
    heapq.heapify(richest)
    for client in [client for client, shard in enumerate(shards) if not len(shard)]:
        _, giver = heapq.heappop(richest)
        place = int(rng.integers(len(shards[giver])))
        owner[shards[giver][place]] = client
        shards[giver] = np.delete(shards[giver], place)
        heapq.heappush(richest, (-len(shards[giver]), giver))
    return owner


def _by_owner(owner: np.ndarray, clients: int) -> tuple[np.ndarray, ...]:
    order = np.argsort(owner, kind="stable").astype(np.int64)
    edges = np.searchsorted(owner[order], np.arange(clients + 1))
    return tuple(order[edges[client] : edges[client + 1]] for client in range(clients))


def _shards_of(partitioner: Any, train: Dataset, clients: int) -> tuple[np.ndarray, ...]:
    """The shards that a flwr-datasets partitioner chooses."""
    from datasets import Dataset as Table

    wanted = getattr(partitioner, "_partition_by", None)
    label = wanted if isinstance(wanted, str) and wanted not in train.columns else "label"
    table = Table.from_dict({**train.columns, label: train.labels, _ROW: np.arange(len(train))})
    name = type(partitioner).__name__
    try:
        partitioner.dataset = table
        if partitioner.num_partitions == clients:
            loaded = [partitioner.load_partition(client) for client in range(clients)]
            shards = tuple(np.sort(np.array(shard[_ROW], dtype=np.int64)) for shard in loaded)
            return _checked(shards, name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name} refused the data: {error}; give it a fresh partitioner that fits them") from None
    raise DataError(f"{name} makes {partitioner.num_partitions} partitions for {clients} clients; make them equal")


def _plugin_shards(kind: str, made: Any, rows: int, clients: int) -> tuple[np.ndarray, ...]:
    """The shards that another package's function chose."""
    shards = tuple(np.sort(np.asarray(shard)) for shard in made)
    if len(shards) != clients:
        raise DataError(f"{kind} made {len(shards)} shards for {clients} clients; make one for each")
    for shard in shards:
        if len(shard) and (shard.dtype.kind not in "iu" or shard.ndim != 1 or shard[0] < 0 or shard[-1] >= rows):
            raise DataError(
                f"{kind} gave {shard.dtype} {shard.tolist()[:5]}; expected row numbers from 0 to {rows - 1}"
            )
    return _checked(tuple(shard.astype(np.int64) for shard in shards), kind)


def _checked(shards: tuple[np.ndarray, ...], name: str) -> tuple[np.ndarray, ...]:
    empty = [client for client, shard in enumerate(shards) if not len(shard)]
    if empty:
        raise DataError(f"{name} gave client {empty[0]} no rows; each client needs at least one")
    rows, times = np.unique(np.concatenate(shards), return_counts=True)
    if times.max() > 1:
        raise DataError(f"{name} gave row {rows[times.argmax()]} to {times.max()} clients; a row belongs to one client")
    return shards


def _need_classes(kind: str, train: Dataset) -> None:
    if not train.classes:
        raise DataError(
            f"partition.kind={kind} divides by label and needs task.kind=classification; use iid or quantity"
        )


def count_labels(train: Dataset, rows: np.ndarray) -> np.ndarray:
    """Count these rows by label, int64 [label]; without classes, [1], all of them."""
    if not train.classes:
        return np.array([len(rows)], dtype=np.int64)
    return np.bincount(train.labels[rows], minlength=len(train.classes)).astype(np.int64)


def _warnings(counts: np.ndarray, train: Dataset, numbers: Sequence[int] = ()) -> list[str]:
    notes = []
    for row in np.flatnonzero((counts > 0).sum(axis=1) == 1) if train.classes else ():
        label, client = int(counts[row].argmax()), numbers[int(row)] if numbers else int(row)
        notes.append(f"client {client} holds only one label: {train.classes[label]!r} ({counts[row, label]} rows)")
    if counts.sum() < len(train):
        notes.append(f"{len(train) - counts.sum()} of {len(train)} training rows belong to no client")
    return notes


_KINDS: dict[str, Callable[[Any, Dataset, int, np.random.Generator], np.ndarray]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shares": _shares,
    "column": _column,
    "quantity": _quantity,
}
