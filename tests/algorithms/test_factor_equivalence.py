"""The methods that mix one factor, or choose their schedule, equal N separate PEFT models that are averaged by hand."""

import threading
from dataclasses import replace

import plain
import pytest
import torch
from peft import set_peft_model_state_dict
from test_plain_loop import PendingExchange, largest_difference, run_stacked

from cases import others_slow
from peerlora.algorithms.base import prepare
from peerlora.runtime.compose import compose

# What trains and what is mixed in round t.
METHODS = {
    "rolora": ("BA", "BA"),
    "ffa-lora": ("B", "B"),
    "fedsa-lora": (["AB"], "A"),
    "fedit": (["AB"], ["AB"]),
    "tad-lora": ("BA", ["AB"]),  # half of three rounds leaves an interval of 1
}


def prepared(config, **how):
    federation = compose(config, **how)
    algorithm, _ = prepare(federation.algorithm, federation.topology, config.train.rounds)
    return replace(federation, algorithm=algorithm)


def mixing_only(factors):
    """plain.average, but in round t every client gets its own tensors back of the factors that are not mixed."""
    rounds = iter(factors * 100)
    everything = plain.average

    def average(models, W, private_head):
        own, kept = [plain.state_of(model) for model in models], set("AB") - set(next(rounds))
        everything(models, W, private_head)
        for model, before in zip(models, own, strict=True):
            back = {name: value for name, value in before.items() if any(f"lora_{block}." in name for block in kept)}
            set_peft_model_state_dict(model, plain.state_of(model) | back)

    return average


@pytest.mark.parametrize("method", others_slow(METHODS, ["rolora", "fedit"]))
@pytest.mark.parametrize(
    ("kind", "words"),
    others_slow(
        [
            ("bert", ["adapter.head=private", "topology.kind=path"]),
            ("bert", []),
            ("llama", ["train.optimizer=sgd", "train.momentum=0.9", "train.lr=1.0", "train.weight_decay=0.1"]),
        ],
        [0],
    ),
)
def test_stacked_run_equals_plain_peft(config, monkeypatch, kind, words, method):
    trained, mixed = METHODS[method]
    chosen = config(kind, f"algorithm.name={method}", *words)
    x = run_stacked(prepared(chosen))
    monkeypatch.setattr(plain, "average", mixing_only(mixed))
    models = plain.run_plain(chosen, compose(chosen), lambda t: trained[t % len(trained)])
    assert largest_difference(x, models) < 1e-9


@pytest.mark.parametrize("method", ["rolora", "ffa-lora", "fedsa-lora"])
def test_two_shards_of_two_equal_one_of_four(config, method):
    chosen = config("bert", f"algorithm.name={method}")
    whole = run_stacked(prepared(chosen))
    meeting, found = PendingExchange(2), {}
    shards = {
        clients[0]: prepared(chosen, clients=clients, gather=meeting.gather(clients[0])) for clients in ([0, 1], [2, 3])
    }

    def run(first):
        found[first] = run_stacked(shards[first]).flat

    threads = [threading.Thread(target=run, args=(first,)) for first in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert float((torch.cat([found[0], found[2]]) - whole.flat).abs().max()) < 1e-12
