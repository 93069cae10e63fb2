"""Whether a model can read what a run's data become, and what one forward shows of it: asked before a run begins."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from peerlora.config.task_kinds import KINDS
from peerlora.data.dataset import Dataset
from peerlora.errors import ConfigError, DataError, ModelError
from peerlora.lora.attach import Targets
from peerlora.lora.base_models import Base
from peerlora.runtime.compose import compose
from peerlora.runtime.model_checks import check_head, check_tokens
from peerlora.train.forward_facts import observe_forward


class Tokenizer(SimpleNamespace):
    """What is asked of a tokenizer: its size and its special tokens."""

    def __len__(self):
        return self.size


class Reader(nn.Module):
    """A model as far as its tables go."""

    base_model_prefix = ""

    def __init__(self, size=10, **config):
        super().__init__()
        self.table, self.config = nn.Embedding(size, 2), SimpleNamespace(**config)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """Only its arguments are looked at."""


def rows(*texts, types=None, names=("a", "b")):
    starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    flat = None if types is None else np.array([kind for row in types for kind in row], dtype=np.uint8)
    ids = np.array([token for text in texts for token in text], dtype=np.int32)
    return Dataset(ids, starts, flat, np.zeros(len(texts), dtype=np.int64), names)


TOKENIZER = dict(size=10, pad_token_id=0, unk_token_id=3, unk_token="[UNK]", all_special_ids=[0, 1, 2, 3])


def checked(model, *data, **changes):
    return check_tokens(Base(model, "./m", (), None), Tokenizer(**(TOKENIZER | changes)), data)


def test_tokens_within_the_tables_are_no_trouble():
    assert checked(Reader(), rows([1, 9, 2], [1, 4, 5, 2])) == ()


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        (Reader(9), {}, r"its tokenizer gives token id 9, but the model has embeddings for 9 tokens \(0 to 8\)"),
        (Reader(10), {"pad_token_id": 10}, "its padding token gives token id 10"),
        (Reader(21), {}, "has a tokenizer of 10 tokens and embeddings for 21"),
    ],
)
def test_tokens_beyond_the_embeddings_are_refused(model, changes, told):
    with pytest.raises(ModelError, match=told):
        checked(model, rows([1, 4, 2]), rows([1, 9, 2]), **changes)


def test_a_tokenizer_with_far_fewer_tokens_than_the_table_is_told():
    (told,) = checked(Reader(12), rows([1, 2]))
    assert "has embeddings for 12 tokens and a tokenizer of 10; if that is another model's" in told
    assert checked(Reader(11), rows([1, 2])) == ()


def test_token_types_beyond_the_table_are_refused():
    typed = rows([1, 4, 2, 5, 2], types=[[0, 0, 0, 1, 2]])
    assert checked(Reader(type_vocab_size=3), typed) == ()
    with pytest.raises(ModelError, match=r"up to type 2, the model knows 2 types \(0 to 1\)"):
        checked(Reader(type_vocab_size=2), typed)


@pytest.mark.parametrize("known", [0, 1])
def test_a_model_of_one_token_type_reads_none_and_says_so(known):
    warnings = checked(Reader(type_vocab_size=known), rows([1, 4, 2, 5, 2], types=[[0, 0, 0, 1, 1]]))
    assert len(warnings) == 1 and "tells the two texts of a pair apart by their separators only" in warnings[0]


def test_texts_that_the_tokenizer_does_not_know_are_told_or_refused():
    assert "knows 50% of the words" in checked(Reader(), rows([1, 3, 3, 4, 5, 2]))[0]
    with pytest.raises(ModelError, match=r"knows no word of the data, every one becomes \[UNK\]"):
        checked(Reader(), rows([1, 3, 3, 2], [1, 3, 2]))


def test_a_classifier_at_the_end_token_needs_one_in_each_row():
    model = Reader(is_encoder_decoder=True, eos_token_id=2)
    assert checked(model, rows([4, 5, 2], [6, 2])) == ()
    with pytest.raises(DataError, match="row 2 of 2 used has 2, the first has 1"):
        checked(model, rows([4, 5, 2], [6, 2, 2]))
    with pytest.raises(DataError, match="row 1 of 1 used has 0"):
        checked(model, rows([4, 5]))
    with pytest.raises(ModelError, match="is also the tokenizer's padding"):
        checked(model, rows([4, 5, 2]), pad_token_id=2)


def test_what_was_drawn_and_never_trains_is_told():
    base = Base(Reader(), "./m", ("body.pooler", "classifier"), None, ("b", "a"))
    heads = Targets((), ("classifier",))
    told = check_head(base, heads, ("a", "b"))
    assert len(told) == 1 and "no weights for body.pooler: drawn from the seed, never trained" in told[0]
    with pytest.raises(ModelError, match="set task.labels="):
        check_head(replace(base, initialised=()), heads, ("a", "b"))


def test_a_rank_above_every_width_is_refused(config):
    with pytest.raises(ConfigError, match="adapter.rank=25 given; the widest adapted layer has 24"):
        compose(config("bert", "adapter.rank=25", "adapter.targets=[intermediate.dense]"))


class Odd(nn.Module):
    """A classifier that puts tokens first, never uses one of its layers, and may read padding or fail."""

    config = SimpleNamespace()

    def __init__(self, last_token=False, mean=False, fails=False):
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.first, self.unused, self.positions = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last_token, self.mean, self.fails = last_token, mean, fails

    def forward(self, input_ids, attention_mask):
        if self.fails:
            raise IndexError("index out of range in self")
        x = self.first(self.table(input_ids).transpose(0, 1)).transpose(0, 1) + self.positions(torch.ones(4))
        self.unused(x)
        real = attention_mask[..., None].float()
        if self.last_token:
            return SimpleNamespace(logits=x[:, -1])
        return SimpleNamespace(logits=x.mean(1) if self.mean else (x * real).sum(1) / real.sum(1))


def observed(model, *names):
    torch.manual_seed(0)
    for table in model.parameters():
        nn.init.normal_(table)
    data = rows([1, 4, 5, 2], [1, 6, 7, 8, 9, 3], [1, 9, 4, 6])
    return observe_forward(model, "./m", names, data, 0, KINDS["classification"])


def test_layers_that_do_not_reach_the_logits_are_found():
    assert observed(Odd(), "first", "unused", "positions").used == {"first", "positions"}


def test_rows_that_do_not_come_first_are_found():
    assert observed(Odd(), "unused").layout.rows_first
    assert not observed(Odd(), "first").layout.rows_first
    assert not observed(Odd(), "positions").layout.rows_first


@pytest.mark.parametrize(
    ("options", "side", "reads"),
    [({}, "right", False), ({"last_token": True}, "left", False), ({"mean": True}, "right", True)],
)
def test_the_side_on_which_padding_is_not_read_is_found(options, side, reads):
    found = observed(Odd(**options), "unused")
    assert found.layout.padding == side and found.reads_padding == reads
    assert found.layout.rows_first == (not reads), "what depends on others' rows is not trained beside them"


def test_a_forward_that_fails_is_a_model_error():
    with pytest.raises(
        ModelError, match="Odd fails on rows of tokens .IndexError: index out of range in self.; give a"
    ):
        observed(Odd(fails=True), "first")


def test_hooks_do_not_stay():
    model = Odd()
    observed(model, "first")
    assert not model.first._forward_hooks


def test_types_that_a_model_does_not_know_are_left_out_of_a_run(config, models, tmp_path):
    folder = tmp_path / "one-type"
    shutil.copytree(models("roberta"), folder)
    path = folder / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    words = [f"model.source={folder}", "data.text=[text, other]", r'adapter.targets=".*layer\\.1\\..*(query|value)"']
    transformers = pytest.importorskip("transformers")
    transformers.RobertaModel.from_pretrained(folder, add_pooling_layer=False)
    settings = json.loads((folder / "config.json").read_text()) | {"type_vocab_size": 1}
    weights = transformers.RobertaModel(transformers.RobertaConfig(**settings), add_pooling_layer=False)
    weights.save_pretrained(folder)
    losses = []
    for fast in ("false", "true"):
        federation = compose(config("roberta", *words, f"train.fast={fast}", "train.dtype=fp32"))
        assert (federation.paths["frozen prefix"] is None) == (fast == "true")
        assert int(federation.train_data.types.max()) == 1
        assert any("separators only" in told for told in federation.warnings)
        losses.append(federation.learner.evaluate(federation.start, federation.eval_data, 8).loss)
        federation.learner.fit(federation.start, "AB")
    assert losses[0].max() < 10 and np.allclose(*losses, rtol=0, atol=1e-5)
