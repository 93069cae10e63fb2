"""Quadratic clients whose local steps can be followed by hand, and runs of them on the virtual clock."""

from contextlib import contextmanager
from dataclasses import replace

import torch

from peerlora.config.loading import parse_spec
from peerlora.config.sections import ClockConfig, TrainConfig
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.runtime.asynchronous import AsynchronousRounds
from peerlora.runtime.synchronous import SynchronousRounds
from peerlora.runtime.virtual_clock import VirtualClock
from peerlora.topology.schedule import build_topology
from peerlora.train.base import LocalPlan, TrainStats
from peerlora.train.local_rules import LocalStep

SPEC = AdapterSpec((LayerSpec("one", 3, 2), LayerSpec("two", 2, 2)), rank=2, alpha=2.0)


def adapters(flat, spec=SPEC):
    return Adapters(spec, flat, torch.full((len(flat),), spec.rank))


def targets(clients, seed=0, spec=SPEC):
    """[client, parameter]: where each client's own loss is lowest."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clients, spec.parameters, generator=generator, dtype=torch.float64)


class Quadratic:
    """``f_i(x) = |x - b_i|^2 / 2`` and plain gradient steps, with the noise of a job where asked for."""

    def __init__(self, b, rate=0.1, steps=1, noise=0.0):
        self.b, self.rate, self.noise = b, rate, noise
        self.settings = TrainConfig(local_steps=steps)
        self.fits = []

    @contextmanager
    def round(self, t, jobs=None, clients=None, step_seconds=None):
        self.jobs = [t] * len(self.b) if jobs is None else list(jobs)
        self.places = list(range(len(self.b))) if clients is None else list(clients)
        self.stats = TrainStats(torch.full((len(self.b),), float("nan")))
        yield self.stats

    def fit(self, x, plan):
        plan = LocalPlan.of(plan)
        train, rule = plan.blocks, plan.rule
        self.fits.append((train, [(place, self.jobs[place]) for place in self.places]))
        flat, start = x.flat[self.places].clone(), x.flat[self.places]
        active = {block: x.spec.columns(block) for block in train}
        b = torch.stack([self._target(place) for place in self.places]) if self.places else self.b[:0]

        def here():
            return {block: flat[:, columns] - b[:, columns] for block, columns in active.items()}

        for _ in range(self.settings.local_steps):
            found = here() if rule is None else rule.gradient(LocalStep(flat, start, active, self.places, here))
            for block, columns in active.items():
                flat[:, columns] -= self.rate * found[block]
        result = x.flat.clone()
        result[self.places] = flat
        self.stats.losses[self.places] = (0.5 * (flat - b).square().sum(1)).float()
        return replace(x, flat=result)

    def _target(self, place):
        generator = torch.Generator().manual_seed(1000 * place + self.jobs[place])
        drawn = torch.randn(self.b.shape[1], generator=generator, dtype=torch.float64)
        return self.b[place] + self.noise * drawn


def rounds_for(algorithm, learner, graph="ring", seed=0, **clock):
    """What advances a run of these parts, asynchronous or not."""
    clients = len(learner.b)
    topology = build_topology(parse_spec(graph), clients, seed)
    kept = VirtualClock(ClockConfig(**clock), clients, seed)
    if hasattr(algorithm, "on_job"):
        return AsynchronousRounds(algorithm, learner, StackedExchange(topology, range(clients)), kept)
    topology = replace(topology, interrupted=kept.interrupts)
    return SynchronousRounds(algorithm, learner, StackedExchange(topology, range(clients)), kept)


def run(algorithm, learner, rounds, graph="ring", start=None, **clock):
    """The runner and the state after every round."""
    clients = len(learner.b)
    runner = rounds_for(algorithm, learner, graph, **clock)
    x = adapters(torch.zeros_like(learner.b) if start is None else start)
    topology = build_topology(parse_spec(graph), clients, 0)
    state = algorithm.start(x, StackedExchange(topology, range(clients)))
    states, passed = [], []
    for t in range(rounds):
        state, told = runner.advance(t, state)
        states.append(state)
        passed.append(told)
    return runner, states, passed
