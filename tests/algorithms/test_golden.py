"""Five rounds of every method against a history that was written down once.

A change of the mathematics, of the order of random draws or of a default shows here.  Where it is meant, write the
histories anew with ``python tests/algorithms/test_golden.py`` and say why in the change log.
The weights and the start come from numpy's generators, not from a library's initialisation.
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peerlora.config.loading import load_config
from peerlora.lora.diagnostics import agreement, local_cross_term
from peerlora.randomness import numpy_generator
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import build_rounds

GOLDEN = Path(__file__).parent / "golden"
METHODS = {"local": {}, "dec-lora": {}, "adf-lora": {"interval": 2}}
METHODS |= {"decaf": {}, "flexlora": {}, "hetlora": {"gamma": 0.5, "penalty": 0.01}}
METHODS |= {"fedrot-lora": {"first": "B"}, "lora-fair": {"ridge": 0.1}}
METHODS |= {"tad-lora": {}, "rolora": {}, "ffa-lora": {}, "fedit": {}, "fedsa-lora": {}}
METHODS |= {"dsgd": {}, "dfedavg": {"interval": 2}, "dfedavgm": {}, "dfedsam": {}, "fedprox": {"mu": 0.5}}
METHODS |= {"fedspeed": {"alpha": 0.7, "interval": 1}, "dfedadmm": {}, "dfedadmm-sam": {}, "k-gt": {"interval": 2}}
METHODS |= {"d2": {}, "consensus-admm": {"rho": 0.3}}
METHODS |= {"qg-dsgdm": {"interval": 2}, "qg-adam": {}, "noloco": {}}
METHODS |= {"cached-dfl": {"max_age": 2, "keep": 2, "weights": "rows", "pull": 0.1}}
ONE_STEP = ("dsgd", "d2")
SGD = (*ONE_STEP, "qg-dsgdm", "dfedavgm", "fedspeed", "dfedadmm", "dfedadmm-sam", "consensus-admm")
METHODS |= {"salf": {"stragglers": 0.7, "cap": 2.0}, "flood": {"beta": 1.0, "every": 2}}
METHODS |= {"aedfl": {"density": 0.4, "ramp": 3, "refresh": 1, "cutoff": 2}, "ad-psgd": {"interval": 2}}
METHODS |= {"rac-lora": {"chain": 2, "settle": 0}, "flora": {}, "fedex-lora": {}, "fedhl": {"growth": 1}}
METHODS |= {"sgp": {"interval": 2}, "push-diging": {}, "choco": {"share": 0.3}}
TOPOLOGIES = dict.fromkeys(("sgp", "push-diging"), {"kind": "directed-ring", "chords": [[0, 2]]})
APART = ("aedfl", "ad-psgd")  # the methods without common rounds: their clients differ in speed here
WORDS = [f"w{i}" for i in range(20)]


def write_model(folder):
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    small = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
    model = tf.BertModel(tf.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **small)).double()
    generator = numpy_generator(0, "golden weights")
    for name, parameter in sorted(model.named_parameters()):
        spread = 0.1 if parameter.ndim == 1 else 0.5
        values = torch.from_numpy(generator.uniform(-spread, spread, tuple(parameter.shape)))
        parameter.data.copy_(values + 1 if name.endswith("LayerNorm.weight") else values)
    model.save_pretrained(folder)


def write_rows(path):
    generator = numpy_generator(0, "golden rows")
    rows = []
    for i in range(40):
        label = i % 2
        words = [WORDS[label * 8 + int(generator.integers(12))] for _ in range(int(generator.integers(2, 8)))]
        rows.append({"text": " ".join(words), "label": "ab"[label]})
    path.write_text("\n".join(json.dumps(row) for row in rows))


def golden_config(folder, method):
    write_model(folder)
    write_rows(folder / "rows.jsonl")
    data = {
        "train": f"jsonl:{folder / 'rows.jsonl'}",
        "eval": None,
        "text": ["text"],
        "label": "label",
        "max_length": 8,
    }
    train = {"rounds": 5, "local_steps": 2, "batch": 3, "lr": 0.02, "weight_decay": 0.01, "clip": 1.0, "dtype": "fp64"}
    train |= {"local_steps": 1} if method in ONE_STEP else {}
    train |= {"optimizer": "sgd", "lr": 0.2, "momentum": 0.9 * (method == "dfedavgm")} if method in SGD else {}
    train |= {"optimizer": "sgd"} if method == "qg-adam" else {}  # along Adam's direction, with its rate
    tree = {"model": {"source": str(folder)}, "adapter": {"rank": 2, "alpha": 4}, "data": data, "train": train}
    tree |= {"clients": 4, "partition": "iid", "topology": TOPOLOGIES.get(method, "path"), "threads": 1, "seed": 7}
    if method in APART:
        tree |= {"clock": {"speed": [1.0, 0.5, 0.3, 0.8], "delay": 0.7, "bandwidth": 2000.0}}
    return load_config(tree | {"algorithm": {"name": method, **METHODS[method]}})


def common_start(x):
    """A and head the same on all clients, B zero."""
    generator = numpy_generator(0, "golden start")
    row = torch.from_numpy(generator.uniform(-0.3, 0.3, x.spec.parameters))
    row[x.spec.columns("B")] = 0
    return replace(x, flat=row.repeat(x.clients, 1))


def history(folder, method):
    """One line per round."""
    federation = compose(golden_config(folder, method))
    learner, peers, algorithm = federation.learner, federation.exchange, federation.algorithm
    state, rounds = algorithm.start(common_start(federation.start), peers), []
    if method in APART:
        return apart(federation, state)
    for t in range(federation.config.train.rounds):
        with learner.round(t) as trained:
            peers.begin(t)
            state = algorithm.round(t, state, learner, peers)
            found = agreement(algorithm.model(state))
            line = {"loss": trained.losses.tolist(), **vars(found)}
        lost = (
            local_cross_term(peers.stats.sent, peers.graph.W, algorithm.model(state))
            if peers.stats.sent is not None
            else 0.0
        )
        rounds.append(line | {"local_cross_term": lost, "bytes_sent": peers.stats.bytes_sent})
    return rounds


def apart(federation, state):
    """The same of a method without common rounds."""
    runner, rounds = build_rounds(federation), []
    for t in range(federation.config.train.rounds):
        state, told = runner.advance(t, state)
        known = [loss if loss == loss else -1 for loss in told.losses]
        line = {"loss": known, **vars(agreement(federation.algorithm.model(state))), "bytes_sent": told.bytes_sent}
        rounds.append(line | {"virtual_seconds": runner.virtual_seconds, **told.measures})
    return rounds


@pytest.mark.parametrize("method", METHODS)
def test_five_rounds_are_as_written_down(tmp_path, cache, method):
    expected = json.loads((GOLDEN / f"{method}.json").read_text())
    found = history(tmp_path, method)
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-9, abs=1e-15), name


def main():
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            rounds = history(Path(folder), method)
        (GOLDEN / f"{method}.json").write_text(json.dumps(rounds, indent=1) + "\n")
        sys.stdout.write(f"{method}: {len(rounds)} rounds\n")


if __name__ == "__main__":
    main()
