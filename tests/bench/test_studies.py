"""The studies of docs/results: every grid runs, and rows of a table share what the table is not about."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cases import others_slow
from peerlora.algorithms.salf import SALF
from peerlora.config.loading import load_config
from peerlora.exchange.attacks import alie_quantile
from peerlora.experiments.grid import load_grid
from peerlora.experiments.inference import detectable_difference
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.trials import plan_search, plan_trials
from peerlora.experiments.work import compare_work
from peerlora.runtime.plan import plan

BENCH = Path(__file__).parents[2] / "bench"
RATES = {name: 1e-3 for name in ("dec-lora", "adf-lora, T = 1", "adf-lora, T = 5", "ffa-lora", "rolora")}
ABOUT_TRAINING = ("sparse-", "label-prior", "policies-")
"""Studies whose rows differ in loss, schedule or memory on purpose, or have no labels."""


PLAIN = {"dec-lora", "+ adjusted loss", "+ cosine", "recipe, complete graph, memory fresh in every round"}
"""Rows of the sparse studies in which the optimiser's memory is not kept, as the recipe keeps it."""
SGD = {
    **dict.fromkeys(
        ("optimisers", "optimisers-sparse"),
        {"sgd, momentum 0.9", "all data in one place, sgd, momentum 0.9", "qg-adam"},
    ),
    "momenta": {"qg-adam", "qg-dsgdm"},
}
"""Rows whose steps are SGD's where others have AdamW; qg-adam scales them by moments of its own."""
LESS_OR_MORE = {
    **dict.fromkeys(("policies-point-mass", "policies-pendulum"), {"behaviour cloning only"}),
    "label-skew": {"dfedsam"},
    "label-skew-sgd": {"dfedsam", "dfedadmm-sam (our reconstruction)", "fedspeed"},
    **dict.fromkeys(("methods", "methods-ring", "drift"), {"rac-lora"}),
    "stragglers": {
        *("alone", "dec-lora, waits", "dec-lora, waits, 60 rounds", "adf-lora, T = 5, waits", "salf, deadline 42 s"),
        *("dec-lora, deadline 6 s", "adf-lora, T = 5, deadline 6 s"),
    },
}
"""Rows of unequal work: SAM takes two gradients a step, rac-lora only mixes in some rounds, stragglers have a budget of
virtual time."""


def load(monkeypatch, name):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module(name)


@pytest.fixture
def studies(monkeypatch):
    return load(monkeypatch, "studies")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Tiny parquet files of every task, large enough for every client to find its labels."""
    folder, draw = tmp_path_factory.mktemp("glue"), np.random.default_rng(0)
    tables = {
        "glue/sst2": (["sentence"], 2),
        "glue/qnli": (["question", "sentence"], 2),
        "glue/qqp": (["question1", "question2"], 2),
        "extra/ag_news": (["text"], 4),
    }
    for place, (columns, labels) in tables.items():
        (folder / place).mkdir(parents=True)
        for split in ("train", "validation"):
            texts = {column: [f"{column} {i}" for i in range(12000)] for column in columns}
            marks = draw.integers(labels, size=12000).astype("int64")
            pq.write_table(pa.table({**texts, "label": marks}), folder / place / f"{split}.parquet")
    return folder


@pytest.fixture
def data(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return files


def every_study(studies):
    papers = {name: studies.study_grids.paper_budget(p, RATES) for name, p in studies.PAPER.items()}
    return {**studies.STUDIES, **papers}


def reported(study, data):
    """Label of a row -> its config, of one seed."""
    trials = [trial for tree in study.parts(data) for trial in plan_trials(load_grid(tree)).trials]
    return {trial.setting: trial.config for trial in trials}


NAMES = (
    *("sparse-sst2", "sparse-agnews", "methods", "methods-ring", "drift", "optimisers", "optimisers-sparse", "momenta"),
    *(f"alternating-{rounds}-{schedule}" for rounds in (24, 48, 96) for schedule in ("constant", "cosine")),
    *("paper-budget", "paper-budget-sparse", "label-skew", "label-skew-sgd", "stragglers", "attackers", "compression"),
    *("strangers", "qnli", "qqp", "dtype", "label-prior", "label-prior-uneven", "label-prior-agnews"),
    *("privacy-sst2", "privacy-agnews", "policies-point-mass", "policies-pendulum"),
)


def test_the_names_below_are_all_studies(studies):
    assert set(NAMES) == studies.STUDIES.keys()


def test_the_page_of_the_studies_names_all_of_them_and_their_modules(studies):
    """Its table is written by ``--list --write``, which a new study needs."""
    page = (BENCH.parent / "docs/results/studies.md").read_text()
    table = page.split("<!-- study-list -->")[1].split("<!-- /study-list -->")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:-1]
    assert {row[0].removeprefix("| "): row[1] for row in rows} == {
        name: f"[{study.page}]({study.page})" for name, study in studies.STUDIES.items()
    }
    order = page.split("## Which come first")[1].split("\n## ")[0]
    assert {name for name in re.findall(r"`([^`]+)`", order) if not name.endswith("-")} <= studies.STUDIES.keys()
    modules = {value.__name__ for value in vars(studies).values() if hasattr(value, "STUDIES") and value is not studies}
    assert len(modules) == 5 and all(f"bench/{module}.py" in page for module in modules)


@pytest.mark.parametrize("name", others_slow(NAMES, ["sparse-sst2", "label-skew-sgd"]))
def test_no_cell_of_a_study_is_refused(name, studies, data):
    study, tuning = every_study(studies)[name], importlib.import_module("study_tuning")
    study.prepare(data)
    for tree in study.parts(data):
        rows = tree["axes"].get("system", {})
        tuned = {row: each for row, each in (study.tuned or {}).items() if row in rows}
        assert tuned.keys() == (study.tuned or {}).keys()
        grids = [tree, *(tuning.tuning_grid(tree, row, each, each.values) for row, each in tuned.items())]
        for grid in map(load_grid, grids):
            assert not {*grid.seeds} & {*grid.search.seeds} or not grid.search.rates
            for planned in (plan_trials(grid), plan_search(grid)):
                assert not planned.refused
                seen = {trial.setting: trial for trial in planned.trials}  # one seed of each row
                for trial in seen.values():
                    plan(trial.config)


@pytest.mark.parametrize("name", others_slow(NAMES, ["sparse-sst2", "label-skew-sgd"]))
def test_rows_of_a_table_share_what_it_is_not_about(name, studies, data):
    study = every_study(studies)[name]
    rows = reported(study, data)
    assert len(rows) > 1
    fresh = {label for label, config in rows.items() if config.train.optimizer_state == "round"}
    assert fresh == (PLAIN if name.startswith("sparse") else {label for label in rows if "(fresh memory)" in label})
    if not name.startswith(ABOUT_TRAINING):
        prior = "none" if name.startswith("privacy") else "uniform"  # privacy refuses a loss that knows label counts
        assert {config.train.label_prior for config in rows.values()} == {prior}
        assert len({config.train.clip for config in rows.values()}) == 1
        assert len({config.train.schedule for config in rows.values()}) == 1
        assert len({config.seed for config in rows.values()}) == 1
    rows.pop("behaviour cloning only", None)  # nothing of it trains
    if name != "stragglers":  # there the budget is virtual time
        assert len({config.training_samples for config in rows.values()}) == 1
    sgd = {label for label, config in rows.items() if config.train.optimizer == "sgd"}
    assert sgd == (set(rows) if name == "label-skew-sgd" else SGD.get(name, set()))
    searched = [load_grid(tree).search for tree in study.parts(data)]
    assert all(search.grow and search.ties == "common" for search in searched if search.rates)
    assert all(bool(search.rates) != name.startswith("paper") for search in searched)
    assert len({config.data.eval for config in rows.values()}) == 1


def row_gradients(config):
    """Of a run in which nobody is late or absent."""
    algorithm, rounds = plan(config).algorithm, config.train.training_rounds
    share = 1.0
    if config.algorithm.name == "rac-lora":
        share = sum(t % algorithm.period < algorithm.chain for t in range(rounds)) / rounds
    return config.training_samples * algorithm.traits.gradients * share


@pytest.mark.parametrize("name", others_slow(NAMES, ["sparse-sst2", "label-skew-sgd"]))
def test_only_named_rows_are_of_unequal_work(name, studies, data):
    """So that all others are ranked: also one client with large batches, and rows of accumulated minibatches."""
    study = every_study(studies)[name]
    trials = {each.setting: each for tree in study.parts(data) for each in plan_trials(load_grid(tree)).trials}
    work = {setting: row_gradients(each.config) for setting, each in trials.items()}
    labels = {setting: studies.split_labels(study, each.labels) for setting, each in trials.items()}
    unequal = set()
    for setting, own in labels.items():
        base = next(other for other, known in labels.items() if known == {**own, **study.baseline})
        if compare_work(work[setting], work[base]):
            unequal.add(setting)
    assert unequal == LESS_OR_MORE.get(name, set())


@pytest.mark.parametrize("name", others_slow(NAMES, ["sparse-sst2", "label-skew-sgd"]))
def test_the_baseline_of_a_study_is_one_of_its_rows(name, studies, data):
    study = every_study(studies)[name]
    labels = [trial.labels for tree in study.parts(data) for trial in plan_trials(load_grid(tree)).trials]
    labels = [studies.split_labels(study, each) for each in labels]
    for (axis, label), *_ in (each.items() for each in (study.baseline, study.further) if each):
        assert any(each[axis] == label for each in labels)
    (axis, _), *_ = study.baseline.items()
    assert not study.costs or axis == "system"


@pytest.mark.slow
def test_every_row_has_a_rate_of_its_own(studies, data):
    for name in ("label-skew-sgd", "stragglers", "attackers", "optimisers", "compression", "methods"):
        for tree in every_study(studies)[name].parts(data):
            groups = {trial.setting for trial in plan_search(load_grid(tree)).trials}
            assert groups == set(tree["axes"]["system"]), name


@pytest.mark.slow
def test_budgets_are_what_the_pages_say(studies, data):
    known = {name: every_study(studies)[name] for name in ("sparse-sst2", "methods", "paper-budget", "label-skew-sgd")}
    rows = {name: next(iter(reported(study, data).values())).training_samples for name, study in known.items()}
    expected = {"sparse-sst2": 24_000, "methods": 19_200, "paper-budget": 960_000, "label-skew-sgd": 38_400}
    assert rows == expected
    paper = reported(known["paper-budget"], data)
    assert all(config.adapter.head == "frozen" for config in paper.values())
    assert {label: config.train.lr for label, config in paper.items()} == RATES
    optimisers = reported(studies.STUDIES["optimisers"], data)
    steps = {label: config.train.rounds * config.train.local_steps for label, config in optimisers.items()}
    assert steps["batch 16, half the steps"] * 2 == steps["batch 8"] == steps["batch 8, 1 step a round"]


def test_paper_budget_takes_the_rates_of_the_study_before_it(studies, data, tmp_path):
    study = studies.study_grids.paper_budget(0.1, {"dec-lora": 7e-3})
    with pytest.raises(SystemExit, match="run the study alternating-96-cosine first"):
        study.parts(data)
    rows = [
        {"labels": {"graph": graph, "method": method}, "rate": rate}
        for graph, rate in (("p = 0.1", 3e-3), ("p = 0.02", 9e-3))
        for method in RATES
    ]
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/study-alternating-96-cosine.json").write_text(json.dumps({"rows": rows}))
    rates = {label: config.train.lr for label, config in reported(study, data).items()}
    assert rates == {**dict.fromkeys(RATES, 3e-3), "dec-lora": 7e-3}
    assert studies.given_rates(["adf-lora, T = 1=0.004"]) == {"adf-lora, T = 1": 0.004}
    for wrong in ("dec-lora", "dec-lora=fast", "dec-lora=-1", "local=0.1"):
        with pytest.raises(SystemExit, match="expected ROW=RATE"):
            studies.given_rates([wrong])


def test_alie_attacks(studies):
    assert alie_quantile(10, studies.study_systems.ATTACKING) > 0 >= alie_quantile(10, 2)


def test_strangers_hold_news_under_random_labels(studies, data):
    systems = studies.study_systems
    systems.write_strangers(data)
    table = pq.read_table(systems.strangers_file()).to_pandas()
    assert table["client"].value_counts().to_dict() == dict.fromkeys(range(10), 1000)
    news = table["sentence"].str.startswith("text")
    assert set(table["client"][news]) == set(systems.STRANGERS)
    share = table.groupby("client")["label"].mean()
    assert share[0] == pytest.approx(0.1) and share[3] == pytest.approx(0.9) and share[6] == 0.5
    assert all(0.4 < share[client] < 0.6 for client in systems.STRANGERS)
    assert set(systems.OWN_CLIENTS) | set(systems.STRANGERS) == set(range(10))


def test_stragglers_fit_the_virtual_budget(studies, data):
    systems = studies.study_systems
    rows = reported(studies.STUDIES["stragglers"], data)
    rounds = {label: config.train.rounds for label, config in rows.items()}
    assert rounds["dec-lora, waits"] * 5 * systems.SLOW == systems.BUDGET
    assert rounds["dec-lora, deadline 6 s"] * 6.0 <= systems.BUDGET and rounds["alone"] == 100
    jobs = 5 * (systems.BUDGET / 5) + 5 * (systems.BUDGET / 50)
    assert rounds["ad-psgd"] == int(jobs / 10)
    salf = SALF(depth="deadline", deadline=systems.CUT)
    seconds = torch.tensor([1.0, systems.SLOW])
    assert salf.in_time(systems.CUT, 3, seconds, 5).tolist() == [3, 2]  # head and two blocks; the slow lack one


@pytest.mark.slow
def test_list_counts_runs_rows_and_core_hours(studies, data):
    effort, outcomes = importlib.import_module("study_effort"), importlib.import_module("outcomes")
    tiny = {"momenta": studies.STUDIES["momenta"], "label-skew-sgd": studies.STUDIES["label-skew-sgd"]}
    efforts = {name: effort.count_effort(study, data) for name, study in tiny.items()}
    table = effort.list_studies(tiny, efforts, data)
    runs = 5 * 5 + 5 * 3 * 2  # rows x seeds, rows x rates x search seeds
    assert f"| momenta | [optimisers.md](optimisers.md) | {runs} | {runs * 24_000:,} | – | 0 |" in table
    rows, tuned = 12, 4
    more = rows * 5 + (rows - tuned) * 6 + tuned * 3 * 6  # values x rates x search seeds, which the search needs anyway
    assert f"| {more} | {more * 38_400:,} | – | 0 |" in table
    assert f"| all |  | {runs + more} | {runs * 24_000 + more * 38_400:,} | – | 0 |" in table
    outcome = Outcome("x", {}, 0, 0.1, "", {"training rows": 24_000.0, "seconds": 36.0})
    for seed, seconds in enumerate((36.0, 24.0, 240.0)):  # one of them on a busy machine
        known = {"training rows": 24_000.0, "seconds": seconds}
        line = {"config": str(seed), "machine": "avx2", "outcome": vars(replace(outcome, measures=known)), "looks": []}
        outcomes.append_line(outcomes.PLACE / "momenta.jsonl", json.dumps(line))
    table = effort.list_studies(tiny, efforts, data)
    hours, others = runs * 36 / 3600, more * 38_400 / 24_000 * 36 / 3600
    assert f"| {runs} | {runs * 24_000:,} | {effort.told(hours)} | 3 |" in table and effort.told(0.55) == "0.55"
    assert f"| {effort.told(others)} | 0 |" in table and f"| {effort.told(hours + others)} | 3 |" in table
    assert "1.5 s per 1,000 rows of texts. They are wall" in table and "computed on: avx2 (3)." in table
    assert "A study without a finished run" in table


def test_policies_are_reckoned_by_themselves_and_short_runs_count_little(studies, data):
    effort, outcomes = importlib.import_module("study_effort"), importlib.import_module("outcomes")
    known = {name: studies.STUDIES[name] for name in ("policies-pendulum", "policies-point-mass", "momenta")}
    for number, (rows, seconds) in enumerate([(40, 100.0), (40, 200.0), (1000, 1.0)]):
        outcome = Outcome("x", {}, 0, 0.1, "", {"training rows": rows, "seconds": seconds})
        line = {"config": str(number), "machine": "avx2", "outcome": vars(outcome), "looks": []}
        outcomes.append_line(outcomes.PLACE / "policies-pendulum.jsonl", json.dumps(line))
    kept = {name: outcomes.OutcomeLines(name, data).kept for name in known}
    assert effort.paces_by_task(known, kept, data) == {"policies": 1e-3, "texts": None}
    efforts = {name: effort.Effort(1, 3_600_000, 1, 5) for name in known}
    table = effort.list_studies(known, efforts, data)
    assert table.count("| 3,600,000 | 1 |") == 2 and table.count("| 3,600,000 | – |") == 1
    assert "| all |  | 3 | 10,800,000 | – | 3 |" in table and "1 s per 1,000 rows of policies" in table


def test_the_page_says_what_five_seeds_can_show(studies, data):
    effort = importlib.import_module("study_effort")
    known = effort.count_effort(studies.STUDIES["momenta"], data)
    assert (known.tests, known.seeds) == (4, 5)
    assert effort.count_effort(studies.STUDIES["dtype"], data).tests == 2  # two methods, each against itself in fp32
    table = effort.seeds_table([known, replace(known, tests=99, seeds=1)])  # one seed tests nothing
    found = [f"{detectable_difference(sd, 5, 0.05 / 4):.3f}" for sd in effort.DEVIATIONS]
    rows = [line for line in table.splitlines() if line.startswith(("| 1 ", "| 4 ", "| 99 "))]
    assert len(rows) == 2 and rows[1] == f"| 4 | {' | '.join(found)} |" and "p is 0.0625 at least" in table


@pytest.mark.slow
def test_rows_of_all_graphs_are_corrected_together_and_clients_alone_run_once(studies, data):
    effort = importlib.import_module("study_effort")
    study = studies.STUDIES["alternating-24-cosine"]
    known = effort.count_effort(study, data)
    rows = 4 * 7 + 2  # of adf-lora three, tad-lora where it differs, ffa-lora, rolora, dec-lora, alone
    assert known.tests == rows - 4  # against dec-lora on the same graph
    assert known.runs == (rows - 3) * (5 + 5 * 2)  # alone is one row on four graphs
    assert load_grid(study.parts(data)[0]).search.rates == [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]


@pytest.mark.slow
def test_the_interval_that_the_pages_name_is_the_one_that_tad_lora_takes(studies):
    grids = studies.study_grids
    for graph, topology in grids.GRAPHS.items():
        for rounds in grids.BUDGETS:
            words = {"clients": 10, "topology": topology, "algorithm": "tad-lora", "train": {"rounds": rounds}}
            assert plan(load_config(words)).algorithm.interval == grids.TAD_INTERVALS[graph], (graph, rounds)


def test_tad_lora_has_a_row_only_where_adf_lora_has_not_its_interval(studies, data):
    grids = studies.study_grids
    tree, *_ = studies.STUDIES["alternating-24-cosine"].parts(data)
    named = {row.partition(": ")[0] for row in tree["axes"]["system"] if "tad-lora" in row}
    assert named == {"p = 0.1", "ring"}
    for graph in grids.GRAPHS:
        own = [row["algorithm"] for label, row in tree["axes"]["system"].items() if label.startswith(f"{graph}: ")]
        assert {"name": "adf-lora", "interval": grids.TAD_INTERVALS[graph]} in own
        assert all(own.count(each) == 1 for each in own)


def test_the_outcomes_that_are_stored_are_still_found(studies, data):
    """A new setting of peerlora, or a change of the studies' rows, must not lose runs that took hours."""
    kept = (BENCH / "results/outcomes/sparse-sst2.jsonl").read_text()
    outcomes = importlib.import_module("outcomes")
    outcomes.PLACE.mkdir(parents=True)
    (outcomes.PLACE / "sparse-sst2.jsonl").write_text(kept)
    lines = outcomes.OutcomeLines("sparse-sst2", data)
    tree, later = studies.STUDIES["sparse-sst2"].parts(data)
    assert {*later["axes"]["system"]}.isdisjoint(tree["axes"]["system"])  # whose common rates it must not change
    found = {lines._key(trial) for trial in plan_search(load_grid(tree)).trials if lines.find(trial)}
    first = {json.loads(line)["config"] for line in kept.splitlines()[:10]}
    assert len(first) == 10 and first <= found
    assert {run["machine"] for run in lines.used if run["purpose"] == "search"} >= {"x86_64 amx_bf16"}
