"""Simulated clients whose local steps Trainers take, one after another, end as those of our own learner."""

import itertools
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loop_rigs import own_settings, peft_model, require_equal, trainer_of
from test_plain_loops import PINNED, TRAIN
from transformers import TrainerCallback

from cases import others_slow
from peerlora.config.loading import load_config
from peerlora.errors import CompositionError, ConfigError, DivergenceError, RunError
from peerlora.hf import PeerCallback, SequentialLearner
from peerlora.runs.events import Evaluated, RoundDone, RunStarted, Warned
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.sequential import _Turn
from peerlora.runtime.simulate import resume, simulate
from peerlora.train import loop_learner

pytestmark = pytest.mark.usefixtures("no_reports")


def sequential(chosen, folder, adjust=lambda trainer, client: None, report=True):
    federation = compose(chosen)
    model = peft_model(chosen, federation)

    def make_trainer(client):
        trainer = trainer_of(chosen, federation, client, folder / f"trainer-{client}", model)
        adjust(trainer, client)
        return trainer

    settings = load_config(own_settings(chosen) | {"eval": {"every": 2}})
    return simulate(settings, folder / "sequential", learner=SequentialLearner(make_trainer), report=report)


@pytest.mark.parametrize("method", others_slow(PINNED, [1]))
def test_trainers_one_after_another_give_the_simulation_s_adapters(config, tmp_path, monkeypatch, method):
    ticks = itertools.count()
    monkeypatch.setattr(loop_learner, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    name, *words = method
    chosen = config("bert", f"algorithm.name={name}", *TRAIN, *words)
    whole, found = simulate(chosen, tmp_path / "whole"), sequential(chosen, tmp_path)
    x = found.adapters
    require_equal(whole.adapters, [x.rows([client]) for client in range(chosen.clients)])
    events = read_events(found.run)
    told = select_events(read_events(whole.run), RoundDone)
    for done, expected in zip(select_events(events, RoundDone), told, strict=True):
        assert done.bytes_sent == expected.bytes_sent
        assert done.measures["loop_seconds"] == 1.0  # of this clock, which moves when it is looked at
    scores = select_events(events, Evaluated)
    assert [each.round for each in scores] == [0, 2, 4] and all(len(each.own) == 3 for each in scores)
    assert "one after another" in " ".join(select_events(events, RunStarted)[0].notes)
    with pytest.raises(RunError, match="loops of your own"):
        resume(found.run)


def without_rows(trainer, client):
    trainer.eval_dataset = None


def without_losses(trainer, client):
    trainer.evaluate = lambda: {"eval_accuracy": 0.5}


@pytest.mark.parametrize("adjust", [without_rows, without_losses])
def test_losses_that_no_evaluation_tells_do_not_end_a_run(config, tmp_path, adjust):
    chosen = config("bert", "algorithm.name=dec-lora", *TRAIN)
    whole, found = simulate(chosen, tmp_path / "whole"), sequential(chosen, tmp_path, adjust)
    require_equal(whole.adapters, [found.adapters.rows([client]) for client in range(chosen.clients)])
    last = select_events(read_events(found.run), Evaluated)[-1]
    assert last.final and np.isnan(last.own_loss).all()
    assert (found.run / "summary.json").is_file() and (found.run / "adapters" / "all.safetensors").is_file()


def test_a_loss_that_an_evaluation_tells_and_is_not_finite_is_divergence(config, tmp_path):
    def diverges(trainer, client):
        trainer.evaluate = lambda: {"eval_loss": float("nan") if client == 1 else 0.5}

    with pytest.raises(DivergenceError, match="loss is not finite after 4 rounds"):
        sequential(config("bert", "algorithm.name=dec-lora", *TRAIN), tmp_path, diverges)


class Stops(TrainerCallback):
    """Ends a Trainer within its third round."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


def test_a_trainer_that_ends_early_ends_the_run_with_the_rounds_that_all_have_done(config, tmp_path):
    def ends(trainer, client):
        if client == 1:
            trainer.add_callback(Stops())

    chosen = config("bert", "algorithm.name=dec-lora", *TRAIN)
    shorter = config("bert", "algorithm.name=dec-lora", *TRAIN, "train.rounds=2")
    whole, found = simulate(shorter, tmp_path / "whole"), sequential(chosen, tmp_path, ends)
    require_equal(whole.adapters, [found.adapters.rows([client]) for client in range(chosen.clients)])
    events = read_events(found.run)
    told = " ".join(each.message for each in select_events(events, Warned))
    assert "ended after 2 of 4 rounds" in told and "its last 1 steps" in told
    last = select_events(events, Evaluated)[-1]
    assert last.final and last.round == 2
    assert np.isnan(last.own_loss[1]) and np.isfinite([last.own_loss[0], last.own_loss[2]]).all()
    assert found.summary["rounds"] == 2 and (found.run / "adapters" / "all.safetensors").is_file()


BLOCKED = """
import sys
for name in ("grpc", "msgspec", "cryptography"):
    sys.modules[name] = None
import peerlora
from peerlora.errors import ExtraMissing
from peerlora.hf import PeerCallback, SequentialLearner
for begin in (
    lambda: PeerCallback({}, "identity", "members.json"),
    lambda: peerlora.join(None, None, {}, identity="identity", members="members.json"),
):
    try:
        begin()
    except ExtraMissing as error:
        print(error)
"""


@pytest.mark.slow
def test_without_the_extra_peer_only_peers_are_missing():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("needs grpc, cryptography, msgspec, not installed; run `pip install '.[peer]'`") == 2


REFUSED = [
    ({"clock": {"speed": 1.0}}, ConfigError, "clock"),
    ({"adversary": {"attack": "sign-flip", "clients": [0]}}, ConfigError, "adversary"),
    ({"train": {"lr": 0.1}}, ConfigError, "train.lr=0.1 given"),
    ({"algorithm": {"name": "salf"}}, CompositionError, "salf cannot leave its local steps"),
    ({"algorithm": {"name": "sgp"}, "topology": "one-peer", "exchange": {"robust": "median"}}, CompositionError, "sgp"),
]


@pytest.mark.parametrize(("settings", "error", "reason"), REFUSED)
def test_settings_are_checked_before_any_trainer_is_made(tmp_path, settings, error, reason):
    chosen = load_config({"clients": 4} | settings)
    with pytest.raises(error, match=reason):
        simulate(chosen, tmp_path / "run", learner=SequentialLearner(lambda client: pytest.fail("a Trainer was made")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("settings", "error", "reason"), REFUSED[:4])
def test_a_callback_checks_its_settings_before_there_is_a_trainer(settings, error, reason):
    with pytest.raises(error, match=reason):
        PeerCallback({"clients": 4} | settings)


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_loop_finds_its_draws_again_and_leaves_those_outside_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draws() for _ in range(4)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    turn, found, outside = _Turn(), [], []
    for _ in range(4):
        turn.begin()
        found.append(draws())
        turn.end()
        outside.append(draws())
    assert found == expected and outside == expected, "both went on from one state, each undisturbed by the other"


def test_the_generators_of_gpus_have_turns_as_well(monkeypatch):
    state = [torch.zeros(2, dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [each.clone() for each in state])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: state.__setitem__(slice(None), states))
    turn = _Turn()
    turn.begin()
    state[0] += 1  # the loop draws
    turn.end()
    assert state[0].tolist() == [0, 0]
    turn.begin()
    assert state[0].tolist() == [1, 1]


def test_relayed_models_are_evaluated_by_trainers(config, tmp_path):
    chosen = config("bert", "algorithm.name=dec-lora", *TRAIN, "exchange.relay={}", "topology=path")
    whole, found = simulate(chosen, tmp_path / "whole"), sequential(chosen, tmp_path)
    require_equal(whole.relayed, [found.relayed.rows([client]) for client in range(chosen.clients)])
    for score in select_events(read_events(found.run), Evaluated):
        assert np.isfinite(score.relayed).all() and len(score.relayed) == 3
