"""Runs with a schedule, quiet rounds and kept moments: resumed anywhere, on a clock, and by real peers, to the bit."""

import pytest
import torch
import yaml
from in_memory import federation

from cases import others_slow
from peerlora.errors import Stopped
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.simulate import resume, simulate

pytestmark = pytest.mark.usefixtures("no_reports")

WORDS = ["train.rounds=8", "train.warmup=0.5", "train.quiet=0.25", "train.schedule=cosine", "checkpoint.every=3"]
KEPT = ["train.optimizer_state=keep", "train.weight_decay=0.1", "adapter.dropout=0.1"]
METHODS = {
    "adf-lora": ["algorithm.interval=1", *KEPT],
    "d2": ["train.local_steps=1"],
    "salf": ["train.optimizer_state=keep", "train.local_steps=2"],
    "dfedadmm": ["algorithm.interval=2", "train.momentum=0.9", "train.optimizer_state=phase"],
    "hetlora": ["adapter.rank=[3, 2, 3, 1]"],
}
CLOCK = ["clock.speed=[1, 1, 0.7, 0.3]", "clock.deadline=2.5", "clock.away=[{client: 1, leave: 2, back: 4}]"]
"""Of six training rounds three rise; rounds 6 and 7 are quiet."""


def told(run):
    """What the rounds of a run tell, without seconds; as text, because NaN does not equal itself."""
    rounds = select_events(read_events(run), RoundDone)
    return str([(each.loss, each.measures, each.absent, each.bytes_sent, each.virtual_seconds) for each in rounds])


def stopped_and_resumed(chosen, folder, rounds):
    stopping = iter([False] * (rounds - 1) + [True])
    with pytest.raises(Stopped, match=f"stopped after {rounds} of"):
        simulate(chosen, folder, stop=lambda: next(stopping, False))
    return resume(folder)


def check_resumed(chosen, folder, rounds):
    whole, again = simulate(chosen, folder / "whole"), stopped_and_resumed(chosen, folder / "part", rounds)
    assert torch.equal(again.adapters.flat, whole.adapters.flat) and told(again.run) == told(whole.run)


@pytest.mark.parametrize("rounds", [2, 7])  # within the warm-up, and between two quiet rounds
@pytest.mark.parametrize(("method", "words"), others_slow(METHODS.items(), [0, 1]))
def test_a_stopped_run_goes_on_to_the_bit(config, tmp_path, method, words, rounds):
    check_resumed(config("bert", f"algorithm.name={method}", *WORDS, *words), tmp_path, rounds)


@pytest.mark.parametrize("rounds", others_slow([2, 5, 7], [1]))
def test_a_stopped_run_with_absent_clients_goes_on_to_the_bit(config, tmp_path, rounds):
    chosen = config("bert", "algorithm.name=adf-lora", "algorithm.interval=1", *WORDS, *KEPT, *CLOCK)
    check_resumed(chosen, tmp_path, rounds)
    absent = [each.absent for each in select_events(read_events(tmp_path / "whole"), RoundDone)]
    assert any(1 in each for each in absent) and any(3 in each for each in absent)


ASYNCHRONOUS = {"ad-psgd": ["algorithm.interval=1"], "aedfl": ["algorithm.density=1"]}


@pytest.mark.parametrize(("method", "words"), others_slow(ASYNCHRONOUS.items(), [0]))
def test_a_stopped_run_without_common_rounds_goes_on_to_the_bit(config, tmp_path, method, words):
    uneven = ["clock.speed=[1,0.7,0.31,0.1]", "clock.delay=0.4", "clock.bandwidth=3000", "train.quiet=0"]
    chosen = config("bert", f"algorithm.name={method}", *WORDS, *KEPT, *uneven, *words)
    check_resumed(chosen, tmp_path, 4)  # while jobs are in flight
    rates = [each.measures["learning_rate"] for each in select_events(read_events(tmp_path / "whole"), RoundDone)]
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True) and len(set(rates)) > 6


def test_a_run_of_an_older_version_goes_on_to_the_bit(config, tmp_path):
    """Its stored config knows neither schedules nor recipes."""
    chosen = config("bert", "algorithm.name=adf-lora", "train.rounds=5", *KEPT)
    whole, stopping = simulate(chosen, tmp_path / "whole"), iter([False, True])
    with pytest.raises(Stopped):
        simulate(chosen, tmp_path / "part", stop=lambda: next(stopping, False))
    place = tmp_path / "part" / "config.yaml"
    tree = yaml.safe_load(place.read_text())
    del tree["recipe"]
    for name in ("schedule", "warmup", "floor", "decay", "quiet"):
        del tree["train"][name]
    place.write_text(yaml.safe_dump(tree))
    again = resume(tmp_path / "part", expected=lambda stored: chosen)
    assert torch.equal(again.adapters.flat, whole.adapters.flat)


REAL = [
    ["algorithm.name=dec-lora"],
    ["algorithm.name=adf-lora", "algorithm.interval=1"],
    ["algorithm.name=d2", "train.local_steps=1", "train.momentum=0.5"],
    ["algorithm.name=rac-lora", "algorithm.chain=2", "algorithm.settle=0"],
    ["recipe=sparse", "algorithm.name=dec-lora", "topology.drop_links=0.3"],
]


@pytest.mark.parametrize("words", others_slow(REAL, [1]))
def test_real_peers_learn_as_the_simulation_does(config, tmp_path, words):
    """Each client has a graph of its own in the simulation too, so sums have the same shapes, if not the same bits."""
    peer = ["peer.deadline=60", "peer.join=60", "train.block=1"]
    kept = ["train.optimizer_state=keep", "adapter.dropout=0.1"]
    chosen = config("bert", *WORDS, *kept, *peer, *words)
    whole, parts = simulate(chosen, tmp_path / "whole"), federation(chosen, tmp_path)
    for client, part in enumerate(parts):
        assert (part.adapters.flat[0] - whole.adapters.flat[client]).abs().max() < 1e-9
    rounds = [select_events(read_events(each.run), RoundDone) for each in (whole, *parts)]
    losses = [loss for each in rounds[0] for loss in each.loss]
    theirs = [rounds[1 + i][t].loss[0] for t in range(8) for i in range(4)]
    assert losses == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    assert all(loss != loss for own in rounds for each in own[6:] for loss in each.loss)
    assert not any(each.missed for own in rounds[1:] for each in own)
