"""What a peer's messages may hold over a whole run: the bound on their size, and the blocks of adapters in them."""

from __future__ import annotations

from peerlora.data.partition import Partition
from peerlora.exchange.gossip_sum import sum_schema
from peerlora.exchange.schema import Schema
from peerlora.lora.adapters import AdapterSpec
from peerlora.network.protocol.replica_cache import replica_schema
from peerlora.network.protocol.wire import largest_body
from peerlora.runtime.compose import Federation


def largest_message(federation: Federation, sends: Schema) -> int:
    """The most bytes of body that a message of an exchange may have; ``sends``: all vectors that the method sends."""
    x, found = federation.start, [sends]
    if sends and (federation.config.exchange.codec or federation.config.exchange.secure):
        found = [federation.exchange.wire_schema(sends)]
    if federation.config.exchange.codec or federation.algorithm.traits.sends == "replicas":
        found.append(replica_schema(x.spec.shared.stop, x.flat.dtype))  # in place of a difference
    if federation.config.train.pooled:
        assert isinstance(federation.partition, Partition), "label counts need labels"
        found.append(sum_schema(federation.partition.counts.shape[1], federation.topology))
    return max(largest_body(each) for each in found)


def exchanged_blocks(sends: Schema, spec: AdapterSpec) -> set[str]:
    """The blocks of adapters of which something is ever exchanged; all where messages do not tell them apart."""
    named = {name.partition(":")[0].rpartition(".")[2] for name in sends if ":" in name}
    return named or set(spec.blocks)
