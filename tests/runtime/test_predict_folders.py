"""What folders of models answer: with padding on the side that a model reads, by their own heads only, and by kind."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from peerlora.config.task_kinds import task_kind
from peerlora.data.chat_rows import read_prompts
from peerlora.errors import ConfigError, DataError, ModelError
from peerlora.runtime.predict import predict
from peerlora.runtime.predict_roles import read_asked
from peerlora.runtime.serving import load_served

SIZE = 44  # words of the tests' tokenizer
TEXTS = ["w1", "w2 w3 w4 w5 w6 w7", "w8 w9", "w10 w11 w12 w13", "w1 w30 w2"]
BART = dict(
    vocab_size=SIZE,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)
XLNET = dict(vocab_size=SIZE, d_model=16, n_layer=2, n_head=2, d_inner=24, pad_token_id=0)
SMALL = dict(
    vocab_size=SIZE,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=40,
    pad_token_id=0,
)


@pytest.fixture
def saved(tmp_path, write_tokenizer):
    """A function that saves a model of these tests with its tokenizer, with larger weights than are usual."""

    def save(model, name="model", scale=6):
        write_tokenizer(tmp_path / name)
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(scale) if value.ndim > 1 else None
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    torch.manual_seed(0)
    return save


@pytest.fixture
def rows(tmp_path):
    """A function that writes rows into a file."""

    def write(each, name="rows.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, each)))
        return str(tmp_path / name)

    return write


def note(folder, task, **more):
    """Say what task a folder is for, as runs do."""
    (folder / "peerlora.json").write_text(json.dumps({"task": task, "text": ["text"], "max_length": 12} | more))
    return folder


OF_A_BASE = dict(
    num_beams=4,
    num_return_sequences=4,
    guidance_scale=2.0,
    min_length=11,
    min_new_tokens=8,
    repetition_penalty=3.0,
    encoder_repetition_penalty=3.0,
    no_repeat_ngram_size=1,
    encoder_no_repeat_ngram_size=1,
    suppress_tokens=list(range(10, 30)),
    begin_suppress_tokens=list(range(30, 44)),
)


def add_settings(folder, **more):
    """Write more settings into a folder's generation_config.json, which its answers do not follow."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def shares(found):
    return np.array([list(each["probabilities"].values()) for each in found])


MODELS = {
    "bart": lambda: tf.BartForSequenceClassification(tf.BartConfig(**BART, num_labels=3)),
    "xlnet": lambda: tf.XLNetForSequenceClassification(tf.XLNetConfig(**XLNET, num_labels=3)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL, num_labels=3)),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(vocab_size=SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=40, num_labels=3, pad_token_id=0)
    ),
}
SIDES = {"bart": "right", "xlnet": "left", "bert": "right", "gpt2": "right"}


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_answers_as_each_row_alone(saved, rows, kind):
    folder = note(saved(MODELS[kind]()), "classification")
    served, source = load_served(folder), rows({"text": text} for text in TEXTS)
    assert served.padding == SIDES[kind]
    alone, together = (list(predict(served, source, batch)) for batch in (1, 5))
    assert np.abs(shares(alone) - shares(together)).max() < 2e-5
    assert np.ptp(shares(alone), axis=0).max() > 2e-3  # rows differ, and so a wrong one would show
    wrong = replace(served, padding="right" if served.padding == "left" else "left")
    assert np.abs(shares(alone) - shares(predict(wrong, source, 5))).max() > 2e-4 or kind in ("bert", "gpt2")


def test_rows_are_alone_where_padding_is_read_on_both_sides(saved, rows):
    served = load_served(note(saved(MODELS["bert"]()), "classification"))
    source, widths = rows({"text": text} for text in TEXTS), []
    served.model.register_forward_pre_hook(
        lambda module, args, given: widths.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    assert len(list(predict(replace(served, padding=None), source, 5))) == 5
    assert widths == [(1, len(text.split()) + 2) for text in TEXTS]


def test_tags_of_a_model_that_pads_on_the_left_are_those_of_their_words(saved, rows):
    names = {i: name for i, name in enumerate(["O", "B-A", "I-A", "B-B", "I-B"])}
    model = tf.XLNetForTokenClassification(tf.XLNetConfig(**XLNET, num_labels=5, id2label=names))
    served = replace(load_served(note(saved(model), "token-classification")), padding="left")
    source = rows({"tokens": text.split()} for text in TEXTS)
    alone, together = (list(predict(served, source, batch)) for batch in (1, 5))
    assert alone == together
    assert len({tag for each in alone for tag in each["tags"]}) > 1


def test_an_encoder_decoder_with_counted_places_answers_as_alone(saved, rows):
    folder = note(
        saved(tf.BartForConditionalGeneration(tf.BartConfig(**BART, tie_word_embeddings=False))), "sequence-to-sequence"
    )
    add_settings(folder, **OF_A_BASE)
    served, source = load_served(folder), rows({"prompt": text} for text in TEXTS)
    alone, together = (list(predict(served, source, batch, 8)) for batch in (1, 5))
    assert alone == together and len({each["answer"] for each in alone}) > 1
    for text, each in zip(TEXTS, alone, strict=True):  # the likeliest token, one by one: no beams
        given, written = served.tokenizer(text, return_tensors="pt"), [2]
        for _ in range(8):
            decoder = torch.tensor([written])
            with torch.no_grad():
                logits = served.model(
                    input_ids=given["input_ids"], attention_mask=given["attention_mask"], decoder_input_ids=decoder
                ).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == 2:
                break
        assert each["answer"] == served.tokenizer.decode(written[1:], skip_special_tokens=True)


def test_settings_of_a_base_leave_a_decoders_answers_alone(saved, rows):
    """A least length counts a batch's padding, and so answers would be others than alone."""
    gpt2 = dict(vocab_size=SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=2)
    folder = note(saved(tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2)), scale=8), "causal-lm")
    source = rows({"text": text} for text in TEXTS)
    written = next(iter(predict(load_served(folder), source, 1, 12)))["answer"].split()
    add_settings(folder, eos_token_id=4 + int(written[2].removeprefix("w")))  # an end that is written early
    expected = list(predict(load_served(folder), source, 1, 12))
    add_settings(folder, **OF_A_BASE)
    for batch in (1, 5):
        assert list(predict(load_served(folder), source, batch, 12)) == expected
    assert len({each["answer"] for each in expected}) > 1
    assert min(len(each["answer"].split()) for each in expected) < 12, "one ends by itself"


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_decoder_answers_a_batch_as_each_prompt_alone(saved, rows, kind):
    """One counts places from the mask, the other by the columns of a batch, so that its prompts are answered alone."""
    llama = dict(**SMALL, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    model = (
        tf.LlamaForCausalLM(tf.LlamaConfig(**llama)) if kind == "llama" else tf.BartForCausalLM(tf.BartConfig(**BART))
    )
    served = load_served(note(saved(model), "causal-lm", max_length=39))
    source = rows({"text": text} for text in [*TEXTS, "w1 w2 " * 16])
    alone, together = (list(predict(served, source, batch, 30)) for batch in (1, 6))
    assert alone == together and len({each["answer"] for each in alone}) > 1


def test_a_prompt_is_not_ended_by_a_tokenizer_that_ends_every_text(saved, rows):
    """The tests' tokenizer puts [CLS] before a text and [SEP], its end of text, behind it."""
    llama = dict(**SMALL, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    folder = note(saved(tf.LlamaForCausalLM(tf.LlamaConfig(**llama))), "causal-lm")
    source = rows({"text": text} for text in [*TEXTS, ""])
    ended = list(predict(load_served(folder), source, 1, 8))
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["post_processor"]["single"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    served = load_served(folder)
    assert served.tokenizer("w1")["input_ids"] == [1, 5]
    assert list(predict(served, source, 1, 8)) == ended
    assert len({each["answer"] for each in ended}) > 1 and all(each["answer"] for each in ended)


def test_a_long_prompt_takes_no_room_from_others_and_is_told(saved, rows, caplog):
    llama = dict(**SMALL, num_key_value_heads=1, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False)
    served = load_served(note(saved(tf.LlamaForCausalLM(tf.LlamaConfig(**llama))), "causal-lm", max_length=40))
    source = rows({"text": text} for text in ["w1", "w2 " * 34])
    counts = [len(each["answer"].split()) for each in predict(served, source, 2, 20)]
    assert counts[0] > 5 >= counts[1]
    assert "1 of 2 answers end before --new-tokens 20, the shortest after 5: the model reads 40 tokens" in caplog.text


# Folders of PEFT, without notes of this project.


def foreign(base, to, head=None, outputs=3, **more):
    """An adapter folder as PEFT writes it for a classifier on ``base``."""
    from peft import LoraConfig, get_peft_model

    model = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    settings = LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=head, **more)
    get_peft_model(model, settings).save_pretrained(to)
    return to


def drop_tensors(folder, part):
    """Take the tensors out of an adapter folder whose names have this part."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if part not in name}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize("noted", [True, False])
def test_an_adapter_without_a_drawn_head_is_refused(saved, tmp_path, noted):
    """PEFT saves heads that it knows by name by itself; that of BART, only if it is told to."""
    base = saved(tf.BartModel(tf.BartConfig(**BART)), "base")
    whole = foreign(base, tmp_path / "whole", head=["classification_head"])
    assert load_served(whole, ("text",)).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    folder = foreign(base, tmp_path / "adapter")
    if noted:
        note(folder, "classification")
        (folder / "labels.json").write_text(json.dumps({"id2label": {0: "a", 1: "b", 2: "c"}}))
    with pytest.raises(ModelError, match="has no weights for classification_head.dense, .*, nor has its base model"):
        load_served(folder, ("text",))


def test_an_adapter_without_a_part_of_its_head_is_refused(models, tmp_path):
    folder = foreign(models("roberta"), tmp_path / "adapter")
    assert load_served(folder, ("text",)).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    drop_tensors(folder, "classifier.out_proj")
    with pytest.raises(ModelError, match="has no weights for classifier.out_proj, nor has its base model"):
        load_served(note(folder, "classification"))


def test_a_head_that_the_base_has_need_not_be_in_the_adapter(saved, tmp_path, rows):
    names = {0: "no", 1: "yes", 2: "perhaps"}
    base = saved(tf.BartForSequenceClassification(tf.BartConfig(**BART, id2label=names)), "base")
    own = foreign(base, tmp_path / "own", head=["classification_head"])
    assert load_served(own, ("text",)).labels == ("LABEL_0", "LABEL_1", "LABEL_2")  # which may mean other classes
    served = load_served(foreign(base, tmp_path / "adapter"), ("text",))
    assert served.labels == ("no", "yes", "perhaps")
    found = list(predict(served, rows({"text": text} for text in TEXTS)))
    assert all(each["label"] in names.values() for each in found)


@pytest.mark.parametrize(
    ("outputs", "names", "problem", "keys"),
    [
        (2, None, None, {"row", "label", "probabilities"}),  # which config.json does not write
        (2, {0: "bad", 1: "good"}, None, {"row", "label", "probabilities"}),
        (3, None, "multi_label_classification", {"row", "labels", "probabilities"}),
        (1, {0: "score"}, "regression", {"row", "value"}),
        (1, {0: "score"}, None, {"row", "value"}),
        (1, None, None, {"row", "value"}),
    ],
)
def test_whole_models_of_others_answer_what_they_were_made_for(saved, rows, outputs, names, problem, keys):
    more = {"id2label": names} if names else {}
    settings = tf.BertConfig(**SMALL, num_labels=outputs, problem_type=problem, **more)
    served = load_served(saved(tf.BertForSequenceClassification(settings)), ("text",))
    found = list(predict(served, rows({"text": text} for text in TEXTS)))
    assert all(set(each) == keys for each in found)
    if "probabilities" in keys:
        assert list(found[0]["probabilities"]) == list((names or {i: f"LABEL_{i}" for i in range(outputs)}).values())
    assert len({json.dumps(each["value"]) for each in found if "value" in each}) in (0, len(found))


def test_adapters_of_others_answer_by_their_outputs_and_say_what_is_unknown(models, rows, tmp_path, caplog):
    source = rows({"text": text} for text in TEXTS)
    number = foreign(models("bert"), tmp_path / "one", outputs=1)
    assert all(set(each) == {"row", "value"} for each in predict(load_served(number, ("text",)), source))
    assert "does not say" not in caplog.text
    classes = foreign(models("bert"), tmp_path / "two", outputs=2)
    found = list(predict(load_served(classes, ("text",)), source))
    assert set(found[0]["probabilities"]) == {"LABEL_0", "LABEL_1"}
    assert "two does not say whether its 2 outputs are classes, or labels of which several may hold" in caplog.text
    note(classes, "multi-label")
    assert all("labels" in each for each in predict(load_served(classes, ("text",)), source))


def test_a_head_that_peft_does_not_know_is_counted(saved, tmp_path):
    base = saved(tf.XLNetModel(tf.XLNetConfig(**XLNET)), "base")
    saved_too = ["logits_proj", "sequence_summary"]
    folder = foreign(base, tmp_path / "adapter", head=saved_too, outputs=5, target_modules=["layer_1", "layer_2"])
    assert len(load_served(folder, ("text",)).labels) == 5


def test_as_many_texts_are_given_as_a_model_reads(saved, models):
    classifier = saved(MODELS["bert"](), "classifier")
    assert load_served(classifier, ("one", "other")).reading.text == (
        "one",
        "other",
    )  # nobody knows of which kind it is
    note(classifier, "classification")
    with pytest.raises(ConfigError, match=r"names 2 columns \(one, other\); the model of .* reads 1; give as many"):
        load_served(classifier, ("one", "other"))
    note(classifier, "classification", text=["a", "b"])
    with pytest.raises(ConfigError, match=r"names 1 columns \(one\); the model of .* reads 2"):
        load_served(classifier, ("one",))
    with pytest.raises(ConfigError, match="reads 1; give as many"):
        load_served(Path(models("llama")), ("one", "other"))
    tags = note(saved(MODELS["bert"](), "tags"), "token-classification")
    with pytest.raises(ConfigError, match="reads 1; give as many"):
        load_served(tags, ("one", "other"))


def test_rows_have_as_many_tokens_as_in_training_at_least(saved):
    """A tokenizer cuts none of its own tokens off, and rows would be longer than was asked for."""
    folder = note(saved(MODELS["bert"]()), "classification")
    with pytest.raises(ConfigError, match="--max-length 3 given; rows have at least 4 tokens"):
        load_served(folder, (), 3)
    assert load_served(folder, (), 4).reading.max_length == 4


def test_a_question_is_asked_with_its_context(rows):
    source, columns = read_asked(rows([{"question": "a", "context": "x"}]), task_kind("chat"), None)
    assert read_prompts(columns, np.arange(1), source) == [[{"role": "user", "content": "a\n\nx"}]]
    with pytest.raises(DataError, match="rows are chats, by question, context; task.kind=sequence-to-sequence reads"):
        read_asked(source, task_kind("sequence-to-sequence"), None)
