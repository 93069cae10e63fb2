"""Loops in fp32 and bf16, gradient scalers, fused optimisers, and optimisers of DeepSpeed."""

import pytest
import torch
from in_memory import network, together
from loop_rigs import batches, joined, matched, optimizer_of, peft_model, plain_loops, read, take_steps
from plain import loss_of
from test_joined_peers import ONE
from test_plain_loops import TRAIN

from peerlora.errors import CompositionError, ModelError
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import simulate
from peerlora.train.loop_driver import plain_optimizer

pytestmark = pytest.mark.usefixtures("no_reports")
SGD = ["train.optimizer=sgd", "train.lr=0.05"]


@pytest.fixture
def lone(config):
    """A config of one client in fp32, with its federation and its model."""

    def make(*words):
        chosen = config("bert", "algorithm.name=dec-lora", *ONE, *SGD, "train.dtype=fp32", *words)
        federation = compose(chosen)
        return chosen, federation, peft_model(chosen, federation)

    return make


def scaled_step(scaler, lone, optimizer, factor=1.0):
    """One step of a gradient scaler on the first rows; ``factor`` multiplies the loss."""
    chosen, federation, model = lone
    loss = loss_of(model, federation.train_data, batches(chosen, federation, 0)[0], "classification")
    scaler.scale(loss * factor).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_leaves_out_does_not_count(lone, tmp_path, fused):
    made = lone("train.rounds=1")
    chosen, _, model = made
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with network(1) as (net, thread), joined(chosen, tmp_path, 0, net, thread, model, optimizer) as peer:
        before, scale = read(model).clone(), scaler.get_scale()
        scaled_step(scaler, made, optimizer, float("inf"))
        assert scaler.get_scale() < scale and torch.equal(read(model), before)
        assert peer.driver.total == 0 and not peer.step()
        seen = []
        for _ in range(chosen.train.local_steps):
            scaled_step(scaler, made, optimizer)
            seen.append(peer.step())
        assert seen == [False, True] and peer.over and not torch.equal(read(model), before)
    assert peer.result.summary["rounds"] == 1


def test_a_method_that_corrects_gradients_refuses_those_that_a_fused_optimiser_has_scaled(lone, tmp_path):
    made = lone("algorithm.name=dfedadmm")
    chosen, _, model = made
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(CompositionError, match="fused optimiser under a gradient scaler"), network(1) as (net, thread):
        with joined(chosen, tmp_path, 0, net, thread, model, optimizer):
            scaled_step(scaler, made, optimizer)


def test_loops_in_fp32_end_with_the_adapters_of_the_simulation(config, tmp_path):
    """SGD, whose steps do not make more of the last bits than they are; of AdamW the fp64 tests tell."""
    chosen = config("bert", "algorithm.name=adf-lora", "algorithm.interval=1", *TRAIN, *SGD, "train.dtype=fp32")
    whole = simulate(chosen, tmp_path / "whole")
    results, models = plain_loops(chosen, tmp_path)
    for client, part in enumerate(results):
        found, expected = part.adapters.flat[0], matched(whole.adapters, client, part.adapters.spec)
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=0, atol=1e-5), float((found - expected).abs().max())
        assert torch.equal(read(models[client]), found)
        assert max(float(B.abs().max()) for B in part.adapters.B.values()) > 1e-4


def test_adapters_in_bf16_are_mixed_in_fp32_and_cast_back(config, tmp_path):
    """Two loops: the model holds the mean of both, which the run has in fp32, as bf16 rounds it."""
    words = ["clients=2", "topology.kind=complete", "peer.deadline=60", "peer.join=60", "train.rounds=2"]
    chosen = config("bert", "algorithm.name=dec-lora", *SGD, *words, "train.dtype=fp32")
    federation = compose(chosen)
    models = [peft_model(chosen, federation).to(torch.bfloat16) for _ in range(2)]

    def one(client, net, thread):
        model, optimizer = models[client], optimizer_of(chosen, models[client])
        with joined(chosen, tmp_path, client, net, thread, model, optimizer) as peer:
            take_steps(peer, model, optimizer, chosen, federation, batches(chosen, federation, client))
        return peer.result

    with network(2) as (net, thread):
        results = together([lambda client=client: one(client, net, thread) for client in range(2)])
    mixed = [each.adapters.flat[0] for each in results]
    assert mixed[0].dtype == torch.float32 and torch.allclose(mixed[0], mixed[1], rtol=0, atol=1e-6)
    kept = [value for name, value in models[0].named_parameters() if "lora_" in name]
    assert all(value.dtype == torch.bfloat16 for value in kept)
    for model in models:
        assert torch.equal(read(model), mixed[0].bfloat16().float())
    assert not torch.equal(mixed[0], mixed[0].bfloat16().float()), "a mean of two numbers of bf16 is none, mostly"


class Zero:
    """Holds copies of the parameters, as DeepSpeed's optimisers do; not a torch optimiser, but has one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class Accelerated(torch.optim.Optimizer):
    """A wrapper that is a torch optimiser itself, as Accelerate's are."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class AcceleratedDeepSpeed(Accelerated):
    pass


Zero.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
AcceleratedDeepSpeed.__module__ = "accelerate.utils.deepspeed"


def test_deepspeed_is_recognised_in_every_wrapper():
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    assert plain_optimizer(plain) is plain and plain_optimizer(Accelerated(plain)) is plain
    wrapped = [Zero(plain), AcceleratedDeepSpeed(plain), AcceleratedDeepSpeed(Zero(plain)), Accelerated(Zero(plain))]
    for optimizer in wrapped:
        with pytest.raises(ModelError, match="DeepSpeed keeps copies"):
            plain_optimizer(optimizer)
    with pytest.raises(ModelError, match="expected a torch.optim.Optimizer"):
        plain_optimizer(object())


def test_accelerate_s_wrapper_for_deepspeed_lies_where_it_is_looked_for():
    wrapper = pytest.importorskip("accelerate.utils.deepspeed").DeepSpeedOptimizerWrapper
    assert issubclass(wrapper, torch.optim.Optimizer) and wrapper.__module__ == "accelerate.utils.deepspeed"
