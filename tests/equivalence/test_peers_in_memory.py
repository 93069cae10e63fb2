"""Peers over the in-memory transport end with the adapters that the simulation gives their clients.

Tolerance: 1e-9 in fp64 after three rounds, of products relative where they are above 1.  The sums are taken in the same
order, but over other shapes: the last bits may differ, and AdamW turns those of a small gradient into a step.
"""

import json

import numpy as np
import pytest
import torch
from in_memory import federation
from test_plain_loop import FP32, STEPS

from cases import ROW_METHODS, others_slow
from peerlora.algorithms.base import is_asynchronous
from peerlora.runs.events import Generated, RoundDone, RunStarted
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_reports")

SETTINGS = {"adf-lora": ["algorithm.interval=1"], "rac-lora": ["algorithm.chain=2", "algorithm.settle=0"]}
SETTINGS |= {name: ["train.lr=3", "train.local_steps=1"] for name in ("dsgd", "d2")} | {"dfedavgm": ["train.lr=3"]}
SETTINGS |= {
    name: ["train.lr=0.7"]
    for name in ("fedspeed", "dfedadmm", "dfedadmm-sam", "consensus-admm", "push-diging", "qg-dsgdm")
}
METHODS = [name for name, kind in ROW_METHODS.items() if not is_asynchronous(kind)]
TOLERANCE = 1e-9


def words(method):
    train = ["peer.deadline=60", "peer.join=60"]
    return ["algorithm.name=" + method, *train, *SETTINGS.get(method, [])]


def simulated(config, folder):
    return simulate(config, folder / "whole")


def products(x, row):
    """All that a client adds to its base, by layer."""
    found = {}
    for layer, A in x.A.items():
        found[layer] = x.scaling[row] * x.B[layer][row] @ A[row]
        if x.merged is not None and not x.merged.layers[layer].empty:
            found[layer] = found[layer] + x.merged.layers[layer].weight()[row]
    return found


def check(whole, parts, tolerance=TOLERANCE):
    moved = 0.0
    for client, part in enumerate(parts):
        expected, found = whole.adapters, part.adapters
        assert found.clients == 1 and torch.equal(found.ranks, expected.ranks[client : client + 1])
        assert torch.allclose(found.flat, expected.flat[client : client + 1], rtol=0, atol=tolerance)
        for layer, product in products(found, 0).items():
            assert torch.allclose(product, products(expected, client)[layer], rtol=tolerance, atol=tolerance)
            moved = max(moved, float(product.abs().max()))
    assert moved > 1e-3, "nothing was trained"


ALWAYS = ["adf-lora", "rac-lora", "choco"]
"""One of each way in which methods use a round; the others with the slow tests."""


@pytest.mark.parametrize("method", others_slow(METHODS, ALWAYS))
def test_every_method_gives_what_the_simulation_gives(config, tmp_path, method):
    chosen = config("bert", *words(method))
    whole, parts = simulated(chosen, tmp_path), federation(chosen, tmp_path)
    check(whole, parts)
    for t in range(3):
        rounds = [select_events(read_events(part.run), RoundDone)[t] for part in parts]
        told = select_events(read_events(whole.run), RoundDone)[t]
        assert [each.loss[0] for each in rounds] == pytest.approx(told.loss, abs=TOLERANCE)
        assert sum(each.bytes_sent for each in rounds) == told.bytes_sent
        assert not any(each.missed for each in rounds)


SKEWED = [
    "partition.kind=shares",
    "partition.shares=[[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.4, 0.2, 0.4]]",
    "partition.counts=[1, 1, 2]",
]


@pytest.mark.parametrize("words", others_slow([[], ["algorithm.name=local"], ["exchange.codec=top-k"]], []))
def test_label_counts_are_summed_over_the_network(config, tmp_path, words):
    chosen = config("bert", "peer.deadline=60", *SKEWED, "train.label_prior=pooled", *words)
    whole, parts = simulated(chosen, tmp_path), federation(chosen, tmp_path)
    check(whole, parts)
    rounds = select_events(read_events(whole.run), RoundDone)
    sent = [[done.bytes_sent for done in select_events(read_events(part.run), RoundDone)] for part in parts]
    assert [sum(each) for each in zip(*sent, strict=True)] == [done.bytes_sent for done in rounds]
    assert rounds[0].bytes_sent > rounds[1].bytes_sent
    total = np.sum(select_events(read_events(whole.run), RunStarted)[0].partition["counts"], axis=0).tolist()
    for part in parts:
        assert json.loads((part.run / "label_counts.json").read_text()) == {"total": total}


OTHERS = [
    ["algorithm.name=hetlora", "algorithm.gamma=0.5", "adapter.rank=[3, 2, 3, 1]"],
    ["algorithm.name=fedhl", "adapter.rank=[3, 2, 3, 1]"],
    ["algorithm.name=rac-lora", "algorithm.chain=1", "algorithm.mix_merged=true"],
    ["algorithm.name=dec-lora", "adapter.head=private", "topology.kind=random", "topology.p=0.5"],
    ["algorithm.name=dec-lora", "topology.drop_links=0.3", "train.optimizer_state=keep"],
    ["algorithm.name=dec-lora", "topology.kind=complete", "exchange.robust=median", "train.lr=0.05"],
    ["algorithm.name=adf-lora", "exchange.robust={kind: balance, gamma: 2}", "train.lr=0.05"],
    ["algorithm.name=salf", "algorithm.send=all"],
    ["algorithm.name=salf", "algorithm.correction=neighbourhood", "adapter.head=private", "topology.kind=complete"],
    ["algorithm.name=salf", "algorithm.depth=poisson", "algorithm.rate=1.0", "topology.drop_links=0.3"],
    ["algorithm.name=flood", "algorithm.mixing=push-sum"],
    ["algorithm.name=flood", "algorithm.mixing=renormalised", "adapter.head=private"],
    ["algorithm.name=flood", "algorithm.beta=1.0", "topology.kind=star", "topology.drop_links=0.2"],
    ["algorithm.name=flood", "topology.lazy=true"],
    ["algorithm.name=choco", "algorithm.codec=qsgd", "train.lr=0.05"],
    ["algorithm.name=dec-lora", "exchange.codec=cast", "adapter.head=private", "train.lr=0.05"],
    ["algorithm.name=dec-lora", "exchange.codec=random-k", "topology.kind=complete", "train.lr=0.05"],
    ["algorithm.name=fedsa-lora", "exchange.codec={kind: sign, gamma: 0.2}", "train.lr=0.05"],
    ["algorithm.name=adf-lora", "algorithm.interval=1", "exchange.codec={kind: top-k, share: 0.3}"],
]


@pytest.mark.parametrize("extra", others_slow(OTHERS, [3]))
def test_other_ranks_heads_and_graphs(config, tmp_path, extra):
    chosen = config("bert", "topology.kind=ring", "peer.deadline=60", *extra)
    check(simulated(chosen, tmp_path), federation(chosen, tmp_path))


OTHER_TASKS = ["chat", "token-classification", "multi-label", "sequence-to-sequence"]


@pytest.mark.parametrize("task", others_slow(OTHER_TASKS, ["chat"]))
def test_peers_learn_other_tasks_as_the_simulation_does(config, chats, tagged, pairs, tmp_path, task):
    words = {
        "chat": [f"data.train=jsonl:{chats}", "data.label=null", "eval.generate={rows: 2, max_new_tokens: 3}"],
        "token-classification": [f"data.train=jsonl:{tagged}", "data.label=null"],
        "multi-label": ["data.label=several"],
        "sequence-to-sequence": [f"data.train=jsonl:{pairs}", "data.label=null", *STEPS],
    }[task]
    base = {"chat": "llama", "sequence-to-sequence": "t5"}.get(task, "bert")
    settings = [
        "algorithm.name=dec-lora",
        "train.lr=0.05",
        "peer.deadline=60",
        "data.max_length=32",
    ]
    chosen = config(base, f"task.kind={task}", *settings, *words)
    whole, parts = simulated(chosen, tmp_path), federation(chosen, tmp_path)
    check(whole, parts, FP32 if task == "sequence-to-sequence" else TOLERANCE)
    told = [select_events(read_events(part.run), Generated) for part in parts]
    assert [len(each) for each in told] == [task == "chat"] * 4
    for client, (each,) in enumerate(told if task == "chat" else []):
        assert each.client == client and set(each.answers[0]) == {"prompt", "expected", "own"}
    if task == "chat":
        (simulated_answers,) = select_events(read_events(whole.run), Generated)
        assert [row["own"] for row in told[0][0].answers] == [row["own"] for row in simulated_answers.answers]


UPPER = "adapter.targets=.*layers\\.1\\..*(q_proj|v_proj)"


@pytest.mark.parametrize("words", others_slow([[], [UPPER, "train.rounds=6"], ["train.label_prior=pooled"]], [1]))
def test_peers_learn_images_as_the_simulation_does(config, pictures, tmp_path, words):
    task = ["task.kind=image-classification", f"data.train=parquet:{pictures}", "algorithm.name=dec-lora"]
    chosen = config("vit", *task, *SKEWED, "train.dtype=fp64", "train.lr=0.05", "peer.deadline=60", *words)
    check(simulated(chosen, tmp_path), federation(chosen, tmp_path), 1e-9)


ONE_WAY = [
    ["algorithm.name=sgp", "topology.kind=directed-ring", "topology.chords=[[0, 2]]"],
    ["algorithm.name=sgp", "topology.kind=one-peer", "adapter.head=private"],
    ["algorithm.name=sgp", "topology.kind=star", "topology.weights=push-sum", "algorithm.interval=1"],
    ["algorithm.name=push-diging", "topology.kind=random-out", "topology.degree=2", "train.lr=0.7"],
    ["algorithm.name=push-diging", "topology.kind=directed-exponential", "topology.drop_links=0.3", "train.lr=0.7"],
    ["algorithm.name=flood", "algorithm.mixing=push-sum", "topology.kind=directed-ring", "topology.chords=[[0, 2]]"],
    ["algorithm.name=sgp", "topology.kind=directed-ring", "topology.chords=[[0, 2]]", "train.label_prior=pooled"],
    ["algorithm.name=local", "topology.kind=directed-ring"],
]


@pytest.mark.parametrize("extra", others_slow(ONE_WAY, [4]))
def test_links_that_go_one_way(config, tmp_path, extra):
    chosen = config("bert", "peer.deadline=60", *extra)
    whole, parts = simulated(chosen, tmp_path), federation(chosen, tmp_path)
    check(whole, parts)
    told = select_events(read_events(whole.run), RoundDone)
    rounds = [select_events(read_events(part.run), RoundDone) for part in parts]
    for t in range(3):
        assert sum(each[t].bytes_sent for each in rounds) == told[t].bytes_sent
        assert not any(each[t].missed for each in rounds)
        links = {tuple(edge) for each in rounds for edge in each[t].edges}
        assert links == {tuple(edge) for edge in told[t].edges}
