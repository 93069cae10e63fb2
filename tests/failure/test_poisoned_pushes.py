"""A member that sends messages that no honest peer sends: refused by name, and nothing changes."""

import asyncio
from functools import partial

import pytest
import torch

from peerlora.algorithms import build_algorithm
from peerlora.config.loading import parse_spec
from peerlora.exchange.mailbox import Mailboxes
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.network.base import Refused
from peerlora.network.protocol.admission import PushOnlyAdmission
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.push_messages import PushFormat, SequenceNumbers
from peerlora.network.protocol.push_service import MOST, PeerMailbox, PushService
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.send_queue import SendQueue
from peerlora.network.protocol.wire import Expected, Header, encode_body, encode_header, with_checksum
from peerlora.network.transport.memory import MemoryNetwork
from peerlora.network.transport.virtual_loop import virtual_run
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 4, 3)), rank=2, alpha=4.0, head=(("out.weight", (3, 2)),))
X = Adapters(SPEC, torch.randn(1, SPEC.parameters, generator=torch.Generator().manual_seed(0)), torch.tensor([2]))
EXPECTED = Expected("run", "ba5e", "5bec")
SITES = {0: "alice", 1: "bob", 2: "mallory"}
GRAPH = build_topology(parse_spec("complete"), 3, 0).at(0)
JOBS = 20
HELD = torch.tensor([True, False, True, True])
AEDFL = {"values": torch.zeros(1 * (5 + 6) + 2 * (4 + 3) + 6), "held": HELD, "scores": torch.zeros(4)}
QUESTION, ANSWER = {"x": torch.zeros(SPEC.parameters)}, {"d": torch.zeros(SPEC.parameters)}


class Peer:
    """One end, with a mailbox that nobody opens unless told."""

    def __init__(self, network, client, method, deadline=5.0):
        self.transport = network.transport(SITES[client])
        others = {other: site for other, site in SITES.items() if other != client}
        algorithm = build_algorithm(method, {})
        format = PushFormat(SITES[client], EXPECTED, JOBS, partial(algorithm.incoming, X), partial(algorithm.flaw, X))
        self.queue = SendQueue(self.transport, deadline, 1 if algorithm.traits.newest_only else MOST)
        self.mailbox = PeerMailbox(
            Mailboxes(GRAPH, 0, algorithm.traits.newest_only), client, others, format, self.queue.put
        )
        self.endpoint = Endpoint(self.transport, EXPECTED, list(others.values()))
        self.control = PushService(self.endpoint, {"train": "same"}, deadline, self.mailbox, self.queue)
        admission = PushOnlyAdmission(self.endpoint)
        self.protocol = RoundProtocol(self.endpoint, deadline, lambda kind: 0, self.control, admission)

    async def start(self):
        await self.control.start(self.protocol)
        self.control.open()

    def polled(self):
        return self.mailbox.mailboxes.poll(self.mailbox.client)


def push(tensors, number=1, version=3, born=10, seen=0, **changes):
    body = encode_body(tensors)
    own = {"run": "run", "kind": "push", "round": version, "step": number, "sender": "mallory", "base": "ba5e"}
    own |= {"spec": "5bec", "facts": {"born": born, "seen": seen}} | changes
    return encode_header(with_checksum(Header(**own), body)), body


def attack(method, *messages, before=lambda alice: None):
    """What alice answers to each of mallory's messages, and alice."""

    async def main():
        network = MemoryNetwork(SITES.values())
        alice, bob, mallory = (Peer(network, client, method) for client in range(3))
        for peer in (alice, bob, mallory):
            await peer.start()
        await asyncio.sleep(5)
        before(alice)
        answers = []
        for head, content in messages:
            try:
                await mallory.transport.send("alice", head, content, deadline=9.0)
                answers.append("taken")
            except Refused as refusal:
                answers.append(refusal.reason)
        await network.close()
        return answers, alice

    return virtual_run(main())


def changed(**tensors):
    return {name: value for name, value in {**AEDFL, **tensors}.items() if value is not None}


TWOS = torch.full((4,), 2, dtype=torch.uint8).view(torch.bool)
POISON = {
    "another's name": (push(AEDFL, sender="bob"), "wrong-sender"),
    "another run": (push(AEDFL, run="other"), "wrong-run"),
    "another base model": (push(AEDFL, base="0bad"), "wrong-base"),
    "another adapter": (push(AEDFL, spec="0bad"), "wrong-spec"),
    "more jobs than there are": (push(AEDFL, version=JOBS + 1), "bad-header"),
    "a version seen that never was": (push(AEDFL, seen=JOBS + 1), "bad-header"),
    "a negative version seen": (push(AEDFL, seen=-1), "bad-header"),
    "born never": (push(AEDFL, facts={"seen": 0}), "bad-header"),
    "born too late for a number": (push(AEDFL, born=2**60), "bad-header"),
    "a word for a number": (push(AEDFL, facts={"seen": "0", "born": 1}), "bad-header"),
    "a vector more": (push(changed(extra=torch.zeros(1))), "unknown-vector"),
    "a vector less": (push(changed(scores=None)), "bad-body"),
    "another dtype": (push(changed(scores=torch.zeros(4, dtype=torch.float64))), "bad-body"),
    "another shape": (push(changed(scores=torch.zeros(2, 2))), "bad-body"),
    "values without a place": (push(changed(values=torch.zeros(32))), "bad-body"),
    "values in a square": (push(changed(values=torch.zeros(2, 2))), "bad-body"),
    "more values than there are": (push(changed(values=torch.zeros(SPEC.parameters + 1))), "bad-body"),
    "half truths": (push(changed(held=TWOS)), "bad-body"),
    "not a number": (push(changed(scores=torch.full((4,), float("nan")))), "not-finite"),
    "infinity": (push(changed(values=AEDFL["values"] + float("inf"))), "not-finite"),
    "a body beyond all bounds": (push({"values": torch.zeros(1 << 20)}), "oversize"),
    "no body": (push({}), "bad-body"),
    "an exchange": (push(AEDFL, kind="mix"), "unexpected"),
    "an exchange of nothing": (push({}, kind="mix"), "unexpected"),
    "a state that nobody asked for": (push(AEDFL, kind="state"), "unexpected"),
    "a greeting with a body": (push(AEDFL, kind="hello"), "oversize"),
}


@pytest.mark.parametrize("what", POISON)
def test_poison_is_refused_by_name_and_a_good_one_is_taken_after_it(what):
    message, reason = POISON[what]
    answers, alice = attack("aedfl", message, push(AEDFL))
    assert answers == [reason, "taken"]
    (found,) = alice.polled()
    assert (found.sender, found.version, found.seen) == (2, 3, 0)
    assert all(torch.equal(value, found.payload[name]) for name, value in AEDFL.items())


def test_questions_and_answers_are_told_apart_by_name():
    mixed = {**QUESTION, **ANSWER}
    answers, alice = attack("ad-psgd", push(QUESTION), push(ANSWER, 2), push(mixed, 3), push(AEDFL, 3))
    assert answers[:2] == ["taken", "taken"] and set(answers[2:]) <= {"unknown-vector", "oversize"}
    assert [set(each.payload) for each in alice.polled()] == [{"x"}, {"d"}]


def test_nothing_is_taken_twice():
    first = push(AEDFL, number=5)
    answers, alice = attack("aedfl", first, first, push(AEDFL, 4), push(AEDFL, 6), first)
    assert answers == ["taken", "replay", "replay", "taken", "replay"]
    assert len(alice.polled()) == 1


def test_a_sender_that_began_again_counts_anew():
    """Its version goes back to a checkpoint: without more ado its messages would be older than what is known."""
    answers, alice = attack("aedfl", push(AEDFL, 9, version=12), push(AEDFL, 1, version=7, born=11))
    assert answers == ["taken", "taken"]
    assert [each.version for each in alice.polled()] == [7]
    assert alice.mailbox.mailboxes.known[0, 2] == 7


def test_a_sender_whose_clock_was_ahead_is_heard_again_after_it_was_set_right():
    """All messages of its next process were refused as replays, and it took that for having got through."""
    ahead, right = push(AEDFL, 5, version=9, born=2_000), push(AEDFL, 1, version=1, born=1_000)
    answers, alice = attack("aedfl", ahead, right, right, push(AEDFL, 2, version=2, born=1_000), ahead)
    assert answers == ["taken", "taken", "replay", "taken", "replay"]
    assert alice.mailbox.mailboxes.known[0, 2] == 2


HUGE = {**AEDFL, "values": torch.full_like(AEDFL["values"], 1e19)}


def test_values_far_from_the_own_ones_are_refused():
    answers, alice = attack("aedfl", push(HUGE), push(AEDFL, 2))
    assert answers == ["out-of-range", "taken"] and len(alice.polled()) == 1


def test_memory_is_bounded():
    many = [push(QUESTION, number) for number in range(1, MOST + 3)]
    answers, alice = attack("ad-psgd", *many)
    assert answers == ["taken"] * MOST + ["late", "late"]
    assert len(alice.polled()) == MOST
    answers, alice = attack("aedfl", *(push(AEDFL, number) for number in range(1, MOST + 3)))
    assert set(answers) == {"taken"} and len(alice.polled()) == 1


def test_who_runs_with_other_settings_sends_no_messages():
    def disagree(alice):
        alice.endpoint.peers.record_refusal("mallory", Refused("wrong-config", "other train"))

    assert attack("aedfl", push(AEDFL), before=disagree)[0] == ["wrong-config"]


def test_when_all_jobs_are_done_messages_are_late():
    assert attack("aedfl", push(AEDFL), before=lambda alice: setattr(alice.mailbox, "closed", True))[0] == ["late"]


def test_duplicates_on_the_way_are_taken_once():
    async def main():
        network = MemoryNetwork(SITES.values())
        alice, bob = (Peer(network, client, "ad-psgd") for client in range(2))
        for peer in (alice, bob):
            await peer.start()
        await asyncio.sleep(5)
        network.repeat("bob", "alice", 3)
        with bob.mailbox.lock:
            bob.mailbox.mailbox().push(QUESTION, [0])
            bob.mailbox.dispatch()
        await bob.queue.flush(5)
        found = alice.polled()
        await network.close()
        return found, bob.queue.sent()

    found, sent = virtual_run(main())
    assert len(found) == 1 and not sent.failed and sent.total == sent.largest == len(encode_body(QUESTION))


def test_numbers_grow_from_process_to_process_though_the_clock_is_set_back():
    first, second = SequenceNumbers(), SequenceNumbers()
    first.started = second.started + 10**9
    first.newest[3] = {5: 6}
    second.load_state_dict({name: value for name, value in first.state_dict().items()})
    assert second.started > first.started and second.newest == {3: {5: 6}}
