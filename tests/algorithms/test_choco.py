import numpy as np
import pytest
import torch
from quadratics import adapters, coupled, curvatures, exchange, run

from cases import others_slow
from peerlora.algorithms import build_algorithm
from peerlora.errors import CompositionError, ConfigError
from peerlora.exchange.schema import encoded_bytes
from peerlora.runtime.compose import compose


@pytest.mark.parametrize("interval", [None, 2])
def test_identity_is_dfedavg(interval):
    x, learner = adapters(6, head=3), coupled(6, size=5, local_steps=2, lr=0.05)
    _, ours = run("choco", {"codec": "identity", "interval": interval}, learner, exchange("ring", 6), x, 12)
    _, plain = run("dfedavg", {"interval": interval}, learner, exchange("ring", 6), x, 12)
    for one, other in zip(ours, plain, strict=True):
        assert (one.x.flat - other.flat).abs().max() < 1e-13


@pytest.mark.parametrize("codec", others_slow(["top-k", "random-k", "sign", "qsgd"], [0, 3]))
def test_every_codec_ends_near_the_solution_and_its_mean_takes_plain_steps(codec):
    b = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 24)))
    learner = curvatures(np.ones(6), b, lr=0.02)
    _, states = run("choco", {"codec": codec}, learner, exchange("ring", 6), adapters(6, 10, 10, head=4), 250)
    mean = states[-1].x.flat.mean(0)
    assert (mean - (1 - 0.98**250) * learner.solution).abs().max() < 1e-12
    assert float((states[-1].x.flat - mean).norm()) < 0.5 * float((b - b.mean(0)).norm())


@pytest.mark.parametrize("head", ["mixed", "private"])
def test_the_message_is_what_is_sent(config, head):
    federation = compose(config("bert", "algorithm.name=choco", "algorithm.share=0.25", f"adapter.head={head}"))
    learner, peers, algorithm = federation.learner, federation.exchange, federation.algorithm
    state = algorithm.start(federation.start, peers)
    with learner.round(0):
        algorithm.round(0, state, learner, peers)
    assert peers.stats.bytes_per_edge == encoded_bytes(algorithm.message(federation.start))
    assert peers.stats.sent is not None


def test_changing_neighbours_are_refused_with_the_reason(config):
    with pytest.raises(CompositionError, match="one weighted sum of what all neighbours last sent.*topology=ring"):
        compose(config("bert", "algorithm.name=choco", "topology.kind=random"))


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"codec": "zip"}, "algorithm.codec: 'zip' given; expected one of identity"),
        ({"share": 2.0}, "algorithm.share: 2.0 given with codec=top-k"),
        ({"codec": "sign", "share": 0.1}, "algorithm.share: 0.1 given with codec=sign; extra inputs"),
        ({"codec": "qsgd", "levels": 500}, "algorithm.levels: 500 given with codec=qsgd"),
        ({"gamma": 0.0}, "algorithm.gamma: 0.0 given"),
    ],
)
def test_settings_that_do_not_fit_are_refused(own, told):
    with pytest.raises(ConfigError, match=told):
        build_algorithm("choco", own)
