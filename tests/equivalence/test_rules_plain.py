"""FedSpeed and K-GT equal N separate PEFT models with torch's optimiser, corrected and averaged by hand."""

import pytest
import torch
from plain import average, initial_models, loss_of, optimiser, state_of, trained_parameters
from test_plain_loop import largest_difference, run_in_two_shards, run_stacked

from cases import others_slow
from peerlora.runtime.compose import compose


def gradients(model, parameters, data, rows):
    loss = loss_of(model, data, rows, "classification")
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def perturbed(model, parameters, data, rows, rho, alpha):
    """FedSpeed's mixture of two gradients."""
    first = gradients(model, parameters, data, rows)
    norm = torch.sqrt(sum(g.square().sum() for g in first.values()))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data.add_(rho * first[name] / norm)
    second = gradients(model, parameters, data, rows)
    for name, parameter in parameters.items():
        parameter.data.copy_(before[name])
    return {name: (1 - alpha) * first[name] + alpha * second[name] for name in first}


def local_steps(config, federation, model, i, t, active, gradient, correct):
    """All local steps of one client: (its parameters, where they were, mean raw corrected gradient)."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = trained_parameters(model, active, config.adapter.head != "frozen")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer, K = optimiser(config, parameters), config.train.local_steps
    mean = {name: torch.zeros_like(value) for name, value in start.items()}
    for rows in federation.learner.shards.rows(i, t, K):
        found = gradient(model, parameters, federation.train_data, rows)
        for name, parameter in parameters.items():
            parameter.grad = found[name] + correct(name, parameter.detach(), start[name])
            mean[name] += parameter.grad / K
        if config.train.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.train.clip)
        optimizer.step()
    return parameters, start, mean


def run_fedspeed(config, federation, active, penalty, rho, alpha):
    models = initial_models(config, federation)
    duals = [{name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()} for model in models]
    for t in range(config.train.rounds):
        for i, (model, dual) in enumerate(zip(models, duals, strict=True)):
            parameters, start, _ = local_steps(
                config,
                federation,
                model,
                i,
                t,
                active(t),
                lambda *at: perturbed(*at, rho, alpha),
                lambda name, now, before, dual=dual: penalty * (now - before) - dual[name],
            )
            for name, parameter in parameters.items():
                dual[name] = dual[name] - penalty * (parameter.detach() - start[name])
                parameter.data.sub_(dual[name] / penalty)
        average(models, federation.topology.at(t).W, config.adapter.head == "private")
    return [state_of(model) for model in models]


def run_k_gt(config, federation, active):
    models, private = initial_models(config, federation), config.adapter.head == "private"
    c = [{name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()} for model in models]
    for t in range(config.train.rounds):
        z, W = [], federation.topology.at(t).W
        for i, model in enumerate(models):
            at = (config, federation, model, i, t, active(t), gradients)
            z.append(local_steps(*at, lambda name, now, before, own=c[i]: own[name])[2])
        for i, own in enumerate(c):
            for name in z[i]:
                if not (private and "lora_" not in name):
                    received = sum(float(W[i, j]) * other[name] for j, other in enumerate(z))
                    own[name] = own[name] - z[i][name] + received
        average(models, W, private)
    return [state_of(model) for model in models]


SGD = ["train.optimizer=sgd", "train.lr=0.5", "train.momentum=0.9", "train.weight_decay=0.1"]
CASES = [
    ("bert", [*SGD, "train.clip=0.5"]),
    ("bert", ["train.optimizer=adamw", "adapter.head=private", "topology.kind=path"]),
    ("llama", [*SGD, "algorithm.interval=1", "train.rounds=4", "train.block=3", "topology.kind=random", "seed=5"]),
]


def schedule(words):
    return (lambda t: "BA"[t % 2]) if "algorithm.interval=1" in words else (lambda t: "AB")


@pytest.mark.parametrize(("kind", "words"), others_slow(CASES, [0]))
def test_fedspeed_equals_a_plain_loop(config, kind, words):
    own = {"penalty": 0.7, "rho": 0.2, "alpha": 0.6}
    clip = [] if any("clip" in word for word in words) else ["train.clip=null"]
    chosen = config(kind, "algorithm.name=fedspeed", *(f"algorithm.{k}={v}" for k, v in own.items()), *words, *clip)
    x = run_stacked(compose(chosen))
    assert largest_difference(x, run_fedspeed(chosen, compose(chosen), schedule(words), **own)) < 1e-9


@pytest.mark.parametrize(("kind", "words"), others_slow(CASES, [2]))
def test_k_gt_equals_a_plain_loop(config, kind, words):
    chosen = config(kind, "algorithm.name=k-gt", *words)
    x = run_stacked(compose(chosen))
    assert largest_difference(x, run_k_gt(chosen, compose(chosen), schedule(words))) < 1e-9


SHARDED = {"fedspeed": [], "k-gt": ["algorithm.interval=1"], "d2": ["train.local_steps=1"], "consensus-admm": []}


@pytest.mark.parametrize(("method", "words"), SHARDED.items())
def test_two_shards_of_two_equal_one_of_four(config, method, words):
    chosen = config("bert", f"algorithm.name={method}", "adapter.dropout=0.3", *words)
    whole = run_stacked(compose(chosen))
    assert float((run_in_two_shards(chosen) - whole.flat).abs().max()) < 1e-12
