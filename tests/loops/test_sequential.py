"""Simulated clients whose local steps Trainers take, one after another, end as those of our own learner."""

import random

import numpy as np
import pytest
import torch
from loop_rigs import own_settings, peft_model, require_equal, trainer_of
from test_plain_loops import PINNED, TRAIN

from cases import others_slow
from peerlora.config.loading import load_config
from peerlora.errors import CompositionError, ConfigError, RunError
from peerlora.hf import PeerCallback, SequentialLearner
from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.sequential import _Turn
from peerlora.runtime.simulate import resume, simulate

pytestmark = pytest.mark.usefixtures("no_reports")


def sequential(chosen, folder):
    federation = compose(chosen)
    model = peft_model(chosen, federation)

    def make_trainer(client):
        return trainer_of(chosen, federation, client, folder / f"trainer-{client}", model)

    settings = load_config(own_settings(chosen) | {"eval": {"every": 2}})
    return simulate(settings, folder / "sequential", learner=SequentialLearner(make_trainer))


@pytest.mark.parametrize("method", others_slow(PINNED, [1]))
def test_trainers_one_after_another_give_the_simulation_s_adapters(config, tmp_path, method):
    name, *words = method
    chosen = config("bert", f"algorithm.name={name}", *TRAIN, *words)
    whole, found = simulate(chosen, tmp_path / "whole"), sequential(chosen, tmp_path)
    x = found.adapters
    require_equal(whole.adapters, [x.rows([client]) for client in range(chosen.clients)])
    events = read_events(found.run)
    told = select_events(read_events(whole.run), RoundDone)
    for done, expected in zip(select_events(events, RoundDone), told, strict=True):
        assert done.bytes_sent == expected.bytes_sent
    scores = select_events(events, Evaluated)
    assert [each.round for each in scores] == [0, 2, 4] and all(len(each.own) == 3 for each in scores)
    assert "one after another" in " ".join(select_events(events, RunStarted)[0].notes)
    with pytest.raises(RunError, match="loops of your own"):
        resume(found.run)


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
