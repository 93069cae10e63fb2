"""What networks do, on the virtual clock: the times are exact, and no test waits."""

import asyncio

import pytest
from rigs import MemoryRig

from peerlora.network.base import DeadlineMissed, PeerDown
from peerlora.network.transport.memory import MemoryNetwork
from peerlora.network.transport.virtual_loop import virtual_run

BEAT = 2.0


def now():
    return asyncio.get_running_loop().time()


@pytest.fixture
def rig():
    return MemoryRig()


async def timed_kinds(rig, site, peer, seconds):
    """What ``site`` tells of ``peer`` during the next seconds, with times since now."""
    start, begin, found = now(), len(rig.told[site]), []
    while now() < start + seconds:
        await asyncio.sleep(0.25)
        for kind, who, _ in rig.told[site][begin:]:
            if who == peer:
                found.append((kind, now() - start))
        begin = len(rig.told[site])
    return found


def test_a_cut_link_is_suspect_after_three_beats_and_down_after_five(rig):
    async def scenario(rig):
        await rig.all_up()
        rig.network.cut("a", "b")
        told = await timed_kinds(rig, "a", "b", 20)
        assert [kind for kind, _ in told] == ["suspect", "down"]
        assert 2 * BEAT <= told[0][1] <= 3.5 * BEAT + 0.5 and 4 * BEAT <= told[1][1] <= 5.5 * BEAT + 0.5
        assert rig.kinds("a", "c") == ["up"] == rig.kinds("c", "b"), "other edges do not notice"
        rig.network.heal("a", "b")
        assert [kind for kind, _ in await timed_kinds(rig, "b", "a", 5)] == ["up"]
        await rig.transports["a"].send("b", b"h", b"x", deadline=1)

    rig.run(scenario)


@pytest.mark.parametrize("source", ["a", "b"])
def test_a_link_cut_in_one_direction_is_down_at_both_ends(rig, source):
    async def scenario(rig):
        target = "b" if source == "a" else "a"
        await rig.all_up()
        rig.network.cut(source, target, both=False)
        await asyncio.sleep(6 * BEAT)
        assert rig.kinds("a", "b")[-1] == "down" == rig.kinds("b", "a")[-1]
        for one, other in ((source, target), (target, source)):
            with pytest.raises(PeerDown):
                await rig.transports[one].send(other, b"h", b"", deadline=1)

    rig.run(scenario)


def test_over_a_cut_link_a_message_misses_its_deadline_and_then_the_peer_is_down(rig):
    async def scenario(rig):
        await rig.all_up()
        rig.network.cut("a", "b")
        start = now()
        with pytest.raises(DeadlineMissed):
            await rig.transports["a"].send("b", b"h", b"x", deadline=3)
        assert now() == start + 3
        with pytest.raises(PeerDown):
            await rig.transports["a"].send("b", b"h", b"x", deadline=100)
        assert now() <= start + 6 * BEAT

    rig.run(scenario)


def test_a_delay_shorter_than_the_suspicion_goes_unnoticed(rig):
    async def scenario(rig):
        await rig.all_up()
        rig.network.delay("a", "b", 1.5)
        await asyncio.sleep(30)
        assert rig.kinds("a", "b") == ["up"]
        start = now()
        await rig.transports["a"].send("b", b"h", b"x", deadline=10)
        assert now() == start + 3.0  # there and back

    rig.run(scenario)


def test_a_lost_message_was_not_taken_a_lost_ack_was(rig):
    async def scenario(rig):
        await rig.all_up()
        for what, taken in (("message", 0), ("ack", 1)):
            rig.network.lose("a", "b", what=what)
            with pytest.raises(DeadlineMissed):
                await rig.transports["a"].send("b", what.encode(), b"x", deadline=2)
            assert len(rig.boxes["b"].got) == taken
        await rig.transports["a"].send("b", b"h", b"x", deadline=2)
        assert [header for _, header, _ in rig.boxes["b"].got] == [b"ack", b"h"]

    rig.run(scenario)


def test_a_repeated_message_arrives_twice(rig):
    async def scenario(rig):
        await rig.all_up()
        rig.network.repeat("a", "b")
        for header in (b"1", b"2"):
            await rig.transports["a"].send("b", header, b"x", deadline=2)
        assert [header for _, header, _ in rig.boxes["b"].got] == [b"1", b"1", b"2"]

    rig.run(scenario)


def test_a_stopped_process_is_noticed_and_goes_on_where_it_was(rig):
    async def scenario(rig):
        await rig.all_up()
        rig.network.hang("b")
        with pytest.raises(DeadlineMissed):
            await rig.transports["a"].send("b", b"h", b"x", deadline=3)
        told = await timed_kinds(rig, "a", "b", 12)
        assert [kind for kind, _ in told] == ["suspect", "down"]
        assert "down" not in rig.kinds("b", "a"), "it did nothing while it was stopped"
        rig.network.wake("b")
        await rig.until(lambda: rig.edge("a", "b") and rig.edge("b", "a"))
        await rig.transports["a"].send("b", b"again", b"x", deadline=3)
        assert rig.boxes["b"].got[-1][1] == b"again"

    rig.run(scenario)


def test_a_partition_leaves_both_halves_working(rig):
    async def scenario(rig):
        await rig.all_up()
        rig.network.split({"c"})
        await asyncio.sleep(6 * BEAT)
        assert rig.kinds("c", "a")[-1] == rig.kinds("a", "c")[-1] == rig.kinds("b", "c")[-1] == "down"
        await rig.transports["a"].send("b", b"h", b"x", deadline=1)

    rig.run(scenario)


def lossy(seed):
    """Which of 200 messages got through a link that loses every third, and when the last was over."""

    async def main():
        rig = MemoryRig()
        rig.network = MemoryNetwork("abc", timing=rig.timing, seed=seed)
        await rig.all_up()
        rig.network.loss("a", "b", 1 / 3)
        for number in range(200):
            try:
                await rig.transports["a"].send("b", b"%d" % number, b"x", deadline=0.5)
            except DeadlineMissed:
                pass
        got = [int(header) for _, header, _ in rig.boxes["b"].got]
        ended = now()
        await rig.stop()
        return got, ended

    return virtual_run(main())


def test_the_same_seed_gives_the_same_failures():
    got, ended = lossy(1)
    assert lossy(1) == (got, ended) and lossy(2)[0] != got
    assert 100 < len(got) < 165 and got == sorted(got)


def test_edges_that_are_not_listed_do_not_exist():
    async def main():
        rig = MemoryRig()
        rig.network = MemoryNetwork("abc", edges=[("a", "b"), ("b", "c")], timing=rig.timing)
        await rig.start("a", "b", "c")
        await asyncio.sleep(1)
        assert rig.edge("a", "b") and rig.edge("b", "c") and not rig.edge("a", "c")
        await rig.stop()

    virtual_run(main())
