"""Processes of transformers.Trainer over gRPC: they end with the simulation's adapters, and survive each other."""

import pytest
import torch
from loop_rigs import TOLERANCE, matched
from safetensors.torch import load_file
from test_plain_loops import PINNED, TRAIN
from trainer_processes import Trainers

from peerlora.lora.peft_model import PeftAdapter
from peerlora.runs.events import CaughtUp, Resumed, RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import simulate
from waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("no_reports")]
DEC = ["algorithm.name=dec-lora", *TRAIN]


def test_trainers_end_with_the_adapters_of_the_simulation(config, tmp_path):
    named = {"-".join(words).replace("=", "."): words for words in PINNED}
    configs = {name: config("bert", f"algorithm.name={words[0]}", *TRAIN, *words[1:]) for name, words in named.items()}
    with Trainers(configs, tmp_path) as trainers:
        for client in range(3):
            trainers.start(client)
        whole = {name: simulate(chosen, tmp_path / "whole" / name).adapters for name, chosen in configs.items()}
        assert trainers.wait() == {0: 0, 1: 0, 2: 0}
        spec = layout(next(iter(configs.values())))
        for name in configs:
            for client in range(3):
                run = trainers.run(name, client)
                found = load_file(run / "adapters" / "all.safetensors")["flat"][0]
                expected = matched(whole[name], client, spec)
                assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE), (name, client)
                assert not any(done.missed for done in select_events(read_events(run), RoundDone))


def layout(chosen):
    from loop_rigs import peft_model

    return PeftAdapter(peft_model(chosen, compose(chosen))).spec


def test_a_trainer_whose_loop_fails_leaves_the_others_running(config, tmp_path):
    chosen = config("bert", *DEC, "topology.kind=complete", "peer.quorum=0", "train.rounds=6", "peer.deadline=20")
    with Trainers({"run": chosen}, tmp_path) as trainers:
        trainers.start(0, fails_at=4)
        trainers.start(1)
        trainers.start(2)
        codes = trainers.wait()
        assert codes[0] != 0 and codes[1] == codes[2] == 0
        rounds = select_events(read_events(trainers.run("run", 1)), RoundDone)
        assert [done.round for done in rounds] == [0, 1, 2, 3, 4, 5]
        assert "0" in rounds[-1].missed and "2" not in rounds[-1].missed


def test_a_killed_trainer_goes_on_from_its_checkpoint_and_takes_part_again(config, tmp_path):
    chosen = config("bert", *DEC, "topology.kind=complete", "peer.quorum=0", "train.rounds=20", "peer.deadline=20")
    saves = {"save_strategy": "steps", "save_steps": 4}
    with Trainers({"run": chosen}, tmp_path) as trainers:
        for client in range(3):
            at = {"kills_at": 10} if client == 0 else {"holds_at": 24}
            trainers.start(client, **at, **saves)
        assert trainers.wait(0) == {0: -9}
        trainers.start(0, resume=True, **saves)
        until(
            lambda: select_events(read_events(trainers.run("run", 0)), Resumed), trainers.running[0].is_alive, every=0.1
        )
        (tmp_path / "go").touch()
        assert set(trainers.wait().values()) == {0}
        events = read_events(trainers.run("run", 0))
        resumed = [each.round for each in select_events(events, Resumed)]
        assert resumed == [4], "the Trainer saved at step 8, the end of the fourth round"
        later = [done for done in select_events(events, RoundDone) if done.round >= 5]
        caught = select_events(events, CaughtUp)
        assert later and (caught or later[0].round == 5)
        assert any(not done.missed for done in later), "it has exchanged with all again"
