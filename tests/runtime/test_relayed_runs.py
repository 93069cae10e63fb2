"""Runs whose clients relay adapters: what changes, what does not, and what they leave behind."""

import dataclasses

import pytest
import torch

from peerlora.runs.events import Evaluated, RoundDone, to_json
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.simulate import simulate

QUICK = ["train.rounds=4", "train.local_steps=1", "eval.every=2", "topology=path"]
RELAY = "exchange.relay={}"


def of(run, kind):
    return select_events(read_events(run), kind)


def without_relay(event):
    """An event of a run with relaying as it is without; times left out."""
    gone = {"measures": {}, "relayed": [], "relayed_loss": [], "relayed_cut": float("nan"), "bytes_sent": 0}
    gone |= {name: 0.0 for name in ("seconds", "seconds_train", "seconds_mix", "seconds_diagnostics")}
    known = {field.name for field in dataclasses.fields(event)}
    return to_json(dataclasses.replace(event, **{name: value for name, value in gone.items() if name in known}))


@pytest.mark.parametrize(
    "words",
    [
        ["algorithm.name=dec-lora"],
        ["algorithm.name=adf-lora", "algorithm.interval=1", "adapter.head=private"],
        ["algorithm.name=decaf", "adapter.rank=[1,2,3,3]", "train.optimizer_state=round"],
        ["algorithm.name=ffa-lora", "adapter.head=frozen"],
        ["algorithm.name=k-gt", "algorithm.step=0.5"],
        ["algorithm.name=dec-lora", "topology=complete", "adversary.attack=sign-flip", "exchange.robust=median"],
        ["algorithm.name=dec-lora", "clock.speed=[1,1,1,0.2]", "clock.deadline=3"],
    ],
    ids=lambda words: words[0].removeprefix("algorithm.name=") + str(len(words)),
)
def test_training_is_bit_identical_with_and_without(config, tmp_path, words):
    plain = simulate(config("bert", *QUICK, *words), tmp_path / "plain", report=False)
    relayed = simulate(config("bert", *QUICK, *words, RELAY), tmp_path / "relayed", report=False)
    assert torch.equal(plain.adapters.flat, relayed.adapters.flat)
    for kind in (RoundDone, Evaluated):
        ours, theirs = ([without_relay(event) for event in of(each.run, kind)] for each in (relayed, plain))
        assert ours == theirs
    assert plain.relayed is None and relayed.relayed is not None
    assert not torch.equal(relayed.relayed.flat, relayed.adapters.flat)
    assert "relayed_mean" in relayed.summary["scores"] and "relayed_mean" not in plain.summary["scores"]
