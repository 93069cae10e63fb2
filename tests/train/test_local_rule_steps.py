"""What a rule sees of a local step, and what the Learner makes of its answer."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from cases import others_slow
from peerlora.runtime.compose import compose
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import Ascent, DualProx, LocalStep, Recorded, plain
from peerlora.train.optim import norms

SGD = ["train.optimizer=sgd", "train.lr=0.5"]


def noisy(x, size=0.1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return replace(x, flat=x.flat + size * torch.randn(x.flat.shape, generator=generator, dtype=x.flat.dtype))


def random_like(x, seed=5):
    return torch.randn(x.flat.shape, generator=torch.Generator().manual_seed(seed), dtype=x.flat.dtype)


@dataclass
class Spy:
    """Notes what it sees and hands the gradient on."""

    looks: int = 1
    shift: float = 0.0
    seen: list = field(default_factory=list)

    def gradient(self, step):
        found = [step.gradient() for _ in range(self.looks)]
        if self.shift:
            step.gradient_at({block: torch.full_like(g, self.shift) for block, g in found[0].items()})
        self.seen.append((step, step.x.clone(), step.start.clone(), found))
        return found[-1]


def quadratic_step(H, x, blocks=("A", "B")):
    """A LocalStep on ``x'Hx / 2`` whose columns are divided evenly among the blocks."""
    width = x.shape[1] // len(blocks)
    active = {block: slice(i * width, (i + 1) * width) for i, block in enumerate(blocks)}

    def here():
        g = torch.einsum("cij,cj->ci", H, x)
        return {block: g[:, columns].clone() for block, columns in active.items()}

    return LocalStep(x, x.clone(), active, list(range(len(x))), here)


@pytest.fixture
def quadratic():
    draw = torch.Generator().manual_seed(0)
    M = torch.randn(3, 4, 4, generator=draw, dtype=torch.float64)
    return M @ M.mT + torch.eye(4), torch.randn(3, 4, generator=draw, dtype=torch.float64)


def together(gradients):
    return torch.cat(list(gradients.values()), 1)


# --- the gradient elsewhere


def test_a_look_elsewhere_leaves_x_as_it_was_to_the_bit(quadratic):
    H, x = quadratic
    before, step = x.clone(), quadratic_step(H, x)
    shift = {"A": torch.full((3, 2), 1e10, dtype=torch.float64), "B": torch.ones(3, 2, dtype=torch.float64)}
    found = together(step.gradient_at(shift))
    assert torch.equal(x, before)
    assert torch.allclose(found, torch.einsum("cij,cj->ci", H, before + together(shift)))


def test_the_ascent_step_has_length_rho_over_all_active_blocks(quadratic):
    H, x = quadratic
    step, moved = quadratic_step(H, x), []
    watched = replace(step, closure=lambda: moved.append(x.clone()) or step.closure())
    Ascent(0.3)(watched)
    assert (moved[1] - moved[0]).norm(dim=1) == pytest.approx([0.3] * 3, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_on_a_quadratic_the_second_gradient_is_known(quadratic, alpha):
    H, x = quadratic
    step = quadratic_step(H, x)
    g = together(step.gradient())
    second = g + 0.3 * torch.einsum("cij,cj->ci", H, g / g.norm(dim=1, keepdim=True))
    assert torch.allclose(together(Ascent(0.3, alpha)(step)), (1 - alpha) * g + alpha * second, rtol=1e-12)


@pytest.mark.parametrize(("rho", "alpha"), [(0.0, 1.0), (0.5, 0.0)])
def test_no_second_look_where_it_would_not_count(quadratic, rho, alpha):
    step, looks = quadratic_step(*quadratic), []
    found = Ascent(rho, alpha)(replace(step, closure=lambda: looks.append(1) or step.closure()))
    assert torch.equal(together(found), together(step.gradient())) and len(looks) == 1


def test_a_zero_gradient_gives_no_direction(quadratic):
    H, _ = quadratic
    found = together(Ascent(0.3)(quadratic_step(H, torch.zeros(3, 4, dtype=torch.float64))))
    assert torch.equal(found, torch.zeros(3, 4, dtype=torch.float64))


def test_the_terms_of_dual_prox_are_added_to_the_gradient(quadratic):
    H, x = quadratic
    step = quadratic_step(H, x)
    x += 1  # it has moved since the round began
    offset = torch.arange(24, dtype=torch.float64).view(6, 4)
    step = replace(step, clients=[2, 3, 4])
    pull = torch.arange(6, dtype=torch.float64)[:, None]
    expected = torch.einsum("cij,cj->ci", H, x) + offset[2:5] + pull[2:5]
    assert torch.allclose(together(DualProx(offset, pull).gradient(step)), expected)
    assert torch.allclose(together(DualProx(pull=2.0).gradient(step)), expected - offset[2:5] - pull[2:5] + 2)


def test_the_norm_runs_over_all_blocks():
    gradients = {"A": torch.tensor([[3.0, 0.0], [1.0, 0.0]]), "B": torch.tensor([[4.0], [0.0]])}
    assert norms(gradients).tolist() == [5.0, 1.0]


# --- rules in a Learner


REGULARISED = ["adapter.dropout=0.3", "model.dropout=0.2", "train.clip=0.01"]


@pytest.mark.parametrize("words", others_slow([[], SGD, REGULARISED], [2]))
@pytest.mark.parametrize("rule", [DualProx(), DualProx(oracle=Ascent(0.0)), Spy(looks=2), Spy(shift=0.7)])
def test_a_rule_that_changes_nothing_changes_no_bit(config, words, rule):
    chosen = config("bert", *words, "train.weight_decay=0.1")
    federation, alone = compose(chosen), compose(chosen)
    x = noisy(federation.start)
    for train in ("AB", "B"):
        with federation.learner.round(0) as ruled, alone.learner.round(0) as plain:
            assert torch.equal(federation.learner.fit(x, LocalPlan(train, rule)).flat, alone.learner.fit(x, train).flat)
        assert torch.equal(ruled.losses, plain.losses)


def test_a_rule_sees_the_minibatch_again_with_the_same_dropout(config):
    federation, spy = compose(config("bert", "adapter.dropout=0.5", "model.dropout=0.3")), Spy(looks=3)
    federation.learner.fit(noisy(federation.start), LocalPlan("AB", spy))
    for _, _, _, (first, *others) in spy.seen:
        for other in others:
            assert all(torch.equal(first[block], other[block]) for block in first)
    assert not torch.equal(spy.seen[0][3][0]["A"], spy.seen[1][3][0]["A"])


@pytest.mark.parametrize("block", [1, 3, 4])
def test_a_rule_sees_where_the_round_began_and_whose_rows_it_has(config, block):
    federation, spy = compose(config("bert", "train.local_steps=3", f"train.block={block}")), Spy()
    x = noisy(federation.start)
    federation.learner.fit(x, LocalPlan("B", spy))
    for step, now, start, (gradients,) in spy.seen:
        assert torch.equal(start, x.flat[step.clients]) and list(step.active) == list(gradients) == ["B", "head"]
        assert gradients["B"].shape == (len(now), x.spec.columns("B").stop - x.spec.columns("B").start)
        assert torch.equal(now[:, x.spec.columns("A")], start[:, x.spec.columns("A")])
    firsts = [now for step, now, start, _ in spy.seen if torch.equal(now, start)]
    assert sum(len(now) for now in firsts) == 4 and len(spy.seen) == 3 * len(firsts)
    assert [step.clients[-1] for step, *_ in spy.seen][-1] == 3


def test_a_step_under_a_rule_is_the_optimisers_on_the_corrected_gradient(config):
    chosen = config("bert", *SGD, "train.local_steps=1")
    federation = compose(chosen)
    x, offset, spy = noisy(federation.start), random_like(federation.start), Spy()
    found = federation.learner.fit(x, LocalPlan("A", DualProx(offset, pull=3.0)))
    compose(chosen).learner.fit(x, LocalPlan("A", spy))
    expected, columns = x.flat.clone(), {block: x.spec.columns(block) for block in ("A", "head")}
    for block, own in columns.items():
        expected[:, own] -= 0.5 * (spy.seen[0][3][0][block] + offset[:, own])
    assert (found.flat - expected).abs().max() < 1e-14


def test_clipping_sees_the_corrected_gradient(config):
    federation = compose(config("bert", *SGD, "train.local_steps=1", "train.clip=0.01"))
    x = noisy(federation.start)
    recorded = Recorded(DualProx(100 * random_like(x)), x.flat)
    moved = (federation.learner.fit(x, LocalPlan("AB", recorded)).flat - x.flat).norm(dim=1)
    assert moved == pytest.approx([0.5 * 0.01] * 4, rel=1e-6)
    assert (recorded.mean.norm(dim=1) > 100).all(), "what is recorded is raw"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_recorded_mean_is_that_of_all_local_steps(config, optimizer):
    federation = compose(config("bert", f"train.optimizer={optimizer}", "train.local_steps=3", "train.block=3"))
    x = noisy(federation.start)
    recorded, spy = Recorded(DualProx(), x.flat), Spy()
    after = federation.learner.fit(x, LocalPlan("B", recorded))
    federation.learner.fit(x, LocalPlan("B", spy))
    total = torch.zeros_like(x.flat)
    for step, _, _, (gradients,) in spy.seen:
        for block, g in gradients.items():
            total[step.clients, x.spec.columns(block)] += g / 3
    assert (recorded.mean - total).abs().max() < 1e-15
    assert not recorded.mean[:, x.spec.columns("A")].any(), "zero where nothing trained"
    if optimizer == "sgd":
        assert torch.allclose(x.flat - after.flat, 3 * federation.config.train.lr * recorded.mean)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_frozen_block_is_held_under_any_rule(config, optimizer):
    federation = compose(config("bert", f"train.optimizer={optimizer}", "train.weight_decay=0.1"))
    x = noisy(federation.start)
    found = federation.learner.fit(x, LocalPlan("B", DualProx(random_like(x), 1.0, Ascent(0.1))))
    assert torch.equal(found.select("A").flat, x.select("A").flat)
    assert not torch.equal(found.select("B").flat, x.select("B").flat)


@pytest.mark.parametrize("train", ["AB", "A"])
def test_rules_run_on_the_speed_paths(config, train):
    rule, found = {}, {}
    for fast in (True, False):
        federation = compose(config("bert", f"train.fast={fast}", "train.batch=[1, 3, 4, 2]"))
        x = noisy(federation.start)
        rule[fast] = Recorded(DualProx(random_like(x), 1.0, Ascent(0.1, 0.5)), x.flat)
        found[fast] = federation.learner.fit(x, LocalPlan(train, rule[fast]))
        assert (federation.paths["packed tokens"] is None) == fast
    assert (rule[True].mean - rule[False].mean).abs().max() < 1e-10
    assert (found[True].flat - found[False].flat).abs().max() < 1e-9


def test_clients_per_graph_do_not_change_what_a_rule_does(config):
    found = []
    for block in (1, 3, 4):
        federation = compose(config("bert", f"train.block={block}", "adapter.dropout=0.3"))
        x = noisy(federation.start)
        pull = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
        found.append(federation.learner.fit(x, LocalPlan("AB", DualProx(random_like(x), pull, Ascent(0.1)))).flat)
    assert max(float((other - found[0]).abs().max()) for other in found[1:]) < 1e-12


def test_the_plain_gradient_is_an_oracle_too(quadratic):
    step = quadratic_step(*quadratic)
    assert torch.equal(together(plain(step)), together(step.gradient()))


def test_the_rule_of_the_guide_works(config):
    """docs/python.md, a local rule of your own."""

    @dataclass(frozen=True)
    class TowardsZero:
        strength: float

        def gradient(self, step):
            return {block: g + self.strength * step.x[:, step.active[block]] for block, g in step.gradient().items()}

    federation = compose(config("bert", *SGD, "train.local_steps=1"))
    x = noisy(federation.start)
    plainly = federation.learner.fit(x, "AB").flat
    assert torch.allclose(
        federation.learner.fit(x, LocalPlan("AB", TowardsZero(0.01))).flat, plainly - 0.5 * 0.01 * x.flat
    )
