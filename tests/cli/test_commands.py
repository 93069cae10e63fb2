"""Every command: its help, what it prints, and its JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
MOST_MODULES = 500
"""Modules that --help may load, the standard library's among them; a heavy package loads thousands."""
COMMANDS = ["demo", "init", "train", "methods", "topology", "show", "export", "schema"]


def python(*words):
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)


def last_json(answer):
    assert answer.code == 0, answer.err
    return json.loads(answer.out.splitlines()[-1])


def test_help_names_every_command(cli):
    answer = cli("--help")
    assert answer.code == 0
    assert all(command in answer.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, cli):
    answer = cli(command, "--help")
    assert answer.code == 0 and f"peerlora {command}" in answer.out and "--help" in answer.out


def test_help_loads_nothing_heavy_and_little_else():
    code = (
        "import sys; from peerlora.cli import main; sys.argv = ['peerlora', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'pyarrow', 'networkx', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), len(sys.modules))"
    )
    heavy, modules = python("-c", code).stdout.splitlines()[-1].rsplit(maxsplit=1)
    assert heavy == "[]" and int(modules) < MOST_MODULES


@pytest.mark.parametrize(
    ("kind", "words", "metric"),
    [
        ("bert", [], "accuracy"),
        ("bert", ["task.kind=regression", "data.label=score"], "spearman"),
        ("llama", ["task.kind=causal-lm", "data.label=null"], "loss"),
    ],
)
def test_train_json_keeps_the_contract(kind, words, metric, cli, yaml_file, tmp_path):
    run = tmp_path / "run"
    told = last_json(cli("train", yaml_file(*words, kind=kind), "--out", run, "--json"))
    assert set(told) >= {
        "method",
        "clients",
        "rounds",
        "metric",
        "accuracy",
        "scores",
        "higher_is_better",
        "consensus",
        "bytes_sent",
        "seconds",
        "run",
    }
    assert (told["method"], told["clients"], told["rounds"], told["metric"]) == ("adf-lora", 4, 3, metric)
    reached = told["scores"]
    assert told["accuracy"] == reached  # the older name
    assert set(reached) >= {"own_mean", "own_min", "own_max", "averaged"}
    assert reached["own_min"] <= reached["own_mean"] <= reached["own_max"]
    assert set(told["consensus"]) >= {"A", "B", "product", "cross_term"}
    assert all(isinstance(value, float) for value in told["consensus"].values())
    assert set(told["seconds"]) >= {"total", "train", "mix", "eval"}
    assert all(value > 0 for value in told["seconds"].values())
    assert isinstance(told["bytes_sent"], int) and told["bytes_sent"] > 0
    assert told["run"] == str(run) and (run / "report.html").is_file()


def test_a_method_that_exchanges_nothing_sends_nothing(cli, yaml_file, tmp_path):
    told = last_json(cli("train", yaml_file(), "algorithm.name=local", "--out", tmp_path / "run", "--json"))
    assert told["method"] == "local" and told["bytes_sent"] == 0


def test_train_without_a_folder_makes_one_below_runs(cli, yaml_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = last_json(cli("train", yaml_file(), "train.rounds=1", "--json"))
    assert Path(told["run"]).parent == Path("runs") and Path(told["run"]).is_dir()


def test_train_takes_settings_without_a_file(cli, models, texts, tmp_path):
    words = [f"model.source={models('bert')}", f"data.train=jsonl:{texts}", "data.text=[text]", "data.label=label"]
    words += ["clients=3", "train.rounds=1", "threads=1", "partition=iid", "topology=ring", "data.max_length=12"]
    assert last_json(cli("train", *words, "--out", tmp_path / "run", "--json"))["clients"] == 3


def test_methods(cli):
    from peerlora.algorithms import REGISTRY

    told = last_json(cli("methods", "--json"))
    assert set(told) == set(REGISTRY) >= {"local", "dec-lora", "adf-lora"}
    for facts in told.values():
        assert {"source", "trains", "mixes", "requires", "settings"} <= set(facts)
    assert told["adf-lora"]["settings"] == {"interval": 5} and "2511.18291" in told["adf-lora"]["source"]
    printed = cli("methods").out
    assert all(name in printed for name in REGISTRY)
    assert set(told["d2"]["not_with"]) == {
        "exchange.codec", "exchange.robust", "exchange.secure", "train.local_steps > 1", "train.optimizer=adamw"
    }  # fmt: skip
    assert "only warned of" in told["d2"]["not_with"]["train.optimizer=adamw"]
    assert "not together" in printed and "train.local_steps > 1" in printed


def test_topology(cli):
    told = last_json(cli("topology", "ring", "--clients", "4", "--parameters", "100", "--json"))
    assert told["degree"] == {"min": 2, "mean": 2.0, "max": 2} and told["connected"] is True
    assert told["stochasticity"]["doubly_stochastic"] is True
    # Metropolis weights of a ring are 1/3 each; the eigenvalues of W for 4 clients are 1, 1/3, 1/3, -1/3.
    assert told["rho"] == pytest.approx(1 / 3) and told["spectral_gap"] == pytest.approx(2 / 3)
    assert told["rounds_to_halve"] == pytest.approx(0.6309, abs=1e-4)  # ln 2 / ln 3
    assert told["bytes_per_round"] == 4 * 2 * 400
    # Of 100 rounds, (1 + 3/9^s)/4 of the noise is left of a step s rounds before the end.
    assert told["noise_averaged_over"]["constant"] == pytest.approx(400 / 100.375)
    assert 3.99 < told["noise_averaged_over"]["cosine"] < 4
    told = last_json(cli("topology", "random", "p=0.5", "--clients", "6", "--rounds", "20", "--json"))
    assert 0 < told["connected"] < 1 and told["union"]["rounds"] == 20
    answer = cli("topology", "random p=0.5", "--clients", "6")
    assert answer.code == 0 and "spectral gap" in answer.out and "noise averaged over" in answer.out
    many = last_json(cli("topology", "ring", "--clients", "501", "--rounds", "1", "--json"))
    assert many["noise_averaged_over"] is None


def test_schema(cli):
    told = json.loads(cli("schema").out)
    assert {"model", "adapter", "data", "train", "seed"} <= set(told["properties"])


def test_show_finished(cli, yaml_file, tmp_path):
    run = tmp_path / "run"
    trained = last_json(cli("train", yaml_file(), "--out", run, "--json"))
    told = last_json(cli("show", run, "--json"))
    assert {key: told[key] for key in trained} == trained
    assert told["finished"] is True and told["resume"] is None and told["rounds_planned"] == 3
    assert {"report.html", "metrics.parquet", "adapters", "config.yaml"} <= set(told["files"])
    shown = cli("show", run)
    assert shown.code == 0 and "finished, 3 of 3 rounds" in shown.out and "report.html" in shown.out


def test_show_a_run_that_relays(cli, yaml_file, tmp_path):
    run = tmp_path / "run"
    assert cli("train", yaml_file(), "algorithm.name=dec-lora", "exchange.relay=true", "--out", run).code == 0
    told, shown = last_json(cli("show", run, "--json")), cli("show", run)
    assert told["deployed"] == "relayed" and 0 <= told["scores"]["relayed_worst"] <= told["scores"]["relayed_mean"] <= 1
    assert "worst relayed" in shown.out and f"{told['scores']['relayed_mean']:.3f}" in shown.out
    assert "the relayed models are deployed" in shown.out


def test_show_unfinished_names_the_command_that_goes_on(cli, config, tmp_path):
    from peerlora.errors import Stopped
    from peerlora.runtime.simulate import simulate

    run = tmp_path / "run"
    with pytest.raises(Stopped):
        simulate(config(), run, stop=lambda: True)
    told = last_json(cli("show", run, "--json"))
    assert told["finished"] is False and told["resume"] == f"peerlora train --resume {run}" and told["rounds"] == 1
    shown = cli("show", run)
    assert "not finished, 1 of 3 rounds" in shown.out and f"peerlora train --resume {run}" in shown.out


def test_a_resumed_run_says_what_it_is(cli, config, tmp_path, no_reports):
    from peerlora.errors import Stopped
    from peerlora.runtime.simulate import simulate

    with pytest.raises(Stopped):
        simulate(config(), tmp_path / "run", stop=lambda: True)
    answer = cli("train", "--resume", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert "going on after round 1" in answer.err and "4 clients, 3 rounds" in answer.err


def test_show_a_run_that_was_killed_before_its_first_event(cli, yaml_file, tmp_path):
    from peerlora.runs.store import RunStore

    RunStore.create(tmp_path / "run", yaml_file().read_text(), {}).close()
    shown = cli("show", tmp_path / "run")
    assert shown.code == 0 and "not finished, 0 of 3 rounds" in shown.out
    assert last_json(cli("show", tmp_path / "run", "--json"))["method"] is None


@pytest.fixture
def demo_words(models, texts):
    words = [f"model.source={models('bert')}", f"data.train=jsonl:{texts}", "data.eval=null", "data.text=[text]"]
    words += ["data.label=label", "data.max_length=12", "clients=3", "threads=1", "algorithm.interval=1"]
    return words + ["train.rounds=2", "train.batch=4", "eval.every=1", "checkpoint.every=1"]


def test_demo_then_show(drawn, cli, demo_words, tmp_path):
    out = tmp_path / "demo"
    told = last_json(cli("demo", *demo_words, "--out", out, "--json"))
    names = ["alone", "averaged once", "Dec-LoRA", "ADF-LoRA", "all data in one place"]
    assert [row["row"] for row in told["rows"]] == names
    assert [row["clients"] for row in told["rows"]] == [3, 3, 3, 3, 1]
    assert Path(told["report"]).is_file() and Path(told["report"]).parent == out
    shown = last_json(cli("show", out, "--json"))
    assert sorted(Path(run["run"]).name for run in shown["runs"]) == [
        "adf-lora",
        "all-data-in-one-place",
        "alone",
        "dec-lora",
    ]
    assert all(run["finished"] for run in shown["runs"]) and shown["report"] == told["report"]
    printed = cli("show", out).out
    assert "adf-lora" in printed and "all-data-in-one-place" in printed


def test_a_run_on_a_clock_tells_its_virtual_time(cli, yaml_file, tmp_path):
    words = ["algorithm.name=aedfl", "clock.speed=[1,1,0.5,0.5]"]
    run = tmp_path / "run"
    told = last_json(cli("train", yaml_file(*words), "--out", run, "--json"))
    assert told["virtual_seconds"] > 0
    assert last_json(cli("show", run, "--json"))["virtual_seconds"] == told["virtual_seconds"]
    assert "virtual s" in cli("show", run).out
    plain = cli("train", yaml_file(), "--out", tmp_path / "plain")
    assert "virtual" not in plain.out
    methods = cli("methods", "--json")
    assert [name for name, facts in last_json(methods).items() if facts["asynchronous"]] == ["aedfl", "ad-psgd"]
