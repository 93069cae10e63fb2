from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.aedfl import AEDFLState, combined, packed
from peerlora.config.loading import parse_spec
from peerlora.errors import ConfigError
from peerlora.exchange.base import Message
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.lora.rank_components import component_norms, coordinates, largest
from peerlora.network.protocol.wire import encoded_bytes
from peerlora.runtime.asynchronous import AsynchronousRounds
from peerlora.runtime.compose import compose
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("one", 3, 2), LayerSpec("two", 2, 4)), rank=4, alpha=2.0, head=(("w", (2, 2)),))


def adapters(clients, seed=0, spec=SPEC):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(clients, spec.parameters, generator=generator, dtype=torch.float64)
    return Adapters(spec, flat, torch.full((clients,), spec.rank))


def message(payload, sender=1, staleness=0):
    return Message(sender, payload, 1, 0, staleness)


FORMS = ["polynomial", "fedasmu"]


@pytest.mark.parametrize("form", FORMS)
@given(
    sigma=st.floats(0, 5),
    taus=st.lists(st.integers(0, 60), min_size=0, max_size=7, unique=True),
    version=st.integers(0, 100),
)
def test_rows_sum_to_one_with_no_negative_weight_however_stale(form, sigma, taus, version):
    """What messages take is at most the links' share of W's row, so the own weight is at least W's own."""
    algorithm = build_algorithm("aedfl", {"sigma": sigma, "staleness": form})
    W = build_topology(parse_spec("complete"), 8, 0).at(0).W
    mail = SimpleNamespace(weights=W[0], version=version)
    received = [message({}, sender, tau) for sender, tau in enumerate(taus, start=1)]
    weights = algorithm.weights(received, mail)
    assert all(weight >= 0 for weight in weights)
    assert 1 - sum(weights) >= W[0, 0] - 1e-12
    # The row that combine applies, read off unit vectors: models e_0 (own) to e_n (messages).
    size = len(weights) + 1
    spec = AdapterSpec((LayerSpec("one", size, 1),), rank=1, alpha=1.0)
    flat = torch.zeros(size, spec.parameters, dtype=torch.float64)
    flat[:, :size] = torch.eye(size, dtype=torch.float64)
    x, held = Adapters(spec, flat, torch.ones(size, dtype=torch.int64)), torch.ones(1, 1, dtype=torch.bool)
    letters = [
        message(packed(x.rows([place]), held, torch.zeros(1, 1, dtype=torch.float64)), place, tau)
        for place, tau in enumerate(taus, start=1)
    ]
    state = AEDFLState(x.rows([0]), held, torch.zeros(1, 1, dtype=torch.float64))
    row = combined(state, letters, weights).x.flat[0, :size]
    assert abs(float(row.sum()) - 1) < 1e-12
    assert row[1:].tolist() == pytest.approx(weights)


@pytest.mark.parametrize("form", FORMS)
@given(sigma=st.floats(0, 5), tau=st.integers(0, 60), version=st.integers(0, 100))
def test_weight_does_not_grow_with_staleness(form, sigma, tau, version):
    algorithm = build_algorithm("aedfl", {"sigma": sigma, "staleness": form})
    assert 0 < algorithm.xi(tau + 1, version) <= algorithm.xi(tau, version) <= 1


def test_weights_by_hand():
    polynomial = build_algorithm("aedfl", {"sigma": 0.5})
    assert [polynomial.xi(tau, 9) for tau in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])
    fedasmu = build_algorithm("aedfl", {"sigma": 0.5, "staleness": "fedasmu"})
    # t = 9, tau = 3: s = 1/3 * 1/2 = 1/6, s / (1 + s) = 1/7
    assert fedasmu.xi(3, 9) == pytest.approx(1 / 7)
    assert fedasmu.xi(0, 0) == pytest.approx(1 / 2)


class Mail:
    """A mailbox that holds these messages."""

    def __init__(self, messages, version=1, clients=4):
        self.messages, self.version, self.pushed, self.client = messages, version, [], 0
        self.weights = np.full(clients, 1 / clients)

    def poll(self):
        found, self.messages = self.messages, []
        return found

    def push(self, payload, to=None):
        self.pushed.append(payload)


@pytest.mark.parametrize(("cutoff", "used"), [(2, [0, 2]), (0, [0]), (None, [0, 2, 3])])
def test_what_is_staler_than_the_cutoff_is_dropped(cutoff, used):
    algorithm = build_algorithm("aedfl", {"cutoff": cutoff, "sigma": 0.0, "density": 1.0})
    x = adapters(4)
    state = algorithm.start(x.rows([0]), None)
    scores = torch.zeros(1, 8, dtype=torch.float64)
    mail = Mail([message(packed(x.rows([i + 1]), state.held, scores), i + 1, tau) for i, tau in enumerate((0, 2, 3))])
    found = algorithm.before_job(state, mail)
    moved = sum(0.25 * (x.flat[i + 1] - x.flat[0]) for i, tau in enumerate((0, 2, 3)) if tau in used)
    assert (found.x.flat[0] - (x.flat[0] + moved)).abs().max() < 1e-15


# --- sparse training


def test_the_score_of_a_component_is_the_norm_of_its_rank_one_part():
    x = adapters(2)
    found = component_norms(x)
    assert found.shape == (2, 8)
    for layer, first in (("one", 0), ("two", 4)):
        for k in range(4):
            part = x.B[layer][1][:, k : k + 1] @ x.A[layer][1][k : k + 1]
            assert float(found[1, first + k]) == pytest.approx(float(part.norm()))


def test_the_largest_are_held_and_of_equal_ones_the_first():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert largest(scores, 2).tolist() == [[False, True, False, True], [True, True, False, False]]


def test_coordinates_are_rows_of_A_columns_of_B_and_the_whole_head():
    held = torch.tensor([[True, False, False, True, False, True, False, False]])
    x = Adapters(SPEC, coordinates(SPEC, held).double(), torch.tensor([4]))
    assert x.A["one"][0, :, 0].tolist() == [1, 0, 0, 1] and x.B["one"][0, 0].tolist() == [1, 0, 0, 1]
    assert x.A["two"][0, :, 0].tolist() == [0, 1, 0, 0] and x.B["two"][0, 0].tolist() == [0, 1, 0, 0]
    assert (x.head["w"] == 1).all()


@given(density=st.floats(0.01, 1), ramp=st.integers(0, 30))
def test_the_density_falls_from_one_to_its_end_and_never_rises(density, ramp):
    algorithm = build_algorithm("aedfl", {"density": density, "ramp": ramp})
    counts = [algorithm.kept(job, SPEC) for job in range(ramp + 5)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 8 or ramp == 0
    assert set(counts[ramp:]) == {max(1, round(8 * density))}


def test_bytes_are_in_proportion_to_density():
    """The values of the held components, beside a header and a byte and a score of every component."""
    wide = AdapterSpec((LayerSpec("one", 300, 200), LayerSpec("two", 100, 400)), rank=10, alpha=2.0)
    x = Adapters(wide, torch.zeros(1, wide.parameters), torch.tensor([10]))
    algorithm = build_algorithm("aedfl", {"density": 0.1, "ramp": 9})
    sizes = [encoded_bytes(algorithm.message(x, job)) for job in range(12)]
    shares = [algorithm.kept(job, wide) / 20 for job in range(12)]
    for size, share in zip(sizes, shares, strict=True):
        held = torch.zeros(1, 20, dtype=torch.bool)
        held[:, : round(share * 20)] = True
        sent = packed(x, held, torch.zeros(1, 20))
        assert size == encoded_bytes({name: (tuple(leaf.shape), leaf.dtype) for name, leaf in sent.items()})
        assert size == pytest.approx(share * 4 * wide.parameters, abs=400)
    assert sizes[0] > 9 * sizes[-1]


def test_what_is_not_held_gets_no_local_update_and_holders_move_it(config):
    """Through the real Learner with weight decay: masked coordinates are the same to the bit after a job."""
    words = ["algorithm.name=aedfl", "algorithm.density=0.3", "algorithm.ramp=0", "algorithm.refresh=1"]
    federation = compose(config("bert", *words, "train.weight_decay=0.1", "train.local_steps=3"))
    assert federation.clock is not None
    runner = AsynchronousRounds(federation.algorithm, federation.learner, federation.exchange, federation.clock)  # pyright: ignore
    state = federation.algorithm.start(federation.start, federation.exchange)
    state, _ = runner.advance(0, state)
    for t in range(1, 4):
        assert runner.start is not None and runner.result is not None
        free = federation.algorithm.coordinates(state)  # pyright: ignore
        began = runner.start.flat.clone()
        state, _ = runner.advance(t, state)
        ended = runner.result.flat
        assert free is not None and (free.sum(1) > 0).all() and (~free).any(1).all()
        assert torch.equal(ended[~free], began[~free])
        assert (ended[free] != began[free]).float().mean() > 0.5


def test_coordinates_are_averaged_over_their_holders_only():
    x = adapters(2)
    held = torch.tensor([[True] * 4 + [False] * 4])
    scores = torch.arange(8.0, dtype=torch.float64)[None]
    theirs = message(packed(x.rows([1]), held, scores))
    own = AEDFLState(x.rows([0]), ~held, torch.zeros(1, 8, dtype=torch.float64))
    found = combined(own, [theirs], [0.25])
    sent = coordinates(SPEC, held)[0]
    assert torch.equal(found.x.flat[0, ~sent], x.flat[0, ~sent]), "what the sender does not hold stays"
    assert (found.x.flat[0, sent] - (0.75 * x.flat[0] + 0.25 * x.flat[1])[sent]).abs().max() < 1e-15
    assert torch.equal(found.scores, 0.25 * scores), "scores are averaged whatever is held"


def test_neighbours_that_hear_each_other_come_to_hold_the_same():
    """Own scores differ; after averages with equal weights the cut is the same."""
    algorithm = build_algorithm("aedfl", {"density": 0.5, "ramp": 0, "refresh": 1})
    x = adapters(2, seed=5)
    states = [algorithm.start(x.rows([i]), None) for i in (0, 1)]
    letters = []
    for i, state in enumerate(states):
        mail = Mail([], clients=2)
        states[i] = algorithm.on_job(state, x.rows([i]), x.rows([i]), mail)
        letters.append(mail.pushed[0])
    apart = [largest(state.scores, 4) for state in states]
    found = [algorithm.before_job(states[i], Mail([message(letters[1 - i], 1 - i)], clients=2)) for i in (0, 1)]
    assert not torch.equal(apart[0], apart[1]) and torch.equal(found[0].held, found[1].held)


@pytest.mark.parametrize("head", ["mixed", "private", "frozen"])
def test_a_private_head_is_not_sent(config, head):
    federation = compose(config("bert", "algorithm.name=aedfl", f"adapter.head={head}"))
    state = federation.algorithm.start(federation.start, federation.exchange)
    x = federation.start.rows([0])
    sent = packed(x, state.held[:1], state.scores[:1])
    assert len(sent["values"]) == x.spec.shared.stop
    told = federation.algorithm.message(x)
    assert told == {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in sent.items()}


REFUSED = [
    ({"sigma": -0.1}, "expected at least 0, else stale messages"),
    ({"cutoff": -1}, "expected at least 0"),
    ({"density": 0.0}, "expected a density above 0"),
    ({"density": 1.1}, "density=1.1"),
    ({"ramp": -1}, "ramp=-1"),
    ({"refresh": 0}, "refresh=0"),
    ({"interval": -1}, "expected a number of jobs, or 0 to train both factors"),
    ({"staleness": "none"}, "expected one of polynomial, fedasmu"),
    ({"cutoff": 1.5}, "algorithm.cutoff"),
]


@pytest.mark.parametrize(("parameters", "told"), REFUSED)
def test_bad_settings_are_refused(parameters, told):
    with pytest.raises(ConfigError, match=told):
        build_algorithm("aedfl", parameters)


# --- what comes from elsewhere


@given(st.lists(st.booleans(), min_size=8, max_size=8))
def test_every_message_that_is_sent_has_the_form_that_is_taken(held):
    algorithm, x = build_algorithm("aedfl", {}), adapters(1)
    payload = packed(x, torch.tensor([held]), component_norms(x))
    claimed = {name: tuple(leaf.shape) for name, leaf in payload.items()}
    found = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in payload.items()}
    assert algorithm.incoming(x, claimed) == found and algorithm.flaw(x, payload) is None
    short = payload | {"values": payload["values"][1:]}
    told = f"{len(payload['values']) - 1} values given, {len(payload['values'])} expected"
    assert algorithm.flaw(x, short).startswith(told)


def test_no_message_is_larger_than_the_one_that_holds_everything():
    algorithm, x = build_algorithm("aedfl", {}), adapters(1)
    assert algorithm.incoming(x, {}) == algorithm.message(x, 0)
    assert algorithm.incoming(x, {"values": (10**9,)}) == algorithm.message(x, 0)
