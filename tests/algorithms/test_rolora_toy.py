"""RoLoRA's rank-one regression: its loss goes to zero where FFA-LoRA's stays above what the fixed A allows."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "rolora_toy.py"))


def best_with_fixed_A():
    """The smallest loss that any B reaches with the common start's A, over everybody's rows."""
    generator = torch.Generator().manual_seed(0)
    learner = EXAMPLE["Regression"](generator)
    spec = EXAMPLE["AdapterSpec"]((EXAMPLE["LayerSpec"]("layer", EXAMPLE["D_IN"], EXAMPLE["D_OUT"]),), 1, 1.0)
    A = EXAMPLE["initial_adapters"](spec, [1], {}, generator, torch.float64).A["layer"][0]
    seen, Y = learner.X.flatten(0, 1) @ A.mT, learner.Y.flatten(0, 1)
    return float((seen @ torch.linalg.lstsq(seen, Y).solution - Y).square().sum(1).mean())


def test_rolora_learns_the_direction_that_ffa_lora_cannot(tmp_path, capsys, drawn):
    EXAMPLE["main"](str(tmp_path / "toy.svg"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    reached = {(method, graph): float(loss) for method, graph, loss in lines}
    floor = best_with_fixed_A()
    assert floor > 0.5
    for graph in ("complete", "ring"):
        assert floor <= reached["ffa-lora", graph] < 1.05 * floor
        assert reached["rolora", graph] < 1e-6
    assert (tmp_path / "toy.svg").stat().st_size > 10_000


def test_the_learner_takes_steps_of_the_gradient():
    generator = torch.Generator().manual_seed(1)
    learner = EXAMPLE["Regression"](generator)
    spec = EXAMPLE["AdapterSpec"]((EXAMPLE["LayerSpec"]("layer", EXAMPLE["D_IN"], EXAMPLE["D_OUT"]),), 1, 1.0)
    x = EXAMPLE["initial_adapters"](spec, [1] * EXAMPLE["CLIENTS"], {}, generator, torch.float64)
    x = replace(x, flat=x.flat + 0.1)
    by_hand = x.flat.clone().requires_grad_()
    for _ in range(EXAMPLE["STEPS"]):
        here = replace(x, flat=by_hand)
        missed = learner.X @ here.A["layer"].mT @ here.B["layer"].mT - learner.Y
        (slope,) = torch.autograd.grad(missed.square().sum() / EXAMPLE["ROWS"], by_hand)
        moved = by_hand.detach().clone()
        moved[:, x.spec.columns("B")] -= EXAMPLE["RATE"] * slope[:, x.spec.columns("B")]
        by_hand = moved.requires_grad_()
    assert learner.fit(x, "B").flat.detach().numpy() == pytest.approx(by_hand.detach().numpy(), rel=1e-12, abs=1e-14)
