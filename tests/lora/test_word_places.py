"""The places whose words a language model is asked for: the same numbers as of a pass that gives all."""

import pytest
import torch

from peerlora.data.batches import collate
from peerlora.lora.attach import with_decoder_inputs
from peerlora.lora.word_places import WordPlaces
from peerlora.runtime.compose import compose
from peerlora.train.base import LocalPlan

CAUSAL = ("task.kind=causal-lm", "data.label=null", "partition.kind=iid", "eval.rows=10")
TASKS = {
    "llama": CAUSAL,
    "gpt2": CAUSAL,
    "t5": (
        "task.kind=sequence-to-sequence",
        "data.columns={prompt: text, completion: other}",
        "data.label=null",
        "partition.kind=iid",
        "eval.rows=10",
    ),
}


@pytest.fixture
def federation(config):
    return lambda kind, *words: compose(config(kind, *TASKS[kind], "clients=3", "train.batch=2", *words))


def inputs_of(federation, rows=(0, 1, 2, 3, 4, 5)):
    """A minibatch of two rows for each client, and the model with their adapters."""
    import numpy as np

    learner, x = federation.learner, federation.start
    x.flat.add_(torch.linspace(-0.1, 0.1, x.flat.numel()).view_as(x.flat))
    federation.model.bind_adapters(x)
    batch = collate(federation.train_data, list(np.array(rows).reshape(3, 2)), learner.pad, torch.float32)
    if batch.written is None:
        return batch.inputs, batch.inputs["input_ids"].shape
    inputs = with_decoder_inputs(federation.model.base, batch.inputs, batch.targets)
    return inputs, inputs["decoder_input_ids"].shape


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("chosen", ["some", "one", "none", "all"])
def test_chosen_places_have_the_logits_of_a_pass_that_gives_all(federation, kind, chosen):
    found = federation(kind)
    inputs, shape = inputs_of(found)
    places = torch.zeros(shape, dtype=torch.bool)
    if chosen == "all":
        places[:] = True
    elif chosen != "none":
        places.view(-1)[:: 3 if chosen == "some" else places.numel()] = True
    if kind != "t5":
        places &= inputs["attention_mask"].bool()
    with torch.no_grad():
        every = found.model(inputs)
        some = found.model(inputs, places=places)
        again = found.model(inputs)
    assert some.shape == (int(places.sum()), every.shape[-1])
    assert torch.allclose(some, every[places], rtol=1e-5, atol=1e-5) and torch.equal(again, every)


def test_places_of_padding_give_all_places(federation):
    found = federation("llama")
    inputs, shape = inputs_of(found)
    assert not inputs["attention_mask"].all()
    assert found.model(inputs, places=torch.ones(shape, dtype=torch.bool)).shape[:2] == shape


@pytest.mark.parametrize("saved", ["lm_head", "all-linear"])
def test_a_layer_of_words_that_trains_gives_all_places(federation, saved):
    words = [f"adapter.modules_to_save=[{saved}]"] if saved == "lm_head" else ["adapter.targets=[q_proj, lm_head]"]
    found = federation("llama", *words)
    inputs, shape = inputs_of(found)
    logits = found.model(inputs, places=torch.ones(shape, dtype=torch.bool))
    assert logits.shape[:2] == shape


@pytest.mark.parametrize(("kind", "word"), [("llama", "dec-lora"), ("gpt2", "adf-lora"), ("t5", "dec-lora")])
@pytest.mark.parametrize("more", [(), ("train.accumulate=2",), ("adapter.dropout=0.2",)])
def test_rounds_and_scores_are_those_of_all_places(federation, monkeypatch, kind, word, more):
    """Of the plain twin, every layer sees all places."""
    words = [f"algorithm.name={word}", "train.optimizer=sgd", "train.lr=0.1", *more]

    def trained():
        found = federation(kind, *words)
        x = found.learner.fit(found.start, LocalPlan("AB"))
        assert not torch.equal(x.flat, found.start.flat)
        return x.flat, found.learner.evaluate(x, found.eval_data, 4)

    chosen = trained()
    monkeypatch.setattr(WordPlaces, "_choose", lambda self, module, inputs: None)
    plain = trained()
    assert torch.allclose(chosen[0], plain[0], rtol=1e-4, atol=1e-6)
    assert chosen[1].metric == pytest.approx(plain[1].metric, rel=1e-5)


def test_a_detached_model_gives_all_places_again(federation):
    found = federation("llama")
    inputs, shape = inputs_of(found)
    places = torch.zeros(shape, dtype=torch.bool)
    words = found.model.base.get_output_embeddings()
    with pytest.raises(RuntimeError, match="broken"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(found.model, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        found.model(inputs, places=places)
    assert found.model(inputs).shape[:2] == shape, "a pass that failed leaves no choice behind"
    found.model.detach()
    assert not words._forward_pre_hooks
