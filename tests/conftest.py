"""Small real things that many tests share: tiny random models with a tokenizer, and data files."""

import gc
import json
import os
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

import image_rows
import shape_checks

# How long an example takes, or drawing one, depends on the machine and on what else it does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
torch.set_num_threads(1)
shape_checks.install()


def pytest_collection_modifyitems(items):
    """Those that take long begin first, in an order that all workers share."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish():
    """The collector, which took an eighth of the time, need not look at torch and at the tests again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


WORDS = [f"w{i}" for i in range(40)]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- ('w39 ' if message['role'] == 'assistant' else 'w38 ') + message['content'] + ' ' + eos_token + ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'w39 ' -}}{%- endif -%}
"""


@pytest.fixture(autouse=True)
def shapes_of_each_test():
    """Each test has its first calls checked."""
    shape_checks.Current.test += 1


@pytest.fixture(scope="session", autouse=True)
def loaded_once():
    """A base model is read from its files once; every run composed here gets a copy of its own.

    What tests of ``lora.base_models`` and ``lora.attach`` call, and what runs in processes call, is not replaced.
    """
    from peerlora.runtime import resources

    load_base, find_targets, observe = resources.load_base, resources.find_targets, resources.observe_forward

    @lru_cache(maxsize=16)
    def base(place, *arguments):
        return load_base(*arguments)

    targets = {}

    def targets_once(model, *words):
        key = (type(model), model.config.to_json_string(), repr(words))
        if key not in targets:
            targets[key] = find_targets(model, *words)
        return targets[key]

    facts = {}

    def observed_once(model, source, modules, data, *words):
        size = None if data.pixels is None else data.pixels.shape
        key = (type(model), model.config.to_json_string(), tuple(modules), size)
        if key not in facts:
            facts[key] = observe(model, source, modules, data, *words)
        return facts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "observe_forward", observed_once)
        patch.setattr(resources, "load_base", lambda *words: deepcopy(base(Path(words[0]).resolve(), *words)))
        patch.setattr(resources, "find_targets", targets_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def files_are_left_to_the_system():
    """Nothing waits for the disk: a power cut is no case of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        yield


@pytest.fixture
def drawn():
    """Figures are drawn in full, where they are the subject."""


@pytest.fixture(autouse=True)
def empty_figures(request, monkeypatch):
    """Reports of runs are written without figures, others with empty ones: drawing takes longer than a tiny run."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("peerlora.runs.report._pictures", lambda start, events: [])
        empty = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'

        def save(figure, out, **options):
            out.write(empty) if hasattr(out, "write") else Path(out).write_text(empty)

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def write_tokenizer():
    """A function that writes the tests' tokenizer into a folder and returns its size."""
    return save_tokenizer


def tiny_model(kind, folder):
    """Save a randomly initialised model of a family, without a task head, and its tokenizer."""
    import transformers as tf

    if kind in image_rows.MODELS:
        return image_rows.save_model(kind, folder)
    size = save_tokenizer(folder)
    small = dict(vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    small |= dict(intermediate_size=24, max_position_embeddings=40)
    torch.manual_seed(1)
    if kind == "bert":
        model = tf.BertModel(tf.BertConfig(**small))
    elif kind == "roberta":
        model = tf.RobertaModel(tf.RobertaConfig(**small), add_pooling_layer=False)
    elif kind == "t5":
        t5 = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
        model = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=size, pad_token_id=0, eos_token_id=2, **t5))
    elif kind == "llama":
        model = tf.LlamaForCausalLM(
            tf.LlamaConfig(**small, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
        )
    else:
        model = tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=2
            )
        )
    for parameter in model.parameters():  # larger than usual, so that a wrong factor shows
        parameter.data.mul_(4) if parameter.ndim == 2 else None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder of a tiny model by family: bert, roberta, llama, gpt2, t5, and those of images."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = str(tiny_model(kind, tmp_path_factory.mktemp(kind)))
        return made[kind]

    return get


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A jsonl file of 60 rows: text, other (a second text), label (3 classes), score, site, several (labels)."""
    import random

    draw = random.Random(0)
    rows = []
    for i in range(60):
        label = i % 3
        words = [draw.choice(WORDS[label * 10 : label * 10 + 14]) for _ in range(draw.randint(2, 9))]
        row = {"text": " ".join(words), "other": " ".join(words[::-1]), "label": f"class{label}"}
        rows.append(row | {"score": draw.random() * 3, "site": f"site{i % 4}"})
        rows[-1]["several"] = [f"class{other}" for other in range(3) if other == label or words[0][-1] in "135"]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "train.jsonl", rows)


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A jsonl file of 40 chats of one or two questions; an answer repeats the words of its question, turned round."""
    import random

    draw = random.Random(0)
    rows = []
    for i in range(40):
        turns = []
        for _ in range(1 + i % 2):
            words = [draw.choice(WORDS[:12]) for _ in range(draw.randint(1, 4))]
            turns += [{"role": "user", "content": " ".join(words)}]
            turns += [{"role": "assistant", "content": " ".join(words[::-1])}]
        rows.append({"messages": turns, "site": f"site{i % 4}"})
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A jsonl file of 40 prompts with completions: their words turned round, once or twice."""
    import random

    draw = random.Random(0)
    rows = []
    for i in range(40):
        words = [draw.choice(WORDS[:12]) for _ in range(draw.randint(1, 4))]
        rows.append({"prompt": " ".join(words), "completion": " ".join(words[::-1] * (1 + i % 2))})
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def tagged(tmp_path_factory):
    """A jsonl file of 40 rows of words, tagged by their number: w0 to w4 begin places, w5 to w9 go on."""
    import random

    draw = random.Random(0)
    rows = []
    for _ in range(40):
        numbers = [draw.randrange(20) for _ in range(draw.randint(2, 9))]
        tags = [("B-LOC", "I-LOC")[number // 5] if number < 10 else "O" for number in numbers]
        rows.append({"tokens": [WORDS[number] for number in numbers], "tags": tags})
    return write_jsonl(tmp_path_factory.mktemp("tagged") / "tagged.jsonl", rows)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A parquet file of 48 images of 3 classes, as `datasets` writes them: image {bytes, path}, label with names."""
    return image_rows.write_table(tmp_path_factory.mktemp("pictures") / "pictures.parquet")


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """The same images, as PNG files in the folders left, middle and right."""
    return image_rows.write_folder(tmp_path_factory.mktemp("picture_folder"))


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(cache_folder, monkeypatch):
    """Keep the tokenised data of the tests, which they share, out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder))


@pytest.fixture
def config(models, texts, cache):
    """Build a config of 4 clients on a tiny model; dotted overrides as on the command line."""
    from peerlora.config.loading import load_config

    def build(kind="bert", *words):
        tree = {
            "model": {"source": models(kind)},
            "adapter": {"rank": 3, "alpha": 6},
            "data": {"train": f"jsonl:{texts}", "eval": None, "text": ["text"], "label": "label", "max_length": 12},
            "clients": 4,
            "partition": {"kind": "iid"},
            "topology": {"kind": "ring"},
            "train": {"rounds": 3, "local_steps": 2, "batch": 4, "lr": 0.01, "dtype": "fp64"},
            "eval": {"every": 2},
            "checkpoint": {"every": 1},
            "threads": 1,
        }
        return load_config(tree, words)

    return build


@pytest.fixture
def no_reports(monkeypatch):
    """Runs draw no figures, which would take longer than a tiny run."""
    monkeypatch.setattr("peerlora.runs.report.write_report", lambda *args, **kwargs: None)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; for tests marked by ``browser_pages.in_browser``."""
    from playwright.sync_api import sync_playwright

    from browser_pages import CHROMIUM

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser):
    """Open a page; it must ask nobody but its own server, or nobody at all where it is a file, and report no error."""
    wrong, pages = [], []

    def open_page(address, width=1280, height=900, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        host = address.split("/")[2]
        own = ("data:", "blob:", address.partition("//")[0] + f"//{host}/" if host else address)
        page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto(address)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []
