"""Runs whose clients are held by workers: the bits of one process, and what becomes of lost workers."""

import pytest
import torch

from peerlora.config.cluster import ClusterConfig
from peerlora.runs.store import read_events
from peerlora.runtime.cluster.group import ThreadEngine
from peerlora.runtime.cluster.run import resume, simulate
from peerlora.runtime.simulate import simulate as simulate_here


def threads(settings):
    return ThreadEngine()


def on_workers(config, out, workers=2, **options):
    settings = ClusterConfig(workers=workers, timeout=60)
    return simulate(config, out, cluster=settings, engine=threads, report=False, **options)


def leaves(x):
    from peerlora.tree import leaves

    return leaves(x)


def check_same_bits(config, tmp_path, workers=2):
    there = on_workers(config, tmp_path / "there", workers)
    from peerlora.config.loading import load_config

    stored = load_config(tmp_path / "there" / "config.yaml")
    here = simulate_here(stored, tmp_path / "here", report=False)
    one, other = leaves(here.adapters), leaves(there.adapters)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), (name, (one[name] - other[name]).abs().max())
    return there, here


def test_plain(config, tmp_path):
    check_same_bits(config("bert"), tmp_path)
    a, b = read_events(tmp_path / "here"), read_events(tmp_path / "there")
    for x, y in zip(a, b, strict=False):
        print(x)
        print(y)
