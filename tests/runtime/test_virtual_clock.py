import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerlora.config.loading import load_config
from peerlora.config.sections import ClockConfig
from peerlora.errors import ConfigError
from peerlora.runtime.virtual_clock import (
    ARRIVED,
    BEGINS,
    DONE,
    SECOND,
    EventQueue,
    ScheduledEvent,
    VirtualClock,
    ticks,
)


def clock(clients=3, seed=0, **settings):
    return VirtualClock(ClockConfig(**settings), clients, seed)


def test_a_job_takes_its_steps_over_the_speed():
    found = clock(step=0.5, speed=[1.0, 2.0, 0.1])
    assert [found.compute(client, 10, 0) for client in range(3)] == [5 * SECOND, 5 * SECOND // 2, 50 * SECOND]


def test_an_upload_takes_its_bytes_over_the_bandwidth():
    found = clock(bandwidth=[100.0, 50.0, 1e9])
    assert [found.upload(client, 200, 0) for client in range(3)] == [2 * SECOND, 4 * SECOND, 200]
    assert clock().upload(0, 10**12, 0) == 0


def test_ten_jobs_of_a_tenth_end_when_one_of_a_second_does():
    found = clock(step=0.1)
    assert sum(found.compute(0, 1, 0) for _ in range(10)) == found.compute(0, 10, 0) == SECOND


def test_log_normal_speeds_are_drawn_per_client_around_what_is_given():
    many = clock(4000, speed=2.0, speed_spread=0.5)
    logs = np.log(many.speeds / 2)
    assert abs(logs.mean()) < 0.03 and abs(logs.std() - 0.5) < 0.03
    few = clock(5, speed=2.0, speed_spread=0.5)
    assert (few.speeds == many.speeds[:5]).all(), "a client's draw does not depend on how many there are"
    assert (clock(5, seed=1, speed=2.0, speed_spread=0.5).speeds != few.speeds).all()
    both = clock(5, bandwidth=2.0, bandwidth_spread=0.5, speed=2.0, speed_spread=0.5)
    assert (both.bandwidths != both.speeds).all()


def test_a_trace_says_what_holds_from_a_moment_on(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("client,seconds,speed,bandwidth\n1,10,0.5,\n1,0,2,100\n0,5,,50\n")
    found = clock(trace=str(file), bandwidth=10.0)
    assert [found.compute(1, 1, at * SECOND) / SECOND for at in (0, 9, 10, 99)] == [0.5, 0.5, 2, 2]
    assert [found.upload(1, 100, at * SECOND) / SECOND for at in (0, 10)] == [1, 1]
    assert [found.upload(0, 100, at * SECOND) / SECOND for at in (4, 5)] == [10, 2]
    assert found.compute(2, 1, 0) == SECOND


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("speed\n1\n", "columns speed; expected client and any of seconds, speed, bandwidth"),
        ("client,velocity\n0,1\n", "columns client, velocity"),
        ("", "columns none"),
        ("client,speed\n0,fast\n", "line 2.*expected numbers"),
        ("client,speed\n0,1\n3,1\n", "line 3: client 3 given; clients are numbered 0 to 2"),
        ("client,speed\n0,0\n", "speed and bandwidth above 0"),
        ("client,speed\n0,inf\n", "expected seconds of at least 0"),
        ("client,seconds,speed\n0,-1,1\n", "expected seconds of at least 0"),
        ("client,speed\n0,1,7\n", "line 2"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path, text, told):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        clock(trace=str(file))


def test_a_trace_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no file; expected a CSV"):
        clock(trace=str(tmp_path / "nowhere.csv"))


AWAY = [
    {"client": 0, "leave": 2, "back": 4, "unit": "seconds"},
    {"client": 0, "leave": 3, "back": 5, "unit": "seconds"},
    {"client": 1, "leave": 1, "unit": "seconds"},
    {"client": 2, "leave": 1, "back": 3},
]


def test_who_is_away_and_when_back():
    found = clock(away=AWAY)
    at = [second * SECOND for second in range(6)]
    assert [found.away(0, now, 0) for now in at] == [False, False, True, True, True, False]
    assert [found.away(1, now, 0) for now in at] == [False] + [True] * 5
    assert [found.away(2, 0, t) for t in range(5)] == [False, True, True, False, False]
    assert [found.back(0, now) for now in at] == [at[0], at[1], at[5], at[5], at[5], at[5]]
    assert found.back(1, 0) == 0 and found.back(1, SECOND) is None


def test_durations_beyond_reason_are_refused():
    with pytest.raises(ConfigError, match="check the units"):
        ticks(1e10)
    with pytest.raises(ConfigError, match="check the units"):
        clock(delay=1e12)
    assert ticks(1e9) == 10**18


events = st.lists(
    st.builds(ScheduledEvent, *(st.integers(0, 3), st.sampled_from([DONE, ARRIVED, BEGINS]), *[st.integers(0, 2)] * 2)),
    unique=True,
    max_size=12,
)


@given(events, st.randoms(use_true_random=False))
def test_the_order_of_events_does_not_depend_on_when_they_were_put_down(events, draw):
    shuffled = list(events)
    draw.shuffle(shuffled)
    queue = EventQueue()
    for event in shuffled:
        queue.add(*event)
    assert queue.to_list() == sorted(events)
    taken = [queue.next() for _ in events]
    assert taken == sorted(events) and queue.moment is None
    for one, other in itertools.pairwise(taken):
        assert one.moment < other.moment or one.kind <= other.kind


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["clock.speed=[1,2]"], "clock.speed lists 2 values for 4 clients"),
        (["clock.bandwidth=[1]"], "clock.bandwidth lists 1 values for 4 clients"),
        (["clock.speed=0"], "clock.speed"),
        (["clock.speed=-1"], "clock.speed"),
        (["clock.spead=1"], r"unknown key 'clock.spead' \(did you mean 'speed'\?\); expected one of step, speed"),
        (["clock.deadline=0"], "clock.deadline"),
        (["clock.away=[{client: 4}]"], "clock.away names client 4; 4 clients are numbered 0 to 3"),
        (["clock.away=[{client: 1, leave: 3, back: 2}]"], "back must be later than leave"),
        (
            ["clock.away=[{client: 1, untill: 2}]"],
            r"unknown key 'clock.away.0.untill'.*; expected one of client, leave",
        ),
        (["clock.delay=.inf"], "clock.delay"),
    ],
)
def test_a_bad_clock_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        load_config({"clients": 4}, words)


def test_a_clock_is_none_unless_it_is_asked_for():
    assert load_config({}).clock is None
    assert load_config({"clock": {}}).clock == ClockConfig()
    assert load_config({}, ["clock.speed=2"]).clock == ClockConfig(speed=2)
    assert math.isinf(clock().bandwidths[0])
