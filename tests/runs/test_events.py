import json
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlora.errors import RunError
from peerlora.runs.events import Event, Warned, from_json, plain, to_json


def test_every_event_comes_back_as_it_was(one_of_each):
    assert {type(event) for event in one_of_each} == set(get_args(Event))
    for event in one_of_each:
        line = to_json(event)
        assert "\n" not in line
        assert json.loads(line)["type"] == type(event).__name__ and json.loads(line)["version"] == 1
        assert from_json(line) == event


def test_what_is_not_finite_is_null_and_read_as_nan(one_of_each):
    done = replace(one_of_each[1], loss=[math.nan, math.inf, 1.0], rho=-math.inf)
    line = to_json(done)
    assert json.loads(line)["loss"] == [None, None, 1.0] and json.loads(line)["rho"] is None
    back = from_json(line)
    assert math.isnan(back.rho) and math.isnan(back.loss[0]) and back.loss[2] == 1.0
    assert from_json(to_json(replace(one_of_each[1], edges=None))).edges is None


def test_numpy_values_become_plain_numbers(one_of_each):
    score = replace(one_of_each[2], own=np.array([0.5, 0.25, 1.0]), averaged=np.float32(0.5), round=np.int64(1))
    assert from_json(to_json(score)) == replace(one_of_each[2], averaged=0.5)


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", '{"type":"Warned"}', '{"type":"Nobody","version":1}', '{"type":["x"],"version":1}'],
)
def test_a_line_that_is_no_event_is_refused(line):
    with pytest.raises(RunError):
        from_json(line)


def test_another_version_is_refused_by_name():
    with pytest.raises(RunError, match=r"Warned 2 is unknown here.*Warned 1"):
        from_json('{"type":"Warned","version":2,"message":"x"}')


def test_missing_and_unknown_fields_are_named():
    with pytest.raises(RunError, match="message, text"):
        from_json('{"type":"Warned","version":1,"text":"x"}')


@settings(max_examples=25)
@given(st.text(st.characters()))
def test_any_text_stays_on_one_line(text):
    line = to_json(Warned(text))
    assert "\n" not in line and "\r" not in line
    assert from_json(line.encode("ascii").decode()) == Warned(text)


def test_plain_goes_into_the_depth():
    assert plain({1: (math.nan, [np.float64(2.0)])}) == {"1": [None, [2.0]]}


def test_a_line_of_an_older_run_lacks_what_came_later(one_of_each):
    tree = json.loads(to_json(one_of_each[1]))
    old = {name: value for name, value in tree.items() if "mismatch" not in name}
    back = from_json(json.dumps(old))
    assert math.isnan(back.weak_mismatch) and math.isnan(back.strong_mismatch) and back.rho == one_of_each[1].rho
    started = json.loads(to_json(one_of_each[0]))
    del started["notes"]
    assert from_json(json.dumps(started)).notes == []
    with pytest.raises(RunError, match="rho"):
        from_json(json.dumps({name: value for name, value in old.items() if name != "rho"}))
