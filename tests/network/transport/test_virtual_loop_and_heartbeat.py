import asyncio

import pytest

from peerlora.network.base import PeerDown
from peerlora.network.transport.heartbeat import Heartbeat, Session, Timing
from peerlora.network.transport.virtual_loop import virtual_run


def test_waiting_costs_no_time_and_happens_in_order():
    async def main():
        order = []

        async def wait(seconds):
            await asyncio.sleep(seconds)
            order.append((seconds, asyncio.get_running_loop().time()))

        await asyncio.gather(*(wait(seconds) for seconds in (3600, 0.5, 60)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1000):
                await asyncio.Event().wait()
        return order, asyncio.get_running_loop().time()

    # More than a test may take, so the loop does not wait.
    assert virtual_run(main()) == ([(0.5, 0.5), (60, 60), (3600, 3600)], 4600)


def test_threads_are_played_at_once():
    async def main():
        assert await asyncio.to_thread(sum, (1, 2)) == 3
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        return asyncio.get_running_loop().time()

    assert virtual_run(main()) == 0


def test_what_would_wait_for_ever_is_told():
    async def main():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="can never happen"):
        virtual_run(main())


def test_health_by_missed_beats():
    heartbeat = Heartbeat(Timing(beat=2, suspect=3, down=5), 100)
    seen = []
    for now in range(101, 112):
        seen.append(heartbeat.health(now))
    assert seen == ["alive"] * 5 + ["suspect"] * 4 + ["down"] * 2
    heartbeat.heard(111)
    assert heartbeat.health(112) == "alive"


def test_a_process_that_stood_still_does_not_blame_its_peer():
    heartbeat = Heartbeat(Timing(beat=2), 0)
    assert heartbeat.health(1) == "alive"
    assert heartbeat.health(1000) == "alive"
    assert [heartbeat.health(1000 + second) for second in (3, 6, 9, 10)] == ["alive", "suspect", "suspect", "down"]


def test_the_wait_before_dialling_grows_to_a_limit():
    timing, waits = Timing(backoff=(0.2, 1.0)), [None]
    for _ in range(5):
        waits.append(timing.next_wait(waits[-1]))
    assert waits[1:] == [0.2, 0.4, 0.8, 1.0, 1.0]


def test_what_waits_on_a_session_ends_with_it():
    async def main():
        session = Session()
        waiting = asyncio.ensure_future(session.during(asyncio.sleep(100, "done")))
        assert await session.during(asyncio.sleep(1, "quick")) == "quick"
        session.end("a reason")
        session.end("a later one")
        with pytest.raises(PeerDown, match="a reason"):
            await waiting
        assert not session.open and asyncio.get_running_loop().time() == 1

    virtual_run(main())
