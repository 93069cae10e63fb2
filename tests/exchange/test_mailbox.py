import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlora.config.loading import parse_spec
from peerlora.exchange.base import Message
from peerlora.exchange.mailbox import Mailboxes
from peerlora.network.protocol.wire import encoded_bytes
from peerlora.topology.schedule import build_topology


def post(clients=4, graph="ring", newest_only=True):
    return Mailboxes(build_topology(parse_spec(graph), clients, 0).at(0), 0, newest_only)


def say(value):
    return {"x": torch.tensor([float(value)])}


def heard(messages):
    return [(each.sender, float(each.payload["x"][0])) for each in messages]


def test_a_push_goes_to_all_neighbours_or_to_some():
    made = post()
    made.mailbox(0).push(say(1))
    made.mailbox(0).push(say(2), [3])
    first, second = made.take_pushed()
    assert (first.receivers, second.receivers) == ([1, 3], [3])
    assert first.size == encoded_bytes({"x": ((1,), torch.float32)})
    assert made.take_pushed() == [] and made.mailbox(1).poll() == [], "nothing arrives by itself"
    for number in [*first.numbers, *second.numbers]:
        made.deliver(number)
    assert heard(made.mailbox(1).poll()) == [(0, 1)] and heard(made.mailbox(3).poll()) == [(0, 2)]
    assert made.used == {(0, 1), (0, 3)}


@pytest.mark.parametrize(("newest_only", "expected"), [(True, [(0, 2), (2, 7)]), (False, [(0, 1), (0, 2), (2, 7)])])
def test_one_slot_per_sender_or_all(newest_only, expected):
    made = post(newest_only=newest_only)
    for sender, value in ((0, 1), (2, 7), (0, 2)):
        made.end_job(sender)
        made.mailbox(sender).push(say(value), [1])
    for pushed in made.take_pushed():
        made.deliver(*pushed.numbers)
    assert heard(made.mailbox(1).poll()) == expected
    assert made.mailbox(1).poll() == []


def test_an_older_message_that_arrives_later_counts_no_more():
    made = post()
    numbers = []
    for value in (1, 2):
        made.end_job(0)
        made.mailbox(0).push(say(value), [1])
        numbers += made.take_pushed()[0].numbers
    for number in reversed(numbers):
        made.deliver(number)
    assert heard(made.mailbox(1).poll()) == [(0, 2)]
    assert made.known[1, 0] == 2


def test_staleness_by_hand():
    """Clients 0 and 1; 1 is slow.  Counters only: what 1 knew of 0 as its job began, against 0's own count."""
    made = post(2, "path")
    for client in (0, 1):
        made.begin_job(client)
    for job in range(3):  # 0 does three jobs, each message there at once
        made.end_job(0)
        made.mailbox(0).push(say(job))
        made.deliver(*made.take_pushed()[0].numbers)
        made.begin_job(0)
    made.end_job(1)
    made.mailbox(1).push(say(9))
    made.deliver(*made.take_pushed()[0].numbers)
    (late,) = made.mailbox(0).poll()
    assert (late.version, late.seen, late.staleness) == (1, 0, 2)  # 0's last job began with version 2
    (fresh,) = made.mailbox(1).poll()
    assert (fresh.version, fresh.seen, fresh.staleness) == (3, 0, 0)
    assert made.staleness == [2, 0]
    made.begin_job(1)
    made.end_job(1)
    made.mailbox(1).push(say(10))
    made.deliver(*made.take_pushed()[0].numbers)
    assert made.mailbox(0).poll()[0].staleness == 0, "its second job began with the newest of 0"


@given(
    st.lists(st.tuples(st.sampled_from(["job", "push", "arrive", "poll"]), st.integers(0, 3)), max_size=60),
    st.booleans(),
)
def test_whatever_happens_no_message_is_handed_out_twice(events, newest_only):
    made, in_flight, pushed, polled = post(newest_only=newest_only), [], 0, []
    for what, client in events:
        if what == "job":
            made.begin_job(client)
            made.end_job(client)
        elif what == "push":
            for number in made.mailbox(client)._mailboxes.graph.neighbours(client):
                made.mailbox(client).push(say(pushed), [number])
                pushed += 1
            in_flight += [number for each in made.take_pushed() for number in each.numbers]
        elif what == "arrive" and in_flight:
            made.deliver(in_flight.pop(client % len(in_flight)))
        elif what == "poll":
            found = made.mailbox(client).poll()
            polled += [value for _, value in heard(found)]
            assert all(each.staleness >= 0 for each in found)
            assert not newest_only or len({each.sender for each in found}) == len(found)
    assert len(polled) == len(set(polled)) <= pushed
    if not newest_only:
        waiting = sum(map(len, made.inbox.values()))
        assert len(polled) + waiting + len(in_flight) == pushed, "none is lost"


def test_draws_are_of_the_client_and_its_version():
    made = post()

    def draw(client):
        return made.mailbox(client).random("partner").integers(2**40)

    first = draw(0)
    assert first == draw(0) != draw(1)
    made.end_job(0)
    assert first != draw(0)


def test_what_is_saved_goes_on():
    made = post(newest_only=False)
    for client in (0, 2, 1):
        made.begin_job(client)
        made.end_job(client)
        made.mailbox(client).push(say(client))
    numbers = [number for each in made.take_pushed() for number in each.numbers]
    made.deliver(numbers[0])
    tensors, facts = made.state_dict()
    again = post(newest_only=False)
    again.load_state_dict(tensors, facts)
    for each in (made, again):
        for number in numbers[1:]:
            each.deliver(number)
    for client in range(4):
        ours, theirs = again.mailbox(client).poll(), made.mailbox(client).poll()
        assert heard(ours) == heard(theirs)
        assert [(each.version, each.seen) for each in ours] == [(each.version, each.seen) for each in theirs]
    assert again.versions == made.versions and again.count == made.count
    assert np.array_equal(again.known, made.known) and np.array_equal(again.known_then, made.known_then)


def test_who_went_back_to_an_earlier_version_is_heard_again():
    made = post()
    made.arrive(0, Message(1, say(1), version=9, seen=0))
    made.poll(0)
    made.arrive(0, Message(1, say(2), version=5, seen=0))
    assert made.poll(0) == [], "older than what is known"
    made.began_again(0, 1)
    made.arrive(0, Message(1, say(3), version=6, seen=0))
    assert heard(made.poll(0)) == [(1, 3)] and made.known[0, 1] == 6


def test_measures_are_of_what_was_polled():
    made = post()
    assert made.measures() == {}
    made.versions[0] = 5
    for sender, seen in ((1, 4), (3, 1)):
        made.arrive(0, Message(sender, say(1), version=1, seen=seen))
    made.poll(0)
    assert made.measures() == {"staleness": 1.5, "staleness_max": 3.0}
