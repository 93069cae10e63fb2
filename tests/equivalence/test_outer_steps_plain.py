"""QG-DSGDm, QG-Adam and NoLoCo equal N separate PEFT models with torch's optimiser and averages by hand."""

import pytest
import torch
from plain import average, initial_models, is_of_head, state_of
from test_plain_loop import largest_difference, run_in_two_shards, run_stacked
from test_rules_plain import gradients, local_steps

from cases import others_slow
from peerlora.runtime.compose import compose

CLIENTS = 4


def memories(models, *kinds):
    """Zeros by client, kind and parameter."""
    return [
        {kind: {name: torch.zeros_like(p) for name, p in model.named_parameters()} for kind in kinds}
        for model in models
    ]


def run_plain(config, federation, active, kinds, gradient, correct, after):
    """Rounds of local steps and averages; ``after(memory, name, start, mixed)`` returns where a trained block goes."""
    models = initial_models(config, federation)
    kept = memories(models, *kinds)
    for t in range(config.train.rounds):
        starts = []
        for i, model in enumerate(models):
            at = (config, federation, model, i, t, active(t), gradient(kept[i]))
            starts.append(local_steps(*at, correct(kept[i]))[1])
        average(models, federation.topology.at(t).W, config.adapter.head == "private")
        for model, memory, start in zip(models, kept, starts, strict=True):
            mixed = {name: parameter for name, parameter in model.named_parameters() if name in start}
            for name, value in after(memory, start, {name: p.detach().clone() for name, p in mixed.items()}).items():
                mixed[name].data.copy_(value)
    return [state_of(model) for model in models]


def nothing(name, now, before):
    return torch.zeros_like(now)


def run_qg_dsgdm(config, federation, active, beta):
    steps = config.train.local_steps * config.train.lr
    of_head = steps * config.train.head_rate

    def after(memory, start, mixed):
        for name, value in mixed.items():
            memory["m"][name] = beta * memory["m"][name] + (1 - beta) * (start[name] - value) / (
                of_head if is_of_head(name) else steps
            )
        return mixed

    return run_plain(
        config,
        federation,
        active,
        ["m"],
        lambda memory: gradients,
        lambda memory: lambda name, now, before: beta * memory["m"][name],
        after,
    )


def run_qg_adam(config, federation, active, beta1, beta2):
    def gradient(memory):
        first, second, count = ({**memory[kind]} for kind in ("m", "v", "rounds"))

        def direction(model, parameters, data, rows):
            found = gradients(model, parameters, data, rows)
            for name, g in found.items():
                first[name] = beta1 * first[name] + (1 - beta1) * g
                second[name] = beta2 * second[name] + (1 - beta2) * g**2
                count[name] = count[name] + 1
                root = (second[name] / (1 - beta2 ** count[name])).sqrt()
                found[name] = first[name] / (1 - beta1 ** count[name]) / (root + 1e-8)
            return found

        return direction

    def after(memory, start, mixed):
        moved = {name: start[name] - value for name, value in mixed.items()}
        norm = torch.sqrt(sum(each.square().sum() for each in moved.values())) + 1e-8
        for name, each in moved.items():
            memory["m"][name] = beta1 * memory["m"][name] + (1 - beta1) * each / norm
            memory["v"][name] = beta2 * memory["v"][name] + (1 - beta2) * (each / norm) ** 2
            memory["rounds"][name] = memory["rounds"][name] + 1
        return mixed

    return run_plain(config, federation, active, ["m", "v", "rounds"], gradient, lambda memory: nothing, after)


def run_noloco(config, federation, active, outer_lr, outer_momentum):
    def after(memory, start, mixed):
        for name, value in mixed.items():
            memory["velocity"][name] = outer_momentum * memory["velocity"][name] + outer_lr * (value - start[name])
        return {name: start[name] + memory["velocity"][name] for name in mixed}

    return run_plain(config, federation, active, ["velocity"], lambda memory: gradients, lambda memory: nothing, after)


METHODS = {
    "qg-dsgdm": (run_qg_dsgdm, {"beta": 0.8}, ["train.lr=0.5"]),
    "qg-adam": (run_qg_adam, {"beta1": 0.7, "beta2": 0.9}, ["train.lr=0.02"]),
    "noloco": (run_noloco, {"outer_lr": 0.6, "outer_momentum": 0.4}, ["train.lr=0.02"]),
}
SETTINGS = [
    ["train.weight_decay=0.1"],
    ["adapter.head=private", "topology.kind=path"],
    ["train.head_rate=0.25", "topology.kind=path"],
    ["algorithm.interval=1", "train.rounds=5", "train.block=3", "topology.kind=random", "seed=5"],
]


@pytest.mark.parametrize("words", others_slow([(each,) for each in SETTINGS], [2]))
@pytest.mark.parametrize("method", METHODS)
def test_outer_steps_equal_a_plain_loop(config, method, words):
    run, own, train = METHODS[method]
    chosen = config("bert", f"algorithm.name={method}", *(f"algorithm.{k}={v}" for k, v in own.items()), *train, *words)
    assert chosen.clients == CLIENTS
    turns = "algorithm.interval=1" in words
    plain = run(chosen, compose(chosen), (lambda t: "BA"[t % 2]) if turns else (lambda t: "AB"), **own)
    assert largest_difference(run_stacked(compose(chosen)), plain) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_two_shards_of_two_equal_one_of_four(config, method):
    chosen = config("bert", f"algorithm.name={method}", "adapter.dropout=0.3")
    whole = run_stacked(compose(chosen))
    assert float((run_in_two_shards(chosen) - whole.flat).abs().max()) < 1e-12
