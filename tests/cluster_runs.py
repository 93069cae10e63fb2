"""Runs whose workers are threads, against those of one process."""

import math

import torch

from peerlora.config.cluster import ClusterConfig
from peerlora.config.loading import load_config
from peerlora.runs.events import Evaluated, RoundDone
from peerlora.runs.store import read_events
from peerlora.runtime.cluster.group import ThreadEngine
from peerlora.runtime.cluster.run import simulate
from peerlora.runtime.simulate import simulate as simulate_here
from peerlora.tree import leaves


def threads(settings, exchanged_bytes):
    return ThreadEngine()


def on_workers(config, out, workers=2, engine=threads, retries=3, **options):
    settings = ClusterConfig(workers=workers, timeout=60, retries=retries)
    return simulate(config, out, cluster=settings, engine=engine, report=False, **options)


def same_bits(one, other):
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])] == []


def both(config, folder, workers=2):
    """The results of workers and, with the config that they resolved, of one process."""
    there = on_workers(config, folder / "there", workers)
    stored = load_config(folder / "there" / "config.yaml")
    return there, simulate_here(stored, folder / "here", report=False)


def close(one, other):
    """Equal, or equal to rounding: sums over clients or layers are added up in another order."""
    if isinstance(one, float) and isinstance(other, float):
        return (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-15)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)
    return one == other


TIMES = {"seconds_train", "seconds_mix", "seconds_diagnostics", "seconds"}


def assert_same_events(folder):
    for one, other in zip(read_events(folder / "here"), read_events(folder / "there"), strict=True):
        assert type(one) is type(other)
        if isinstance(one, RoundDone | Evaluated):
            for name in vars(one).keys() - TIMES:
                assert close(getattr(one, name), getattr(other, name)), (name, one, other)
