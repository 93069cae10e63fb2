"""The prior-adjusted loss: closed forms on a toy, and what a run does with it."""

import json
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import ROW_METHODS, others_slow
from peerlora.data.batches import Batch
from peerlora.errors import CompositionError, ConfigError
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose, opening_state
from peerlora.runtime.simulate import simulate
from peerlora.train import loss_rules
from peerlora.train.kernels.packed_encoder import PackedEncoder
from peerlora.train.loss_rules import LabelPrior, offsets
from peerlora.train.tasks import task

pytestmark = pytest.mark.usefixtures("no_reports")

SKEWED = (
    "partition.kind=shares",
    "partition.shares=[[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.4, 0.2, 0.4]]",
    "partition.counts=[1, 1, 2]",
)


# --- the offsets


def test_offsets_by_hand():
    own, even = torch.tensor([[9.0, 1.0]]).double(), torch.ones(1, 2).double()
    assert offsets(own, even).tolist()[0] == pytest.approx([log((9 + 1) / 12 / 0.5), log((1 + 1) / 12 / 0.5)])
    pooled = torch.tensor([[30.0, 10.0]]).double()
    expected = [log((9 + 2 * 0.75) / 12 / 0.75), log((1 + 2 * 0.25) / 12 / 0.25)]
    assert offsets(own, pooled).tolist()[0] == pytest.approx(expected)


def test_a_class_that_a_client_lacks_is_hardly_pushed_down():
    counts = torch.tensor([[50.0, 50.0, 0.0]]).double()
    for target in ([1, 1, 1], [50, 50, 900], [50, 50, 0]):
        found = offsets(counts, torch.tensor([target]).double())[0]
        assert float(found[2]) == pytest.approx(-log((100 + 3) / 3)) and bool(found.isfinite().all())
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    plain, adjusted = (
        torch.autograd.grad(torch.nn.functional.cross_entropy(logits + add, torch.tensor([0])), logits)[0][0, 2]
        for add in (0.0, offsets(counts, torch.ones(1, 3).double()))
    )
    assert 0 < float(adjusted) < float(plain) / 20


@given(st.lists(st.integers(1, 500), min_size=2, max_size=6), st.integers(1, 50))
def test_the_targets_own_proportions_need_no_adjustment(target, times):
    both = torch.tensor([target]).double()
    assert float(offsets(both * times, both).abs().max()) < 1e-12


@given(
    st.lists(st.integers(0, 500), min_size=2, max_size=6).filter(any),
    st.lists(st.integers(1, 500), min_size=6, max_size=6),
)
def test_offsets_grow_with_the_share_and_shift_by_a_proper_prior(own, target):
    counts, wanted = torch.tensor([own]).double(), torch.tensor([target[: len(own)]]).double()
    found = offsets(counts, wanted)
    share = wanted / wanted.sum()
    assert float((found.exp() * share).sum()) == pytest.approx(1.0)  # own shares sum to one
    order = (counts / wanted).argsort()
    assert bool((found[0, order[0]].diff() >= -1e-12).all())


# --- the loss


def toy_batch(rows):
    """One client's rows (feature, label, how often) with their weights."""
    weights = torch.tensor([[often for _, _, often in rows]]).double()
    labels = torch.tensor([label for _, label, _ in rows])
    return Batch({}, labels, weights / weights.sum(), [(len(rows), 1)])


def best_logits(rows, rule):
    """The minimiser of the loss over one pair of logits per feature value, by Newton's method."""
    features = torch.tensor([feature for feature, _, _ in rows])
    batch = toy_batch(rows)

    def loss(free):
        logits = torch.stack([torch.zeros_like(free), free], 1)[features]
        return task("classification").losses(*rule(logits, batch, [0])).sum()

    free = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        slope = torch.autograd.functional.jacobian(loss, free)
        free = free - torch.linalg.solve(torch.autograd.functional.hessian(loss, free), slope)
    return free


def plain(logits, batch, clients):
    return logits, batch


@pytest.mark.parametrize("share", others_slow([0.1, 0.5, 0.9, 0.99], [2]))
def test_skewed_rows_with_the_adjusted_loss_have_the_balanced_optimum(share, monkeypatch):
    monkeypatch.setattr(loss_rules, "SMOOTHING", 0.0)  # exact shares
    likelihood = [[0.7, 0.3], [0.2, 0.8]]  # of feature 0 or 1 given the label
    n = 100_000

    def rows(positive):
        return [(f, y, n * (positive if y else 1 - positive) * likelihood[y][f]) for y in (0, 1) for f in (0, 1)]

    skewed, balanced = rows(share), rows(0.5)
    counts = np.array([[round(n * (1 - share)), round(n * share)]])
    found = best_logits(skewed, LabelPrior(counts, "uniform"))
    closed = torch.tensor([log(0.2 / 0.7), log(0.8 / 0.3)]).double()
    assert torch.allclose(found, closed, atol=1e-9) and torch.allclose(best_logits(balanced, plain), closed, atol=1e-9)
    assert torch.allclose(best_logits(skewed, plain), closed + log(share / (1 - share)), atol=1e-9)


def test_every_client_gets_its_own_offsets():
    rule = LabelPrior(np.array([[1, 9], [5, 5], [9, 1]]), "uniform")
    logits = torch.zeros(4, 2, dtype=torch.float64)
    found, _ = rule(logits, toy_batch([(0, 0, 1)] * 4), [1, 2])
    assert torch.allclose(found[:2], torch.zeros(2, 2).double(), atol=1e-12)
    assert torch.equal(found[2], found[3]) and float(found[2, 0]) == pytest.approx(log(10 / 6))


def test_pooled_offsets_have_to_be_agreed_first():
    with pytest.raises(AssertionError, match="agree"):
        LabelPrior(np.array([[1, 2]]), "pooled")(torch.zeros(1, 2), toy_batch([(0, 0, 1)]), [0])


# --- in a run


def run(config, rounds=2):
    federation = compose(config)
    x = opening_state(federation)
    for t in range(rounds):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            x = federation.algorithm.round(t, x, federation.learner, federation.exchange)
    return federation, federation.algorithm.model(x)


@pytest.mark.parametrize("method", ["adf-lora", "fedsa-lora", "flora"])
@pytest.mark.parametrize("target", others_slow(["uniform", "pooled"], ["pooled"]))
def test_it_works_under_every_kind_of_method_on_both_forwards(config, method, target):
    found = {}
    for words in ((), ("train.fast=false",), ("train.block=1",)):
        asked = config("bert", *SKEWED, f"algorithm.name={method}", f"train.label_prior={target}", *words)
        federation, x = run(asked)
        assert isinstance(federation.model.forward, PackedEncoder) == (words != ("train.fast=false",))
        found[words] = x.flat
    other = run(config("bert", *SKEWED, f"algorithm.name={method}"))[1].flat
    assert float((found[()] - other).abs().max()) > 1e-4, "nothing was adjusted"
    for x in found.values():
        assert float((x - found[()]).abs().max()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("method", ROW_METHODS)
def test_it_works_under_every_method(config, tmp_path, method):
    """All start at the same function, so the loss of the first step is everybody's: the adjusted one."""
    words = [*SKEWED, f"algorithm.name={method}", "train.local_steps=1", "train.rounds=1"]
    words += ["topology=complete"] if method == "d2" else []
    words += ["algorithm.alpha=0.0"] if method == "flood" else []  # its emphasis would change the loss too
    found = {}
    for target in ("none", "uniform"):
        result = simulate(config("bert", *words, f"train.label_prior={target}"), tmp_path / target)
        (done,) = select_events(read_events(result.run), RoundDone)
        found[target] = result.adapters.flat, done.loss
    expected = first_losses(compose(config("bert", *SKEWED, "train.label_prior=uniform")))
    assert found["uniform"][1] == pytest.approx(expected, rel=1e-9)
    assert found["none"][1] != pytest.approx(expected, rel=1e-3)
    moved = (found["uniform"][0] - found["none"][0]).abs().amax(1)
    assert bool(found["uniform"][0].isfinite().all()) and float(moved.min()) > 1e-7, "who trained, trained otherwise"


def first_losses(federation):
    """Of every client's first batch at the start, on logits that are shifted by hand."""
    found = []
    for i, counts in enumerate(federation.partition.counts):
        (rows,) = federation.learner.shards.rows(i, 0, 1)
        shift = torch.from_numpy(np.log((counts + 1) / (counts.sum() + 3) * 3))
        federation.model.bind_adapters(federation.start.rows([i]))
        batch = prior_batch(federation, rows)
        found.append(float(torch.nn.functional.cross_entropy(federation.model(batch.inputs) + shift, batch.labels)))
    return found


@pytest.mark.parametrize("method", ["sgp", "push-diging"])
def test_pooled_counts_are_summed_over_links_that_go_one_way(config, method):
    words = [*SKEWED, f"algorithm.name={method}", "topology.kind=directed-ring", "topology.chords=[[0, 2]]"]
    federation, _ = run(config("bert", *words, "train.label_prior=pooled"), 1)
    (rule,) = federation.learner.loss_rules
    pooled = torch.from_numpy(federation.partition.counts.sum(0)).double().expand(4, -1)
    expected = LabelPrior(federation.partition.counts, "pooled")
    expected.agree(lambda own: pooled)
    logits, batch = torch.zeros(4, 3, dtype=torch.float64), toy_batch([(0, 0, 1)])
    assert torch.equal(rule(logits, batch, [0, 1, 2, 3])[0], expected(logits, batch, [0, 1, 2, 3])[0])


def test_the_loss_of_a_step_is_cross_entropy_on_shifted_logits(config):
    federation = compose(config("bert", *SKEWED, "train.label_prior=uniform", "train.local_steps=1"))
    learner = federation.learner
    with learner.round(0) as trained:
        learner.fit(federation.start, "B")
    assert trained.losses.tolist() == pytest.approx(first_losses(federation), rel=1e-10)


def prior_batch(federation, rows):
    from peerlora.data.batches import collate

    return collate(federation.train_data, [rows], 0, torch.float64)


def test_without_it_nothing_stands_between_logits_and_losses(config):
    assert compose(config()).learner.loss_rules == ()


def test_equal_shares_train_as_the_plain_loss(config):
    even = ("partition.kind=shares", "partition.shares=[[0.3333333, 0.3333333, 0.3333334]]", "partition.counts=[4]")
    plainly = run(config("bert", *even))[1].flat
    for target in ("uniform", "pooled"):
        assert float((run(config("bert", *even, f"train.label_prior={target}"))[1].flat - plainly).abs().max()) < 1e-9


def test_evaluation_sees_no_offsets(config):
    adjusted, plainly = (compose(config("bert", *SKEWED, *words)) for words in ((), ("train.label_prior=uniform",)))
    x = run(config("bert", *SKEWED))[1]
    scores = [some.learner.evaluate(x, some.eval_data, 8) for some in (adjusted, plainly)]
    assert scores[0].loss.tolist() == scores[1].loss.tolist()


def test_gossip_of_counts_is_paid_in_the_first_round_and_told(config, tmp_path):
    events = {}
    for target in ("uniform", "pooled"):
        result = simulate(config("bert", *SKEWED, f"train.label_prior={target}"), tmp_path / target)
        lines = [json.loads(line) for line in (result.run / "events.jsonl").read_text().splitlines()]
        events[target] = [line for line in lines if "bytes_sent" in line], str(lines[0])
    first, later = ([done["bytes_sent"] for done in rounds] for rounds, _ in events.values())
    assert later[0] > first[0] and later[1:] == first[1:]
    assert "rounds of gossip before round 0" in events["pooled"][1] and "gossip before" not in events["uniform"][1]


def test_a_resumed_run_sums_again_and_counts_once(config, tmp_path):
    from peerlora.errors import Stopped
    from peerlora.runtime.simulate import resume

    asked = config("bert", *SKEWED, "train.label_prior=pooled")
    whole = simulate(asked, tmp_path / "whole")
    with pytest.raises(Stopped):
        simulate(asked, tmp_path / "stopped", stop=lambda: True)
    again = resume(tmp_path / "stopped")
    assert torch.equal(again.adapters.flat, whole.adapters.flat)
    assert again.summary["bytes_sent"] == whole.summary["bytes_sent"]


def test_other_tasks_are_refused(config):
    with pytest.raises(ConfigError, match="label_prior=uniform adjusts class logits, which task.kind=regression"):
        config("bert", "task.kind=regression", "data.label=score", "train.label_prior=uniform")


def test_a_disconnected_network_is_refused_before_anything_is_loaded(config):
    words = ("topology.kind=edges", "topology.edges=[[0, 1], [2, 3]]", "topology.allow_disconnected=true")
    with pytest.raises(CompositionError, match="no client hears of all"):
        compose(config("bert", *words, "train.label_prior=pooled"))


def test_a_site_with_rows_of_its_own_has_its_own_counts(config):
    words = ("partition.kind=own", "task.labels=[class0, class1, class2]", "train.label_prior=uniform")
    federation = compose(config("bert", *words), clients=[2])
    (rule,) = federation.learner.loss_rules
    assert rule.counts.tolist() == federation.partition.counts.tolist() == [[18, 18, 18]]
