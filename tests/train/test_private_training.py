"""Noise, samples, budgets and sensitivity of private training."""

import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_learner import noisy
from test_row_gradients import SGD, drawn_rows, private, row_gradients

from cases import others_slow
from peerlora.config.privacy import PrivacyConfig
from peerlora.errors import CompositionError
from peerlora.lora.adapters import mask_ranks
from peerlora.randomness import numpy_generator
from peerlora.runs.privacy_ledger import Release
from peerlora.runtime.compose import compose
from peerlora.train.base import LocalPlan
from peerlora.train.privacy import Guarantee, PrivateTraining, clip_factor
from peerlora.train.private_draws import SeededDraws, SystemDraws

DRAWS = {"seeded": SeededDraws(3), "system": SystemDraws()}


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_are_uniform_and_normal_and_differ(kind):
    draws = DRAWS[kind]
    uniform, normal = next(draws.uniform(20_001, "a", 0, 0)), draws.normal(20_001, "a", 0, 0)
    assert uniform.shape == normal.shape == (20_001,) and 0 <= uniform.min() and uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-6  # one draw in a million would fail
    assert stats.kstest(normal, "norm").pvalue > 1e-6
    assert not np.array_equal(draws.normal(9, "a", 0, 0), draws.normal(9, "a", 0, 1))
    again = draws.normal(9, "a", 0, 1), draws.normal(9, "a", 0, 1)
    assert np.array_equal(*again) == (kind == "seeded")


@pytest.mark.parametrize("blocks", ["AB", "B"])
def test_noise_has_the_promised_variance_in_trained_blocks_and_none_elsewhere(config, blocks):
    """By the chi-squared law of a sum of squares, at one in a million on either side."""
    federation = compose(config("bert", *SGD, "clients=2", "topology=path"))
    private(federation, clip=0.7, noise=3.0)
    federation.learner.privacy.sample = lambda i, job, shard, steps, parts: [shard[:0]]
    x = noisy(federation.start)
    moved = x.flat - federation.learner.fit(x, blocks).flat
    trained = torch.zeros(x.spec.parameters, dtype=torch.bool)
    for block in x.spec.trained(tuple(blocks)):
        trained[x.spec.columns(block)] = True
    assert not moved[:, ~trained].any()
    for own, guarantee in zip(moved[:, trained], federation.learner.privacy.guarantees, strict=True):
        squares = float((own * guarantee.expected_rows / (3.0 * 0.7)).square().sum())
        assert 1e-6 < stats.chi2.cdf(squares, int(trained.sum())) < 1 - 1e-6


def test_noise_stays_within_a_clients_rank(config):
    federation = compose(config("bert", "algorithm.name=local", "adapter.rank=[1, 2, 3, 3]", "train.optimizer=sgd"))
    private(federation, noise=1.0)
    after = federation.learner.fit(federation.start, "AB")
    assert torch.equal(mask_ranks(after).flat, after.flat) and not torch.equal(after.flat, federation.start.flat)


def test_every_row_is_sampled_by_itself_at_the_clients_rate(config):
    federation = compose(config("bert", "train.batch=[2, 4, 8, 15]"))
    privacy, shards = private(federation), federation.learner.shards.shards
    for client, shard in enumerate(shards):
        steps = privacy.sample(client, 5, shard, 2_000, 1)
        counts = np.array([len(rows) for rows in steps])
        expected = privacy.guarantees[client].expected_rows
        assert expected == pytest.approx([2, 4, 8, len(shard)][client])
        deviation = (expected * (1 - privacy.guarantees[client].rate)) ** 0.5
        assert abs(counts.mean() - expected) <= 5 * deviation / 2_000**0.5
        assert counts.std() == pytest.approx(deviation, rel=0.15, abs=1e-12)
        assert all(np.isin(rows, shard).all() and len(set(rows.tolist())) == len(rows) for rows in steps)
    together = np.concatenate(privacy.sample(0, 5, shards[0], 3, 4)[4:8])
    assert np.array_equal(together, privacy.sample(0, 5, shards[0], 3, 1)[1]), "pieces are those of one step"


def sampling(draws, rate, rows):
    """The training of one client, number 7, with so many rows."""
    guarantee = Guarantee(rows, rate, noise=1.0, delta=1e-6, releases=1)
    return PrivateTraining(PrivacyConfig(noise=1), [7], [guarantee], draws, 1)


def test_seeded_samples_are_those_of_one_draw_of_all_steps():
    shard, steps = np.arange(100, 141), 5
    drawn = numpy_generator(3, "privacy rows", client=7, round=2).random((steps, len(shard)))
    found = sampling(SeededDraws(3), 0.3, len(shard)).sample(0, 2, shard, steps, 1)
    assert len(found) == steps
    assert all(np.array_equal(rows, shard[own < 0.3]) for rows, own in zip(found, drawn, strict=True))


@pytest.mark.parametrize("kind", DRAWS)
def test_samples_take_memory_for_one_step_at_a_time(kind):
    shard = np.arange(50_000)
    privacy = sampling(DRAWS[kind], 1e-4, len(shard))
    privacy.sample(0, 0, shard, 1, 1)  # what is made once
    tracemalloc.start()
    try:
        privacy.sample(0, 0, shard, 40, 1)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 5 * 8 * len(shard)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.floats(1e-2, 10), st.integers(0, 10**6))
def test_clipping_bounds_what_one_row_can_change(sizes, clip, seed):
    """Sums over adjacent shards, with a row and without, are no further apart than ``clip``."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(sizes), 5, generator=generator, dtype=torch.float64) * torch.tensor(sizes)[:, None]
    clipped = rows * clip_factor(rows.norm(dim=1), clip)[:, None]
    assert ((clipped.sum(0) - clipped[1:].sum(0)).norm() <= clip * (1 + 1e-9)).item()


@pytest.mark.parametrize("blocks", others_slow(["AB", "A", "B"], [0]))
def test_an_adjacent_shard_moves_a_step_by_no_more_than_the_clipping_norm(config, blocks):
    """The model's own row gradients, one row more or less: the sum before noise moves by at most ``clip``."""
    federation = compose(config("bert", *SGD, "train.batch=15"))
    x, clip = noisy(federation.start), 0.3
    privacy, shards = private(federation, clip=clip), federation.learner.shards
    whole, clipped = federation.learner.fit(x, blocks).flat, 0
    expected = torch.tensor([len(shard) for shard in shards.shards])
    for row in range(4):
        privacy.sample = lambda i, job, shard, steps, parts, row=row: [np.delete(shard, row)]
        gap = (federation.learner.fit(x, blocks).flat - whole).norm(dim=1) * expected
        assert (gap <= clip * (1 + 1e-9)).all() and (gap > 0).all()
        clipped += int((gap > 0.99 * clip).sum())
    assert clipped, "no row was long enough to be clipped"
    assert all(each.rate == 1 for each in privacy.guarantees), "a step takes the whole shard"


def test_a_client_moves_by_no_more_than_the_clipping_norm_in_a_round(config):
    federation = compose(config("bert", "train.lr=0.1", "train.local_steps=3"))
    x = noisy(federation.start)
    usual = federation.learner.fit(x, "AB").flat - x.flat
    private(federation, clip=0.2, unit="client")
    moved = federation.learner.fit(x, "AB").flat - x.flat
    assert (usual.norm(dim=1) > 0.2).all() and torch.allclose(moved.norm(dim=1), torch.tensor(0.2).double(), rtol=1e-4)
    assert torch.allclose(moved / moved.norm(dim=1, keepdim=True), usual / usual.norm(dim=1, keepdim=True), atol=1e-9)
    private(federation, clip=0.2, noise=2.0, unit="client")
    noise = (federation.learner.fit(x, "AB").flat - x.flat - moved) / 0.4
    for own in noise:
        assert 1e-6 < stats.chi2.cdf(float(own.square().sum()), x.spec.parameters) < 1 - 1e-6


def test_a_used_up_budget_ends_training_before_it_is_exceeded(config):
    federation = compose(config("bert", "train.local_steps=2"))
    privacy = private(federation, epsilon=8, noise=0.1, steps=2, releases=5)
    told = []
    privacy.record = told.append
    x = noisy(federation.start)
    for t in range(4):
        with federation.learner.round(t, clients=[0, 1] if t else [0]) as stats_of:
            after = federation.learner.fit(x, "AB")
        moved = (after.flat != x.flat).any(1).tolist()
        assert moved == [t < 2, 1 <= t < 3, False, False], t
        assert [not loss.isnan() for loss in stats_of.losses] == moved
        x = after
    assert privacy.releases == [4, 4, 0, 0] and privacy.exhausted == (0, 1)
    assert told == [[Release(0, 0, 2)], [Release(0, 1, 2), Release(1, 1, 2)], [Release(1, 2, 2)]], "once a round"


@pytest.mark.parametrize("kind", DRAWS)
def test_what_ran_after_a_checkpoint_counts_unless_it_repeats_itself(config, kind):
    federation = compose(config("bert", "train.local_steps=2"))
    privacy = private(federation, draws=DRAWS[kind])
    privacy.load_state_dict({"releases": [6, 6, 6, 0]}, [(0, 6), (0, 2), (1, 6), (2, 4)])
    assert privacy.releases == ([6, 6, 6, 0] if kind == "seeded" else [8, 6, 6, 0])
    privacy.load_state_dict({}, [(3, 2)])
    assert privacy.releases == ([0, 0, 0, 0] if kind == "seeded" else [0, 0, 0, 2])


class Twice:
    def gradient(self, step):
        step.gradient()
        return step.gradient()


def test_a_rule_with_a_second_gradient_is_refused(config):
    federation = compose(config("bert"))
    private(federation)
    with pytest.raises(CompositionError, match="second gradient"):
        federation.learner.fit(federation.start, LocalPlan("AB", Twice()))


def test_gradients_equal_those_of_opacus(config, monkeypatch):
    """A plain copy of the model's factors and head, differentiated by opacus' hooks: the same clipped sum."""
    opacus = pytest.importorskip("opacus", reason="needs the extra privacy")
    from opacus.grad_sample import GradSampleModule

    assert opacus.__version__
    federation = compose(config("bert", *SGD, "clients=1", "topology=complete", "train.batch=9", "train.dtype=fp64"))
    x, clip = noisy(federation.start), 0.5
    privacy = private(federation, clip)
    rows = drawn_rows(federation, 0)[0]
    moved = (x.flat - federation.learner.fit(x, "AB").flat)[0] * privacy.guarantees[0].expected_rows

    weights = _opacus_weights(GradSampleModule, federation, x, rows)
    flat = torch.cat([weight.grad_sample.flatten(1) for weight in weights], dim=1)
    expected = (flat * (clip / (flat.norm(dim=1, keepdim=True) + 1e-6)).clamp_max(1)).sum(0)
    assert (flat - row_gradients(federation, x, 0, rows, ("A", "B"))).abs().max() < 1e-9
    assert (moved - expected).abs().max() < 1e-6 and expected.abs().max() > 1e-3
    assert (flat.norm(dim=1) > clip).any()


def test_a_noisy_step_is_opacus_own_with_the_same_noise(config, monkeypatch):
    """Its optimiser clips, adds the vector that our draws give, divides by the expected rows and steps."""
    pytest.importorskip("opacus", reason="needs the extra privacy")
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer, optimizer

    federation = compose(config("bert", *SGD, "clients=1", "topology=complete", "train.batch=9", "train.dtype=fp64"))
    x, clip, noise = noisy(federation.start), 0.5, 0.7
    privacy = private(federation, clip, noise)
    rows = drawn_rows(federation, 0)[0]
    found = federation.learner.fit(x, "AB").flat[0]

    weights = _opacus_weights(GradSampleModule, federation, x, rows)
    drawn = privacy.draws.normal(x.spec.parameters, "privacy step 0", 0, 0)
    parts = iter(torch.from_numpy(drawn).split([weight.numel() for weight in weights]))
    monkeypatch.setattr(optimizer, "_generate_noise", lambda std, reference, **_: std * next(parts).view_as(reference))
    sgd = torch.optim.SGD(weights, lr=1.0)
    expected = privacy.guarantees[0].expected_rows
    options = {"noise_multiplier": noise, "max_grad_norm": clip, "expected_batch_size": expected}
    DPOptimizer(sgd, **options, loss_reduction="mean").step()
    stepped = torch.cat([weight.detach().flatten() for weight in weights])
    assert next(parts, None) is None and (stepped - x.flat[0]).abs().max() > 1e-3
    assert (found - stepped).abs().max() < 1e-9


def _opacus_weights(grad_sample, federation, x, rows):
    """The factors and head of PEFT's model with the client's values, in order, and in each opacus' row gradients."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from peerlora.data.batches import collate

    source = federation.config.model.source
    quiet = dict(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    base = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float64, **quiet)
    names = [layer.name for layer in x.spec.layers]
    model = get_peft_model(base, LoraConfig(r=x.spec.rank, lora_alpha=x.spec.alpha, target_modules=names)).train()
    inside = model.base_model.model
    weights = []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for slot in x.spec.slots:
        value = x.spec.view(slot, x.flat)[0]
        if slot.block == "head":
            parameter = inside.get_parameter(slot.name)
        else:
            parameter = getattr(inside.get_submodule(slot.name), f"lora_{slot.block}")["default"].weight
        parameter.data.copy_(value)
        parameter.requires_grad_(True)
        weights.append(parameter)
    batch = collate(federation.train_data, [rows], 0, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of opacus, on hooks of modules without trained weights
        wrapped = grad_sample(model, loss_reduction="sum", strict=False)
        logits = wrapped(**batch.inputs).logits
        torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum").backward()
    return weights
