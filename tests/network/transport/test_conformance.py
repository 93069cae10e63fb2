"""What every transport does.  Each test runs in memory on a virtual clock, and over gRPC with mutual TLS."""

import asyncio
import os

import pytest

from peerlora.network.base import HEADER_BYTES, DeadlineMissed, PeerDown, Refused, TransportError

WAYS = [("a", "b"), ("b", "a"), ("c", "a"), ("a", "c")]  # dialler to dialled and back; with a site that only dials
LARGE = bytes(range(256)) * (3 << 12)  # 3 MB: three chunks


@pytest.mark.parametrize(("source", "target"), WAYS)
def test_messages_arrive_whole_and_in_the_order_of_the_calls(rig, source, target):
    async def scenario(rig):
        await rig.all_up()
        bodies = [os.urandom(size) for size in (0, 1, 1 << 20, (1 << 20) + 1, 3_000_000, 7)] * 2
        sends = [rig.transports[source].send(target, b"%d" % i, body, deadline=20) for i, body in enumerate(bodies)]
        await asyncio.gather(*sends)
        assert rig.boxes[target].got == [(source, b"%d" % i, body) for i, body in enumerate(bodies)]

    rig.run(scenario)


def test_all_edges_work_at_once(rig):
    async def scenario(rig):
        await rig.all_up()
        pairs = [(x, y) for x in "abc" for y in "abc" if x != y]
        await asyncio.gather(*(rig.transports[x].send(y, b"h", LARGE, deadline=20) for x, y in pairs))
        assert {(x, y) for y in "abc" for x, _, _ in rig.boxes[y].got} == set(pairs)
        assert all(body == LARGE for box in rig.boxes.values() for _, _, body in box.got)

    rig.run(scenario)


@pytest.mark.parametrize(("source", "target"), WAYS)
def test_the_ack_comes_after_the_receiver_took_the_message(rig, source, target):
    async def scenario(rig):
        await rig.all_up()
        box = rig.boxes[target]
        box.gate.clear()
        sending = asyncio.ensure_future(rig.transports[source].send(target, b"h", LARGE, deadline=20))
        await rig.until(lambda: box.inside == 1)
        await asyncio.sleep(0.1)
        assert not sending.done() and not box.got
        box.gate.set()
        await sending
        assert box.got == [(source, b"h", LARGE)]

    rig.run(scenario)


@pytest.mark.parametrize(("source", "target"), WAYS)
def test_a_slow_receiver_holds_one_message_of_an_edge(rig, source, target):
    async def scenario(rig):
        await rig.all_up()
        box = rig.boxes[target]
        box.gate.clear()
        sends = [asyncio.ensure_future(rig.transports[source].send(target, b"h", LARGE, deadline=20)) for _ in range(5)]
        await rig.until(lambda: box.inside == 1)
        await asyncio.sleep(0.2)
        assert box.inside == 1 and not any(send.done() for send in sends)
        box.gate.set()
        await asyncio.gather(*sends)
        assert len(box.got) == 5 and box.largest_inside == 1

    rig.run(scenario)


@pytest.mark.parametrize(("source", "target"), WAYS)
def test_more_bytes_than_admitted_are_refused_before_they_are_taken(rig, source, target):
    async def scenario(rig):
        await rig.all_up()
        rig.boxes[target].most = 1000
        with pytest.raises(Refused) as refused:
            await rig.transports[source].send(target, b"h", LARGE, deadline=20)
        assert refused.value.reason == "oversize" and not rig.boxes[target].got
        await rig.transports[source].send(target, b"small", b"x" * 1000, deadline=20)
        await rig.until(lambda: any(kind == "refused" for kind, _, _ in rig.told[target]))
        assert any(who == source and "oversize, here" in text for _, who, text in rig.told[target])
        assert any(who == target and "oversize, there" in text for _, who, text in rig.told[source])

    rig.run(scenario)


@pytest.mark.parametrize("where", ["header", "body"])
@pytest.mark.parametrize(("source", "target"), WAYS)
def test_a_refusal_reaches_the_sender_with_its_reason_and_the_edge_goes_on(rig, source, target, where):
    async def scenario(rig):
        await rig.all_up()
        box = rig.boxes[target]
        (box.refuse_header if where == "header" else box.refuse_body)[b"bad"] = "wrong-run"
        for _ in range(3):
            with pytest.raises(Refused) as refused:
                await rig.transports[source].send(target, b"bad", LARGE * 4, deadline=20)
            assert (refused.value.reason, refused.value.detail) == ("wrong-run", f"by its {where}")
        await rig.transports[source].send(target, b"good", LARGE, deadline=20)
        assert [header for _, header, _ in box.got] == [b"good"]
        assert "down" not in rig.kinds(source, target) + rig.kinds(target, source)

    rig.run(scenario)


def test_a_receiver_that_fails_refuses_and_goes_on(rig, caplog):
    async def scenario(rig):
        await rig.all_up()

        async def broken(peer, header, body):
            raise ZeroDivisionError("a mistake of ours")

        rig.boxes["b"].deliver = broken
        for source in ("a", "c"):
            with pytest.raises(Refused, match="internal"):
                await rig.transports[source].send("b", b"h", b"x", deadline=20)
        del rig.boxes["b"].deliver
        await rig.transports["a"].send("b", b"h", b"x", deadline=20)
        assert "a mistake of ours" in caplog.text

    rig.run(scenario)


@pytest.mark.parametrize(("source", "target"), WAYS)
def test_after_a_missed_deadline_the_message_was_not_taken_and_the_edge_goes_on(rig, source, target):
    async def scenario(rig):
        await rig.all_up()
        box = rig.boxes[target]
        box.gate.clear()
        with pytest.raises(DeadlineMissed):
            await rig.transports[source].send(target, b"late", LARGE, deadline=0.3)
        await rig.until(lambda: box.inside == 0)
        box.gate.set()
        await rig.transports[source].send(target, b"next", LARGE, deadline=20)
        await asyncio.sleep(0.1)
        assert [header for _, header, _ in box.got] == [b"next"]

    rig.run(scenario)


def test_a_message_waiting_for_its_turn_has_the_same_deadline(rig):
    async def scenario(rig):
        await rig.all_up()
        rig.boxes["b"].gate.clear()
        first = asyncio.ensure_future(rig.transports["a"].send("b", b"1", b"", deadline=20))
        await rig.until(lambda: rig.boxes["b"].inside == 1)
        with pytest.raises(DeadlineMissed):
            await rig.transports["a"].send("b", b"2", b"", deadline=0.2)
        rig.boxes["b"].gate.set()
        await first
        assert [header for _, header, _ in rig.boxes["b"].got] == [b"1"]

    rig.run(scenario)


def test_without_a_session_a_peer_is_down_at_once(rig):
    async def scenario(rig):
        await rig.start("a")
        with pytest.raises(PeerDown):
            await rig.transports["a"].send("b", b"h", b"", deadline=20)
        with pytest.raises(Refused, match="not-a-member"):
            await rig.transports["a"].send("nobody", b"h", b"", deadline=20)
        with pytest.raises(TransportError, match="header of"):
            await rig.transports["a"].send("b", b"h" * (HEADER_BYTES + 1), b"", deadline=20)

    rig.run(scenario)


def test_the_largest_header_passes(rig):
    async def scenario(rig):
        await rig.all_up()
        for source, target in WAYS:
            await rig.transports[source].send(target, b"h" * HEADER_BYTES, b"x", deadline=20)
            assert rig.boxes[target].got[-1] == (source, b"h" * HEADER_BYTES, b"x")

    rig.run(scenario)


@pytest.mark.parametrize(("source", "target"), WAYS)
def test_a_crash_is_noticed_at_once_by_calls_in_flight(rig, source, target):
    async def scenario(rig):
        await rig.all_up()
        rig.boxes[target].gate.clear()
        sending = asyncio.ensure_future(rig.transports[source].send(target, b"h", LARGE, deadline=20))
        await rig.until(lambda: rig.boxes[target].inside == 1)
        await rig.crash(target)
        with pytest.raises(PeerDown):
            await sending
        await rig.until(lambda: rig.kinds(source, target)[-1] == "down")
        with pytest.raises(PeerDown):
            await rig.transports[source].send(target, b"h", b"", deadline=20)

    rig.run(scenario)


@pytest.mark.parametrize("site", ["a", "b", "c"])
def test_whoever_comes_back_takes_part_again(rig, site):
    async def scenario(rig):
        await rig.all_up()
        others = [other for other in "abc" if other != site]
        for _ in range(2):
            await rig.crash(site)
            await rig.until(lambda: all(rig.kinds(other, site)[-1] == "down" for other in others))
            await rig.start(site)
            await rig.until(lambda: all(rig.edge(*pair) for o in others for pair in ((site, o), (o, site))))
            for other in others:
                await rig.transports[other].send(site, b"welcome", LARGE, deadline=20)
                await rig.transports[site].send(other, b"here", LARGE, deadline=20)
            assert sorted(peer for peer, _, _ in rig.boxes[site].got) == others

    rig.run(scenario)


def test_a_new_session_of_the_same_site_replaces_the_old_one(rig):
    async def scenario(rig):
        await rig.all_up()
        old, old_box = rig.transports["c"], rig.boxes["c"]
        await rig.start("c")
        await rig.until(lambda: rig.kinds("a", "c") == ["up", "down", "up"])
        await rig.until(lambda: rig.edge("c", "a") and rig.edge("c", "b"))
        for _ in range(3):
            await rig.transports["a"].send("c", b"h", LARGE, deadline=20)
            await rig.transports["c"].send("a", b"h", LARGE, deadline=20)
        assert not old_box.got and len(rig.boxes["c"].got) == 3 == len(rig.boxes["a"].got)
        with pytest.raises(PeerDown):
            await old.send("a", b"h", b"", deadline=1)
        await old.close()

    rig.run(scenario)


def test_a_removed_member_is_refused_at_once_and_both_sides_say_so(rig):
    async def scenario(rig):
        await rig.all_up()
        await rig.expel("c")
        for target in ("a", "b"):
            with pytest.raises(Refused, match="not-a-member"):
                await rig.transports[target].send("c", b"h", b"", deadline=1)
            await rig.until(lambda target=target: rig.kinds(target, "c")[:2] == ["up", "down"])
            await rig.until(lambda target=target: any("not-a-member, here" in text for _, _, text in rig.told[target]))
        await rig.until(lambda: not rig.edge("c", "a"))
        await rig.until(lambda: any("not-a-member" in text for _, _, text in rig.told["c"]))
        with pytest.raises((PeerDown, Refused)):
            await rig.transports["c"].send("a", b"h", LARGE, deadline=1)
        assert not rig.boxes["a"].got
        await rig.transports["a"].send("b", b"h", b"x", deadline=20)

    rig.run(scenario)


def test_closing_ends_calls_in_flight_and_the_events(rig):
    async def scenario(rig):
        await rig.all_up()
        rig.boxes["b"].gate.clear()
        sends = [asyncio.ensure_future(rig.transports[x].send("b", b"h", LARGE, deadline=20)) for x in ("a", "c")]
        await rig.until(lambda: rig.boxes["b"].inside == 2)
        await rig.transports["a"].close()
        with pytest.raises(PeerDown):
            await sends[0]
        await rig._listening[0]
        rig.boxes["b"].gate.set()
        await sends[1]

    rig.run(scenario)


def test_nothing_is_delivered_twice_or_lost_over_many_messages_and_failures(rig):
    async def scenario(rig):
        await rig.all_up()
        acked = {pair: [] for pair in WAYS}

        async def talk(source, target):
            for number in range(40):
                try:
                    await rig.transports[source].send(target, b"%d" % number, LARGE[: number * 1000], deadline=5)
                    acked[source, target].append(b"%d" % number)
                except (PeerDown, Refused):
                    await asyncio.sleep(0.05)

        talking = asyncio.gather(*(talk(*pair) for pair in WAYS))
        await asyncio.sleep(0.1)
        kept = rig.boxes["c"]
        await rig.crash("c")
        await rig.start("c")
        await talking
        rig.boxes["c"].got = kept.got + rig.boxes["c"].got
        for source, target in WAYS:
            got = [header for peer, header, _ in rig.boxes[target].got if peer == source]
            assert len(got) == len(set(got)) and set(acked[source, target]) <= set(got)
            assert got == sorted(got, key=int)
        assert len(acked["a", "b"]) == len(acked["b", "a"]) == 40

    rig.run(scenario)


def test_a_part_that_is_refused_after_all_is_told_and_the_message_stays_taken(rig):
    async def scenario(rig):
        await rig.all_up()
        await rig.transports["a"].send("b", b"h", b"body", deadline=20)
        rig.transports["b"].report_refusal("a", Refused("bad-signature", "of a part"), b"h")
        await rig.until(lambda: ("refused", "a", "bad-signature, here: of a part") in rig.told["b"])
        assert [body for *_, body in rig.boxes["b"].got] == [b"body"] and not rig.kinds("a", "b").count("refused")

    rig.run(scenario)


def test_only_a_transport_that_authenticates_nobody_leaves_statements_unsigned(rig):
    async def scenario(rig):
        await rig.all_up()
        signatures = {site: transport.signatures for site, transport in rig.transports.items()}
        if not hasattr(rig, "members"):
            assert set(signatures.values()) == {None}
            return
        for signer, signs in signatures.items():
            signed = signs.sign(b"statement")
            for reader in signatures.values():
                reader.verify(signer, b"statement", signed)
        with pytest.raises(Refused, match="bad-signature"):
            signatures["a"].verify("b", b"statement", signatures["c"].sign(b"statement"))

    rig.run(scenario)
