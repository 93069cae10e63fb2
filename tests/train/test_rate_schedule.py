"""The rate of every round against transformers' schedules and by hand, and training against a plain torch loop."""

import math
import subprocess
import sys

import pytest
import torch
import transformers as tf

from cases import others_slow
from peerlora.config.loading import load_config
from peerlora.config.sections import TrainConfig
from peerlora.data.batches import Shards, collate
from peerlora.errors import ConfigError, DivergenceError
from peerlora.lora.adapters import Adapters
from peerlora.runtime.compose import compose
from peerlora.train.schedule import rate, rate_factor


def factors(**settings):
    train = TrainConfig(**settings)
    return [rate_factor(train, t) for t in range(train.training_rounds)]


def stepped(schedule, steps, **options):
    """The factors of a schedule of transformers before every step; its warm-up starts at zero, so it has none here."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = schedule(optimizer, num_warmup_steps=0, **options), []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("rounds", [1, 2, 7, 150])
def test_without_warm_up_schedules_are_those_of_transformers(rounds):
    linear = stepped(tf.get_linear_schedule_with_warmup, rounds, num_training_steps=rounds)
    cosine = stepped(tf.get_cosine_schedule_with_warmup, rounds, num_training_steps=rounds)
    assert factors(schedule="linear", rounds=rounds) == pytest.approx(linear, abs=1e-14)
    assert factors(schedule="cosine", rounds=rounds) == pytest.approx(cosine, abs=1e-14)


@pytest.mark.parametrize(("decay", "falling"), [(None, 20), (0.3, 30), (1.0, 100), (0.0, 0)])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_wsd_is_that_of_transformers_with_a_linear_decline(decay, falling, floor):
    stable = {"num_decay_steps": falling, "num_stable_steps": 100 - falling, "decay_type": "linear"}
    theirs = stepped(tf.get_wsd_schedule, 100, min_lr_ratio=floor, **stable)
    assert factors(schedule="wsd", decay=decay, floor=floor) == pytest.approx(theirs, abs=1e-14)


def test_the_floor_is_where_cosine_leads_as_with_transformers():
    theirs = stepped(tf.get_cosine_with_min_lr_schedule_with_warmup, 40, num_training_steps=40, min_lr_rate=0.25)
    assert factors(schedule="cosine", floor=0.25, rounds=40) == pytest.approx(theirs, abs=1e-14)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_rises_in_equal_steps_to_the_whole_rate(schedule):
    found = factors(schedule=schedule, warmup=0.3, rounds=10)
    assert found[:4] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert factors(schedule="linear", warmup=0.3, rounds=10)[3:] == pytest.approx([(10 - t) / 7 for t in range(3, 10)])
    by_hand = [(1 + math.cos(math.pi * (t - 3) / 7)) / 2 for t in range(3, 10)]
    assert factors(schedule="cosine", warmup=0.3, rounds=10)[3:] == pytest.approx(by_hand, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize(("share", "rounds", "quiet"), [(0.05, 1, 0.0), (0.3, 6, 0.0), (0.5, 8, 0.2), (0.98, 20, 0.0)])
def test_a_warm_up_in_rounds_is_that_of_the_same_share(schedule, share, rounds, quiet):
    settings = {"schedule": schedule, "rounds": 20, "quiet": quiet}
    assert factors(warmup=rounds, **settings) == factors(warmup=share, **settings)


def test_a_warm_up_in_rounds_does_not_grow_with_the_run():
    short, long = (factors(schedule="cosine", warmup=4, rounds=rounds) for rounds in (10, 1000))
    assert short[:5] == long[:5] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1])


def test_a_constant_rate_is_the_setting_to_the_bit():
    train = TrainConfig(lr=0.1 + 0.2)
    assert {rate(train, t) for t in (0, 50, 99, 1000)} == {0.1 + 0.2}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("quiet", [0.0, 0.4])
def test_a_training_round_has_a_rate_above_zero_that_rises_and_then_falls(schedule, rounds, warmup, quiet):
    train = TrainConfig(schedule=schedule, rounds=rounds, warmup=warmup, quiet=quiet)
    found = [rate_factor(train, t) for t in range(train.training_rounds)]
    top = found.index(max(found))
    assert all(0 < each <= 1 for each in found)
    assert found[: top + 1] == sorted(found[: top + 1]) and found[top:] == sorted(found[top:], reverse=True)


def test_a_schedule_runs_over_the_training_rounds_alone():
    quiet = TrainConfig(schedule="cosine", rounds=50, quiet=0.4)
    alone = TrainConfig(schedule="cosine", rounds=30)
    assert [rate_factor(quiet, t) for t in range(30)] == [rate_factor(alone, t) for t in range(30)]
    assert quiet.is_quiet(30) and not quiet.is_quiet(29) and rate_factor(quiet, 30) == 0


@pytest.mark.parametrize(
    ("rounds", "quiet", "left"), [(10, 0.0, 10), (10, 0.15, 8), (10, 0.14, 9), (50, 0.29, 35), (3, 0.5, 1), (2, 0.5, 1)]
)
def test_half_a_round_is_rounded_up(rounds, quiet, left):
    train = TrainConfig(rounds=rounds, quiet=quiet)  # 0.29 * 50 is 14.499999999999998 in floats
    assert train.training_rounds == left
    assert sum(train.is_quiet(t) for t in range(rounds)) == train.quiet_rounds == rounds - left


def test_without_quiet_rounds_no_round_is_quiet_however_late():
    assert not TrainConfig(rounds=3).is_quiet(3)


REFUSED = [
    (["train.floor=0.1"], "train.floor=0.1 says where a falling rate ends"),
    (["train.decay=0.2"], "train.decay=0.2 is a setting of train.schedule=wsd, train.schedule=constant given"),
    (["train.schedule=cosine", "train.decay=0.5"], "train.schedule=cosine given"),
    (["train.schedule=wsd", "train.warmup=0.7", "train.decay=0.4"], "more than all training rounds"),
    (["train.schedule=wsd", "train.warmup=13", "train.decay=0.4"], "train.warmup=13 and train.decay=0.4 are more than"),
    (["train.warmup=21"], "train.warmup=21 rounds are more than the 20 in which clients train; give fewer"),
    (["train.warmup=11", "train.quiet=0.5"], "train.warmup=11 rounds are more than the 10 in which"),
    (["train.warmup=2.5"], "train.warmup: 2.5 given; expected a share of the training rounds, below 1, or rounds, a"),
    (["train.quiet=0.5", "train.rounds=1"], "leaves none of train.rounds=1 to train in"),
    (["train.quiet=0.99"], "leaves none of train.rounds=20"),
    (["train.quiet=1"], "train.quiet: 1 given"),
    (["train.warmup=-0.1"], "train.warmup: -0.1 given"),
    (["train.schedule=cosin"], "train.schedule: 'cosin' given"),
    (["recipe=dense"], "recipe: 'dense' given"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_settings_that_contradict_each_other_are_refused_in_one_sentence(words, told):
    with pytest.raises(ConfigError) as error:
        load_config({"train": {"rounds": 20}}, words)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["train.warmup=0.9", "train.schedule=wsd"],  # with the decline by default, and less than it is left
        ["train.warmup=0.1"],
        ["train.warmup=100"],  # all of them
        ["train.schedule=wsd", "train.warmup=60", "train.decay=0.4"],
        ["train.epochs=1", "train.warmup=101"],  # of epochs, rounds are known with the rows
        ["train.schedule=wsd", "train.warmup=0.3", "train.decay=0.7"],
        ["recipe=sparse", "train.floor=0.1"],  # the recipe brings the schedule
        ["recipe=sparse", "train.class_weights=balanced"],  # and no second prior
    ],
)
def test_a_default_contradicts_nothing(words):
    load_config({}, words)


def test_the_schedule_is_known_without_torch():
    code = "import sys, peerlora.train.schedule; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the learner


def plain(config, rounds):
    """One client, with torch's own optimiser per block and LambdaLR, one step of the scheduler per round."""
    federation = compose(config)
    x, train = federation.start, config.train
    parameters = {b: torch.nn.Parameter(x.select(b).flat.clone()) for b in ("A", "B", "head")}
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.SGD
    momentum = {} if train.optimizer == "adamw" else {"momentum": train.momentum}
    optimizer = kind(parameters.values(), lr=train.lr, weight_decay=train.weight_decay, **momentum)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (1 + math.cos(math.pi * t / train.training_rounds)) / 2
    )
    for t in range(rounds):
        for rows in federation.learner.shards.rows(0, t, train.local_steps):
            batch = collate(federation.train_data, [rows], 0, torch.float64)
            federation.model.bind_adapters(Adapters(x.spec, torch.cat(list(parameters.values()), 1), x.ranks))
            loss = federation.learner.task.losses(federation.model(batch.inputs), batch)[0]
            optimizer.zero_grad()
            for b, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                parameters[b].grad = gradient
            optimizer.step()
        scheduler.step()
    return torch.cat(list(parameters.values()), 1).detach()


OPTIMIZERS = {
    "adamw": ["train.weight_decay=0.3"],
    "adamw, plain operations": ["train.weight_decay=0.3", "train.fast=false"],
    "sgd": ["train.optimizer=sgd", "train.momentum=0.9", "train.lr=0.3", "train.weight_decay=0.1"],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_client_learns_as_a_plain_loop_with_torchs_scheduler(config, optimizer):
    words = ["clients=1", "topology.kind=complete", "algorithm.name=local", "train.schedule=cosine", "train.rounds=8"]
    chosen = config("bert", *words, "train.quiet=0.25", "train.optimizer_state=keep", *OPTIMIZERS[optimizer])
    federation = compose(chosen)
    x = federation.start
    for t in range(8):
        with federation.learner.round(t):
            x = federation.learner.fit(x, "AB")
    expected = plain(chosen, 6)
    assert (x.flat - expected).abs().max() < 1e-9 and (x.flat - federation.start.flat).abs().max() > 1e-3


@pytest.mark.parametrize("kept", others_slow(["round", "phase", "keep"], ["keep"]))
def test_a_quiet_round_changes_nothing_and_measures_nothing(config, monkeypatch, kept):
    federation = compose(config("bert", "train.quiet=0.3", f"train.optimizer_state={kept}", "adapter.dropout=0.1"))
    learner, x = federation.learner, federation.start
    for t in (0, 1):
        with learner.round(t):
            x = learner.fit(x, "AB")
    memory = {name: leaf.clone() for name, leaf in learner.state_dict().items()}
    monkeypatch.setattr(Shards, "rows", lambda *_: pytest.fail("rows were drawn"))
    with learner.round(2) as trained:
        found = learner.fit(x, "B")
    assert torch.equal(found.flat, x.flat) and found.flat is not x.flat and trained.losses.isnan().all()
    assert learner.trained == (() if kept == "round" else ("A", "B", "head"))
    assert all(torch.equal(leaf, memory[name]) for name, leaf in learner.state_dict().items())


def test_divergence_tells_the_rate_of_the_round(config):
    federation = compose(config("bert", "train.schedule=linear", "train.rounds=4"))
    flat = federation.start.flat.clone()
    flat[2, federation.start.spec.columns("B").start] = float("inf")
    poisoned = Adapters(federation.start.spec, flat, federation.start.ranks)
    with federation.learner.round(3), pytest.raises(DivergenceError, match=r"now 0\.01, 0\.0025 in this round\)"):
        federation.learner.fit(poisoned, "AB")
    with federation.learner.round(0), pytest.raises(DivergenceError, match=r"now 0\.01\)"):
        federation.learner.fit(poisoned, "AB")
