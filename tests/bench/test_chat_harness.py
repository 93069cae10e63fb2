"""The chat harness compares equal work, and its page says what was reached."""

import pytest

import chat
import performance_page
from peerlora.train.base import LocalPlan


@pytest.fixture
def tiny(models, monkeypatch):
    monkeypatch.setattr(chat, "TOKENS", 26)
    return chat.federation(models("llama"), 3, (4, 40))


def test_both_ways_do_the_same_rounds(tiny):
    found = chat.measure_rate(tiny, repetitions=2)
    assert found["difference"] < chat.TOLERANCE["fp32"]
    assert min(found["tokens_per_second"].values()) > 0
    assert found["cpu"]["least"] <= found["cpu"]["median"] <= found["cpu"]["most"]


def test_unequal_work_is_refused(tiny, monkeypatch):
    fit = tiny.learner.fit
    monkeypatch.setattr(tiny.learner, "fit", lambda x, plan: fit(x, LocalPlan("B")))
    with pytest.raises(SystemExit, match="of their way from the plain loop"):
        chat.measure_rate(tiny, repetitions=1)


def test_the_page_says_what_was_reached():
    rate = {
        "clients": 4,
        "batch": 2,
        "threads": 1,
        "dtype": "fp32",
        "tokens_per_second": {"ours": 900.0, "plain": 300.0},
        "target": 2.0,
    }
    rate |= {"cpu": {"median": 3.0, "least": 2.9, "most": 3.1}, "wall": {"median": 3.0, "least": 2.9, "most": 3.1}}
    memory = {"clients": 8, "bytes": {"ours": 3_000_000_000, "plain": 2_000_000_000}, "ratio": 1.5, "target": 1.3}
    text = performance_page.chat_models(
        {
            "model": "a-model",
            "machine": {"processor": "a processor"},
            "rates": [rate, rate | {"batch": 8}],
            "memory": memory,
        }
    )
    assert text.count("**3.00** times as fast") == 2 and "With 8 rows a step 900 tokens a second" in text
    assert "at least 2.0 reached" in text
    assert "**1.50** times" in text and "at most 1.3 not reached" in text
    assert "make bench-chat" in performance_page.chat_models({})
