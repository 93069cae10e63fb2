"""Gradients accumulated over minibatches are those of one batch of all their rows."""

import pytest
import torch
from test_learner import CAUSAL, OPTIMIZERS, SCHEDULE, noisy, run

from cases import others_slow
from peerlora.errors import ConfigError, Stopped
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import resume, simulate
from peerlora.train.base import LocalPlan
from peerlora.train.tasks import TokenLosses

MOST = 1e-10  # of fp64: sums of the same numbers in another order


def trained(chosen, schedule=SCHEDULE):
    federation = compose(chosen)
    return run(federation.learner, noisy(federation.start), schedule).flat


@pytest.mark.parametrize("kept", others_slow(["keep", "phase", "round"], [0, 1]))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_minibatches_are_one_of_twice_the_rows_whatever_alternates(config, optimizer, kept):
    words = [*OPTIMIZERS[optimizer], f"train.optimizer_state={kept}"]
    halves = trained(config("bert", "train.accumulate=2", "train.batch=2", *words))
    whole = trained(config("bert", "train.batch=4", *words))
    assert (halves - whole).abs().max() < MOST
    assert (halves - trained(config("bert", "train.batch=2", *words))).abs().max() > 1e-4


@pytest.mark.parametrize("words", [["train.clip=0.01"], ["train.batches=by-length", "train.local_steps=1"]])
def test_they_are_clipped_as_one_gradient_and_sorted_as_one_round(config, words):
    halves = trained(config("bert", "train.accumulate=2", "train.batch=2", *words))
    assert (halves - trained(config("bert", "train.batch=4", *words))).abs().max() < MOST


def test_clients_with_batches_of_their_own_accumulate_them(config):
    halves = trained(config("bert", "train.accumulate=3", "train.batch=[1, 2, 3, 1]"))
    assert (halves - trained(config("bert", "train.batch=[3, 6, 9, 3]"))).abs().max() < MOST


def test_of_a_language_model_every_token_counts_the_same(config, monkeypatch):
    """Minibatches have different numbers of tokens, so the mean of their mean losses is another number."""
    words = ("llama", *CAUSAL, *OPTIMIZERS["sgd"])
    whole, parts = config(*words, "train.batch=4"), config(*words, "train.accumulate=4", "train.batch=1")
    assert (trained(parts) - trained(whole)).abs().max() < 1e-6  # rotary tables are fp32
    monkeypatch.delattr(TokenLosses, "loss_terms")
    assert (trained(parts) - trained(whole)).abs().max() > 1e-4


class Twice:
    """Asks for the gradient of each step twice."""

    def __init__(self):
        self.gaps = []

    def gradient(self, step):
        first, again = step.gradient(), step.gradient()
        self.gaps += [float((first[block] - again[block]).abs().max()) for block in first]
        return again


def test_a_rule_that_looks_twice_sees_the_same_dropout_in_every_minibatch(config):
    federation = compose(config("bert", "train.accumulate=3", "train.batch=2", "adapter.dropout=0.3"))
    rule = Twice()
    run(federation.learner, noisy(federation.start), [LocalPlan("AB", rule)])
    assert rule.gaps and max(rule.gaps) == 0.0


def test_a_stopped_run_goes_on_to_the_bit(config, tmp_path, no_reports):
    chosen = config(
        *("bert", "algorithm.name=adf-lora", "algorithm.interval=1", "train.accumulate=2", "train.rounds=5"),
        *("train.optimizer_state=keep", "adapter.dropout=0.1", "train.schedule=linear"),
    )
    whole, stopping = simulate(chosen, tmp_path / "whole"), iter([False, True])
    with pytest.raises(Stopped):
        simulate(chosen, tmp_path / "part", stop=lambda: next(stopping, False))
    assert torch.equal(resume(tmp_path / "part").adapters.flat, whole.adapters.flat)


@pytest.mark.parametrize("given", ["0", "1.5", "many"])
def test_it_is_a_number_of_minibatches(config, given):
    with pytest.raises(ConfigError, match="train.accumulate: "):
        config("bert", f"train.accumulate={given}")
