"""SALF: the correction in closed form, masked mixing, depths, and bytes."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from quadratics import adapters, exchange

from cases import others_slow
from peerlora.algorithms import build_algorithm
from peerlora.algorithms.salf import SALF, mix_reached, neighbourhood_mean
from peerlora.config.loading import load_config
from peerlora.errors import CompositionError, ConfigError
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.lora.layer_order import by_column, depth_of, layer_numbers, reached_layers
from peerlora.network.protocol.wire import encoded_bytes
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose, opening_state
from peerlora.runtime.plan import plan
from peerlora.runtime.simulate import simulate
from peerlora.train.backward_depth import BackwardDepth
from peerlora.train.base import LocalPlan

pytestmark = pytest.mark.usefixtures("no_reports")

SGD = ("train.optimizer=sgd", "train.lr=0.1", "train.local_steps=1")


def three_layers(clients, private=False):
    """Random values: blocks 0 and 1, and a head, so L = 3."""
    spec = AdapterSpec((LayerSpec("h.0.q", 2, 3), LayerSpec("h.1.q", 2, 3)), 1, 1.0, (("head.weight", (2,)),), private)
    generator = torch.Generator().manual_seed(4)
    flat = torch.randn(clients, spec.parameters, generator=generator, dtype=torch.float64)
    return Adapters(spec, flat, torch.ones(clients, dtype=torch.int64))


def rounds(config, count=3):
    federation = compose(config)
    x = opening_state(federation)
    for t in range(count):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            x = federation.algorithm.round(t, x, federation.learner, federation.exchange)
    return federation, x


# --- the correction


@pytest.mark.parametrize(("q", "released", "plain"), [(2 / 3, 0.469, None), (1 / 3, 0.735, 0.361)])
def test_the_servers_rule_is_unbiased_where_others_are_not(q, released, plain):
    """Four clients whose layer moved from 1 to a mean of 0.203: all 16 outcomes, weighted by their chance."""
    peers = exchange("complete", 4)
    before = replace(adapters(4), flat=torch.ones(4, 2, dtype=torch.float64))
    values = torch.tensor([0.9, -0.4, 0.5, -0.188], dtype=torch.float64)
    assert float(values.mean()) == pytest.approx(0.203)
    after = replace(before, flat=values[:, None].expand(4, 2).clone())
    chance, corrected, alone, theirs = 0.0, 0.0, 0.0, 0.0
    for reached in product((False, True), repeat=4):
        mask = torch.tensor(reached)
        p = float(np.prod([q if own else 1 - q for own in reached]))
        kept = replace(after, flat=torch.where(mask[:, None], after.flat, before.flat))
        found = neighbourhood_mean(before, kept, mask[:, None], torch.tensor([q], dtype=torch.float64), peers).flat
        assert float((found - found[0]).abs().max()) < 1e-12
        chance += p
        corrected += p * float(found[0, 0])
        alone += p * (float(values[mask].mean()) if any(reached) else 1.0)
        theirs += p * float(torch.where(mask, values, 1.0).mean())
    assert chance == pytest.approx(1) and corrected == pytest.approx(0.203, abs=1e-9)
    assert theirs == pytest.approx(released, abs=1e-3)
    assert plain is None or alone == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("q", [0.9, 2 / 3, 1 / 3, 0.1])
def test_the_variance_of_the_servers_rule_grows_with_the_chance_that_nobody_reaches_a_layer(q):
    """Over all 16 outcomes: ``move^2 ((1 + p) / (1 - p) - 1) / 2`` where all moved alike, else the paper's bound."""
    peers, before, p = exchange("complete", 4), adapters(4), (1 - q) ** 4
    for moves in ([1.0, 1.0, 1.0, 1.0], [0.9, -0.4, 0.5, -0.188]):
        values = torch.tensor(moves, dtype=torch.float64)
        second = 0.0
        for reached in product((False, True), repeat=4):
            mask = torch.tensor(reached)[:, None]
            kept = replace(before, flat=torch.where(mask, values[:, None], 0.0).expand(4, 2).clone())
            found = neighbourhood_mean(before, kept, mask, torch.tensor([q], dtype=torch.float64), peers).flat[0, 0]
            second += float(np.prod([q if own else 1 - q for own in reached])) * float(found) ** 2
        variance = second - float(values.mean()) ** 2  # the rule is unbiased
        if len(set(moves)) == 1:
            assert variance == pytest.approx(((1 + p) / (1 - p) - 1) / 2, rel=1e-9)
        assert variance <= 4 * 4 / 3 * float(values.abs().max()) ** 2 * (1 + p) / (1 - p)


def test_inverse_chances_make_the_expected_update_the_full_one(config):
    federation = compose(config("bert", *SGD, "algorithm.name=salf", "algorithm.stragglers=1.0"))
    x = federation.start
    x = replace(x, flat=x.flat + 0.1 * torch.randn(x.flat.shape, generator=torch.Generator().manual_seed(1)).double())
    full = federation.learner.fit(x, "AB").flat
    q = federation.algorithm.chances(3)
    assert q.tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    factor = (1 / q).expand(4, -1)
    found = [
        federation.learner.fit(x, LocalPlan("AB", depth=BackwardDepth(torch.tensor([d] * 4), factor))).flat
        for d in (1, 2, 3)
    ]
    assert float((sum(found) / 3 - full).abs().max()) < 1e-12
    plain = [
        federation.learner.fit(x, LocalPlan("AB", depth=BackwardDepth(torch.tensor([d] * 4), factor * 0 + 1))).flat
        for d in (1, 2, 3)
    ]
    shrunk = x.flat + by_column(x.spec, q.expand(4, -1)) * (full - x.flat)
    assert float((sum(plain) / 3 - shrunk).abs().max()) < 1e-12 and float((shrunk - full).abs().max()) > 1e-4


@pytest.mark.parametrize("settings", [{"stragglers": 0.6}, {"depth": "poisson", "rate": 1.5}])
def test_draws_follow_the_stated_chances(settings):
    algorithm, peers = SALF(**settings), exchange("ring", 5)
    found = []
    for t in range(2000):
        peers.begin(t)
        found.append(algorithm.depths(4, None, peers))
    reached = reached_layers(torch.cat(found), 4).double().mean(0)
    assert float((reached - algorithm.chances(4)).abs().max()) < 0.02
    assert (torch.cat(found).min() == 0) == ("depth" in settings)


def test_a_cap_bounds_the_factor(config):
    words = ("algorithm.name=salf", "algorithm.stragglers=1.0", *SGD, "topology=complete")
    factors = {}
    for cap in (1.0, 1.5, 10.0):
        federation = compose(config("bert", *words, f"algorithm.cap={cap}"))
        seen = []
        fit = federation.learner.fit

        def noting(x, plan, fit=fit, seen=seen):
            seen.append(plan.depth.factor[0])
            return fit(x, plan)

        federation.learner.fit = noting
        federation.algorithm.round(0, federation.start, federation.learner, federation.exchange)
        factors[cap] = seen[0].tolist()
    assert factors[1.0] == [1, 1, 1] and factors[1.5] == pytest.approx([1, 1.5, 1.5])
    assert factors[10.0] == pytest.approx([1, 1.5, 3])


# --- mixing


@pytest.mark.parametrize("private", [False, True])
def test_masked_mixing_is_a_doubly_stochastic_matrix_per_layer(private):
    x, peers = three_layers(6, private), exchange("ring", 6)
    depth = torch.tensor([0, 1, 2, 3, 3, 2])
    reached = reached_layers(depth, 3)
    found = mix_reached(x, reached, peers)
    expected = x.flat.clone()
    for slot, number in zip(x.spec.slots, layer_numbers(x.spec), strict=True):
        own = reached[:, number - 1].double()
        W = torch.from_numpy(peers.graph.W) * own[:, None] * own
        W += torch.diag(1 - W.sum(1))
        assert torch.allclose(W.sum(0), torch.ones(6).double())
        if not (private and slot.block == "head"):
            expected[:, slot.start : slot.stop] = W @ x.flat[:, slot.start : slot.stop]
    assert float((found.flat - expected).abs().max()) < 1e-12
    assert torch.equal(found.flat[0], x.flat[0]), "who reached nothing takes no part"
    assert float((found.flat.mean(0) - x.flat.mean(0)).abs().max()) < 1e-12


def test_bytes_are_those_of_the_reached_layers():
    x, peers = three_layers(4), exchange("path", 4)
    depth = torch.tensor([0, 1, 2, 3])
    mix_reached(x, reached_layers(depth, 3), peers)
    expected = 0
    for client, (own, links) in enumerate(zip(depth.tolist(), peers.graph.degrees, strict=True)):
        schema = {".reached": ((3,), torch.float64)}
        for slot, number in zip(x.spec.slots, layer_numbers(x.spec), strict=True):
            if number <= own:
                schema[f".layers{slot.block}:{slot.name}"] = (slot.shape, torch.float64)
        expected += int(links) * encoded_bytes(schema)
        assert len(schema) == 1 + [0, 1, 3, 5][client]
    assert peers.stats.bytes_sent == expected


def test_a_layer_that_nobody_near_has_reached_keeps_its_old_value():
    peers, before = exchange("path", 3), three_layers(3)
    after = replace(before, flat=before.flat + 1)
    reached = reached_layers(torch.tensor([1, 1, 3]), 3)
    after = replace(after, flat=torch.where(by_column(before.spec, reached), after.flat, before.flat))
    found = neighbourhood_mean(before, after, reached, torch.tensor([1.0, 0.7, 0.5], dtype=torch.float64), peers)
    lowest = by_column(before.spec, torch.tensor([[False, False, True]]))[0]
    assert torch.equal(found.flat[0, lowest], before.flat[0, lowest])
    p = 0.5**3  # client 1 has two neighbours, of which client 2 alone reached it
    expected = (after.flat[2, lowest] - p * before.flat[1, lowest]) / (1 - p)
    assert torch.allclose(found.flat[1, lowest], expected)


# --- whole rounds


@pytest.mark.parametrize("interval", ["null", "1"])
@pytest.mark.parametrize("words", [["algorithm.depth=deadline"], ["algorithm.stragglers=0.0"]])
def test_without_an_end_it_is_the_host_algorithm_to_the_bit(config, interval, words):
    name = "dec-lora" if interval == "null" else "adf-lora"
    host = [f"algorithm.name={name}", *(["algorithm.interval=1"] if interval == "1" else []), "train.clip=1.0"]
    expected, x = rounds(config("bert", *host))
    found, y = rounds(config("bert", "algorithm.name=salf", f"algorithm.interval={interval}", *words, "train.clip=1.0"))
    assert torch.equal(y.flat, x.flat) and found.exchange.stats.bytes_sent == expected.exchange.stats.bytes_sent


@pytest.mark.parametrize("correction", ["ipw", "neighbourhood", "none"])
@pytest.mark.parametrize("interval", others_slow(["null", "2"], ["2"]))
def test_rounds_run_and_the_lowest_layers_move_least_often(config, correction, interval):
    words = [f"algorithm.correction={correction}", f"algorithm.interval={interval}", "algorithm.stragglers=1.0"]
    federation = compose(config("bert", "algorithm.name=salf", *words))
    fit, moved, depths = federation.learner.fit, [], []

    def noting(x, plan):
        trained = fit(x, plan)
        moved.append(layers_moved(x, trained))
        depths.append(plan.depth.depth)
        return trained

    federation.learner.fit = noting
    x = replace(federation.start, flat=federation.start.flat + 0.1)  # where B is zero, A has no gradient
    for t in range(4):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            x = federation.algorithm.round(t, x, federation.learner, federation.exchange)
    assert torch.equal(torch.cat(moved), reached_layers(torch.cat(depths), 3)), "what was reached moved, and no more"
    often = torch.cat(moved).sum(0).tolist()
    assert 16 == often[0] > often[1] > often[2] > 0
    full = rounds(config("bert", "algorithm.name=dec-lora"), 1)[0].exchange.stats.bytes_sent
    assert bool(x.flat.isfinite().all()) and 0 < federation.exchange.stats.bytes_sent < full


def layers_moved(before, after):
    """[client, layer]: whether anything of a layer is not what it was."""
    numbers = torch.zeros(before.spec.parameters, dtype=torch.int64)
    for slot, number in zip(before.spec.slots, layer_numbers(before.spec), strict=True):
        numbers[slot.start : slot.stop] = number
    changed = before.flat != after.flat
    return torch.stack([changed[:, numbers == l].any(1) for l in range(1, depth_of(before.spec) + 1)], 1)  # noqa: E741


@pytest.mark.parametrize("send", ["reached", "all"])
def test_with_the_last_step_alone_cut_the_steps_before_it_are_kept_at_home(config, send):
    words = ("algorithm.name=salf", "algorithm.steps=last", "algorithm.stragglers=1.0", "algorithm.correction=none")
    federation = compose(config("bert", *words, f"algorithm.send={send}", "train.local_steps=3"))
    x = replace(federation.start, flat=federation.start.flat + 0.1)
    depth = federation.algorithm.depths(3, federation.learner, federation.exchange)
    assert int(depth.min()) < 3, "somebody does not reach everything"
    with federation.learner.round(0):
        y = federation.algorithm.round(0, x, federation.learner, federation.exchange)
        assert bool(layers_moved(x, y).all()), "full steps have moved every layer of everybody"
        plain = compose(config("bert", "algorithm.name=dec-lora", "train.local_steps=2"))
        before_last = plain.learner.fit(x, "AB").flat
    below = ~by_column(x.spec, reached_layers(depth, 3))
    home = torch.isclose(y.flat, before_last, rtol=0, atol=1e-12)
    assert bool(home[below].all()) == (send == "reached")


def test_sending_everything_mixes_what_was_not_reached_too(config):
    federation, x = rounds(config("bert", "algorithm.name=salf", "algorithm.send=all", "algorithm.stragglers=1.0"))
    host, _ = rounds(config("bert", "algorithm.name=dec-lora"))
    assert federation.exchange.stats.bytes_sent == host.exchange.stats.bytes_sent
    assert federation.algorithm.message(x) == x.message()


def test_the_mean_over_clients_is_kept_by_every_exchange(config):
    federation = compose(config("bert", "algorithm.name=salf", "algorithm.stragglers=1.0"))
    x, fit, trained = federation.start, federation.learner.fit, []
    federation.learner.fit = lambda *words, **more: trained.append(fit(*words, **more)) or trained[-1]
    for t in range(3):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            x = federation.algorithm.round(t, x, federation.learner, federation.exchange)
        assert float((x.flat.mean(0) - trained[-1].flat.mean(0)).abs().max()) < 1e-12


def test_every_client_draws_the_same_wherever_it_lives():
    algorithm, peers = SALF(), exchange("ring", 6)
    everybody = algorithm.depths(5, None, peers)
    peers.clients = [4, 1]
    assert algorithm.depths(5, None, peers).tolist() == [everybody[4], everybody[1]]


# --- deadlines


CLOCK = ("clock.step=2.0", "clock.speed=[2.0, 1.0, 0.7, 0.1]")
LATE = ("algorithm.name=salf", "algorithm.depth=deadline", "algorithm.deadline=4.0", "train.local_steps=2")


def test_depths_follow_from_speed_and_deadline(config, tmp_path):
    asked = config("bert", *CLOCK, *LATE)
    federation = compose(asked)
    federation.learner.step_seconds = torch.tensor([1.0, 2.0, 2 / 0.7, 20.0], dtype=torch.float64)
    found = federation.algorithm.depths(3, federation.learner, federation.exchange)
    # 2 s a step: all of it, all of it, (0.7 - 0.5) / 0.5 of three layers, not even the forward pass
    assert found.tolist() == [3, 3, 1, 0]
    federation.learner.step_seconds = torch.tensor([4.0, 2.4, float("nan"), 3.0], dtype=torch.float64)
    assert federation.algorithm.depths(3, federation.learner, federation.exchange).tolist() == [0, 2, 0, 1]


def test_a_run_on_the_clock_waits_no_longer_than_the_deadline(config, tmp_path):
    result = simulate(config("bert", *CLOCK, *LATE), tmp_path / "run")
    import json

    lines = [json.loads(line) for line in (result.run / "events.jsonl").read_text().splitlines()]
    done = [line for line in lines if "virtual_seconds" in line and "bytes_sent" in line]
    assert [line["virtual_seconds"] for line in done] == pytest.approx([4.0, 8.0, 12.0])
    assert all(line["loss"][3] is None or np.isnan(line["loss"][3]) for line in done)
    start = compose(config("bert", *CLOCK, *LATE)).start
    assert torch.equal(result.adapters.flat[3], start.flat[3]), "the slowest never gets through a forward pass"
    assert not torch.equal(result.adapters.flat[2], start.flat[2])


@pytest.mark.parametrize(("speed", "send", "layers"), [(2.0, "reached", 3), (0.7, "reached", 1), (0.7, "all", 3)])
def test_the_upload_takes_what_is_sent(config, tmp_path, speed, send, layers):
    """All have one speed and two links, so a round lasts the deadline, if they need it, and one client's upload."""
    words = [*LATE, f"algorithm.send={send}", "clock.step=2.0", f"clock.speed={speed}", "clock.bandwidth=1000"]
    found = simulate(config("bert", *words, "train.rounds=1", "topology=ring"), tmp_path / "run")
    (done,) = select_events(read_events(found.run), RoundDone)
    assert done.virtual_seconds == pytest.approx(min(4.0, 2 * 2.0 / speed) + done.bytes_sent / 4 / 1000, abs=1e-6)
    sent = 4 * 2 * encoded_bytes(found.adapters.message())
    assert done.bytes_sent < 0.6 * sent if layers == 1 else done.bytes_sent >= sent


def test_enough_time_is_the_host_algorithm(config):
    words = [word for word in LATE if "deadline=4" not in word]
    federation = compose(config("bert", *CLOCK, *words, "algorithm.deadline=1000.0"))
    federation.learner.step_seconds = torch.full((4,), 20.0).double()
    x = federation.algorithm.round(0, federation.start, federation.learner, federation.exchange)
    host = compose(config("bert", "algorithm.name=dec-lora", "train.local_steps=2"))
    y = host.algorithm.round(0, host.start, host.learner, host.exchange)
    assert float((x.flat - y.flat).abs().max()) < 1e-12


@pytest.mark.parametrize("words", [[], ["clock.trace={path}"]])
def test_a_deadline_within_the_forward_passes_is_warned_of(config, tmp_path, words):
    """Two steps of 1 s of the fastest client have forward passes of 1 s in all."""
    trace = tmp_path / "trace.csv"
    trace.write_text("client,seconds,speed\n0,0,8.0\n")
    given = ["clients=4", "clock.step=1.0", "clock.speed=[0.5, 1, 0.1, 0.1]", *LATE[:2], LATE[3]]
    given += [word.format(path=trace) for word in words]
    (warning,) = plan(config("bert", *given, "algorithm.deadline=1.0")).warnings or (None,)
    if words:  # then speeds are the trace's
        assert warning is None
    else:
        assert warning.startswith("salf: algorithm.deadline=1: the forward passes")
        assert warning.endswith("so no client trains; give more than 1")
    assert plan(config("bert", *given, "algorithm.deadline=1.1")).warnings == ()


def test_a_deadline_without_a_clock_is_refused(config):
    with pytest.raises(CompositionError, match="salf: algorithm.deadline asks for.*section clock"):
        compose(config("bert", *LATE))


def test_a_one_way_graph_is_refused(config):
    words = ("topology.kind=directed-ring", "algorithm.name=salf")
    with pytest.raises(CompositionError, match="salf needs a topology whose mixing matrix is symmetric.*both ends"):
        compose(config("bert", *words))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"stragglers": 1.5}, "expected 0 to 1"),
        ({"cap": 0.5}, "at least 1"),
        ({"deadline": 3.0}, "together with depth=deadline"),
        ({"depth": "deadline", "deadline": -1.0}, "seconds above 0"),
        ({"depth": "deadline", "deadline": 1.0, "steps": "last"}, "steps=every"),
        ({"correction": "neighbourhood", "send": "all"}, "send=reached"),
        ({"correction": "neighbourhood", "steps": "last"}, "throw away the steps before the last; use steps=every"),
        ({"depth": "normal"}, "one of uniform, poisson, deadline"),
        ({"interval": 0}, "at least 1 round"),
    ],
)
def test_bad_settings_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        build_algorithm("salf", settings)


def test_the_message_names_what_may_come(config):
    federation = compose(config("bert", "algorithm.name=salf"))
    message = federation.algorithm.message(federation.start)
    layers = depth_of(federation.start.spec)
    assert message["reached"] == ((layers,), torch.float64) and len(message) == 1 + len(federation.start.message())
    assert load_config({"algorithm": "salf"}).algorithm.name == "salf"
