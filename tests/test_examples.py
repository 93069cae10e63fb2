"""Every script in examples/ runs as it stands, on tiny settings."""

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from peerlora import read_events
from peerlora.plugins import METHODS, TOPOLOGIES
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

    def go(name, *words):
        out = tmp_path / name
        given = [models("bert"), str(texts), str(out), *TINY, *words]
        for registry in (METHODS, TOPOLOGIES):  # what a script registers ends with it
            monkeypatch.setattr(registry, "_plugins", dict(registry._plugins))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return out, capsys.readouterr().out

    return go


def test_every_example_is_tested_and_short():
    scripts = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == {
        "own_data",
        "own_method",
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
