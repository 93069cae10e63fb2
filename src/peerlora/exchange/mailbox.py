"""Mailboxes of clients without common rounds: messages in flight, received messages, and known versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerlora.exchange.base import Message, Vectors
from peerlora.exchange.schema import encoded_bytes
from peerlora.randomness import numpy_generator
from peerlora.topology.schedule import RoundGraph


@dataclass(frozen=True)
class Pushed:
    """One call of ``push``: the same message to several receivers."""

    receivers: list[int]
    numbers: list[int]
    """One per receiver: what ``deliver`` is told."""
    size: int
    """Bytes of one."""


class Mailboxes:
    """Mailboxes of all clients on one fixed graph; a real peer fills only its own.

    Staleness needs counters only, no common clock.  A client's version is the number of jobs it has done.  With its
    message about a job, client j tells i the newest version of i that it knew when that job began; i subtracts this
    from its own version as its own latest job began.
    """

    def __init__(self, graph: RoundGraph, seed: int, newest_only: bool):
        clients = graph.clients
        self.graph, self.seed, self.newest_only = graph, seed, newest_only
        self.versions = [0] * clients
        self.known = np.zeros((clients, clients), dtype=np.int64)
        """[client, other] the newest version of the other that has arrived."""
        self.known_then = self.known.copy()
        """The same when the client's latest job began."""
        self.count = 0
        self.in_flight: dict[int, tuple[int, Message]] = {}
        """Number of a message -> its receiver and itself."""
        self.inbox: dict[int, list[Message]] = {client: [] for client in range(clients)}
        self.pushed: list[Pushed] = []
        self.staleness: list[int] = []
        """Of every message polled since ``begin_round``."""
        self.used: set[tuple[int, int]] = set()
        """Links over which something arrived since then."""

    def begin_round(self) -> None:
        """Reset what is counted for a round."""
        self.staleness, self.used = [], set()

    def begin_job(self, client: int) -> None:
        """Note that a client begins a job, with the versions that it knows now."""
        self.known_then[client] = self.known[client]

    def end_job(self, client: int) -> None:
        """Note that a client has done a job."""
        self.versions[client] += 1

    def mailbox(self, client: int) -> ClientMailbox:
        """One client's mailbox."""
        return ClientMailbox(self, client)

    def send(self, sender: int, payload: Vectors, receivers: Sequence[int]) -> None:
        """Send a message to each receiver; its tensors must not change any more."""
        numbers = list(range(self.count, self.count + len(receivers)))
        for number, receiver in zip(numbers, receivers, strict=True):
            seen = int(self.known_then[sender, receiver])
            self.in_flight[number] = receiver, Message(sender, payload, self.versions[sender], seen)
        self.count += len(receivers)
        size = encoded_bytes({name: (tuple(leaf.shape), leaf.dtype) for name, leaf in payload.items()})
        self.pushed.append(Pushed(list(receivers), numbers, size))

    def take_pushed(self) -> list[Pushed]:
        """Take what was pushed since the last call."""
        pushed, self.pushed = self.pushed, []
        return pushed

    def deliver(self, number: int) -> None:
        """Deliver a message that is in flight."""
        self.arrive(*self.in_flight.pop(number))

    def arrive(self, receiver: int, message: Message) -> None:
        """Put a message into a client's inbox; where only the newest counts, it replaces an older one of its sender."""
        self.used.add((min(receiver, message.sender), max(receiver, message.sender)))
        late = message.version < self.known[receiver, message.sender]
        self.known[receiver, message.sender] = max(message.version, self.known[receiver, message.sender])
        if self.newest_only:
            if late:
                return
            self.inbox[receiver] = [each for each in self.inbox[receiver] if each.sender != message.sender]
        self.inbox[receiver].append(message)

    def poll(self, client: int) -> list[Message]:
        """Take a client's received messages, with their staleness."""
        begun = max(0, self.versions[client] - 1)
        found = [replace(each, staleness=max(0, begun - each.seen)) for each in self.inbox[client]]
        self.inbox[client] = []
        self.staleness += [each.staleness for each in found]
        return sorted(found, key=lambda each: each.sender)

    def began_again(self, client: int, other: int) -> None:
        """Reset what a client knows of another that went back to an earlier version of itself."""
        self.known[client, other] = 0

    def measures(self) -> dict[str, float]:
        """Mean and largest staleness of what was polled since ``begin_round``; nothing where nothing was."""
        found = self.staleness
        return {"staleness": float(np.mean(found)), "staleness_max": float(max(found))} if found else {}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything, as tensors and as facts that JSON knows."""
        listed = [(number, *each) for number, each in sorted(self.in_flight.items())]
        listed += [(None, client, each) for client, own in self.inbox.items() for each in own]
        tensors = {"known": torch.from_numpy(self.known.copy()), "known then": torch.from_numpy(self.known_then.copy())}
        facts = []
        for place, (number, receiver, message) in enumerate(listed):
            tensors |= {f"message.{place}.{name}": leaf for name, leaf in message.payload.items()}
            facts.append([number, receiver, message.sender, message.version, message.seen])
        return tensors, {"messages": facts, "count": self.count, "versions": list(self.versions)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.versions, self.count = list(facts["versions"]), facts["count"]
        self.known, self.known_then = (tensors[name].cpu().numpy().copy() for name in ("known", "known then"))
        payloads: dict[int, Vectors] = {}
        for path, leaf in tensors.items():
            if path.startswith("message."):
                _, place, name = path.split(".", 2)
                payloads.setdefault(int(place), {})[name] = leaf
        for place, (number, receiver, sender, version, seen) in enumerate(facts["messages"]):
            message = Message(sender, payloads.get(place, {}), version, seen)
            if number is None:
                self.inbox[receiver].append(message)
            else:
                self.in_flight[number] = receiver, message


class ClientMailbox:
    """One client's mailbox."""

    def __init__(self, mailboxes: Mailboxes, client: int):
        self._mailboxes, self.client = mailboxes, client
        self.version, self.weights = mailboxes.versions[client], mailboxes.graph.weights([client])[0]

    def push(self, payload: Vectors, to: Sequence[int] | None = None) -> None:
        """Send to some neighbours, by default to all."""
        receivers = self._mailboxes.graph.neighbours(self.client) if to is None else list(to)
        self._mailboxes.send(self.client, payload, receivers)

    def poll(self) -> list[Message]:
        """What has arrived since the last call, by sender."""
        return self._mailboxes.poll(self.client)

    def random(self, purpose: str) -> np.random.Generator:
        """From the seed of the run, the client and its version."""
        return numpy_generator(self._mailboxes.seed, purpose, client=self.client, round=self.version)
