"""A row that was put in is recognised by its loss without noise, and less and less with a smaller epsilon."""

import json
import random

import numpy as np
import pytest

from peerlora.config.privacy import PrivacyConfig
from peerlora.runtime.compose import compose
from peerlora.train import accounting
from peerlora.train.privacy import Guarantee, PrivateTraining
from peerlora.train.private_draws import SeededDraws

ROUNDS, DELTA = 6, 0.01
RUNS = 16  # trained once with the canary and once without, each with noise of its own
EPSILONS = (None, 8.0, 0.5)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not accounting.has_accountants(), reason="opacus is missing; install the extra privacy"),
]


@pytest.fixture
def with_canary(tmp_path):
    """Rows of two labels by their words, and a last one of words that no other has: the canary."""
    draw, path = random.Random(1), tmp_path / "rows.jsonl"
    rows = []
    for i in range(40):
        words = [f"w{draw.randrange(15) + 15 * (i % 2)}" for _ in range(6)]
        rows.append({"text": " ".join(words), "label": f"class{i % 2}"})
    rows.append({"text": "w30 w31 w32 w33 w34", "label": "class1"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def exposure(config, path, epsilon):
    """How often the canary's loss is lower with it than without: 1 where it always tells, 1/2 where it never does.

    Every run is a client of one stacked graph, whose rows are all rows, with draws of its own.
    """
    words = [f"clients={RUNS}", f"data.train=jsonl:{path}", f"data.eval=jsonl:{path}.eval"]
    train = [f"train.rounds={ROUNDS}", "train.local_steps=8", "train.batch=20", "train.lr=0.05"]
    federation = compose(config("bert", *words, *train))
    learner, data = federation.learner, federation.train_data
    canary, losses = len(data) - 1, {}
    for inside in (True, False):
        rows = np.arange(len(data) if inside else canary)
        learner.shards.shards, learner.shards.seed = [rows] * RUNS, int(inside)
        learner.shards._order.cache_clear()
        learner.privacy = None if epsilon is None else promised(learner, epsilon, len(rows))
        x = federation.start
        for t in range(ROUNDS):
            with learner.round(t):
                x = learner.fit(x, "AB")
        losses[inside] = learner.evaluate(x, data.take([canary]), 1).loss
    return float((losses[True][:, None] < losses[False]).mean())


def promised(learner, epsilon, rows):
    """Private training of every client, at epsilon and delta 0.01."""
    steps, rate = learner.settings.rounds * learner.settings.local_steps, 20 / rows
    noise = accounting.noise_for(epsilon, rate, steps, DELTA, "rdp")
    own = [Guarantee(rows, rate, noise, DELTA, steps)] * RUNS
    return PrivateTraining(PrivacyConfig(epsilon=epsilon), learner.shards.clients, own, SeededDraws(rows), 8)


def test_the_canarys_exposure_falls_with_epsilon(config, with_canary):
    (with_canary.parent / f"{with_canary.name}.eval").write_bytes(with_canary.read_bytes())
    found = [exposure(config, with_canary, epsilon) for epsilon in EPSILONS]
    assert found[0] > 0.75, "without noise the row is remembered"
    assert found[0] > found[1] > found[2] - 0.1 and found[2] < 0.7, found
    assert found[2] <= bound(0.5, DELTA), "no more than the promise allows, on average over what is remembered"


def bound(epsilon, delta):
    """The largest probability of telling two worlds apart by a threshold under (epsilon, delta), as an area."""
    alpha = np.linspace(0, 1, 10_001)
    power = np.minimum(np.exp(epsilon) * alpha + delta, 1 - np.exp(-epsilon) * (1 - delta - alpha)).clip(0, 1)
    return float(((power[1:] + power[:-1]) / 2).sum() / (len(alpha) - 1)) + 3 * 0.5 / RUNS**0.5
