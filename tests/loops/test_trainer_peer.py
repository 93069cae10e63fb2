"""A transformers.Trainer with PeerCallback: its steps, logs, checkpoints and errors."""

import json

import pytest
import torch
from in_memory import network
from loop_rigs import TOLERANCE, memory_run, own_settings, peft_model, read, trainer_of
from transformers import Trainer, TrainerCallback

from cases import others_slow
from peerlora.errors import ConfigError, ModelError, RunError
from peerlora.hf import PeerCallback
from peerlora.runs.events import CheckpointSaved, Evaluated, Resumed, RoundDone, RunStarted, Warned
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose

pytestmark = pytest.mark.usefixtures("no_reports")
TRAIN = ["train.dtype=fp64", "train.rounds=4", "train.lr=0.001", "clients=1", "topology.kind=complete", "peer.join=1"]


class Alone(PeerCallback):
    """Takes part over the memory transport, without others."""

    def __init__(self, config, net, thread, **options):
        super().__init__(config, **options)
        self.net, self.thread = net, thread

    def connect(self, out):
        return memory_run(self.net, self.thread, 0, 1, out, resume=(out / "run.json").is_file())


def trained(chosen, folder, resume=None, kind=None, words=None, more=(), **settings):
    federation = compose(chosen)
    model = peft_model(chosen, federation)
    with network(1) as (net, thread):
        callback = Alone(own_settings(chosen) | (words or {}), net, thread)
        trainer = trainer_of(chosen, federation, 0, folder / "trainer", model, [callback, *more], kind, **settings)
        try:
            trainer.train(resume_from_checkpoint=resume)
        finally:
            callback.leave()
    return callback, model, trainer


@pytest.fixture
def chosen(config):
    return lambda *words: config("bert", "algorithm.name=adf-lora", "algorithm.interval=1", *TRAIN, *words)


def test_a_round_is_so_many_optimiser_steps_however_many_batches_they_take(chosen, tmp_path):
    settings = {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 4, "max_grad_norm": 1.0}
    settings |= {"lr_scheduler_type": "linear", "metric_for_best_model": "loss"}
    callback, model, trainer = trained(chosen(), tmp_path, **settings)
    assert trainer.state.global_step == 8
    events = read_events(callback.result.run)
    rounds = select_events(events, RoundDone)
    assert [done.round for done in rounds] == [0, 1, 2, 3]
    assert all(done.loss[0] > 0 for done in rounds), "the Trainer's logs"
    assert {"grad_norm", "learning_rate"} <= rounds[1].measures.keys()
    scores = select_events(events, Evaluated)
    assert [(each.round, each.final) for each in scores] == [(2, False), (4, True)]
    assert scores[-1].own_loss[0] == pytest.approx(trainer.state.log_history[-2]["eval_loss"])
    assert scores[0].rows == 54
    assert torch.equal(read(model), callback.result.adapters.flat[0]), (
        "the Trainer's model ends with the mixed adapters"
    )
    assert all(value.requires_grad for name, value in model.named_parameters() if "lora_" in name)
    assert "the user's own" in " ".join(select_events(events, RunStarted)[0].notes)


class Killed(Exception):
    pass


class KilledTrainer(Trainer):
    def training_step(self, *words, **options):
        if self.state.global_step == 6:
            raise Killed
        return super().training_step(*words, **options)


@pytest.mark.parametrize("checkpoint", others_slow([3, 6], [0]))
def test_a_trainer_that_goes_on_from_its_checkpoint_ends_as_one_that_was_not_stopped(chosen, tmp_path, checkpoint):
    keep, saves = chosen("train.optimizer_state=keep"), {"save_strategy": "steps", "save_steps": 3}
    whole, _, _ = trained(keep, tmp_path / "whole")
    with pytest.raises(Killed):
        trained(keep, tmp_path / "killed", kind=KilledTrainer, **saves)
    trainer = tmp_path / "killed" / "trainer"
    run = trainer / "peer"
    saved = [each.round for each in select_events(read_events(run), CheckpointSaved)]
    assert saved == [1, 3], "the Trainer saves at step 3, within the second round, and at step 6, the end of the third"
    found, _, _ = trained(keep, tmp_path / "killed", str(trainer / f"checkpoint-{checkpoint}"), **saves)
    events = read_events(run)
    assert [each.round for each in select_events(events, Resumed)] == [checkpoint // 2]
    assert torch.allclose(found.result.adapters.flat, whole.result.adapters.flat, rtol=0, atol=TOLERANCE)
    assert not [each for each in select_events(events, Warned) if "goes on from its step" in each.message]


class SavesAt(TrainerCallback):
    """Asks for a checkpoint at one step, which nobody can foresee, as the end of an epoch or a best score does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == self.step


def test_the_checkpoint_that_goes_with_the_trainers_stays_however_many_follow(chosen, tmp_path):
    keep, saves = chosen("train.optimizer_state=keep"), {"save_strategy": "epoch", "more": [SavesAt(3)]}
    whole, _, _ = trained(keep, tmp_path / "whole")
    with pytest.raises(Killed):
        trained(keep, tmp_path / "killed", kind=KilledTrainer, **saves)
    trainer = tmp_path / "killed" / "trainer"
    there = sorted(path.stem for path in (trainer / "peer" / "checkpoints").glob("*.json"))
    assert [path.name for path in trainer.glob("checkpoint-*")] == ["checkpoint-3"]
    assert there == ["round-000001", "round-000002", "round-000003"]
    found, _, _ = trained(keep, tmp_path / "killed", str(trainer / "checkpoint-3"), **saves)
    events = read_events(found.result.run)
    assert [each.round for each in select_events(events, Resumed)] == [1]
    assert torch.allclose(found.result.adapters.flat, whole.result.adapters.flat, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("method", others_slow(["k-gt", "dfedadmm"], ["k-gt"]))
def test_what_a_method_gathers_within_a_round_is_told_where_it_is_lost(chosen, tmp_path, method):
    sgd, saves = chosen(f"algorithm={{name: {method}}}"), {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(Killed):
        trained(sgd, tmp_path, kind=KilledTrainer, optim="sgd", **saves)
    found, _, _ = trained(sgd, tmp_path, str(tmp_path / "trainer" / "checkpoint-3"), optim="sgd", **saves)
    told = [each.message for each in select_events(read_events(found.result.run), Warned)]
    assert any("goes on 1 steps into a round of 2" in each for each in told) == (method == "k-gt")


@pytest.mark.slow
def test_checkpoints_that_do_not_fit_are_told(chosen, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 6}
    with pytest.raises(Killed):
        trained(chosen(), tmp_path, kind=KilledTrainer, **saves)
    trainer = tmp_path / "trainer"
    state = trainer / "checkpoint-6" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 5}))
    found, _, _ = trained(chosen(), tmp_path, str(trainer / "checkpoint-6"), **saves)
    told = [each.message for each in select_events(read_events(found.result.run), Warned)]
    assert any("goes on from its step 5, the adapters from the end of a round at step 6" in each for each in told)


@pytest.mark.slow
def test_a_run_that_is_over_is_not_begun_again(chosen, tmp_path):
    trained(chosen(), tmp_path)
    with pytest.raises(RunError, match="holds a run that is over"):
        trained(chosen(), tmp_path)


def test_a_trainer_that_ends_early_ends_the_run(chosen, tmp_path):
    found, model, _ = trained(chosen(), tmp_path, max_steps=5)
    events = read_events(found.result.run)
    assert len(select_events(events, RoundDone)) == 2
    told = [each.message for each in select_events(events, Warned)]
    assert any("ended after 2 of 4 rounds" in each and "its last 1 steps" in each for each in told)
    assert found.result.summary["rounds"] == 2


def test_identity_and_members_are_asked_for(chosen, tmp_path):
    federation = compose(chosen())
    model = peft_model(chosen(), federation)
    trainer = trainer_of(chosen(), federation, 0, tmp_path, model, [PeerCallback(own_settings(chosen()))])
    with pytest.raises(ConfigError, match="without identity and members"):
        trainer.train()


def test_a_model_without_adapters_is_refused_before_anything_is_written(chosen, tmp_path):
    federation = compose(chosen())
    base = peft_model(chosen(), federation).unload()
    with network(1) as (net, thread):
        callback = Alone(own_settings(chosen()), net, thread)
        trainer = trainer_of(chosen(), federation, 0, tmp_path / "trainer", base, [callback])
        with pytest.raises(ModelError, match="has no PEFT adapter"):
            trainer.train()
    assert not (tmp_path / "trainer" / "peer").exists()
