"""Clients whose losses are quadratics in A, B and a head: the algorithms run on them as they are, without a model.

``u`` is a client's row of the flat buffer, its loss ``u'H u / 2 - r'u``.
"""

import numpy as np
import torch
from pydantic import TypeAdapter

from peerlora.algorithms import build_algorithm
from peerlora.config.sections import TopologyConfig, TrainConfig
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.topology.schedule import build_topology
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import LocalStep
from peerlora.train.optim import Moments, step
from peerlora.tree import leaves, tree_map


def adapters(clients, d_in=1, d_out=1, head=0, private=False):
    """Zeros: one layer of rank 1, so ``d_in`` entries of A, ``d_out`` of B, and a head."""
    heads = (("head.weight", (head,)),) if head else ()
    spec = AdapterSpec((LayerSpec("q", d_in, d_out),), rank=1, alpha=1.0, head=heads, private_head=private)
    flat = torch.zeros(clients, spec.parameters, dtype=torch.float64)
    return Adapters(spec, flat, torch.ones(clients, dtype=torch.int64))


class Quadratics:
    """The part of a Learner that algorithms use; local steps go through the same rules and the same optimiser."""

    def __init__(self, H, r, noise=0.0, seed=0, **train):
        self.H, self.r = torch.as_tensor(H), torch.as_tensor(r)
        self.settings = TrainConfig(**{"optimizer": "sgd", "lr": 0.1, "local_steps": 1, **train})
        self.rate = self.settings.lr
        """Of the present round: a test may set another."""
        self.noise, self.draw, self.looks = noise, np.random.default_rng(seed), 0

    def fit(self, x, plan):
        plan = LocalPlan.of(plan)
        active = {block: x.spec.columns(block) for block in plan.trained(x.spec) if x.spec.columns(block).stop}
        flat, moments = x.flat.clone(), Moments.fresh(x.flat, x.spec.blocks)
        for _ in range(self.settings.local_steps):
            noise = torch.from_numpy(self.noise * self.draw.normal(size=flat.shape))

            def here(noise=noise):
                self.looks += 1
                g = torch.einsum("cij,cj->ci", self.H, flat) - self.r + noise
                return {block: g[:, columns].clone() for block, columns in active.items()}

            at = LocalStep(flat, x.flat, active, list(range(x.clients)), here)
            found = here() if plan.rule is None else plan.rule.gradient(at)
            step(self.settings, self.rate, flat, found, moments, active)
        return Adapters(x.spec, flat, x.ranks)

    @property
    def solution(self):
        """The minimiser of the mean loss."""
        return torch.linalg.solve(self.H.mean(0), self.r.mean(0))


def curvatures(a, b, **train):
    """``a_i / 2 |u - b_i|^2`` in every coordinate of ``b`` [client, parameter]."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    b = b[:, None].expand(-1, 2) if b.ndim == 1 else b
    H = a[:, None, None] * torch.eye(b.shape[1], dtype=torch.float64)
    return Quadratics(H, a[:, None] * b, **train)


def coupled(clients, size=4, seed=0, **train):
    """Random positive definite H and random r: A, B and a head depend on each other."""
    draw = np.random.default_rng(seed)
    M = draw.normal(size=(clients, size, size))
    H = M @ M.transpose(0, 2, 1) / size + 0.5 * np.eye(size)
    return Quadratics(H, draw.normal(size=(clients, size)), **train)


def exchange(topology, clients, seed=0):
    chosen = topology if isinstance(topology, dict) else {"kind": topology}
    parsed = TypeAdapter(TopologyConfig).validate_python(chosen)
    return StackedExchange(build_topology(parsed, clients, seed), range(clients))


def run(method, settings, learner, peers, x, rounds):
    """The state after every round."""
    algorithm = build_algorithm(method, settings)
    states = [algorithm.start(x, peers)]
    for t in range(rounds):
        peers.begin(t)
        states.append(algorithm.round(t, states[-1], learner, peers))
    return algorithm, states[1:]


ROUNDING = 1e-9
"""What ``end`` leaves of rounding, which its squarings double twelve times along eigenvalue one; by processor."""


def end(method, settings, learner, peers, x, period=1, doublings=12):
    """The clients' rows after ``period * 2**doublings`` rounds, of which only a few are run.

    On quadratics without noise ``period`` rounds are an affine map of the state, so it is found by trying unit vectors
    and squared again and again.
    """
    algorithm = build_algorithm(method, settings)
    start = algorithm.start(x, peers)

    def later(vector):
        state = with_vector(start, vector)
        for t in range(period):
            peers.begin(t)
            state = algorithm.round(t, state, learner, peers)
        return vector_of(state)

    now = vector_of(start)
    moved = later(torch.zeros_like(now))
    M = torch.stack([later(unit) - moved for unit in torch.eye(len(now), dtype=torch.float64)], dim=1)
    for _ in range(doublings):
        moved, M = M @ moved + moved, M @ M
    return algorithm.model(with_vector(start, M @ now + moved)).flat


def vector_of(state):
    """All that changes from round to round."""
    return torch.cat([leaf.flatten() for leaf in leaves(state).values() if leaf.ndim == 2])


def with_vector(state, vector):
    left = iter(vector.split([leaf.numel() for leaf in leaves(state).values() if leaf.ndim == 2]))
    return tree_map(lambda _, leaf: next(left).view_as(leaf).clone() if leaf.ndim == 2 else leaf, state)
