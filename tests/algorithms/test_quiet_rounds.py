"""Rounds without training at the end of a run: every method goes on mixing as it should, or refuses them."""

import json

import pytest
import torch

from cases import ROW_METHODS, others_slow
from peerlora.algorithms import REGISTRY, describe_algorithms
from peerlora.cli.progress import Progress
from peerlora.errors import CompositionError
from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.metrics import select_events
from peerlora.runs.report import write_report
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.plan import plan
from peerlora.runtime.simulate import build_rounds, simulate

QUIET = [name for name, kind in ROW_METHODS.items() if kind.traits.quiet_refusal() is None]
PRODUCTS = ("decaf", "flexlora", "fedhl", "lora-fair")
"""Their exchange keeps the mean of products, as far as the rank allows: on the complete graph, where all are equal."""
NO_MEAN = ("hetlora", "fedrot-lora", "cached-dfl")
"""Their exchange weighs by norms, turns factors or averages old ones: it keeps no mean while clients train either."""
APART = ("local", "fedsa-lora")
"""They leave clients apart on purpose."""
SKEWED = ["partition.kind=dirichlet", "partition.concentration=0.3"]
TRAINING, ROUNDS = 6, 12


def words(method, graph="ring"):
    own = REGISTRY[method].traits.train_defaults
    steps = own.get("local_steps", 2)
    rate = 1.0 if own.get("optimizer") == "sgd" else 0.02
    budget = [f"train.rounds={ROUNDS}", "train.quiet=0.5", f"train.lr={rate}", f"train.local_steps={steps}"]
    return [f"algorithm.name={method}", f"topology.kind={graph}", *budget, *SKEWED]


def whole(x):
    """All that each client adds to its base: the products with what was merged, and the head."""
    found = [x.select("head").flat]
    for layer, A in x.A.items():
        update = x.scaling[:, None, None].to(A) * (x.B[layer] @ A)
        if x.merged is not None and not x.merged.layers[layer].empty:
            update = update + x.merged.layers[layer].weight()
        found.append(update.flatten(1))
    return torch.cat(found, 1)


def spread(values):
    """Mean squared distance from the mean of the clients."""
    return float((values - values.mean(0)).square().sum(1).mean())


def states(federation):
    """The state after the last round of training, and after every quiet round."""
    rounds, found = build_rounds(federation), []
    state = federation.algorithm.start(federation.start, federation.exchange)
    for t in range(ROUNDS):
        state, told = rounds.advance(t, state)
        assert t < TRAINING or all(loss != loss for loss in told.losses)
        found.append(state)
    return found[TRAINING - 1 :]


@pytest.mark.parametrize("graph", ["ring", "complete"])
@pytest.mark.parametrize("method", QUIET)
def test_quiet_rounds_bring_clients_together_where_their_mean_is(config, method, graph):
    federation = compose(config("bert", *words(method, graph)))
    passed = states(federation)
    models = [federation.algorithm.model(state) for state in passed]
    apart = [spread(whole(x)) for x in models]
    assert apart[-1] <= apart[0] and (method in APART or apart[-1] < 0.2 * apart[0] or apart[0] < 1e-25)
    if method in NO_MEAN or (method in PRODUCTS and graph != "complete"):
        return
    values = [whole(x) if method in PRODUCTS else x.flat for x in models]
    weights = passed[0].c if method == "flood" else torch.ones(4).double()
    means = [(weights[:, None] * each).sum(0) / weights.sum() for each in values]
    assert max((mean - means[0]).abs().max() for mean in means) < 1e-12
    assert values[0].abs().max() > 0.05, "nothing was trained"


@pytest.mark.parametrize("codec", others_slow(["top-k", "sign", "qsgd", "cast"], ["top-k"]))
def test_a_codec_goes_on_in_quiet_rounds(config, codec):
    federation = compose(config("bert", *words("dec-lora"), f"exchange.codec={codec}", "train.dtype=fp32"))
    models = states(federation)
    assert spread(models[-1].flat) < 0.5 * spread(models[0].flat)
    assert (models[-1].flat.mean(0) - models[0].flat.mean(0)).abs().max() < 1e-5


def test_who_cannot_refuses_them_before_anything_is_loaded(config):
    refusing = set(ROW_METHODS) - set(QUIET)
    assert refusing == {"flora", "consensus-admm", "aedfl", "ad-psgd"}
    for method in refusing:
        with pytest.raises(CompositionError, match=f"{method} cannot end with .*train.quiet=0.5.*; use train.quiet=0"):
            plan(config("bert", f"algorithm.name={method}", "train.quiet=0.5"))
        plan(config("bert", f"algorithm.name={method}", "train.quiet=0.01"))  # none of three rounds
    told = {name: facts["not_with"].get("train.quiet") for name, facts in describe_algorithms().items()}
    assert {name for name, reason in told.items() if reason} == refusing


@pytest.mark.parametrize("method", others_slow(["d2", "dfedadmm", "push-diging", "k-gt"], ["d2", "dfedadmm"]))
def test_what_a_method_remembers_of_training_is_held(config, method):
    federation = compose(config("bert", *words(method)))
    first, *later = states(federation)
    name = {"d2": "psi", "dfedadmm": "dual", "push-diging": "g", "k-gt": "c"}[method]
    held = getattr(first, name)
    assert held.abs().max() > 1e-6
    for state in later:
        assert (getattr(state, name) - held).abs().max() < 1e-15


def test_a_block_of_rac_lora_is_not_merged_in_a_quiet_round(config):
    federation = compose(config("bert", *words("rac-lora", "complete"), "algorithm.chain=3", "algorithm.settle=0"))
    first, *later = states(federation)  # the third block would begin at round 6
    assert all(torch.equal(state.select("A").flat, first.select("A").flat) for state in later)


def test_a_quiet_round_takes_no_computing_time_but_the_exchange_its_own(config):
    clock = ["clock.step=3", "clock.speed=[1, 0.5, 2, 1]", "clock.delay=0.25"]
    federation = compose(config("bert", "algorithm.name=dec-lora", "train.rounds=4", "train.quiet=0.5", *clock))
    rounds, state = build_rounds(federation), federation.start
    moments = []
    for t in range(4):
        state, told = rounds.advance(t, state)
        moments.append(rounds.virtual_seconds)
        assert told.absent == [] and told.bytes_sent > 0
    assert moments == pytest.approx([12.25, 24.5, 24.75, 25.0], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [["algorithm.depth=deadline", "algorithm.deadline=3.0"], []])
def test_salf_mixes_every_layer_in_a_quiet_round(config, depth):
    clock = ["clock.speed=[1, 0.5, 1, 1]"] if depth else []
    federation = compose(config("bert", *words("salf", "complete"), *depth, *clock))
    _, *later = states(federation)
    assert all(spread(x.flat) < 1e-28 for x in later)


@pytest.mark.usefixtures("drawn")
def test_a_run_tells_that_nobody_trained(config, tmp_path):
    schedule = ["train.schedule=cosine", "train.rounds=4", "train.quiet=0.5", "eval.every=1", "eval.rows=4"]
    shown, lines = Progress(), []
    chosen = config("bert", "algorithm.name=dec-lora", *schedule)

    def listen(event):
        shown(event)
        if isinstance(event, RoundDone):
            lines.append(shown._facts(event)["loss"])

    result = simulate(chosen, tmp_path / "run", sinks=[listen], report=False)
    done = select_events(read_events(result.run), RoundDone)
    assert [all(loss != loss for loss in each.loss) for each in done] == [False, False, True, True]
    assert lines[2:] == ["-", "-"] and "-" not in lines[:2]
    raw = [json.loads(line) for line in (result.run / "events.jsonl").read_text().splitlines()]
    assert [each["loss"] for each in raw if each["type"] == "RoundDone"][2:] == [[None] * 4] * 2
    assert [each.measures.get("learning_rate") for each in done] == [0.01, pytest.approx(0.005), None, None]
    json.dumps(result.summary, allow_nan=False)
    assert select_events(read_events(result.run), Evaluated)[-1].averaged_loss > 0
    page = write_report(result.run).read_text()
    assert "Learning rate" in page and page.count("<svg") > 5
    constant = simulate(config("bert", "algorithm.name=dec-lora"), tmp_path / "constant", report=False).run
    assert all("learning_rate" not in each.measures for each in select_events(read_events(constant), RoundDone))
    assert select_events(read_events(constant), RunStarted)
    assert "Learning rate" not in write_report(constant).read_text()
