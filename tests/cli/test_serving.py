"""``merge``, ``predict``, ``push`` and ``export --with-base``: what is done with a run's models."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from peerlora.config.loading import load_config
from peerlora.data.sources import load_datasets
from peerlora.lora.base_models import load_tokenizer
from peerlora.runtime.compose import compose
from peerlora.runtime.export import exporter_of, read_adapters

README = Path(__file__).parents[2] / "README.md"
CAUSAL = ("task.kind=causal-lm", "data.label=null")
QUICK = ("train.rounds=1", "eval.every=1", "train.dtype=fp32", "train.lr=0.1")


@pytest.fixture
def finished(cli, yaml_file, tmp_path):
    """A function that runs a federation and gives its folder."""

    def run(*words, kind="bert", name="run"):
        answer = cli("train", yaml_file(*QUICK, *words, kind=kind), "--out", tmp_path / name)
        assert answer.code == 0, answer.err
        return tmp_path / name

    return run


@pytest.fixture
def five_classes(tmp_path):
    """Words of a config whose rows have five classes."""
    path = tmp_path / "five.jsonl"
    rows = [{"text": f"w{i % 40} w{i % 7}", "label": f"kind{i % 5}"} for i in range(50)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return (f"data.train=jsonl:{path}",)


def shares_of(run, client=None):
    """[row, class] what a client of a run (None: the average) says of its evaluation rows."""
    config = load_config(run / "config.yaml")
    federation, x = compose(config), read_adapters(run, exporter_of(run))
    own = x.mean() if client is None else x.rows([client])
    return torch.softmax(torch.from_numpy(federation.learner.logits(own, federation.eval_data, 7)[0]).double(), 1)


def rows_of(run, tmp_path):
    """A file with the texts of the evaluation rows, in their order."""
    config = load_config(run / "config.yaml")
    tokenizer = load_tokenizer(config.model.source)
    _, evaluation = load_datasets(config, tokenizer, cache=None)
    texts = [
        " ".join(tokenizer.convert_ids_to_tokens(evaluation.ids[a + 1 : b - 1].tolist()))
        for a, b in zip(evaluation.starts[:-1], evaluation.starts[1:], strict=True)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def answers(cli, *words):
    answer = cli("predict", *words)
    assert answer.code == 0, answer.err
    return [json.loads(line) for line in answer.out.splitlines()]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", ()),
        ("bert", ("adapter.init=pissa",)),
        ("bert", ("adapter.modules_to_save=[word_embeddings]",)),
        ("roberta", ("adapter.modules_to_save=[classifier.dense]",)),  # a head of two layers, and no pooler
        ("gpt2", ()),  # weights stored transposed
        ("gpt2", ("adapter.init=olora",)),
    ],
)
def test_merged_and_adapter_folders_answer_as_the_run_does(cli, finished, five_classes, tmp_path, kind, words):
    run = finished(*five_classes, *words, kind=kind)
    rows, expected = rows_of(run, tmp_path), shares_of(run, 2)
    answer = cli("merge", run, "--client", "2", "--to", tmp_path / "model", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out) == {"run": str(run), "client": 2, "to": str(tmp_path / "model")}
    names = [f"kind{i}" for i in range(5)]
    for folder in (tmp_path / "model", run / "adapters" / "client-02"):
        found = answers(cli, folder, "--rows", rows, "--batch", "3")
        assert [each["row"] for each in found] == list(range(1, len(expected) + 1))
        shares = np.array([[each["probabilities"][name] for name in names] for each in found])
        assert np.abs(shares - expected.numpy()).max() < 1e-5
        assert [each["label"] for each in found] == [names[i] for i in expected.argmax(1).tolist()]


def test_the_average_merges_and_can_be_written_in_bf16(cli, finished, five_classes, tmp_path):
    from safetensors.torch import load_file

    run = finished(*five_classes)
    rows, expected = rows_of(run, tmp_path), shares_of(run)
    assert cli("merge", run, "--average", "--to", tmp_path / "half", "--dtype", "bf16").code == 0
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    found = answers(cli, tmp_path / "half", "--rows", rows)
    shares = np.array([list(each["probabilities"].values()) for each in found])
    assert np.abs(shares - expected.numpy()).max() < 0.05
    assert "the average of all clients" in (tmp_path / "half" / "README.md").read_text()


def test_the_card_of_a_whole_model_names_the_base_as_the_run_did(cli, finished, models, tmp_path, monkeypatch):
    shutil.copytree(models("bert"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    run = finished("model.source=./base")
    monkeypatch.chdir("/")
    assert cli("merge", run, "--client", "0", "--to", tmp_path / "model").code == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "`./base` with the LoRA adapter of client 0" in card and str(tmp_path) not in card


def test_a_number_and_a_continuation_are_answers_too(cli, finished, tmp_path):
    run = finished("task.kind=regression", "data.label=score")
    rows = rows_of(run, tmp_path)
    found = answers(cli, run / "adapters" / "average", "--rows", rows)
    assert all(set(each) == {"row", "value"} for each in found) and found
    run = finished(*CAUSAL, kind="llama", name="causal")
    assert cli("merge", run, "--client", "0", "--to", tmp_path / "model").code == 0
    whole = answers(cli, tmp_path / "model", "--rows", rows, "--new-tokens", "5")
    adapter = answers(cli, run / "adapters" / "client-00", "--rows", rows, "--new-tokens", "5")
    assert whole == adapter and all(len(each["answer"].split()) <= 5 for each in whole)
    assert any(each["answer"] for each in whole)
    far = answers(cli, tmp_path / "model", "--rows", rows, "--new-tokens", "5000")  # the model reads 40 tokens
    assert all(len(each["answer"].split()) <= 40 for each in far)
    settings = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    settings["post_processor"]["single"].pop()  # its end of text, without which a prompt has room for one token
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(settings))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "w1 " * 60}))
    answer = cli("predict", tmp_path / "model", "--rows", tmp_path / "long.jsonl", "--max-length", "40")
    assert answer.code == 2 and "leave no room for an answer" in answer.err


def test_tied_weights_are_untied_where_a_head_is_adapted(cli, finished, tmp_path):
    run = finished(*CAUSAL, "adapter.targets=[lm_head]", kind="gpt2")
    rows = rows_of(run, tmp_path)
    assert cli("merge", run, "--client", "1", "--to", tmp_path / "model").code == 0
    assert not json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"]
    assert answers(cli, tmp_path / "model", "--rows", rows) == answers(
        cli, run / "adapters" / "client-01", "--rows", rows
    )


def test_answers_go_into_a_new_file(cli, finished, tmp_path):
    run = finished()
    rows, to = rows_of(run, tmp_path), tmp_path / "answers.jsonl"
    answer = cli("predict", run / "adapters" / "average", "--rows", rows, "--to", to, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["rows"] == len(to.read_text().splitlines()) > 0
    assert cli("predict", run / "adapters" / "average", "--rows", rows, "--to", to).code == 2


def test_pipelines_and_peft_load_an_adapter_with_its_base(cli, finished, five_classes, tmp_path, monkeypatch):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import pipeline

    run = finished(*five_classes)
    expected = shares_of(run, 1)
    answer = cli("export", run, "--client", "1", "--to", tmp_path / "adapter", "--with-base")
    assert answer.code == 0, answer.err
    texts = [json.loads(line)["text"] for line in rows_of(run, tmp_path).read_text().splitlines()]
    monkeypatch.chdir("/")
    found = pipeline("text-classification", model=str(tmp_path / "adapter"))(texts)
    assert [each["label"] for each in found] == [f"kind{i}" for i in expected.argmax(1).tolist()]
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert loaded.config.id2label == {i: f"kind{i}" for i in range(5)}
    assert answers(cli, tmp_path / "adapter", "--rows", tmp_path / "rows.jsonl")[0]["label"] == found[0]["label"]


def test_the_snippets_of_the_readme_run_with_five_classes(cli, finished, five_classes, tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    part = text[text.index("## Using an adapter") : text.index("## Limits")]
    whole, adapter = re.findall(r"```python\n(.*?)```", part, flags=re.S)
    run = finished(*five_classes)
    assert cli("merge", run, "--average", "--to", tmp_path / "model").code == 0
    assert cli("export", run, "--average", "--to", tmp_path / "adapter").code == 0
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(whole, scope)
    exec(adapter, scope)
    with torch.no_grad():
        logits = scope["model"](**scope["tokenizer"](["w1 w2"], return_tensors="pt")).logits
    answered = scope["pipeline"]("text-classification", model="model")("w1 w2")[0]["label"]
    assert answered == scope["model"].config.id2label[int(logits.argmax())] and logits.shape == (1, 5)


def test_a_folder_without_the_projects_notes_asks_for_its_columns(cli, finished, tmp_path):
    run = finished()
    rows, folder = rows_of(run, tmp_path), tmp_path / "foreign"
    shutil.copytree(run / "adapters" / "average", folder)
    known = answers(cli, folder, "--rows", rows)
    (folder / "peerlora.json").unlink()
    answer = cli("predict", folder, "--rows", rows)
    assert answer.code == 2 and "give --text NAME" in answer.err
    assert answers(cli, folder, "--rows", rows, "--text", "text", "--max-length", "12") == known
    (folder / "labels.json").unlink()
    unnamed = answers(cli, folder, "--rows", rows, "--text", "text")
    assert set(unnamed[0]["probabilities"]) == {"LABEL_0", "LABEL_1", "LABEL_2"}


@pytest.mark.parametrize(
    "content", ["[", "[]", '{"task": "classification"}', '{"task": "x", "text": [], "max_length": 3}']
)
def test_damaged_notes_are_told(cli, finished, tmp_path, content):
    run = finished()
    (run / "adapters" / "average" / "peerlora.json").write_text(content)
    answer = cli("predict", run / "adapters" / "average", "--rows", rows_of(run, tmp_path))
    assert answer.code == 2 and "peerlora.json" in answer.err and "Traceback" not in answer.err


def test_rows_beyond_what_a_model_reads_are_cut_and_told(cli, finished, tmp_path, caplog):
    run = finished()
    folder, rows = run / "adapters" / "average", tmp_path / "long.jsonl"
    texts = ["w1 w2", "w1 " * 10, "w1 " * 11, "w3 " * 300]  # with two tokens around them
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = answers(cli, folder, "--rows", rows)
    assert "2 of 4 rows have more than 12 tokens and are cut there" in caplog.text
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("\n".join(json.dumps({"text": " ".join(text.split()[:10])}) for text in texts))
    caplog.clear()
    assert answers(cli, folder, "--rows", shorter) == found and not caplog.text
    (folder / "peerlora.json").unlink()  # of another program: 512 tokens, and the model reads 40
    cut = answers(cli, folder, "--rows", rows, "--text", "text")
    assert "1 of 4 rows have more than 40 tokens" in caplog.text and len(cut) == 4
    answer = cli("predict", folder, "--rows", rows, "--text", "text", "--max-length", "41")
    assert answer.code == 2 and "reads at most 40 tokens; lower it" in answer.err


def test_a_row_without_a_token_is_named(cli, finished, tmp_path, monkeypatch):
    run = finished(*CAUSAL, kind="llama")
    rows = tmp_path / "empty.jsonl"
    rows.write_text('{"text": "w1"}\n{"text": ""}')
    from peerlora.runtime import predict

    monkeypatch.setattr(predict, "tokenise", _without_special(predict.tokenise))
    answer = cli("predict", run / "adapters" / "average", "--rows", rows)
    assert answer.code == 2 and "row 2 has no token" in answer.err


def _without_special(tokenise):
    """As the tokenizers of many decoders, which put nothing around a text."""

    def plain(texts, tokenizer, *words):
        tokenizer.backend_tokenizer.post_processor = None
        return tokenise(texts, tokenizer, *words)

    return plain


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("peerlora.json", '{"task": "no-such", "text": ["text"], "max_length": 9}', "task 'no-such' given"),
        ("peerlora.json", '{"task": "flow-policy", "text": ["text"], "max_length": 9}', "flow-policy answers no rows"),
        ("labels.json", "[", "cannot be read"),
        ("labels.json", "[]", "expected a JSON object"),
        ("adapter_config.json", "{", "cannot be read"),
        ("adapter_config.json", "[1]", "expected a JSON object"),
        ("adapter_config.json", "{}", "does not name a base model"),
        ("adapter_model.safetensors", "broken", "adapter_model.safetensors cannot be read"),
    ],
)
def test_damaged_folders_are_one_message(cli, finished, tmp_path, file, content, told):
    run = finished()
    folder, rows = run / "adapters" / "average", rows_of(run, tmp_path)
    (folder / file).write_text(content)
    answer = cli("predict", folder, "--rows", rows)
    assert answer.code == 2 and told in answer.err and len(answer.err.strip().splitlines()) == 1
    if file == "adapter_config.json":
        answer = cli("push", folder, "me/x", "--dry-run")
        assert answer.code == 2 and len(answer.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"task_type": "QUESTION_ANS"}, "task_type='QUESTION_ANS'; rows can be answered by SEQ_CLS"),
        ({"task_type": None}, "task_type=None"),
        ({"task_type": ""}, "task_type=''; rows can be answered by SEQ_CLS"),
    ],
)
def test_a_folder_for_another_task_is_refused(cli, finished, tmp_path, settings, told):
    run = finished()
    folder, rows = run / "adapters" / "average", rows_of(run, tmp_path)
    (folder / "peerlora.json").unlink()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    answer = cli("predict", folder, "--rows", rows, "--text", "text")
    assert answer.code == 2 and told in answer.err


def test_a_pickle_is_never_read(cli, finished, tmp_path):
    run = finished()
    folder, rows = run / "adapters" / "average", rows_of(run, tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    answer = cli("predict", folder, "--rows", rows)
    assert answer.code == 2 and "a pickle, which can run code" in answer.err


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_classes_without_names_are_counted_by_the_head(cli, finished, five_classes, tmp_path, kind):
    run = finished(*five_classes, "adapter.modules_to_save=[word_embeddings]", kind=kind)
    folder, rows = run / "adapters" / "average", rows_of(run, tmp_path)
    (folder / "labels.json").unlink()
    assert set(answers(cli, folder, "--rows", rows)[0]["probabilities"]) == {f"LABEL_{i}" for i in range(5)}


def test_a_merge_that_was_killed_leaves_nothing_that_stays(cli, finished, tmp_path, monkeypatch):
    from peerlora.runtime import whole_model

    run = finished()
    before = set(tmp_path.iterdir())

    def killed(*words):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(whole_model, "_merged", killed)
        assert cli("merge", run, "--client", "0", "--to", tmp_path / "model").code == 130
        assert set(tmp_path.iterdir()) == before
        patch.setattr("shutil.rmtree", lambda *words, **more: None)  # killed for good: nothing is tidied
        assert cli("merge", run, "--client", "0", "--to", tmp_path / "model").code == 130
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"model.tmp"}
    assert cli("merge", run, "--client", "0", "--to", tmp_path / "model").code == 0
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"model"}
    assert not (tmp_path / "model" / "adapter").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["merge", "RUN", "--to", "NEW"], "merge needs exactly one of --client I and --average"),
        (["merge", "RUN", "--client", "9", "--to", "NEW"], "has clients 0 to 3"),
        (["merge", "RUN", "--average", "--to", "RUN"], "is not empty"),
        (["merge", "RUN", "--average", "--to", "NEW", "--dtype", "int8"], "expected one of fp32, bf16, fp16"),
        (["merge", "NEW", "--average", "--to", "OTHER"], "is not a run folder"),
        (["predict", "NEW", "--rows", "x.csv"], "holds neither config.json nor adapter_config.json"),
        (["predict", "RUN/adapters/average", "--rows", "nowhere.csv"], "file does not exist"),
        (["predict", "RUN/adapters/average", "--rows", "RUN/rows.jsonl", "--text", "other"], "no column 'other'"),
        (["predict", "RUN/adapters/average", "--rows", "RUN/rows.jsonl", "--text", "n"], "expected text"),
    ],
)
def test_bad_words_give_one_message(cli, finished, tmp_path, words, told):
    run = finished()
    (run / "rows.jsonl").write_text('{"text": "w1", "n": 1}')
    places = {"NEW": str(tmp_path / "new"), "OTHER": str(tmp_path / "other")}
    answer = cli(*(places.get(word, word.replace("RUN", str(run))) for word in words))
    assert answer.code == 2 and told in answer.err and len(answer.err.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.tmp").exists()


# --- push


def test_a_dry_run_tells_the_files_and_sends_nothing(cli, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    run = finished()
    assert cli("merge", run, "--average", "--to", tmp_path / "model").code == 0
    (tmp_path / "model" / "notes.py").write_text("private")
    answer = cli("push", tmp_path / "model", "me/model", "--dry-run")
    assert answer.code == 0, answer.err
    assert "model.safetensors" in answer.out and "notes.py" not in answer.out and "nothing was sent" in answer.out


@pytest.fixture
def hub(monkeypatch):
    """What a hub in place of the real one was given: repo, private, and files by name."""
    seen = {}

    class Hub:
        def create_repo(self, repo, private, exist_ok):
            seen.update(repo=repo, private=private)
            return type("Made", (), {"repo_id": repo if "/" in repo else f"me/{repo}"})

        def create_commit(self, repo_id, operations, commit_message):
            places = {each.path_in_repo: each.path_or_fileobj for each in operations}
            seen.update(to=repo_id, lying={name for name, place in places.items() if not isinstance(place, bytes)})
            seen["files"] = {
                name: place if isinstance(place, bytes) else Path(place).read_bytes() for name, place in places.items()
            }
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return seen


def test_an_upload_names_the_base_and_leaves_the_folder_alone(cli, finished, hub):
    run = finished()
    folder = run / "adapters" / "average"
    before = (folder / "adapter_config.json").read_bytes()
    answer = cli("push", folder, "me/adapter", "--base", "owner/base", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["commit"].endswith("commit/1")
    assert hub["repo"] == hub["to"] == "me/adapter" and hub["private"] is True
    assert json.loads(hub["files"]["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    card = hub["files"]["README.md"].decode()
    assert '"base_model": "owner/base"' in card and "layers of `owner/base`" in card
    assert "on the machine that wrote it" not in card and str(Path(run).parents[1]) not in card
    assert hub["files"].keys() >= {"adapter_model.safetensors", "tokenizer.json", "labels.json", "peerlora.json"}
    assert hub["lying"] == hub["files"].keys() - {"adapter_config.json", "README.md"}, "weights are not copied"
    assert (folder / "adapter_config.json").read_bytes() == before


def test_a_name_without_an_owner_is_one_of_the_user_and_may_be_a_base(cli, finished, hub):
    run = finished()
    folder = run / "adapters" / "average"
    assert cli("push", folder, "adapter", "--base", "gpt2").code == 0
    assert hub["to"] == "me/adapter"
    assert json.loads(hub["files"]["adapter_config.json"])["base_model_name_or_path"] == "gpt2"
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "gpt2"}))
    assert cli("push", folder, "me/adapter").code == 0


@pytest.mark.parametrize(("base", "kept"), [("owner/base", "v1.2"), ("owner/other", None)])
def test_a_revision_is_of_the_base_that_had_it(cli, finished, hub, base, kept):
    run = finished()
    path = run / "adapters" / "average" / "adapter_config.json"
    named = {"base_model_name_or_path": "owner/base", "revision": "v1.2"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    assert cli("push", path.parent, "me/adapter", "--base", base).code == 0
    assert json.loads(hub["files"]["adapter_config.json"])["revision"] == kept


def test_a_base_in_the_folder_has_no_revision(cli, finished, tmp_path):
    run = finished()
    path = run / "adapters" / "client-00" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "v1.2"}))
    assert cli("export", run, "--client", "0", "--to", tmp_path / "adapter", "--with-base").code == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["revision"] is None
    assert settings["base_model_name_or_path"] == str(tmp_path / "adapter" / "base")
    assert answers(cli, tmp_path / "adapter", "--rows", rows_of(run, tmp_path))


def test_offline_is_one_message(cli, finished, tmp_path):
    run = finished()
    assert cli("merge", run, "--average", "--to", tmp_path / "model").code == 0
    answer = cli("push", tmp_path / "model", "me/model")  # HF_HUB_OFFLINE is set
    assert answer.code == 2 and "me/model cannot be written" in answer.err and "--dry-run" in answer.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["FOLDER", "me/your/x"], "expected OWNER/NAME or NAME"),
        (["FOLDER", "me/x", "--base", "../x"], "--base is '../x'; expected OWNER/NAME or NAME"),
        (
            ["FOLDER", "me/x"],
            "which others cannot load; give --base OWNER/NAME, or upload the whole model: peerlora merge",
        ),
        (["RUN", "me/x"], "holds neither config.json nor adapter_config.json"),
    ],
)
def test_uploads_that_nobody_could_use_are_refused(cli, finished, words, told):
    run = finished()
    places = {"FOLDER": str(run / "adapters" / "average"), "RUN": str(run)}
    answer = cli("push", *(places.get(word, word) for word in words), "--dry-run")
    assert answer.code == 2 and told in answer.err


CHAT = ("task.kind=chat", "data.label=null", "data.max_length=32", "train.rounds=20", "algorithm.name=dec-lora")


def test_chats_are_answered_with_or_without_their_answers(cli, finished, chats, tmp_path):
    """The run's own answers, of a merged model, of an adapter folder, and of questions alone."""
    single = [row for row in map(json.loads, chats.read_text().splitlines()) if len(row["messages"]) == 2]
    (tmp_path / "whole.jsonl").write_text("\n".join(map(json.dumps, single)))
    asked = [{"prompt": row["messages"][0]["content"]} for row in single]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    generate = "eval.generate={rows: 4, max_new_tokens: 6, client: 1}"
    run = finished(*CHAT, "data.template=alpaca", generate, f"data.train={tmp_path}/whole.jsonl", kind="llama")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = next(each["answers"] for each in events if "answers" in each)
    assert cli("merge", run, "--client", "1", "--to", tmp_path / "model").code == 0
    places = [(tmp_path / "model", "whole.jsonl"), (run / "adapters" / "client-01", "asked.jsonl")]
    found = [
        [each["answer"] for each in answers(cli, folder, "--rows", tmp_path / file, "--new-tokens", "6")]
        for folder, file in places
    ]
    assert found[0] == found[1] and len(set(found[0])) > 1
    by_question = {row["prompt"]: answer for row, answer in zip(asked, found[0], strict=True)}
    assert told and all(row["own"] == by_question[" ".join(row["expected"].split()[::-1])] for row in told)
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert settings["eos_token_id"] in (2, [2])


def test_words_get_the_tags_of_the_run(cli, finished, tagged, tmp_path):
    task = ("task.kind=token-classification", "data.label=null", f"data.train=jsonl:{tagged}", "train.rounds=20")
    run = finished(*task, "algorithm.name=dec-lora", "data.max_length=8")
    assert cli("merge", run, "--average", "--to", tmp_path / "model").code == 0
    rows = [json.loads(line) for line in tagged.read_text().splitlines()]
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps({"tokens": row["tokens"]}) for row in rows))
    whole = answers(cli, tmp_path / "model", "--rows", tmp_path / "words.jsonl", "--batch", "7")
    assert whole == answers(cli, run / "adapters" / "average", "--rows", tagged)
    assert [each["tokens"] for each in whole] == [row["tokens"] for row in rows]
    seen = 8 - 2  # tokens between [CLS] and [SEP], a word each
    pairs = [
        pair for each, row in zip(whole, rows, strict=True) for pair in zip(each["tags"], row["tags"], strict=True)
    ]
    assert all(each["tags"][seen:] == [None] * (len(each["tags"]) - seen) for each in whole if len(each["tags"]) > seen)
    known = [one == other for one, other in pairs if one is not None]
    assert len(known) < len(pairs) and sum(known) / len(known) > 0.8
    (tmp_path / "wrong.jsonl").write_text('{"tokens": ["w1"]}\n{"tokens": ["w1", ""]}')
    answer = cli("predict", tmp_path / "model", "--rows", tmp_path / "wrong.jsonl")
    assert answer.code == 2 and "wrong.jsonl: row 2: token 2 is ''; expected a word" in answer.err
    (tmp_path / "other.jsonl").write_text('{"said": ["w1"]}')
    answer = cli("predict", tmp_path / "model", "--rows", tmp_path / "other.jsonl")
    assert answer.code == 2 and "has no columns for task.kind=token-classification; expected tokens" in answer.err
    assert len(answers(cli, tmp_path / "model", "--rows", tmp_path / "other.jsonl", "--text", "said")) == 1
    kept = json.loads((tmp_path / "model" / "peerlora.json").read_text()) | {"columns": {"words": "said"}}
    (tmp_path / "model" / "peerlora.json").write_text(json.dumps(kept))
    answer = cli("predict", tmp_path / "model", "--rows", tmp_path / "other.jsonl")
    assert answer.code == 2 and "mend columns in peerlora.json" in answer.err


def test_several_labels_are_told_by_name(cli, finished, tmp_path):
    run = finished("task.kind=multi-label", "data.label=several", "partition=iid", "algorithm.name=dec-lora")
    rows = rows_of(run, tmp_path)
    config = load_config(run / "config.yaml")
    federation, x = compose(config), read_adapters(run, exporter_of(run))
    logits = federation.learner.logits(x.rows([3]), federation.eval_data, 7)[0]
    shares = torch.sigmoid(torch.from_numpy(logits).double())
    assert cli("merge", run, "--client", "3", "--to", tmp_path / "model").code == 0
    for folder in (tmp_path / "model", run / "adapters" / "client-03"):
        for each, expected in zip(answers(cli, folder, "--rows", rows), shares.tolist(), strict=True):
            assert each["probabilities"] == pytest.approx({f"class{i}": expected[i] for i in range(3)}, abs=1e-5)
            assert each["labels"] == [f"class{i}" for i in range(3) if expected[i] > 0.5]
    (tmp_path / "model" / "peerlora.json").unlink()
    again = answers(cli, tmp_path / "model", "--rows", rows, "--text", "text")
    assert [each["labels"] for each in again] == [
        [f"class{i}" for i in range(3) if own[i] > 0.5] for own in shares.tolist()
    ]


def with_base(cli, run, to, client):
    answer = cli("export", run, "--client", client, "--to", to, "--with-base")
    assert answer.code == 0, answer.err
    return to


def test_peft_and_pipelines_load_an_adapter_of_chats_with_its_base(cli, finished, chats, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM
    from transformers import pipeline

    run = finished(*CHAT, "data.template=alpaca", f"data.train={chats}", kind="llama")
    folder = with_base(cli, run, tmp_path / "adapter", 1)
    monkeypatch.chdir("/")
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert type(loaded.base_model.model).__name__ == "LlamaForCausalLM"
    assert any(value.abs().max() > 0 for name, value in loaded.named_parameters() if "lora_B" in name)
    asked = [json.loads(line)["messages"][:1] for line in chats.read_text().splitlines()[:6]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in asked))
    own = run / "adapters" / "client-01"
    ours = [each["answer"] for each in answers(cli, own, "--rows", tmp_path / "rows.jsonl", "--new-tokens", "6")]
    model = pipeline("text-generation", model=str(folder))
    for chat, answer in zip(asked, ours, strict=True):
        found = model(chat, max_new_tokens=6, do_sample=False)[0]["generated_text"][-1]["content"]
        assert found.strip() == answer
    assert len(set(ours)) > 1


def test_peft_and_pipelines_load_an_adapter_of_tags_with_its_base(cli, finished, tagged, tmp_path, monkeypatch):
    from peft import AutoPeftModelForTokenClassification
    from transformers import pipeline

    task = ("task.kind=token-classification", "data.label=null", f"data.train=jsonl:{tagged}", "train.rounds=20")
    run = finished(*task, "algorithm.name=dec-lora")
    folder = with_base(cli, run, tmp_path / "adapter", 2)
    monkeypatch.chdir("/")
    loaded = AutoPeftModelForTokenClassification.from_pretrained(folder)
    assert set(loaded.config.id2label.values()) == {"B-LOC", "I-LOC", "O"}
    rows = [json.loads(line)["tokens"] for line in tagged.read_text().splitlines()][:10]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"tokens": words}) for words in rows))
    ours = [each["tags"] for each in answers(cli, run / "adapters" / "client-02", "--rows", tmp_path / "rows.jsonl")]
    found = pipeline("token-classification", model=str(folder), ignore_labels=[])([" ".join(words) for words in rows])
    assert [[each["entity"] for each in row] for row in found] == ours
    assert len({tag for row in ours for tag in row}) > 1


@pytest.mark.slow
def test_peft_loads_an_adapter_of_an_encoder_decoder_with_its_base(cli, finished, pairs, tmp_path, monkeypatch):
    from peft import AutoPeftModelForSeq2SeqLM
    from transformers import AutoTokenizer

    task = ("task.kind=sequence-to-sequence", "data.label=null", f"data.train={pairs}", "data.max_length=12")
    run = finished(*task, "algorithm.name=dec-lora", "train.rounds=20", kind="t5")
    folder = with_base(cli, run, tmp_path / "adapter", 2)
    monkeypatch.chdir("/")
    loaded, tokenizer = AutoPeftModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ours = answers(cli, run / "adapters" / "client-02", "--rows", pairs, "--new-tokens", "6")
    prompts = [json.loads(line)["prompt"] for line in pairs.read_text().splitlines()]
    for prompt, answer in list(zip(prompts, ours, strict=True))[:10]:
        given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        written = loaded.generate(**given, max_new_tokens=6, do_sample=False, num_beams=1)
        assert tokenizer.decode(written[0, 1:], skip_special_tokens=True) == answer["answer"]
    assert len({each["answer"] for each in ours}) > 1


@pytest.mark.slow
def test_an_encoder_decoder_answers_prompts(cli, finished, pairs, tmp_path):
    """Of a merged model, of an adapter folder, and as the library's own generation does."""
    from transformers import AutoModelForSeq2SeqLM

    task = ("task.kind=sequence-to-sequence", "data.label=null", f"data.train={pairs}", "data.max_length=12")
    run = finished(*task, "algorithm.name=dec-lora", "train.rounds=20", kind="t5")
    assert cli("merge", run, "--client", "2", "--to", tmp_path / "model").code == 0
    prompts = [json.loads(line)["prompt"] for line in pairs.read_text().splitlines()]
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    found = [
        answers(cli, tmp_path / "model", "--rows", tmp_path / "asked.jsonl", "--new-tokens", "6", "--batch", "7"),
        answers(cli, run / "adapters" / "client-02", "--rows", pairs, "--new-tokens", "6"),
    ]
    assert found[0] == found[1] and len({each["answer"] for each in found[0]}) > 1
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    given = tokenizer(prompts[0], return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=1)
    assert found[0][0]["answer"] == tokenizer.decode(written[0, 1:], skip_special_tokens=True)
