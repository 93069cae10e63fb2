"""What a method remembers of a client is in the checkpoint: a stopped run goes on bit for bit."""

import pytest

from cases import others_slow
from peerlora.errors import Stopped
from peerlora.runs.metrics import find_start
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.plan import plan
from peerlora.runtime.simulate import resume, simulate

pytestmark = pytest.mark.usefixtures("no_reports")

METHODS = {
    "fedspeed": ["algorithm.interval=1"],
    "k-gt": ["topology.kind=random", "topology.p=0.5"],
    "d2": ["algorithm.interval=2", "train.local_steps=1"],
    "consensus-admm": ["train.optimizer_state=keep"],
    "cached-dfl": ["topology=path", "algorithm.max_age=2", "algorithm.weights=rows", "algorithm.interval=1"],
}


@pytest.mark.parametrize(("method", "words"), others_slow(METHODS.items(), [1, 4]))
def test_stopped_and_resumed_is_undisturbed(config, tmp_path, method, words):
    chosen = config("bert", f"algorithm.name={method}", "train.rounds=5", "checkpoint.every=2", "eval.every=5", *words)
    whole = simulate(chosen, tmp_path / "whole")
    rounds = iter([False, False, True])
    with pytest.raises(Stopped):
        simulate(chosen, tmp_path / "stopped", stop=lambda: next(rounds, False))
    again = resume(tmp_path / "stopped", expected=lambda stored: chosen)
    assert bool((again.adapters.flat == whole.adapters.flat).all())
    assert again.summary["scores"] == whole.summary["accuracy"]


def test_the_methods_own_defaults_are_in_the_stored_config_and_a_warning_in_the_events(config, tmp_path):
    chosen = config("bert", "algorithm.name=fedspeed", "train.rounds=1")
    assert chosen.train.optimizer == "sgd" and compose(chosen).learner.settings.optimizer == "sgd"
    run = simulate(chosen, tmp_path / "run").run
    assert "optimizer: sgd" in (run / "config.yaml").read_text() and find_start(read_events(run)).warnings == []
    run = simulate(
        config("bert", "algorithm.name=fedspeed", "train.rounds=1", "train.optimizer=adamw"), tmp_path / "two"
    ).run
    (warning,) = find_start(read_events(run)).warnings
    assert "made for train.optimizer=sgd" in warning


@pytest.mark.parametrize("name", ["dsgd", "d2", "consensus-admm", "push-diging"])
def test_methods_of_one_sgd_step_are_warned_of_another_optimiser(config, name):
    words = ["topology.weights=push-sum", "topology.kind=directed-ring"] if name == "push-diging" else []
    words += [f"algorithm.name={name}", "train.local_steps=1"]
    (warning,) = plan(config("bert", *words, "train.optimizer=adamw")).warnings
    assert warning.startswith(f"{name} with train.optimizer=adamw: ")
    assert plan(config("bert", *words)).warnings == ()
