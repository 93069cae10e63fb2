import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.ad_psgd import ADPSGDState, roles
from peerlora.config.loading import parse_spec
from peerlora.errors import ConfigError
from peerlora.exchange.base import Message
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.network.protocol.wire import encoded_bytes
from peerlora.runtime.compose import compose
from peerlora.topology.graphs import components
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("one", 3, 2),), rank=2, alpha=2.0, head=(("w", (2, 2)),), private_head=True)
AVERAGE = build_algorithm("ad-psgd", {})


def adapters(clients, seed=0):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(clients, SPEC.parameters, generator=generator, dtype=torch.float64)
    return Adapters(SPEC, flat, torch.full((clients,), SPEC.rank))


class Mail:
    """One client's mailbox, filled by hand."""

    def __init__(self, client, version=1):
        self.client, self.version, self.waiting, self.pushed = client, version, [], []
        self.weights = np.ones(1)

    def poll(self):
        found, self.waiting = self.waiting, []
        return found

    def push(self, payload, to=None):
        self.pushed.append((payload, to))

    def random(self, purpose):
        return np.random.default_rng(0)


def client(x, number, partners=(), asked=-1):
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[:, list(partners)] = True
    return ADPSGDState(x.rows([number]), mask, torch.tensor([asked]))


def test_one_average_by_its_two_messages():
    x = adapters(2)
    shared, total = x.spec.shared, x.flat.sum(0)
    active, passive, mail, theirs = client(x, 0, [1]), client(x, 1), Mail(0), Mail(1)
    active = AVERAGE.on_job(active, x.rows([0]), x.rows([0]), mail)
    ((question, to),) = mail.pushed
    assert to == [1] and torch.equal(question["x"], x.flat[0, shared]) and int(active.asked) == 1
    theirs.waiting = [Message(0, question, 1, 0)]
    passive = AVERAGE.on_message(passive, theirs)
    ((answer, back),) = theirs.pushed
    mail.waiting = [Message(1, answer, 0, 0)]
    active = AVERAGE.on_message(active, mail)
    mean = x.flat.mean(0)[shared]
    assert back == [0] and int(active.asked) == -1
    assert (active.x.flat[0, shared] - mean).abs().max() < 1e-15
    assert (passive.x.flat[0, shared] - mean).abs().max() < 1e-15
    assert ((active.x.flat + passive.x.flat)[0] - total).abs().max() < 1e-15
    head = SPEC.columns("head")
    assert torch.equal(active.x.flat[0, head], x.flat[0, head]), "a private head stays"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(-3, 3)), max_size=6))
def test_the_sum_is_kept_whatever_both_do_meanwhile(moves):
    """Both train between question and answer."""
    x = adapters(2)
    state, moved = {"a": client(x, 0, [1]), "b": client(x, 1)}, torch.zeros(SPEC.parameters, dtype=torch.float64)
    mail, theirs = Mail(0), Mail(1)
    state["a"] = AVERAGE.on_job(state["a"], x.rows([0]), x.rows([0]), mail)
    question = mail.pushed[0][0]
    for half in (moves[: len(moves) // 2], moves[len(moves) // 2 :]):
        for who, size in half:
            before = state[who].x
            after = Adapters(SPEC, before.flat + size, before.ranks)
            state[who] = AVERAGE.on_job(state[who], before, after, Mail(0))
            moved = moved + size
        if question is not None:
            theirs.waiting, question = [Message(0, question, 1, 0)], None
            state["b"] = AVERAGE.on_message(state["b"], theirs)
    mail.waiting = [Message(1, theirs.pushed[0][0], 0, 0)]
    state["a"] = AVERAGE.on_message(state["a"], mail)
    assert ((state["a"].x.flat + state["b"].x.flat)[0] - (x.flat.sum(0) + moved)).abs().max() < 1e-12


def test_the_step_is_added_to_what_the_client_is_by_then():
    x = adapters(3)
    found = AVERAGE.on_job(client(x, 0), x.rows([1]), x.rows([2]), Mail(0))
    assert (found.x.flat[0] - (x.flat[0] + x.flat[2] - x.flat[1])).abs().max() < 1e-15


def test_one_average_at_a_time_until_patience_ends():
    algorithm, x = build_algorithm("ad-psgd", {"patience": 3}), adapters(1)
    state, asked = client(x, 0, [1]), []
    for version in range(1, 9):
        mail = Mail(0, version)
        state = algorithm.on_job(state, x, x, mail)
        asked += [version] * len(mail.pushed)
    assert asked == [1, 4, 7]


def test_a_passive_client_asks_nobody():
    mail = Mail(1)
    AVERAGE.on_job(client(adapters(2), 1), adapters(1), adapters(1), mail)
    assert mail.pushed == []


# --- roles


@pytest.mark.parametrize(
    ("graph", "clients", "expected"),
    [("path", 5, [1, 0, 1, 0, 1]), ("ring", 6, [1, 0, 1, 0, 1, 0]), ("star", 4, [1, 0, 0, 0]), ("complete", 2, [1, 0])],
)
def test_of_a_bipartite_graph_all_links_are_between_the_roles(graph, clients, expected):
    assert roles(build_topology(parse_spec(graph), clients, 0).at(0).adjacency).astype(int).tolist() == expected


@pytest.mark.parametrize("clients", [3, 4, 7, 10])
def test_on_the_complete_graph_half_are_active(clients):
    active = roles(~np.eye(clients, dtype=bool))
    assert clients // 2 <= active.sum() <= (clients + 1) // 2


@given(st.integers(2, 12), st.integers(0, 10**6), st.floats(0.05, 1))
def test_links_between_the_roles_connect_what_the_graph_connects(clients, seed, p):
    upper = np.triu(np.random.default_rng(seed).random((clients, clients)) < p, 1)
    adjacency = upper | upper.T
    active = roles(adjacency)
    between = adjacency & (active[:, None] != active[None])
    assert np.array_equal(components(between), components(adjacency))


def test_partners_are_the_passive_neighbours_of_an_active_client(config):
    federation = compose(config("bert", "algorithm.name=ad-psgd", "topology.kind=path"))
    state = federation.algorithm.start(federation.start, federation.exchange)
    assert state.partners.int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    mail = Mail(0)
    x = federation.start.rows([0])
    row = ADPSGDState(x, state.partners[:1], state.asked[:1])
    federation.algorithm.on_job(row, x, x, mail)  # pyright: ignore[reportAttributeAccessIssue]
    told = federation.algorithm.message(x)
    sent = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in mail.pushed[0][0].items()}
    assert encoded_bytes(told) == encoded_bytes(sent)


@pytest.mark.parametrize(
    ("parameters", "told"), [({"patience": 0}, "at least 1 job"), ({"interval": -1}, "jobs, or 0")]
)
def test_bad_settings_are_refused(parameters, told):
    with pytest.raises(ConfigError, match=told):
        build_algorithm("ad-psgd", parameters)


def test_questions_and_answers_are_what_is_taken():
    x = adapters(1)
    question, answer = AVERAGE.incoming(x, {}), AVERAGE.incoming(x, {"d": (3,)})
    assert question == AVERAGE.message(x) and list(answer) == ["d"] and answer["d"] == question["x"]
    assert AVERAGE.incoming(x, {"d": (3,), "x": (3,)}) == question
