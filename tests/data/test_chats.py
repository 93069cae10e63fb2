"""Chats: three spellings of rows, answers marked token by token, what is cut, left out and refused."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peerlora.config.chat import TEMPLATES
from peerlora.config.data import DataConfig
from peerlora.config.loading import load_config
from peerlora.config.task_kinds import CHAT_FORMS
from peerlora.data.chat_rows import read_chats
from peerlora.data.chat_template import ChatTemplate
from peerlora.data.chat_tokens import chat_dataset
from peerlora.data.dataset import UNLEARNED
from peerlora.data.roles import find_roles
from peerlora.data.sources import load_datasets
from peerlora.errors import ConfigError, DataError, ModelError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer without a chat template, which knows the special tokens of three of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    text = "user assistant system Hi there Hello you What now Nothing [INST] [/INST]"
    core.train_from_iterator([text] * 20, trainer)
    ends = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=SPECIAL[2:], **ends)


def turns(*contents):
    """user, assistant, user, ..."""
    return [{"role": ("user", "assistant")[place % 2], "content": each} for place, each in enumerate(contents)]


TALK = turns("Hi there", "Hello you", "What now", "Nothing")


def tokenised(tokenizer, *chats, **settings):
    data = DataConfig(**{"max_length": 500, "template": "chatml", **settings})
    return chat_dataset(data, chats, np.arange(len(chats)), "chats.jsonl", tokenizer)


def marked(tokenizer, found, row=0):
    """The tokens of a row, those that are not learned in brackets."""
    span = slice(*found.starts[row : row + 2].tolist())
    pairs = zip(found.ids[span], found.targets[span], strict=True)
    assert all(target in (token, UNLEARNED) for token, target in zip(found.ids, found.targets, strict=True))
    return [tokenizer.decode([i]) if target != UNLEARNED else f"({tokenizer.decode([i])})" for i, target in pairs]


# As the files of SmolLM2, Llama 3 and Mistral 7B have them; none marks what a model generates.
STOCK = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama-3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 "
        "%}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
    ),
}
MASKS = {  # tokens with a dot between them; in brackets what is not learned
    "chatml": (
        "(<|im_start|>)·(user)·(\n)·(H)·(i)·( there)·(<|im_end|>)·(\n)·(<|im_start|>)·(as)·(sistant)·(\n)·"
        "H·el·lo· you·<|im_end|>·(\n)·"
        "(<|im_start|>)·(user)·(\n)·(Wh)·(at)·( now)·(<|im_end|>)·(\n)·(<|im_start|>)·(as)·(sistant)·(\n)·"
        "No·thin·g·<|im_end|>·(\n)"
    ),
    "llama-3": (
        "(<s>)·(<|start_header_id|>)·(user)·(<|end_header_id|>)·(\n)·(\n)·(H)·(i)·( there)·(<|eot_id|>)·"
        "(<|start_header_id|>)·(as)·(sistant)·(<|end_header_id|>)·(\n)·(\n)·H·el·lo· you·<|eot_id|>·"
        "(<|start_header_id|>)·(user)·(<|end_header_id|>)·(\n)·(\n)·(Wh)·(at)·( now)·(<|eot_id|>)·"
        "(<|start_header_id|>)·(as)·(sistant)·(<|end_header_id|>)·(\n)·(\n)·No·thin·g·<|eot_id|>"
    ),
    "mistral": (
        "(<s>)·([)·(INST)·(])·( Hi)·( there)·( [/)·(INST)·(])· Hello· you·</s>·"
        "([)·(INST)·(])·( What)·( now)·( [/)·(INST)·(])· Nothing·</s>"
    ),
}


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("shipped", [False, True])
def test_answers_with_the_end_of_each_turn_are_learned_token_by_token(tokenizer, name, shipped):
    found = tokenised(tokenizer, TALK, template=name if shipped else STOCK[name])
    assert marked(tokenizer, found) == MASKS[name].split("·")


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_the_rendered_chat(tokenizer, name):
    found = tokenised(tokenizer, TALK, turns("a", "b"), template=name)
    for row, chat in enumerate([TALK, turns("a", "b")]):
        whole = tokenizer.apply_chat_template(chat, chat_template=TEMPLATES[name], return_dict=False)
        assert found.ids[slice(*found.starts[row : row + 2])].tolist() == whole
    assert found.labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_stands_before_an_answer_is_what_a_model_is_asked_with(tokenizer, name):
    found = tokenised(tokenizer, TALK, template=name)
    learned = found.targets != UNLEARNED
    first = int(np.flatnonzero(learned[:-1] < learned[1:])[-1]) + 1  # of the last answer
    options = dict(chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False)
    assert found.ids[:first].tolist() == tokenizer.apply_chat_template(TALK[:3], **options)


def test_a_systems_text_and_white_space_of_an_answer(tokenizer):
    chat = [{"role": "system", "content": "Hi"}, *turns("a", " b\n")]
    assert "".join(marked(tokenizer, tokenised(tokenizer, chat))) == (
        "(<|im_start|>)(sy)(stem)(\n)(H)(i)(<|im_end|>)(\n)(<|im_start|>)(user)(\n)(a)(<|im_end|>)(\n)"
        "(<|im_start|>)(as)(sistant)(\n) b\n<|im_end|>(\n)"
    )


def test_all_tokens_but_the_first_are_learned_where_asked_for(tokenizer):
    found = tokenised(tokenizer, TALK, loss_on="all")
    assert found.targets[0] == UNLEARNED
    assert (found.targets[1:] == found.ids[1:]).all()


# --- length


@pytest.mark.parametrize(
    ("way", "left", "told"),
    [
        ("cut-right", [slice(0, 20), slice(0, 20)], "their ends are cut off"),
        ("cut-left", [slice(-20, None), slice(0, 20)], "their beginnings are cut off"),
        ("drop", [slice(0, 0), slice(0, 20)], "they are left out"),
    ],
)
def test_long_chats_are_cut_or_dropped_and_counted(tokenizer, caplog, way, left, told):
    chats = [TALK, turns("a", "b")]
    whole = tokenised(tokenizer, *chats)
    assert whole.lengths.tolist() == [35, 13]
    found = tokenised(tokenizer, *chats, max_length=20, too_long=way)
    rows = [np.arange(*whole.starts[row : row + 2])[part] for row, part in enumerate(left)]
    rows = [row for row in rows if len(row)]
    assert found.ids.tolist() == whole.ids[np.concatenate(rows)].tolist()
    assert found.lengths.tolist() == [len(row) for row in rows]
    expected = f"1 of 2 chats have more than data.max_length=20 tokens, the longest 35; {told} (data.too_long={way})"
    assert [record.getMessage() for record in caplog.records] == [f"chats.jsonl: {expected}"]


def test_the_first_token_of_a_chat_that_was_cut_is_not_learned(tokenizer):
    found = tokenised(tokenizer, TALK, max_length=4, too_long="cut-left")
    assert marked(tokenizer, found) == ["(thin)", "g", "<|im_end|>", "(\n)"]


def test_rows_without_an_answer_are_left_out_and_counted(tokenizer, caplog):
    found = tokenised(tokenizer, turns("a"), turns("a", "b"), TALK[:1], turns("a" * 80, "b"), max_length=40)
    assert found.labels.tolist() == [1]
    assert (
        "3 of 4 chats are without an answer, or whose answers lie beyond data.max_length=40, the first is row 1; "
        "they are left out" in caplog.text
    )


def test_a_file_without_any_answer_is_refused(tokenizer):
    with pytest.raises(DataError, match="chats.jsonl: none of 2 chats has a token to learn"):
        tokenised(tokenizer, turns("a"), turns("b"))


# --- templates


def test_a_tokenizer_without_a_template_needs_one(tokenizer):
    with pytest.raises(ConfigError, match="no chat template; give one as data.template: chatml, llama-3, mistral"):
        tokenised(tokenizer, TALK, template=None)


def test_a_template_that_is_no_jinja_is_refused_with_its_line(tokenizer):
    with pytest.raises(ConfigError, match="data.template: line 2 is no Jinja"):
        tokenised(tokenizer, TALK, template="{{ bos_token }}\n{% for message in %}")


def test_what_a_template_refuses_is_told_with_the_row(tokenizer):
    with pytest.raises(
        DataError, match="chats.jsonl: row 2: the chat template refuses the chat: .*roles must alternate"
    ):
        tokenised(tokenizer, TALK, [*TALK[:2], *TALK[1:]], template=STOCK["mistral"])


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    forgets = (
        "{% for m in messages %}{{ m['role'] }}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
        "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    assert tokenised(tokenizer, turns("a", "b"), template=forgets).targets.max() > 0
    with pytest.raises(DataError, match="row 1: the chat template writes the turns before turn 2 otherwise"):
        tokenised(tokenizer, TALK, template=forgets)


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tokenizer):
    dated = "{{ strftime_now('%d %b %Y') }}" + STOCK["chatml"]
    text, spans = ChatTemplate(tokenizer, dated).render(TALK, "row 1")
    assert text.startswith("26 Jul 2024<|im_start|>")
    assert [text[start:end] for start, end in spans] == ["Hello you<|im_end|>", "Nothing<|im_end|>"]
    usual = "{% if not date_string is defined %}{% set date_string = 'today' %}{% endif %}{{ date_string }}"
    assert ChatTemplate(tokenizer, usual + STOCK["chatml"]).render(TALK, "row 1")[0] == text


def test_a_template_without_an_end_of_turn_is_warned_of(tokenizer, caplog):
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    tokenised(tokenizer, turns("a", "b"), template=plain + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert "puts no special token behind answers" in caplog.text


def test_a_tokenizer_that_does_not_tell_where_tokens_lie_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="a tokenizer that tells where its tokens lie"):
        tokenised(Slow(), TALK)


@pytest.mark.parametrize("given", ["chatlm", "no braces"])
def test_an_unknown_template_is_refused(given):
    with pytest.raises(ConfigError, match=f"data.template: '{given}' given; input should be chatml, llama-3, mistral"):
        load_config({"task": {"kind": "chat"}, "partition": "iid", "data": {"train": "a.jsonl", "template": given}})


# --- rows


def chats_of(**columns):
    table = pa.table(columns)
    roles = find_roles(table.column_names, CHAT_FORMS)
    by_role = {role: table.column(name) for role, name in roles.items()}
    return read_chats(by_role, np.arange(table.num_rows), "rows.parquet")


ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PART = {"type": "text", "text": "x"}  # of content, as OpenAI has it
WITH_SYSTEM = [{"role": "system", "content": "s"}, *ASKED]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": [ASKED]}, ASKED),
        ({"id": [3], "Messages": [WITH_SYSTEM]}, WITH_SYSTEM),
        ({"conversations": [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]]}, ASKED),
        ({"messages": [[{"role": "User ", "content": "a"}, {"role": "Assistant", "content": "b"}]]}, ASKED),
        ({"prompt": ["a"], "completion": ["b"]}, ASKED),
        ({"prompt": ["a"], "response": ["b"], "system": ["s"]}, WITH_SYSTEM),
        ({"question": ["a"], "answer": ["b"]}, ASKED),
        ({"instruction": ["a"], "output": ["b"]}, ASKED),
        ({"instruction": ["a"], "input": [""], "output": ["b"], "system": [None]}, ASKED),
        ({"instruction": ["a"], "input": ["x"], "output": ["b"]}, [{"role": "user", "content": "a\n\nx"}, ASKED[1]]),
        (
            {"instruction": ["a"], "context": ["x"], "response": ["b"]},
            [{"role": "user", "content": "a\n\nx"}, ASKED[1]],
        ),
        ({"question": ["a"], "context": ["x"], "answer": ["b"]}, turns("a\n\nx", "b")),
        ({"prompt": ["a"], "input": ["x"], "output": ["b"]}, turns("a\n\nx", "b")),
        (
            {"prompt": ["a"], "input": ["x"], "completion": ["b"], "system": ["s"], "history": [[["c", "d"]]]},
            [WITH_SYSTEM[0], *turns("c", "d", "a\n\nx", "b")],
        ),
        ({"prompt": [ASKED[:1]], "input": ["x"], "completion": ["b"]}, turns("a\n\nx", "b")),
        ({"prompt": [WITH_SYSTEM[:1]], "input": ["a"], "completion": ["b"]}, WITH_SYSTEM),
        ({"conversations": [ASKED], "system": ["s"]}, WITH_SYSTEM),
        ({"messages": [WITH_SYSTEM], "system": ["other"]}, WITH_SYSTEM),
        ({"messages": [ASKED], "system": [" "]}, ASKED),
        ({"instruction": ["a"], "output": ["b"], "history": [[["c", "d"]]]}, [*turns("c", "d"), *ASKED]),
        (
            {"instruction": ["a"], "output": ["b"], "input": ["x"], "system": ["s"], "history": [[["c", "d"]] * 2]},
            [WITH_SYSTEM[0], *turns("c", "d") * 2, *turns("a\n\nx", "b")],
        ),
        ({"instruction": ["a"], "output": ["b"], "history": [[]]}, ASKED),
        ({"prompt": [ASKED[:1]], "completion": [ASKED[1:]]}, ASKED),
        ({"prompt": [WITH_SYSTEM + ASKED[:1]], "completion": ["b"]}, [*WITH_SYSTEM, *ASKED]),
        ({"messages": [[{"role": "user", "content": [PART, PART | {"text": "y"}]}]]}, turns("xy")),
    ],
)
def test_rows_in_every_spelling_become_turns(columns, expected):
    assert chats_of(**columns) == [expected]


def message(**fields):
    return [ASKED, [ASKED[0], {"role": "assistant", "content": "b"} | fields]]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"messages": [ASKED, None]}, "row 2: messages is empty; expected a list of turns with role and content"),
        ({"messages": [ASKED, []]}, "row 2: messages is empty; expected turns"),
        ({"messages": ["a"]}, "row 1: messages is a str; expected a list of turns"),
        ({"messages": [["a"]]}, "row 1, turn 1: is a str; expected an object with role and content"),
        ({"messages": message(role=None)}, "row 2, turn 2: there is no role; expected one of system"),
        ({"messages": message(role="narrator")}, "row 2, turn 2: role 'narrator' is unknown; expected one of system"),
        (
            {"messages": [[{"role": ["user"], "content": "a"}]]},
            "row 1, turn 1: role ['user'] is unknown; expected one of",
        ),
        (
            {"messages": [[{"speaker": "user", "text": "a"}]]},
            "row 1, turn 1: there is no role, its keys are speaker, text; expected role and content, or from and value",
        ),
        (
            {"messages": [[{"role": "user", "text": "a"}]]},
            "row 1, turn 1: there is no content, its keys are role, text; expected role and content, or from and value",
        ),
        ({"messages": message(content=None)}, "row 2, turn 2: content is empty; expected text"),
        ({"messages": message(content=" ")}, "row 2, turn 2: content is empty; expected text"),
        ({"messages": [[{"role": "user", "content": 3}]]}, "row 1, turn 1: content is a int; expected text"),
        ({"messages": [ASKED, ASKED[::-1]]}, "row 2: begins with an assistant's turn"),
        ({"messages": [ASKED * 600]}, "row 1: 1200 turns; expected at most 1000"),
        ({"prompt": ["a", "a"], "completion": ["b", ""]}, "row 2: completion is empty; expected text; fill or remove"),
        ({"prompt": [7], "completion": ["b"]}, "row 1: prompt is a int; expected text"),
        ({"instruction": ["a"], "input": [["x"]], "output": ["b"]}, "row 1: input is a list; expected text"),
        ({"instruction": [ASKED], "output": ["b"]}, "row 1: instruction is a list; expected text"),
        ({"messages": [ASKED], "system": [3]}, "row 1: system is a int; expected text"),
        ({"prompt": [ASKED[:1], []], "completion": [ASKED[1:]] * 2}, "row 2, prompt: prompt is empty; expected turns"),
        ({"prompt": [ASKED[:1]], "completion": [message(role="x")[1]]}, "row 1, completion, turn 2: role 'x' is"),
        ({"prompt": [ASKED[1:]], "completion": ["b"]}, "row 1: begins with an assistant's turn"),
        (
            {"instruction": ["a"], "output": ["b"], "history": [[["c"]]]},
            "row 1: history is no list of pairs; expected [[question, answer], ...]",
        ),
        (
            {"instruction": ["a"], "output": ["b"], "history": [[["c", "d"], ["e", ""]]]},
            "row 1: answer 2 of history is empty; expected text",
        ),
        (
            {"messages": [[{"role": "user", "content": [PART, PART | {"type": "image_url"}]}]]},
            "row 1, turn 1: part 2 of content is of type 'image_url'; only parts of type 'text' are read",
        ),
        ({"messages": [[{"role": "user", "content": ["a"]}]]}, "row 1, turn 1: part 1 of content is a str; only parts"),
        (
            {"messages": message(role="function_call")},
            "row 2, turn 2: role 'function_call' is of calls of functions, which each model spells otherwise",
        ),
    ],
)
def test_bad_rows_are_named(columns, told):
    with pytest.raises(DataError, match=f"rows.parquet: {re.escape(told)}"):
        chats_of(**columns)


def chat_config(models, file, **data):
    tree = {"train": str(file), "eval": None, "max_length": 32, **data}
    return load_config(
        {"model": {"source": models("llama")}, "task": {"kind": "chat"}, "partition": "iid", "data": tree}
    )


def load(models, file, **data):
    from peerlora.lora.base_models import load_tokenizer

    return load_datasets(chat_config(models, file, **data), load_tokenizer(models("llama")), None)


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


ALPACA = {"instruction": "What now", "output": "Nothing", "history": [["Hi there", "Hello you"]]}


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"messages": TALK, "system": "Hi"}, [{"role": "system", "content": "Hi"}, *TALK]),
        (ALPACA, TALK),
        ({"prompt": TALK[:3], "completion": TALK[3:]}, TALK),
    ],
)
def test_systems_histories_and_lists_of_turns_are_learned_token_by_token(tokenizer, tmp_path, row, chat):
    tree = {"train": str(write(tmp_path, [row] * 2)), "max_length": 100, "template": "chatml", "eval": None}
    config = load_config({"task": {"kind": "chat"}, "partition": "iid", "data": tree})
    train, _ = load_datasets(config, tokenizer, None)
    expected = MASKS["chatml"].split("·")
    if len(chat) > len(TALK):
        expected = "(<|im_start|>)·(sy)·(stem)·(\n)·(H)·(i)·(<|im_end|>)·(\n)".split("·") + expected
    assert marked(tokenizer, train) == expected
    assert train.ids.tolist() == tokenised(tokenizer, chat).ids.tolist()


def test_columns_are_named_by_role_also_inside_objects(models, tmp_path):
    rows = [{"q": f"w{i}", "all": {"of": {"it": f"w{i + 1} w{i + 2}"}}} for i in range(10)]
    train, _ = load(models, write(tmp_path, rows), columns={"prompt": "q", "completion": "all.of.it"})
    usual = [{"prompt": row["q"], "completion": row["all"]["of"]["it"]} for row in rows]
    same, _ = load(models, write(tmp_path, usual, "usual.jsonl"))
    assert train.ids.tolist() == same.ids.tolist()
    assert train.targets.tolist() == same.targets.tolist() and len(train) == 9


def test_parquet_of_messages_is_read_as_jsonl_is(models, tmp_path, chats):
    table = pa.Table.from_pylist([json.loads(line) for line in chats.read_text().splitlines()])
    pq.write_table(table, tmp_path / "chats.parquet")
    ours, theirs = load(models, chats), load(models, tmp_path / "chats.parquet")
    assert all(one.ids.tolist() == other.ids.tolist() for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"columns": {"prompt": "p", "completion": "a"}}, "has no column 'p' for data.columns"),
        ({"columns": {"prompt": "q", "completion": "a.b"}}, "field 'b' for data.columns=a.b: it holds large_string"),
        ({"columns": {"prompt": "q", "completion": "c.b"}}, "has no column 'c.b' for data.columns"),
        (
            {},
            "has no columns for task.kind=chat; expected messages (and perhaps system); or instruction and output",
        ),
    ],
)
def test_missing_columns_are_refused(models, tmp_path, data, told):
    file = write(tmp_path, [{"q": "w1", "a": "w2", "wrong": 1}] * 8)
    with pytest.raises(DataError, match=re.escape(told)):
        load(models, file, **data)


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"data": {"template": "chatml"}}, "data.template='chatml' is of task.kind=chat"),
        ({"data": {"loss_on": "all"}}, "data.loss_on='all' is of task.kind=chat"),
        ({"data": {"too_long": "drop"}}, "data.too_long='drop' is of task.kind=chat"),
        ({"data": {"columns": {"prompt": "a"}}}, "task.kind=classification reads data.text and data.label"),
        ({"eval": {"generate": {}}}, "task.kind=classification writes no answers"),
        ({"task": {"kind": "chat"}, "data": {"columns": {"prompt": "a"}}}, "data.columns names prompt; task.kind=chat"),
        (
            {"task": {"kind": "chat"}, "data": {"loss_on": "all"}, "eval": {"generate": {}}},
            "data.loss_on=all does not tell answers apart",
        ),
        (
            {"task": {"kind": "chat"}, "eval": {"generate": {"client": 10}}},
            "eval.generate.client=10 given; 10 clients are numbered 0 to 9",
        ),
        ({"task": {"kind": "chat"}, "eval": {"generate": {"scores": ["bleu"]}}}, "eval.generate.scores"),
    ],
)
def test_settings_that_a_task_does_not_read_are_refused(tree, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_config({"partition": "iid", **tree})


def test_targets_follow_their_rows(models, chats):
    train, _ = load(models, chats)
    some = train.take([5, 2])
    for place, row in enumerate([5, 2]):
        theirs = slice(*train.starts[row : row + 2].tolist())
        ours = slice(*some.starts[place : place + 2].tolist())
        assert some.targets[ours].tolist() == train.targets[theirs].tolist()


def test_a_column_decides_who_holds_a_chat(models, chats):
    tree = {"train": str(chats), "eval": None, "max_length": 32}
    config = load_config(
        {
            "model": {"source": models("llama")},
            "task": {"kind": "chat"},
            "partition": {"kind": "column", "column": "site"},
            "clients": 4,
            "data": tree,
        }
    )
    from peerlora.data.partition import partition
    from peerlora.lora.base_models import load_tokenizer

    train, _ = load_datasets(config, load_tokenizer(models("llama")), None)
    shards = partition(config.partition, train, 4, 0).shards
    assert [len(set(train.columns["site"][own])) for own in shards] == [1, 1, 1, 1]
