"""``peerlora compare`` as people call it: a grid file, words, presets, bad input."""

import json
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import yaml

from peerlora.errors import Stopped
from peerlora.experiments import runner, trial_pool
from peerlora.experiments.grid import load_grid
from peerlora.experiments.inference import detectable_difference
from peerlora.experiments.presets import PRESETS, TASKS, preset
from peerlora.experiments.results import write_results
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.trials import expand_settings, plan_search, plan_trials, search_labels
from waiting import until

METHODS = ["dec-lora", {"algorithm": {"name": "adf-lora", "interval": 1}}]


@pytest.fixture
def grid_file(config, texts, tmp_path):
    """Write a grid of two methods and one seed."""

    def write(**changes):
        base = config("bert", "train.rounds=2", f"data.eval=jsonl:{texts}").model_dump(mode="json")
        del base["seed"]
        tree = {"base": base, "axes": {"method": METHODS}, "seeds": [0], "baseline": {"method": "dec-lora"}} | changes
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def test_a_comparison_prints_a_table_and_json(cli, grid_file, tmp_path):
    answer = cli("compare", grid_file(), "train.rounds=1", "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert "cell 1 of 2: dec-lora, seed 0" in answer.err and "left)" in answer.err
    result = json.loads(answer.out.splitlines()[-1])
    assert [row["labels"]["method"] for row in result["rows"]] == ["dec-lora", "adf-lora interval=1"]
    assert result["rows"][1]["differences"]["mean client"]["interval"] is None  # one seed
    assert "[no interval]" in answer.out and str(tmp_path / "out" / "report.html") in answer.out
    again = cli("compare", "--resume", tmp_path / "out", "--json")
    assert again.code == 0 and json.loads(again.out.splitlines()[-1]) == result
    assert "cell" not in again.err


GAPS = {"adf-lora": (0.20, 0.21, 0.22), "local": (-0.01, 0.0, 0.02), "dfedsam": (0.1, 0.1, 0.2)}
"""What methods have more than dec-lora, by seed."""


def known_outcomes():
    """A clear difference, one that is not distinguishable, and a row whose steps take two gradients."""
    for method, gaps in {"dec-lora": (0.0, 0.0, 0.0), **GAPS}.items():
        for seed, gap in enumerate(gaps):
            measures = {"mean client": 0.5 + gap, "worst client": 0.25 + gap, "training rows": 100.0}
            yield Outcome(method, {"method": method}, seed, 0.01, method, measures, method, "accuracy")


def test_marks_and_the_smallest_difference_are_printed(cli, grid_file, tmp_path, monkeypatch):
    """Of known outcomes, since those of real runs differ from processor to processor."""

    def start(grid, out, callbacks):
        out.mkdir()
        return write_results(out, list(known_outcomes()), [], grid.baseline, grid.to_yaml(), {}, None)

    monkeypatch.setattr(runner, "start_grid", start)
    axes = {"method": ["dec-lora", *GAPS]}
    answer = cli("compare", grid_file(axes=axes, seeds=[0, 1, 2]), "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    marked = {sign: [line for line in answer.out.splitlines() if f" {sign} " in line and "│" in line] for sign in "≈‡"}
    assert [len(rows) for rows in marked.values()] == [1, 1], answer.out
    assert "local" in marked["≈"][0] and "dfedsam" in marked["‡"][0]
    told = " ".join(answer.out.split())
    assert "≈ Not distinguishable from the baseline: p, adjusted by Holm, is above 0.05." in told
    assert "‡ Unequal work, so not ranked" in told
    assert "dfedsam: 200 row gradients, the baseline 100 (2.00 times)." in told
    deviation = float(np.sqrt(np.mean([np.var(GAPS[name], ddof=1) for name in ("adf-lora", "local")])))
    expected = detectable_difference(deviation, 3, 0.05 / 2)
    assert f"Smallest difference of the mean client that 3 seeds can show: {expected:.3f}, found with 80 %" in told
    assert "at Holm's first level, 0.05 / 2 rows" in told
    rows = {row["labels"]["method"]: row for row in json.loads(answer.out.splitlines()[-1])["rows"]}
    found = {name: row["differences"]["mean client"]["distinguishable"] for name, row in rows.items() if name in GAPS}
    assert found == {"adf-lora": True, "local": False, "dfedsam": None}
    assert "worst client" in (tmp_path / "out" / "table.md").read_text().split("Of further measures")[1]


@pytest.mark.parametrize(
    ("stored", "file", "words", "workers"),
    [
        (None, None, ["cluster.workers=4"], 4),
        ({"workers": 2}, None, ["cluster.workers=4"], 4),
        ({"workers": 2}, None, ["cluster=null"], None),
        ({"workers": 2}, {}, [], 2),  # a file that says nothing of it
        ({"workers": 2}, {"cluster": {"workers": 3}}, [], 3),
        ({"workers": 2}, {"cluster": {"workers": 3}}, ["--workers", 5], 5),
    ],
)
def test_a_resumed_comparison_computes_where_it_is_asked_to(cli, tmp_path, monkeypatch, stored, file, words, workers):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "grid.yaml").write_text(load_grid({"cluster": stored}).to_yaml())
    used = []

    @contextmanager
    def pools(settings, warn):
        used.append(settings.workers)
        yield lambda cache: None

    def end(*_):
        raise Stopped("enough")

    monkeypatch.setattr(trial_pool, "trial_pools", pools)
    monkeypatch.setattr(runner, "resume_grid", end)
    given = []
    if file is not None:
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"seeds": [0, 1, 2]} | file))
        given = [tmp_path / "grid.yaml"]
    answer = cli("compare", *given, *words, "--resume", tmp_path / "out")
    assert answer.code == 130 and "enough" in answer.err, answer.err
    assert used == ([] if workers is None else [workers])


REFUSED = {
    "no grid": ([], ["GRID.yaml", "--preset", "--resume"]),
    "no such file": (["missing.yaml"], ["'missing.yaml' does not exist", "--preset adf-lora"]),
    "a folder": (["."], ["'.' is a folder", "peerlora compare --resume ."]),
    "unknown key": (["{grid}", "search.raets=[1]"], ["'search.raets'", "did you mean 'rates'"]),
    "unknown setting of the base": (["{grid}", "train.rouns=1"], ["'train.rouns'", "did you mean 'rounds'"]),
    "unknown axis": (
        ["{grid}", "axes.topolgy.p=[0.1]"],
        ["axes.topolgy.p", "did you mean 'topology'", "name of your own"],
    ),
    "empty axis": (["{grid}", "axes.topology.p=[]"], ["axes: topology.p: [] given", "at least one value"]),
    "no seeds": (["{grid}", "seeds=[]"], ["seeds", "[] given", "at least 1"]),
    "a seed twice": (["{grid}", "seeds=[1,1]"], ["[1, 1] given", "list each once"]),
    "a value twice": (["{grid}", "axes.clients=[4,4]"], ["axes.clients lists '4' twice"]),
    "a seed in the base": (["{grid}", "seed=3"], ["seed", "seeds: [0, 1, 2]"]),
    "unknown baseline": (["{grid}", "baseline={method: dec-lra}"], ["'dec-lra'", "did you mean 'dec-lora'"]),
    "baseline of an unknown axis": (["{grid}", "baseline={methd: dec-lora}"], ["'method'", "no such axis"]),
    "a rate beside a search": (["{grid}", "search.rates=[0.1]"], ["train.lr is set", "drop one"]),
    "a rate below 0": (["{grid}", "search.rates=[-1]"], ["search.rates", "-1 given", "greater than 0"]),
    "a word that an axis overrules": (
        ["{grid}", "algorithm=local"],
        ["algorithm", "'method' sets it", "axes.method=[...]"],
    ),
    "an axis named as a column": (["{grid}", "axes.round={a: ring}"], ["axes.round", "column of this name"]),
    "grid and preset": (["{grid}", "--preset", "adf-lora"], ["drop one"]),
    "budget without preset": (["{grid}", "--budget", "small"], ["--budget small belongs to --preset"]),
    "unknown preset": (["--preset", "adf-lra"], ["'adf-lra' is unknown", "did you mean 'adf-lora'"]),
    "unknown budget": (["--preset", "adf-lora", "--budget", "smal"], ["'smal'", "did you mean 'small'"]),
    "unknown published": (["{grid}", "published=fedavg"], ["published", "'fedavg' given", "'adf-lora' or 'tad-lora'"]),
    "resume of no comparison": (["--resume", "."], ["not a comparison", "grid.yaml"]),
    "out and resume": (["--resume", ".", "--out", "x"], ["drop --out"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_message_and_nothing_is_written(case, cli, grid_file, tmp_path, monkeypatch):
    words, parts = REFUSED[case]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = grid_file()
    answer = cli("compare", *[str(file) if word == "{grid}" else word for word in words])
    assert answer.code == 2 and answer.out == "" and answer.err.startswith("peerlora: "), answer
    for part in parts:
        assert part in answer.err, answer.err
    assert not list((tmp_path / "here").iterdir())


def test_a_seed_that_is_searched_and_reported_gets_a_warning_before_and_after(cli, grid_file, tmp_path):
    path = grid_file()
    tree = yaml.safe_load(path.read_text())
    del tree["base"]["train"]["lr"]
    path.write_text(yaml.safe_dump(tree))
    words = ["search.rates=[0.01]", "search.holdout=0.3", "train.rounds=1", "axes.method=[dec-lora]"]
    answer = cli("compare", path, *words, "search.seeds=[0]", "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert answer.err.startswith("warning: search.seeds and seeds both have 0:")
    result = json.loads(answer.out.splitlines()[-1])
    assert "both have 0:" in result["warnings"][0] and "both have 0:" in answer.out
    assert [rate["rate"] for rate in result["search"][0]["rates"]] == [0.01] and "(taken)" in answer.out


def test_an_output_folder_in_use_is_refused(cli, grid_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    answer = cli("compare", grid_file(), "--out", tmp_path / "out")
    assert answer.code == 2 and "is in use" in answer.err and [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_search_needs_rows_that_are_not_reported(cli, grid_file, tmp_path):
    path = grid_file()
    tree = yaml.safe_load(path.read_text())
    del tree["base"]["train"]["lr"]
    path.write_text(yaml.safe_dump(tree))
    answer = cli("compare", path, "data.eval=null", "search.rates=[0.1]", "--out", tmp_path / "out")
    assert answer.code == 2 and "data.eval is null" in answer.err and "name a file in data.eval" in answer.err


@pytest.mark.slow
def test_ctrl_c_ends_with_the_resume_command(process, grid_file, tmp_path):
    out = tmp_path / "out"
    running = process("compare", grid_file(), "train.rounds=2000", "--out", out)
    until(lambda: list(out.glob("cells/*/events.jsonl")), lambda: running.poll() is None)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130, told
    assert f"stopped after 0 of 2 cells; go on with: peerlora compare --resume {out}" in told
    assert list(out.glob("cells/dec-lora__seed-0/checkpoints/*.json"))


def rows_counted(grid, evaluated):
    """Training rows, and rows times models evaluated, of all cells, where rates grow to the most."""
    total = 0
    most = {
        trial.setting: [1e-3 * (1 + rate) for rate in range(grid.search.most)] for trial in plan_search(grid).trials
    }
    for trial in [*plan_search(grid, most).trials, *plan_trials(grid).trials]:
        config = trial.config
        models, seen = config.clients + 1, min(config.eval.rows, evaluated)
        total += config.training_samples
        total += models * evaluated + seen + models * seen * ((config.train.rounds - 1) // config.eval.every)
    return total


@pytest.mark.parametrize("name", PRESETS)
def test_a_small_preset_keeps_its_promise_of_half_an_hour(name, tmp_path):
    grid = load_grid(preset(name, "small", tmp_path))
    rows = rows_counted(grid, 2 * grid.base["data"]["eval_per_class"])
    assert rows / 160 < 30 * 60, rows
    assert grid.search.grow and not {*grid.search.seeds} & {*grid.seeds}
    assert f"{tmp_path}/sst2/train.parquet" in grid.to_yaml()


@pytest.mark.slow
def test_the_small_presets_have_the_intervals_and_graphs_of_the_full_ones():
    small, full = (
        [plan_trials(load_grid(preset(name, budget))).trials for name in PRESETS] for budget in ("small", "full")
    )
    for some, all_of_them in zip(small, full, strict=True):
        for wanted in (
            lambda trial: trial.config.topology.model_dump(),
            lambda trial: trial.config.algorithm.parameters.get("interval"),
        ):
            assert {str(wanted(trial)) for trial in some} == {str(wanted(trial)) for trial in all_of_them}


@pytest.mark.slow
def test_the_full_presets_are_the_papers_protocol(tmp_path):
    adf, tad = (load_grid(preset(name, "full")) for name in ("adf-lora", "tad-lora"))
    assert len(expand_settings(adf)) == 7 * 4 and len(expand_settings(tad)) == 4 * 7 * 4
    assert not plan_trials(adf).refused and not plan_trials(tad).refused and not plan_search(adf).refused
    for trial in plan_trials(adf).trials:
        train, adapter = trial.config.train, trial.config.adapter
        assert (train.rounds, train.local_steps, train.batch) == (150, 20, 32)
        assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.head) == (8, 16, 0.1, "frozen")
        assert trial.config.topology.model_dump()["p"] == 0.1 and trial.config.clients == 10
    assert {trial.config.algorithm.parameters.get("interval") for trial in plan_trials(adf).trials} == {
        None,
        1,
        5,
        10,
        20,
    }
    assert len(plan_search(adf).trials) == (3 + 4) * 4 * 4 * 2  # methods and intervals, tasks, rates, seeds
    assert len(plan_search(tad).trials) == 4 * 4 * 5 * 2  # methods, tasks, rates, seeds; on the first graph
    for grid in (adf, tad):
        assert grid.search.grow and grid.search.ties == "common" and not {*grid.search.seeds} & {*grid.seeds}
    assert all(labels["method"] in setting for setting, labels in search_labels(adf).items())
    assert {labels["topology"] for labels in search_labels(tad).values()} == {"random p=0.5"}
    assert len(TASKS["MNLI"][3]["shares"][0]) == 3


def test_another_kind_drops_the_settings_of_the_old_one():
    base = {"topology": {"kind": "random", "p": 0.3, "weights": "laplacian"}}
    grid = load_grid({"base": base, "axes": {"topology": ["ring", {"p": 0.5}]}})
    found = [setting.tree["topology"] for setting in expand_settings(grid)]
    assert found == [{"kind": "ring"}, {"kind": "random", "p": 0.5, "weights": "laplacian"}]
    assert [setting.name for setting in expand_settings(grid)] == ["ring", "p=0.5"]


def test_axes_by_setting_by_list_and_by_label():
    axes = {"topology.p": [0.5, 0.02], "method": {"ours": {"algorithm": "adf-lora"}, "theirs": "dec-lora"}}
    grid = load_grid({"base": {"topology": "random"}, "axes": axes, "seeds": [0]}, ["train.rounds=7"])
    assert [setting.name for setting in expand_settings(grid)] == [
        "p=0.5, ours",
        "p=0.5, theirs",
        "p=0.02, ours",
        "p=0.02, theirs",
    ]
    trials = plan_trials(grid).trials
    assert trials[2].config.topology.model_dump()["p"] == 0.02 and trials[2].config.algorithm.name == "adf-lora"
    assert {trial.config.train.rounds for trial in trials} == {7}
    assert trials[0].folder == "cells/p=0.5-ours__seed-0"
