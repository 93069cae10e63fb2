"""A budget in epochs: the rounds that follow from it, in the run, its folder and when it is resumed."""

import pytest
import torch

from peerlora.config.loading import load_config
from peerlora.errors import CompositionError, ConfigError, RunError, Stopped
from peerlora.runs.events import RoundDone, RunStarted
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.epochs import rounds_of
from peerlora.runtime.simulate import resume, simulate


@pytest.fixture
def in_epochs(config):
    """A function that gives the tiny config a budget in epochs."""

    def build(epochs, *words):
        tree = config("bert", *words).model_dump(mode="json")
        del tree["train"]["rounds"]
        return load_config(tree, [f"train.epochs={epochs}"])

    return build


@pytest.mark.parametrize(
    ("words", "rows", "rounds"),
    [
        (["1", "train.local_steps=2", "train.batch=3"], 48, 2),  # 4 clients take 24 rows a round
        (["1", "train.local_steps=2", "train.batch=3"], 49, 3),
        (["2.5", "train.local_steps=1", "train.batch=[1, 2, 3, 4]"], 40, 10),
        (["1", "train.local_steps=1", "train.batch=1", "train.accumulate=5"], 40, 2),
        (["1", "train.local_steps=1", "train.batch=1", "train.quiet=0.25"], 12, 4),  # 3 of them train
        (["1", "train.local_steps=1", "train.batch=1", "train.quiet=0.3"], 12, 4),
        (["0.001"], 10, 1),
    ],
)
def test_rounds_are_the_fewest_that_reach_the_epochs(in_epochs, words, rows, rounds):
    assert rounds_of(in_epochs(*words), rows) == rounds


def test_a_run_of_epochs_is_the_run_of_its_rounds(config, in_epochs, tmp_path):
    words = ["train.local_steps=2", "train.batch=3", "algorithm.name=adf-lora", "algorithm.interval=1"]
    found = simulate(in_epochs(1, *words), tmp_path / "epochs")
    events = read_events(found.run)
    (started,), rounds = select_events(events, RunStarted), select_events(events, RoundDone)
    assert started.notes[0] == f"train.epochs=1 of 54 training rows: train.rounds={len(rounds)}"
    assert len(rounds) == started.rounds == 3
    stored = load_config(found.run / "config.yaml").train
    assert (stored.rounds, stored.epochs) == (3, None)
    other = simulate(config("bert", "train.rounds=3", *words), tmp_path / "rounds")
    assert torch.equal(found.adapters.flat, other.adapters.flat)


def test_a_warm_up_longer_than_the_rounds_of_the_epochs_is_refused(in_epochs):
    told = "train.epochs=1 of 54 training rows: train.warmup=4 rounds are more than the 3 in which clients train"
    with pytest.raises(CompositionError, match=told):
        compose(in_epochs(1, "train.local_steps=2", "train.batch=3", "train.rounds=9", "train.warmup=4"))
    assert compose(in_epochs(1, "train.local_steps=2", "train.batch=3", "train.warmup=3")).config.train.warmup == 3


def test_a_stopped_run_goes_on_with_the_same_epochs_and_no_others(in_epochs, tmp_path):
    words = ["train.local_steps=2", "train.batch=3", "algorithm.name=dec-lora"]
    chosen = in_epochs(1, *words)
    with pytest.raises(Stopped):
        simulate(chosen, tmp_path / "part", stop=lambda: True)
    with pytest.raises(RunError, match="train.epochs: None then, 2.0 now"):
        resume(tmp_path / "part", expected=lambda stored: in_epochs(2, *words))
    again = resume(tmp_path / "part", expected=lambda stored: chosen)
    whole = simulate(chosen, tmp_path / "whole")
    assert torch.equal(again.adapters.flat, whole.adapters.flat)


def test_both_budgets_are_refused(config):
    with pytest.raises(ConfigError, match="rounds=3 and epochs=2 given, and each is the whole budget; drop one"):
        config("bert", "train.rounds=3", "train.epochs=2")


def test_peers_and_grids_need_rounds(in_epochs):
    from peerlora.experiments.trial_checks import _refusal
    from peerlora.runtime.peer.checks import plan_peer
    from peerlora.runtime.peer.site import Site

    chosen = in_epochs(2)
    with pytest.raises(CompositionError, match="all sites count the same rounds"):
        plan_peer(chosen, Site(0, {client: f"site{client}" for client in range(4)}, "run"))
    assert "compared by their rounds" in str(_refusal(chosen, None, {}, None))


def test_rows_that_clients_are_scored_on_are_no_training_rows(config, in_epochs, tmp_path):
    """With a third of 54 rows set aside, a round's 24 rows are an epoch in 2 rounds, not in 3."""
    words = ["train.local_steps=2", "train.batch=3", "eval.own=true", "data.holdout=0.34", f"data.eval={_rows(config)}"]
    found = simulate(in_epochs(1, *words), tmp_path / "run")
    (started,) = select_events(read_events(found.run), RunStarted)
    held = sum(len(rows) for rows in compose(config("bert", *words)).own_rows)
    assert held > 12
    assert started.notes[0] == f"train.epochs=1 of {60 - held} training rows: train.rounds={started.rounds}"
    assert started.rounds == rounds_of(in_epochs(1, *words), 60 - held) < rounds_of(in_epochs(1, *words), 60)


def _rows(config):
    """The training rows of the tests, which are named for evaluation so that all of them can be trained on."""
    return config("bert").data.train


def test_a_partitioner_divides_rows_once(in_epochs):
    """It takes a data set once only."""
    partitioners = pytest.importorskip("flwr_datasets.partitioner")
    made = compose(in_epochs(1, "eval.own=true"), partitioner=partitioners.IidPartitioner(num_partitions=4))
    held = sum(map(len, made.own_rows))
    assert made.notes[0].startswith(f"train.epochs=1 of {54 - held} training rows")
