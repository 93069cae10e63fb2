"""A site: one participant of a real federation, and its place in the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peerlora.data.dataset import Dataset
from peerlora.network.base import PeerId
from peerlora.network.protocol.wire import Expected
from peerlora.runtime.compose import Federation
from peerlora.runtime.peer.config_digest import section_hashes, shortened, spec_digest
from peerlora.topology.schedule import Topology
from peerlora.topology.storage import columns_of


@dataclass(frozen=True)
class Site:
    """Who takes part, seen from one site."""

    client: int
    names: Mapping[int, PeerId]
    """Client number -> site, of everybody on the list, this one too."""
    run: str
    """The run's id."""

    def neighbours(self, topology: Topology) -> dict[int, PeerId]:
        """Those on the list that this client may meet in some round, whichever way their link goes."""
        anybody, graph = range(topology.clients), topology.graph
        linked = anybody if graph is None else columns_of(graph + graph.T, self.client)
        return {j: self.names[j] for j in linked if j != self.client and j in self.names}


def expected_of(federation: Federation, site: Site) -> Expected:
    """What every message of the run must agree with."""
    return Expected(site.run, federation.base_digest, spec_digest(federation.start.spec))


def settings_of(federation: Federation) -> dict[str, str]:
    """What this site's greeting tells of its settings, by section; see ``section_hashes``."""
    data = federation.train_data
    pixels = data.pixels if isinstance(data, Dataset) else None
    digests = section_hashes(federation.config, data.names, federation.start_digest, pixels)
    return digests | {name: shortened(digest) for name, digest in federation.beside_weights.items()}
