"""Runs of chats, tags and several labels from the files to the report: answers, resume, scores by label."""

import json

import pytest
import torch

from peerlora.cli.progress import Progress
from peerlora.errors import ConfigError, Stopped
from peerlora.runs.events import Evaluated, Generated, Resumed, RoundDone, RunStarted
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.simulate import resume, simulate

CHAT = ["task.kind=chat", "data.label=null", "data.max_length=32", "algorithm.name=dec-lora", "topology.kind=complete"]


@pytest.fixture
def chat_config(config, chats):
    return lambda *words: config("llama", *CHAT, f"data.train=jsonl:{chats}", *words)


def test_models_learn_the_answers_and_write_them_beside_the_expected_ones(chat_config, tmp_path):
    scores = "eval.generate={rows: 3, max_new_tokens: 5, client: 2, scores: [exact-match, rouge-l]}"
    result = simulate(chat_config("train.rounds=20", "train.lr=0.03", scores), tmp_path / "run")
    events = read_events(result.run)
    assert select_events(events, RunStarted)[0].metric == "loss"
    first, *_, last = select_events(events, Evaluated)
    assert last.averaged < first.averaged - 0.25
    (told,) = select_events(events, Generated)
    assert (told.round, told.client, len(told.answers)) == (20, 2, 3)
    for row in told.answers:
        assert set(row) == {"prompt", "expected", "own", "averaged"}
        *_, question = row["prompt"].removesuffix(" w39").split("w38 ")
        assert row["expected"].split() == question.split()[::-1]
    assert set(told.scores) == {"own", "averaged"}
    assert all(0 <= value <= 1 for own in told.scores.values() for value in own.values())
    assert set(told.scores["own"]) == {"exact-match", "rouge-l"}
    page = (result.run / "report.html").read_text()
    assert "<h2>Answers</h2>" in page and "client 2: exact-match" in page and told.answers[0]["expected"] in page


@pytest.mark.parametrize("way", ["cut-right", "cut-left"])
def test_rows_whose_answer_was_cut_are_not_asked(chat_config, tmp_path, way):
    words = ["data.max_length=10", "data.holdout=0.5", f"data.too_long={way}", "train.rounds=1"]
    result = simulate(chat_config(*words, "eval.generate={rows: 50, max_new_tokens: 2}"), tmp_path / "run")
    (started,), (told,) = (select_events(read_events(result.run), kind) for kind in (RunStarted, Generated))
    assert told.answers
    for row in told.answers:  # a question of which enough is left to be compared
        question = row["prompt"].removesuffix(" w39").split("w38 ")[-1].split()
        assert row["expected"].split()[::-1][-len(question) :] == question
    if way == "cut-right":
        assert told.cut > 0 and any(f"of {told.cut} of " in each for each in started.warnings)
        assert f"{told.cut} rows were not asked" in (result.run / "report.html").read_text()


def test_a_run_whose_answers_are_all_cut_is_refused(chat_config, tmp_path):
    row = json.dumps({"prompt": "w1", "completion": "w2 w3 w4 w5 w6"})
    (tmp_path / "rows.jsonl").write_text("\n".join([row] * 20))
    words = [f"data.train={tmp_path}/rows.jsonl", "data.max_length=7", "eval.generate={rows: 2, max_new_tokens: 2}"]
    told = "of 2 of 2 evaluation rows the answer is cut at data.max_length=7, so none has one to compare with"
    with pytest.raises(ConfigError, match=told):
        simulate(chat_config(*words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_tells_its_sinks_how_it_had_started(chat_config, tmp_path, no_reports):
    """Else the table calls the client with the smallest loss the worst, and knows no number of rounds."""
    with pytest.raises(Stopped):
        simulate(chat_config("eval.every=1"), tmp_path / "run", stop=lambda: True)
    told, shown = [], Progress()
    resume(tmp_path / "run", sinks=[told.append, shown])
    assert [type(event) for event in told[:2]] == [Resumed, RunStarted]
    last, (*_, scores) = select_events(told, RoundDone)[-1], select_events(told, Evaluated)
    facts = shown._facts(last)
    assert facts["round"] == "3/3" and facts["worst"] == f"{max(scores.own):.3f}" and "left" in facts
    assert len(select_events(read_events(tmp_path / "run"), RunStarted)) == 1


def test_without_the_setting_nobody_answers(chat_config, tmp_path):
    result = simulate(chat_config(), tmp_path / "run")
    assert not select_events(read_events(result.run), Generated)
    assert "Answers" not in (result.run / "report.html").read_text()


def test_unequal_ranks_have_no_averaged_answers(chat_config, tmp_path):
    words = ["adapter.rank=[1, 2, 3, 3]", "algorithm.name=local", "eval.generate={rows: 2, max_new_tokens: 2}"]
    result = simulate(chat_config(*words), tmp_path / "run")
    (told,) = select_events(read_events(result.run), Generated)
    assert set(told.answers[0]) == {"prompt", "expected", "own"} and told.scores == {}


def test_a_stopped_run_goes_on_to_the_same_bits(chat_config, tmp_path):
    chosen = chat_config("eval.generate={rows: 2, max_new_tokens: 4}")
    whole = simulate(chosen, tmp_path / "whole")
    with pytest.raises(Stopped):
        simulate(chosen, tmp_path / "part", stop=lambda: True)
    again = resume(tmp_path / "part")
    assert torch.equal(again.adapters.flat, whole.adapters.flat)
    (one,), (other,) = (select_events(read_events(each.run), Generated) for each in (whole, again))
    assert one == other


def test_exported_folders_hold_the_template_that_was_used(chat_config, tmp_path):
    from transformers import AutoTokenizer

    result = simulate(chat_config("data.template=alpaca"), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(result.run / "adapters" / "client-00")
    assert "### Response:" in tokenizer.chat_template


def test_changed_answers_are_noticed_at_resume(chat_config, chats, tmp_path):
    """The same tokens of which others are learned are other rows."""
    from dataclasses import replace

    from peerlora.runtime.compose import compose
    from peerlora.runtime.inputs import describe_rows

    data = compose(chat_config()).train_data
    other = replace(data, targets=data.targets[::-1].copy())
    ours, theirs = (describe_rows(each, each)["train"] for each in (data, other))
    assert {name for name in ours if ours[name] != theirs[name]} == {"targets"}
    assert "targets" not in describe_rows(*2 * [replace(data, targets=None)])["train"]


@pytest.mark.parametrize("task", ["token-classification", "multi-label"])
def test_the_last_evaluation_tells_f1_of_every_label(config, tagged, tmp_path, task):
    from peerlora.runtime.compose import compose
    from peerlora.train.metrics import f1

    words = {
        "token-classification": [f"data.train={tagged}", "data.label=null"],
        "multi-label": ["data.label=several", "partition=iid"],
    }[task]
    chosen = config("bert", f"task.kind={task}", *words, "algorithm.name=dec-lora", "train.rounds=12", "train.lr=0.03")
    result = simulate(chosen, tmp_path / "run")
    first, *_, last = select_events(read_events(result.run), Evaluated)
    rows = compose(chosen).eval_data
    counts = [compose(chosen).learner.evaluate(result.adapters.rows([i]), rows, 8).counts[0] for i in range(4)]
    if task == "multi-label":
        assert [own["true"] for own in last.by_name.values()] == rows.labels.sum(0).tolist()
    else:  # a place begins at a tag B-LOC, or at an I-LOC behind an O
        names = [rows.names[tag] if tag >= 0 else "O" for tag in rows.targets.tolist()]
        before = ["O", *names[:-1]]
        begun = [one == "B-LOC" or (one == "I-LOC" and prior == "O") for prior, one in zip(before, names, strict=True)]
        assert {name: own["true"] for name, own in last.by_name.items()} == {"LOC": sum(begun)}
    assert first.by_name == {} and any(own["averaged"] > 0 for own in last.by_name.values())
    for place, own in enumerate(last.by_name.values()):
        assert own["own"] == pytest.approx(sum(f1(*each[place]) for each in counts) / 4)
    page = (result.run / "report.html").read_text()
    assert "<h2>Label by label</h2>" in page and all(f'<th scope="row">{name}</th>' in page for name in last.by_name)


def test_answers_end_where_the_model_reads_no_more_and_the_run_says_so(config, chats, tmp_path):
    """The model counts 40 places; without the limit, its table would be left."""
    words = [*CHAT, f"data.train=jsonl:{chats}", "eval.generate={rows: 3, max_new_tokens: 60}", "train.rounds=1"]
    result = simulate(config("gpt2", *words), tmp_path / "run")
    (started,), (told,) = (select_events(read_events(result.run), kind) for kind in (RunStarted, Generated))
    (warning,) = [each for each in started.warnings if "eval.generate" in each]
    longest = max(len(row["prompt"].split()) for row in told.answers)  # without the ends of turns
    room = int(warning.rsplit(" ", 1)[1])
    assert "max_new_tokens=60 given; " in warning and "reads at most 40 tokens" in warning
    assert 0 < room < 40 - longest
    assert all(len(row[name].split()) <= room for row in told.answers for name in ("own", "averaged"))


def test_a_failure_while_answering_costs_no_result(chat_config, tmp_path, monkeypatch):
    def fail(*words):
        raise RuntimeError("no memory")

    monkeypatch.setattr("peerlora.runtime.trainer.generate_answers", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        simulate(chat_config("eval.generate={rows: 2, max_new_tokens: 4}"), tmp_path / "run")
    assert (tmp_path / "run" / "adapters" / "all.safetensors").is_file()
