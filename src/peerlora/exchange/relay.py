"""Relayed adapters: every client keeps the newest version of every client's adapter that it has heard of.

An entry is one version of one client's exchanged adapter.  In round t every client's own entry is what it put into the
mixing, version t + 1; that of a neighbour is in the message that the method sends anyway.  After the mixing the two
ends of a used link tell each other the versions that they hold, and each sends the other the entries of third clients
of which it had a newer version before this round's contacts: an entry moves one link a round, whatever the order.

The age of an entry is the number of finished rounds less its version: 0 of the own entry and of those of the round's
neighbours, d - 1 of one that came over d links of a fixed graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peerlora.config.exchange import CacheConfig
from peerlora.exchange.entry_pool import UNKNOWN, Entry, EntryPool
from peerlora.exchange.schema import Schema, encoded_bytes
from peerlora.lora.adapters import BLOCKS, Adapters, AdapterSpec, Block


class RelayCache:
    """The entries that one client holds: the newest version of each origin that has reached it.

    In every round ``begin``, then ``take`` for the own entry and those of the neighbours' messages.  With every
    neighbour: the ``versions`` that it tells go into ``lacking``, which says what to send it, and what it sends is
    taken too.  ``end`` closes the round.
    """

    def __init__(self, client: int, settings: CacheConfig, pool: EntryPool, places: Int[np.ndarray, " client"]):
        self.client, self.settings, self.pool = client, settings, pool
        self.places = places
        """By origin, where its entry is in the pool; changed in place."""
        self.places_before = places.copy()
        """The same before the contacts of this round: what may be passed on in it."""

    @property
    def versions(self) -> Int[np.ndarray, " client"]:
        """The version held of every client, 0 of an unknown one: what a neighbour is told."""
        return self.pool.versions(self.places)

    @property
    def held(self) -> Int[np.ndarray, " origin"]:
        """The clients of which an entry is held."""
        return np.flatnonzero(self.places != UNKNOWN)

    def begin(self, t: int) -> None:
        """Begin round ``t``: what is too old for it is dropped, and what is left may be passed on in it."""
        if self.settings.max_age is not None:
            old = t + 1 - self.versions > self.settings.max_age
            old[self.client] = False
            self.places[old] = UNKNOWN
        self.places_before = self.places.copy()

    def take(self, entry: Entry) -> bool:
        """Take an entry; False, and nothing changes, where its version is not newer than the one held."""
        if entry.version <= self.versions[entry.origin]:
            return False
        self.places[entry.origin] = self.pool.put([entry])[0]
        return True

    def lacking(self, versions: Int[np.ndarray, " client"]) -> Int[np.ndarray, " origin"]:
        """The origins to send to a neighbour that holds these versions: third clients, known better before this round.

        The own entry and the neighbour's are in the messages of the round, which count as held.
        """
        newer = self.pool.versions(self.places_before) > versions
        newer[self.client] = False
        return np.flatnonzero(newer)

    def entry(self, origin: int) -> Entry:
        """The entry held of one of the clients in ``held``."""
        return self.pool.entry(int(self.places[origin]))

    def entries(self, origins: Int[np.ndarray, " origin"]) -> list[Entry]:
        """What is sent of these origins: the entries that were held before this round."""
        return [self.pool.entry(place) for place in self.places_before[origins].tolist()]

    def end(self) -> None:
        """End the round: of the others' entries the newest ``keep`` are left, of equal ones those next in number."""
        keep, held = self.settings.keep, self.held
        others = held[held != self.client]
        if keep is not None and len(others) > keep:
            nearer = (others - self.client) % len(self.places)
            order = np.lexsort((nearer, -self.versions[others]))
            self.places[others[order[keep:]]] = UNKNOWN

    def ages(self, done: int) -> Int[np.ndarray, " origin"]:
        """The ages of the entries in ``held`` after ``done`` rounds."""
        return done - self.versions[self.held]

    def weights(self, done: int) -> Float[np.ndarray, " origin"]:
        """The weights of the entries in ``held``, which sum to 1."""
        given = {
            "uniform": np.ones(len(self.held)),
            "rows": self.pool.facts[self.places[self.held], 3].astype(float),
            "age": 1 / (1 + self.ages(done)),
        }[self.settings.weights]
        return given / given.sum()


class RelayCaches:
    """The caches of the clients held here, which share one pool.

    ``whole`` is the layout of a client's adapter; of which of its blocks entries consist is known from the first on.
    ``rows``: client -> its training rows, of those held here; ``total``: all clients of the run.
    """

    def __init__(self, settings: CacheConfig, whole: AdapterSpec, rows: Mapping[int, int], total: int):
        assert min(rows.values(), default=1) > 0, "a client without rows would weigh nothing"
        self.settings, self.whole, self.rows, self.clients = settings, whole, dict(rows), sorted(rows)
        self.pool, self.layout = EntryPool(), whole.exchanged()
        self.places: Int[np.ndarray, "holder client"] = np.full((len(rows), total), UNKNOWN, dtype=np.int64)
        self.done = 0
        """Finished rounds, as of the last ``end``."""
        self._renew()

    def _renew(self) -> None:
        self.caches = [
            RelayCache(client, self.settings, self.pool, places)
            for client, places in zip(self.clients, self.places, strict=True)
        ]

    def __getitem__(self, client: int) -> RelayCache:
        """The cache of a client held here."""
        return self.caches[self.clients.index(client)]

    def begin(self, t: int) -> None:
        """Begin round ``t`` for every client held here."""
        self.done = t + 1
        for cache in self.caches:
            cache.begin(t)

    def end(self) -> None:
        """End the round for every client held here; what nobody holds any more is dropped."""
        for cache in self.caches:
            cache.end()
        self.pool.keep_only(np.unique(self.places[self.places != UNKNOWN]))

    @property
    def versions(self) -> Int[np.ndarray, "holder client"]:
        """What every client holds."""
        return self.pool.versions(self.places)

    def measures(self) -> dict[str, Tensor]:
        """The ages of what is held after the round, own entries too, and of how many clients.

        Mean and oldest age, in rounds; clients known on average and at least.
        """
        ages = [cache.ages(self.done) for cache in self.caches if len(cache.held)]
        known = [len(cache.held) for cache in self.caches]
        measured = {
            "relayed_age_mean": float(np.mean([each.mean() for each in ages])) if ages else 0.0,
            "relayed_age_max": float(max((each.max() for each in ages), default=0)),
            "relayed_known_mean": float(np.mean(known)),
            "relayed_known_min": float(min(known)),
        }
        return {name: torch.tensor([value], dtype=torch.float64) for name, value in measured.items()}

    def weights(self, clients: Sequence[int]) -> Float[np.ndarray, "client entry"]:
        """The weights that these clients give the entries in ``pool.used``; a row of zeros where nothing is held."""
        numbers = self.pool.numbers
        W = np.zeros((len(clients), len(numbers)))
        for row, client in enumerate(clients):
            cache = self[client]
            if len(cache.held):
                W[row, [numbers[place] for place in cache.places[cache.held].tolist()]] = cache.weights(self.done)
        return W

    def state_dict(self) -> dict[str, Tensor]:
        """Return the entries by origin and version, who holds which, and of which blocks they consist."""
        used, values = self.pool.used, self.pool.values
        numbers = self.pool.numbers | {UNKNOWN: UNKNOWN}
        places = [[numbers[place] for place in row] for row in self.places.tolist()]
        return {
            "relay.done": torch.tensor([self.done]),
            "relay.blocks": torch.tensor([block in self.layout.blocks for block in BLOCKS]),
            "relay.places": torch.tensor(places, dtype=torch.int64),
            "relay.facts": torch.from_numpy(self.pool.facts[used]),
            "relay.values": torch.zeros(0, 0) if values is None else values[used],
        }

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        blocks: list[Block] = [
            block for block, held in zip(BLOCKS, saved["relay.blocks"].tolist(), strict=True) if held
        ]
        self.layout = self.whole.select(*blocks)
        self.pool, self.done = EntryPool(), int(saved["relay.done"][0])
        facts, values = saved["relay.facts"].cpu().tolist(), saved["relay.values"]
        self.pool.put(Entry(*each, values=value) for each, value in zip(facts, values, strict=True))
        self.places = saved["relay.places"].cpu().numpy().copy()
        self._renew()


def relay_round(
    caches: RelayCaches, t: int, sent: Adapters, adjacency: Bool[np.ndarray, "client client"], present: Sequence[int]
) -> SwapCounts:
    """Relay in round ``t`` of a simulation, all clients at once; ``caches`` are those of all.

    ``sent``: what each client put into the mixing.  ``adjacency[i, j]``: i hears from j, so j sends i what it lacks,
    and i tells j what it holds.  Who is not ``present`` makes no new version.
    """
    caches.begin(t)
    caches.layout = sent.spec
    made = caches.pool.put(Entry(i, t + 1, int(sent.ranks[i]), caches.rows[i], sent.flat[i].detach()) for i in present)
    newest = np.full(len(caches.clients), UNKNOWN, dtype=np.int64)
    newest[present] = made
    heard = adjacency | np.eye(len(adjacency), dtype=bool)
    heard[:, newest == UNKNOWN] = False
    caches.places[heard] = np.broadcast_to(newest, heard.shape)[heard]
    counts = _swap(caches, adjacency)
    caches.end()
    return counts


@dataclass(frozen=True)
class SwapCounts:
    """What the swaps of one round took, by client."""

    entries: Int[np.ndarray, " client"]
    """Entries that it sent."""
    sent_bytes: Int[np.ndarray, " client"]
    """All that it sent: entries, and the versions that it holds."""


def _swap(caches: RelayCaches, adjacency: Bool[np.ndarray, "client client"]) -> SwapCounts:
    """Swap entries over all links, each as of before the round."""
    versions, sizes = caches.versions, _entry_sizes(caches)
    counts = SwapCounts(np.zeros(len(versions), dtype=np.int64), np.zeros(len(versions), dtype=np.int64))
    arrived = []
    for i, j in np.argwhere(adjacency).tolist():
        origins = caches.caches[j].lacking(versions[i])
        places = caches.caches[j].places_before[origins]
        counts.entries[j] += len(origins)
        counts.sent_bytes[j] += header_bytes(len(origins)) + int(sizes[places].sum())
        counts.sent_bytes[i] += versions_bytes(len(versions))
        arrived.append((i, origins, places))
    for i, origins, places in arrived:  # of several versions the newest stays, whoever sent it
        newer = caches.pool.versions(places) > caches.pool.versions(caches.places[i, origins])
        caches.places[i, origins[newer]] = places[newer]
    return counts


def _entry_sizes(caches: RelayCaches) -> Int[np.ndarray, " place"]:
    """The bytes of the entry at every place of the pool; 0 at free ones."""
    sizes, pool = np.zeros(len(caches.pool.facts), dtype=np.int64), caches.pool
    if pool.values is None:
        return sizes
    by_rank = {
        rank: entry_bytes(caches.layout, rank, pool.values.dtype) for rank in set(pool.facts[pool.used, 2].tolist())
    }
    for place in pool.used:
        sizes[place] = by_rank[int(pool.facts[place, 2])]
    return sizes


# --- what crosses in a swap


def versions_schema(clients: int) -> Schema:
    """What tells the versions that one client holds."""
    return {"versions": ((clients,), torch.int64)}


def table_schema(entries: int) -> Schema:
    """What precedes so many entries in a message: origin, version and training rows of each."""
    return {"entries": ((entries, 3), torch.int64)}


def versions_bytes(clients: int) -> int:
    """The bytes of the message in which one client tells another which versions it holds."""
    return encoded_bytes(versions_schema(clients))


def header_bytes(entries: int) -> int:
    """The bytes of what precedes so many entries in a message."""
    return encoded_bytes(table_schema(entries))


def entry_bytes(layout: AdapterSpec, rank: int, dtype: torch.dtype) -> int:
    """The bytes of one entry: the same tensors, at its real rank, as in its origin's message."""
    return encoded_bytes({name: (shape, dtype) for name, shape in layout.row_shapes(rank).items()})
