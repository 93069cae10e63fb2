"""The speed harness compares equal work, and its page says what was reached and what was not measured."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from peerlora.runs.events import to_json
from peerlora.runs.live.state import LiveRun

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/, which is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.mark.slow
def test_every_way_does_the_same_rounds(bench, models):
    speed = bench("speed")
    shape = speed.Shape(clients=4, batch=3, tokens=16)
    found = speed.compete(shape, models("bert"), (4, 40))
    assert set(found["ours"]) < set(found["differences"])  # and the second naive loop
    naive = found["naive"]
    for runner in naive.values():
        runner.round(1)
    for name, variant in speed.VARIANTS.items():
        ours = found["ours"][name]
        before = ours.x.flat
        ours.round(1)
        assert float((ours.x.flat - before).abs().max()) > 1e-3, "nothing was trained"
        if variant.exact:
            assert all(loop.largest_difference(ours.x) < 1e-4 for loop in naive.values())


def test_unequal_work_is_refused(bench, models, monkeypatch):
    speed = bench("speed")
    longer = speed.Variant(("train.lr=0.002",), "fp32")
    monkeypatch.setattr(speed, "VARIANTS", {"other rate": longer})
    with pytest.raises(SystemExit, match="other rate: adapters differ"):
        speed.compete(speed.Shape(clients=3, batch=2, tokens=16), models("bert"), (4, 40))


def test_both_evaluate_alike(bench, models):
    speed, naive = bench("speed"), bench("naive")
    shape = speed.Shape(clients=3, batch=2, tokens=16)
    parts = speed.federation(shape, (), models("bert"), (4, 40))
    start = speed.scattered(parts.start)
    scores = parts.learner.evaluate(start, parts.eval_data, 64)
    for tokens in (16, None):
        plain = naive.NaiveLoop(parts, start, tokens).evaluate(parts.eval_data, 64)
        assert torch.allclose(torch.tensor(plain[:, 1]), torch.tensor(scores.loss), atol=1e-5)
        assert abs(plain[:, 0] - scores.metric).max() <= 1 / 500


def test_import_times_are_summed_by_package(bench):
    log = "import time: self [us] | cumulative | imported package\n"
    log += "import time:      1500 |       2000 |   torch.nn\nimport time:       500 |        500 | torch\n"
    assert bench("speed").import_seconds(log) == {"torch": 0.002}


SPREAD = {"median": 2.0, "least": 1.9, "most": 2.2}


def shape_row(variant, target, median):
    ratios = {clock: SPREAD | {"median": median} for clock in ("cpu", "wall")}
    rates = {"samples_per_second": 90.0, "flops_per_second": 8e10, "peak": "fp32", "share_of_peak": 0.8}
    return {"variant": variant, **ratios, "to_longest": ratios, **rates, "target": target, "difference": 1e-6}


def shapes(threads):
    rows = [shape_row("fp32", 3.2, 1.7), shape_row("bf16", 5.1, 6.0)]
    shape = {"clients": 10, "batch": 8, "tokens": 32, "steps": 2}
    peaks = {"fp32": 1e11, "packed fp32": 1.2e11, "bf16": 2.1e11}
    return {"name": "N10 b8 s32", "shape": shape, "threads": threads, "peaks": peaks, "rows": rows}


SPEED = {
    "machine": {"processor": "some processor", "cores": 2, "flags": ["avx2"]},
    "versions": {"python": "3.11"},
    "parts": {
        "shapes": {
            "load_before": 0.1,
            "repetitions": 5,
            "rows": [shapes(1), shapes(2)],
            "target_peaks": {"packed fp32": 2.35, "bf16": 4.6},
            "tolerance": 1e-4,
            "setup": {
                "adapter": {"rank": 8, "alpha": 16, "targets": ["query", "value"], "head": "frozen"},
                "train": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01},
            },
        },
        "startup": {
            "repetitions": 5,
            "seconds": {"loaded": 5.0, "first step": 5.5},
            "imports": {"torch": 1.0},
            "all_imports": 4.0,
            "target": 6.0,
        },
        "round": {
            "threads": 2,
            "shape": {"clients": 100, "batch": 8, "tokens": 32, "steps": 10},
            "seconds": {"train": 98.0, "mix": 1.0, "bookkeeping": 1.0},
            "target": 0.01,
        },
    },
}


def runner(name, seconds):
    numbers = {"startup_seconds": 1.0, "round_seconds": seconds, "wall_seconds": seconds, "cpu_seconds": None}
    facts = {"peak_bytes": 10**9, "bytes": 10**6, "accuracy_mean": 0.9, "accuracy_worst": None, "note": "a | b"}
    return {"runner": name, "graph": "ring", "job": "short"} | numbers | facts


PEERS = {
    "command": "some command",
    "job": {"short": {"rounds": 3}},
    "rows": [runner("peerlora", 2.0), runner("other", 25.0)],
    "unavailable": [{"runner": "third", "reason": "does not\ninstall"}],
}


EXTRAS = {
    "run": 20.0,
    "rounds": 2,
    "extras": {"schedule": {"seconds": 0.02, "calls": 9}, "metrics": {"seconds": 0.08, "calls": 30}},
    "shape": {"clients": 3, "local_steps": 1, "batch": 2, "rows": 4},
    "metrics": 6,
    "target": 0.01,
}


def test_page_tells_what_was_reached(bench, tmp_path):
    (tmp_path / "speed.json").write_text(json.dumps(SPEED))
    (tmp_path / "peers.json").write_text(json.dumps(PEERS))
    (tmp_path / "extras.json").write_text(json.dumps(EXTRAS))
    text = bench("performance_page").page(tmp_path)
    assert "N10 b8 s32, fp32: target not reached, 1.70 of 3.20" in text
    assert "N10 b8 s32, bf16: target reached, 6.00 of 5.10" in text
    assert "| packed fp32 | 2.35 | 1.20 |" in text
    assert "5.5 seconds" in text and "at most 6: target reached" in text
    assert "take 2.00% of the round; the aim is at most 1%: target not reached" in text
    assert "| other | ring | 1.0 | 25.0 | 25.0 |  | 1.00 GB | 1.00 MB | 0.900 |  | 12.5 | 12.5 | a / b |" in text
    assert "| third | does not install |" in text
    assert "of processor time in all, of which schedule, metrics and best rounds take 0.50%; the aim" in text
    assert "| metrics | 30 | 80.0 | 0.400% |" in text and "at most 1%: target reached" in text
    assert text.count("Not measured on this machine") == 5  # evaluation, chat models, many clients, live page, GPU


def test_page_tells_how_fast_the_live_page_is(bench, tmp_path):
    numbers = {name: {"median": 40.0, "most": 250.0} for name in ("first_paint", "curves", "update", "delay")}
    numbers["first_paint"]["median"] = 1200.0
    settings = {"clients": 1000, "rounds": 500, "updates": 20, "repeats": 3}
    targets, machine = {"first_paint": 1000.0, "update": 100.0}, {"cores": 2, "load": 3.5}
    found = {**settings, "targets": targets, "machine": machine, "milliseconds": numbers}
    (tmp_path / "live_page.json").write_text(json.dumps(found))
    cost = {"page": {"run": 50.0, "once": 2.0, "rounds": 0.25}}
    (tmp_path / "watching_cost.json").write_text(json.dumps(cost))
    text = bench("performance_page").page(tmp_path)
    assert "1,000 clients and 500 rounds" in text and "beside other work (load 3.5)" in text
    assert "| first paint | 1200 | 250 | 1000, not reached |" in text
    assert "| an update after a round, on the page's thread | 40 | 250 | 100, reached |" in text
    assert "| page | 2.0 | 0.25 | 0.50% |  |" in text


def test_the_log_of_the_live_page_s_harness_is_one_that_the_page_takes(bench):
    found = bench("live_page").events(70, 4)
    live = LiveRun()
    for event in found:
        live.add(json.loads(to_json(event)), ())
    assert len(live.rounds) == 4 and live.loss.entry(4, False)["mean"] > 0
    assert not [each for each in live.notices if each["level"] == "warning"]


def test_page_without_results_says_how_to_get_them(bench, tmp_path):
    text = bench("performance_page").page(tmp_path)
    assert text.count("run `make bench`") == 6
    assert "run `make bench-peers`" in text and "run `make bench-gpu`" in text
