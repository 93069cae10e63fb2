"""The harness of what a schedule and metrics cost: it times what a run calls, and leaves all as it was."""

import pytest

from peerlora.runtime import selection, trainer
from peerlora.train import client_outcomes, local_training


@pytest.fixture
def harness(no_reports):
    import extras_cost

    return extras_cost


def originals():
    return (
        local_training.rate,
        trainer.rate,
        client_outcomes.margins_of,
        client_outcomes.compute_metric,
        client_outcomes.counts_by_name,
        selection.BestRounds.offer,
    )


def test_every_extra_is_timed_in_a_run_and_functions_are_put_back(harness, config, tmp_path):
    before = originals()
    words = [*harness.EXTRAS, "eval.metrics=[auroc, macro-f1]", "train.rounds=2"]
    found = harness.measure(config("bert", *words), tmp_path / "run")
    assert originals() == before
    extras = found["extras"]
    assert set(extras) == set(harness.TIMED) and found["rounds"] == 2
    assert all(each["calls"] > 0 for each in extras.values())
    assert extras["best rounds"]["calls"] == 3, "before the first round, and after both"
    assert extras["schedule"]["calls"] >= 4, "in the learner and in the event of every round"


def test_a_run_without_an_extra_is_no_figure(harness, config, tmp_path):
    with pytest.raises(SystemExit, match="best rounds: nothing was called"):
        harness.measure(config("bert", "train.schedule=cosine", "eval.metrics=[auroc]"), tmp_path / "run")


def test_seconds_are_those_of_the_threads_own_work(harness, monkeypatch):
    ticks = iter([1.0, 1.5, 4.0, 4.25])
    monkeypatch.setattr(harness.time, "thread_time", lambda: next(ticks))
    watch = harness.Stopwatch()
    double = watch.timed(lambda x: 2 * x)
    assert (double(2), double(x=3)) == (4, 6) and (watch.seconds, watch.calls) == (0.75, 2)
