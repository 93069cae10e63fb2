"""The proximal step against closed forms: one action dimension, a quadratic critic, blocks that are affine maps."""

import math

import pytest
import torch

from peerlora.train.online.flow import euler_chain
from peerlora.train.online.proximal import (
    log_det,
    one_jump,
    proximal_losses,
    proximal_velocity,
    score_of_velocity,
)

KAPPA, GOAL, TAU = 1.0, -1.0, 0.2
START, SPREAD = 1.0, 0.6  # of the pre-trained flow: N(1, 0.36)
GRID = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)[:, None]  # quantiles of N(0, 1)


class AffineFlow:
    """Blocks ``v_k(a) = offset_k + slope_k a``: what they do to a normal density is known."""

    def __init__(self, blocks):
        self.blocks, self.offset, self.slope = blocks, [], []
        for k in range(blocks):  # of the path (1 - t) x_0 + t a, whose velocity is affine for normal actions
            t = k / blocks
            variance = (1 - t) ** 2 + t**2 * SPREAD**2
            slope = (t * SPREAD**2 - (1 - t)) / variance
            self.slope.append(slope)
            self.offset.append(START - slope * t * START)

    def velocity(self, k, a):
        return self.offset[k] + self.slope[k] * a

    def density(self):
        mean, std = 0.0, 1.0
        for offset, slope in zip(self.offset, self.slope, strict=True):
            factor = 1 + slope / self.blocks
            mean, std = factor * mean + offset / self.blocks, abs(factor) * std
        return mean, std

    def regress(self, k, a, wanted):
        """The exact minimum of the regression: least squares of an affine block."""
        centred = a - a.mean()
        self.slope[k] = float((centred * wanted).sum() / centred.square().sum())
        self.offset[k] = float(wanted.mean()) - self.slope[k] * float(a.mean())

    def target(self, k, a, mean, std, beta):
        old = self.velocity(k, a)
        landed = one_jump(a, old, k / self.blocks, limit=math.inf)
        score = -(landed - mean) / std**2
        return proximal_velocity(old, -KAPPA * (landed - GOAL), beta, TAU, score)

    def sweep(self, beta, jointly):
        chain = euler_chain(self.velocity, GRID, self.blocks)
        mean, std = self.density()
        wanted = []
        for k in range(self.blocks):
            if jointly:
                wanted.append((chain.inputs[k], self.target(k, chain.inputs[k], mean, std, beta)))
            else:  # a block sees what earlier blocks have become
                a = euler_chain(self.velocity, GRID, self.blocks).inputs[k]
                self.regress(k, a, self.target(k, a, *self.density(), beta))
        for k, pair in enumerate(wanted):
            self.regress(k, *pair)


@pytest.mark.parametrize("blocks", [4, 8])
@pytest.mark.parametrize("jointly", [True, False])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_sweeps_reach_the_closed_form_of_a_quadratic_critic(blocks, jointly, beta):
    """exp(Q / tau) is N(goal, tau / kappa): mean -1, standard deviation 0.447."""
    flow = AffineFlow(blocks)
    for _ in range(60):
        flow.sweep(beta, jointly)
    mean, std = flow.density()
    assert mean == pytest.approx(GOAL, abs=0.01)
    assert std == pytest.approx(math.sqrt(TAU / KAPPA), abs=0.02)


@pytest.mark.parametrize("beta", [0.05, 0.2])
def test_one_sweep_is_one_step_of_its_size_and_one_after_another_is_more_cautious(beta):
    """To first order the mean moves by ``beta kappa (goal - mean)``, whatever the number of blocks."""
    for blocks in (4, 8):
        moved = {}
        for jointly in (True, False):
            flow = AffineFlow(blocks)
            begun = flow.density()[0]
            flow.sweep(beta, jointly)
            moved[jointly] = begun - flow.density()[0]
        step = beta * KAPPA * (begun - GOAL)
        assert moved[True] == pytest.approx(step, rel=0.35)
        assert 0.5 * step < moved[False] < moved[True]


def test_the_pretrained_flow_has_the_density_that_it_was_made_for():
    mean, std = AffineFlow(400).density()
    assert (mean, std) == (pytest.approx(START, abs=0.01), pytest.approx(SPREAD, abs=0.01))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8])
def test_the_score_follows_from_the_velocity(t):
    """Of N(t m, (1 - t)^2 + t^2 s^2), whose score is known."""
    variance = (1 - t) ** 2 + t**2 * SPREAD**2
    a = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    slope = (t * SPREAD**2 - (1 - t)) / variance
    velocity = START + slope * (a - t * START)
    assert torch.allclose(score_of_velocity(a, velocity, t), -(a - t * START) / variance, atol=1e-12)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_log_determinant_of_a_block_is_that_of_its_matrix(dimensions):
    generator = torch.Generator().manual_seed(dimensions)
    matrix = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    rows = torch.randn(5, dimensions, generator=generator, dtype=torch.float64)
    eye = torch.eye(dimensions, dtype=torch.float64)
    found = log_det(lambda a: a @ matrix.T + 0.3 * a.square(), rows, 0.25)
    expected = [torch.linalg.slogdet(eye + 0.25 * (matrix + torch.diag(0.6 * row)))[1] for row in rows]
    assert torch.allclose(found, torch.stack(expected), atol=1e-12)


def test_the_log_determinant_in_the_loss_pushes_as_the_score_does():
    """The minimum over affine blocks moves by ``-beta tau score`` of the block's own input, to first order in beta."""
    beta, tau, step, std = 1e-3, 0.5, 0.25, 0.8
    a, old = std * GRID, 0.4 * std * GRID
    slope = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for _ in range(40):  # Newton on one number
        dets = log_det(lambda inputs, slope=slope: slope * inputs, a, step)
        loss = proximal_losses((slope * a)[None], old[None], beta, tau, dets[None], step).sum()
        (first,) = torch.autograd.grad(loss, slope, create_graph=True)
        (second,) = torch.autograd.grad(first, slope)
        slope = (slope - first / second).detach().requires_grad_()
    expected = 0.4 + beta * tau / std**2 / (1 + step * 0.4)
    assert slope.item() == pytest.approx(expected, rel=1e-4)


def test_losses_without_entropy_are_mean_squares():
    v = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    assert proximal_losses(v, torch.zeros_like(v)).tolist() == [2.5]
