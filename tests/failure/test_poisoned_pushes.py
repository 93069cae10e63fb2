"""A member that sends letters that no honest peer sends: refused by name, and nothing changes."""

import asyncio
from functools import partial

import pytest
import torch

from peerlora.algorithms import build_algorithm
from peerlora.config.loading import parse_spec
from peerlora.exchange.mailbox import Mailboxes
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.network.base import Refused
from peerlora.network.protocol.push_messages import PushFormat, SequenceNumbers
from peerlora.network.protocol.push_service import MOST, PeerMailbox, PushOnlyProtocol, PushService
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
        form = PushFormat(SITES[client], EXPECTED, JOBS, partial(algorithm.incoming, X), partial(algorithm.flaw, X))
        self.outbox = SendQueue(self.transport, deadline, 1 if algorithm.newest_only else MOST)
        self.mail = PeerMailbox(Mailboxes(GRAPH, 0, algorithm.newest_only), client, others, form, self.outbox.put)
        self.protocol = PushOnlyProtocol(self.transport, EXPECTED, deadline, 0)
        self.control = PushService(self.protocol, list(others.values()), {"train": "same"}, self.mail, self.outbox)

    async def start(self):
        await self.control.start()
        self.control.open()

    def polled(self):
        return self.mail.post.poll(self.mail.client)


def letter(tensors, number=1, version=3, born=10, seen=0, **changes):
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
    "another's name": (letter(AEDFL, sender="bob"), "wrong-sender"),
    "another run": (letter(AEDFL, run="other"), "wrong-run"),
    "another base model": (letter(AEDFL, base="0bad"), "wrong-base"),
    "another adapter": (letter(AEDFL, spec="0bad"), "wrong-spec"),
    "more jobs than there are": (letter(AEDFL, version=JOBS + 1), "bad-header"),
    "a version seen that never was": (letter(AEDFL, seen=JOBS + 1), "bad-header"),
    "a negative version seen": (letter(AEDFL, seen=-1), "bad-header"),
    "born never": (letter(AEDFL, facts={"seen": 0}), "bad-header"),
    "born too late for a number": (letter(AEDFL, born=2**60), "bad-header"),
    "a word for a number": (letter(AEDFL, facts={"seen": "0", "born": 1}), "bad-header"),
    "a vector more": (letter(changed(extra=torch.zeros(1))), "unknown-vector"),
    "a vector less": (letter(changed(scores=None)), "bad-body"),
    "another dtype": (letter(changed(scores=torch.zeros(4, dtype=torch.float64))), "bad-body"),
    "another shape": (letter(changed(scores=torch.zeros(2, 2))), "bad-body"),
    "values without a place": (letter(changed(values=torch.zeros(32))), "bad-body"),
    "values in a square": (letter(changed(values=torch.zeros(2, 2))), "bad-body"),
    "more values than there are": (letter(changed(values=torch.zeros(SPEC.parameters + 1))), "bad-body"),
    "half truths": (letter(changed(held=TWOS)), "bad-body"),
    "not a number": (letter(changed(scores=torch.full((4,), float("nan")))), "not-finite"),
    "infinity": (letter(changed(values=AEDFL["values"] + float("inf"))), "not-finite"),
    "a body beyond all bounds": (letter({"values": torch.zeros(1 << 20)}), "oversize"),
    "no body": (letter({}), "bad-body"),
    "an exchange": (letter(AEDFL, kind="mix"), "unexpected"),
    "an exchange of nothing": (letter({}, kind="mix"), "unexpected"),
    "a state that nobody asked for": (letter(AEDFL, kind="state"), "unexpected"),
    "a greeting with a body": (letter(AEDFL, kind="hello"), "oversize"),
}


@pytest.mark.parametrize("what", POISON)
def test_poison_is_refused_by_name_and_a_good_letter_is_taken_after_it(what):
    message, reason = POISON[what]
    answers, alice = attack("aedfl", message, letter(AEDFL))
    assert answers == [reason, "taken"]
    (found,) = alice.polled()
    assert (found.sender, found.version, found.seen) == (2, 3, 0)
    assert all(torch.equal(value, found.payload[name]) for name, value in AEDFL.items())


def test_questions_and_answers_are_told_apart_by_name():
    mixed = {**QUESTION, **ANSWER}
    answers, alice = attack("ad-psgd", letter(QUESTION), letter(ANSWER, 2), letter(mixed, 3), letter(AEDFL, 3))
    assert answers[:2] == ["taken", "taken"] and set(answers[2:]) <= {"unknown-vector", "oversize"}
    assert [set(each.payload) for each in alice.polled()] == [{"x"}, {"d"}]


def test_nothing_is_taken_twice():
    first = letter(AEDFL, number=5)
    answers, alice = attack("aedfl", first, first, letter(AEDFL, 4), letter(AEDFL, 6), letter(AEDFL, 7, born=9))
    assert answers == ["taken", "replay", "replay", "taken", "replay"]
    assert len(alice.polled()) == 1


def test_a_sender_that_began_again_counts_anew():
    """Its version goes back to a checkpoint: without more ado its letters would be older than what is known."""
    answers, alice = attack("aedfl", letter(AEDFL, 9, version=12), letter(AEDFL, 1, version=7, born=11))
    assert answers == ["taken", "taken"]
    assert [each.version for each in alice.polled()] == [7]
    assert alice.mail.post.known[0, 2] == 7


def test_memory_is_bounded():
    many = [letter(QUESTION, number) for number in range(1, MOST + 3)]
    answers, alice = attack("ad-psgd", *many)
    assert answers == ["taken"] * MOST + ["late", "late"]
    assert len(alice.polled()) == MOST
    answers, alice = attack("aedfl", *(letter(AEDFL, number) for number in range(1, MOST + 3)))
    assert set(answers) == {"taken"} and len(alice.polled()) == 1


def test_who_runs_with_other_settings_sends_no_letters():
    def disagree(alice):
        alice.control.disagrees("mallory", Refused("wrong-config", "other train"))

    assert attack("aedfl", letter(AEDFL), before=disagree)[0] == ["wrong-config"]


def test_when_all_jobs_are_done_letters_are_late():
    assert attack("aedfl", letter(AEDFL), before=lambda alice: setattr(alice.mail, "over", True))[0] == ["late"]


def test_duplicates_on_the_way_are_taken_once():
    async def main():
        network = MemoryNetwork(SITES.values())
        alice, bob = (Peer(network, client, "ad-psgd") for client in range(2))
        for peer in (alice, bob):
            await peer.start()
        await asyncio.sleep(5)
        network.repeat("bob", "alice", 3)
        with bob.mail.lock:
            bob.mail.box().push(QUESTION, [0])
            bob.mail.dispatch()
        await bob.outbox.flush(5)
        found = alice.polled()
        await network.close()
        return found, bob.outbox.sent()

    found, sent = virtual_run(main())
    assert len(found) == 1 and not sent.failed and sent.total == sent.largest == len(encode_body(QUESTION))


def test_numbers_grow_from_process_to_process_though_the_clock_is_set_back():
    first, second = SequenceNumbers(), SequenceNumbers()
    first.born = second.born + 10**9
    first.newest[3] = (5, 6)
    second.load_state_dict({name: value for name, value in first.saved().items()})
    assert second.born > first.born and second.newest == {3: (5, 6)}
