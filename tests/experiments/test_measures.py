"""The work of a run: rows and gradients of what was really trained, from its events."""

from dataclasses import replace

import pytest

from peerlora.config.loading import load_config
from peerlora.experiments.measures import count_work, measure_run
from peerlora.runs.events import RoundDone
from peerlora.runs.store import read_events
from peerlora.runtime.simulate import simulate

NAN = float("nan")


def rounds(*losses, absent=()):
    blank = RoundDone(0, [], 0, 0, 0, 0, 0, 0, [], 0, 0, 0, 0, 0, 0, absent=list(absent))
    return [replace(blank, round=t, loss=list(loss)) for t, loss in enumerate(losses)]


def work(done, *words):
    tree = {"clients": 4, "topology": "ring", "train": {"local_steps": 3, "batch": 8}}
    found = count_work(done, load_config(tree, words))
    return found["training rows"], found["gradients"]


def test_row_gradients_are_rows_as_often_as_a_step_takes_their_gradient():
    """Ten clients whose steps take 8 rows do the work of one whose steps take 80, accumulated or not."""
    apart = {"clients": 10, "topology": "complete", "train": {"local_steps": 3, "batch": 8}}
    together = {"clients": 1, "topology": "complete", "train": {"local_steps": 3, "batch": 80}}

    def row_gradients(tree, *words):
        done = rounds(*[[1] * tree["clients"]] * 2)
        return count_work(done, load_config(tree, words))["row gradients"]

    assert row_gradients(apart) == row_gradients(together) == 2 * 3 * 80
    assert row_gradients(apart, "algorithm.name=dfedsam") == 2 * row_gradients(together)
    assert row_gradients(together, "train.batch=20", "train.accumulate=4") == 2 * 3 * 80


def test_a_client_trained_in_the_rounds_where_it_has_a_loss():
    assert work(rounds([1, 1, 1, 1], [1, 1, 1, 1])) == (2 * 4 * 3 * 8, 2 * 4 * 3)
    assert work(rounds([1, NAN, 1, 1], [NAN] * 4)) == (3 * 3 * 8, 3 * 3)  # a late client; a round of mixing alone
    assert work(rounds([1, NAN, 1, NAN]), "train.batch=[1,2,4,8]") == (3 * (1 + 4), 2 * 3)


def test_gradients_count_those_of_a_step():
    for name, count in (("dec-lora", 1), ("dfedsam", 2), ("fedspeed", 2)):
        assert work(rounds([1, 1, 1, 1]), f"algorithm.name={name}") == (4 * 3 * 8, count * 4 * 3)


def test_attackers_have_no_loss_and_train_all_the_same():
    attack = ["adversary.attack=sign-flip", "adversary.clients=[1,3]"]
    assert work(rounds([1, NAN, 1, NAN]), *attack) == (4 * 3 * 8, 4 * 3)
    assert work(rounds([1, NAN, 1, NAN], absent=[3]), *attack) == (3 * 3 * 8, 3 * 3)
    assert work(rounds([NAN] * 4), *attack) == (0, 0)


def test_without_common_rounds_as_many_train_as_there_are_clients():
    """The fast one trained four times here, and has one loss, their mean."""
    assert work(rounds([1, NAN, NAN, NAN]), "algorithm.name=ad-psgd", "train.batch=[1,2,4,9]") == (3 * 16, 4 * 3)


@pytest.mark.parametrize(
    ("words", "trained"),
    [
        (["algorithm.name=dec-lora"], 5 * 4),
        (["algorithm.name=rac-lora", "algorithm.chain=1", "algorithm.settle=1"], 3 * 4),
        (["clock.speed=[1,1,1,0.4]", "clock.deadline=2.1"], 5 * 3 + 1),  # the slow one is in the third
        (["algorithm.name=ad-psgd", "clock.speed=[1,1,1,0.4]"], 5 * 4),
    ],
)
def test_the_work_of_real_runs(words, trained, config, tmp_path):
    own = config("bert", "train.rounds=5", "topology=ring", *words)
    events = read_events(simulate(own, tmp_path / "run", report=False).run)
    found = measure_run(events, own)
    assert found["training rows"] == trained * own.train.local_steps * own.batches[0]
    assert found["gradients"] == trained * own.train.local_steps
    assert found["training rows"] == found["row gradients"]
    assert "training rows" not in measure_run(events)
