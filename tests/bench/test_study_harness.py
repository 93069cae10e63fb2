"""The harness of the studies: kept outcomes, equal cost, tuned settings, and a toy study from end to end."""

import importlib
import json
from dataclasses import MISSING, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peerlora.config.loading import load_config
from peerlora.experiments.grid import load_grid
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.trials import Trial, plan_search, plan_trials
from peerlora.runs.events import Evaluated, RoundDone, RunStarted

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.chdir(tmp_path)


def load(name):
    return importlib.import_module(name)


def blank(kind, **known):
    """An event with zeros where a field has no default."""
    needed = (field.name for field in fields(kind) if MISSING is field.default is field.default_factory)
    return kind(**dict.fromkeys(needed, 0.0) | known)


def evaluated(round, own, seconds=float("nan")):
    known = {"own": own, "own_loss": [1.0] * len(own), "relayed": [], "relayed_loss": []}
    return blank(Evaluated, **known, round=round, virtual_seconds=seconds, averaged=0.5, rows=4, final=round == 4)


def done(t, sent, clients=2):
    known = {"loss": [0.1] * clients, "edges": [], "missed": {}, "absent": [], "measures": {}}
    return blank(RoundDone, **known, round=t, bytes_sent=sent)


CLOCK = ["clients=2", "clock.step=1.0"]


def events(sent=100, own=((0.5, 0.5), (0.6, 0.7), (0.8, 0.9)), seconds=(0.0, 200.0, 400.0)):
    first = blank(RunStarted, metric="accuracy", method="dec-lora", higher_is_better=True, clients=2, held=[])
    looks = [evaluated(t, list(each), at) for t, each, at in zip((0, 2, 4), own, seconds, strict=True)]
    return [first, looks[0], done(0, sent), done(1, sent), looks[1], done(2, sent), done(3, sent), looks[2]]


def test_looks_are_what_a_run_had_spent_and_reached():
    costs = load("study_costs")
    looks = costs.follow(events(), load_config(None, CLOCK))
    assert [(look.round, look.bytes, look.seconds, look.worst) for look in looks] == [
        (2, 200.0, 200.0, 0.6),
        (4, 400.0, 400.0, 0.8),
    ]
    assert [look.mean for look in looks] == pytest.approx([0.65, 0.85])
    assert costs.last_within(looks, seconds=399.0).round == 2 and costs.last_within(looks, sent=199.0) is None


def test_a_run_without_a_clock_counts_gradients_and_bytes():
    costs = load("study_costs")
    words = ["clients=2", "train.local_steps=5", "algorithm.name=fedspeed", "topology=ring"]
    looks = costs.follow(events(sent=2e7), load_config(None, words))
    assert looks[0].seconds == 2 * 5 * 2 + 4e7 / 2 / costs.UPLINK  # two gradients a step


def test_rows_are_compared_at_equal_cost():
    costs, clock = load("study_costs"), load_config(None, CLOCK)
    dear = costs.follow(events(100), clock)
    cheap = costs.follow(events(50, ((0.5, 0.5), (0.5, 0.6), (0.7, 0.8)), (0.0, 300.0, 600.0)), clock)
    quiet = costs.follow(events(0), clock)
    table = costs.cost_table(
        {"dear": {0: dear, 1: dear}, "cheap": {0: cheap, 1: cheap}, "none": {0: quiet, 1: quiet}}, "dear"
    )
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
    end, middle = "0.850 ± 0.000 (0.800)", "0.650 ± 0.000 (0.600)"
    assert rows["dear"] == f"| dear | 4 | 400 | 0.00 | {end} | {middle} | {end} | baseline |"  # 210 bytes allowed
    assert (
        "| 0.750 ± 0.000 (0.700) | 0.750 ± 0.000 (0.700) | 0.550 ± 0.000 (0.500) | -0.300 [no interval] |"
        in rows["cheap"]
    )
    assert rows["none"].count(end) == 3 and "| +0.000 [no interval] |" in rows["none"]


def trial_of(words=(), name="ring"):
    data = {"train": "parquet:/data/a.parquet", "eval": "x.csv", "text": ["t"], "label": "l"}
    axes = {"system": {name: {"topology": "ring"}}}
    grid = load_grid({"base": {"clients": 2, "data": data}, "axes": axes, "seeds": [0]}, words)
    return plan_trials(grid).trials[0]


def test_an_outcome_and_its_looks_are_found_in_another_checkout():
    outcomes = load("outcomes")
    trial, kept = trial_of(), outcomes.OutcomeLines("toy", Path("/data"))
    outcome = Outcome.of_events("ring", trial.labels, 0, 1e-3, "x", events(), trial.config)
    assert kept.find(trial) is None and kept.looks(trial) == [] and len(kept) == 0
    kept.keep(trial, outcome)
    again = outcomes.OutcomeLines("toy", Path("/data"))
    assert again.find(trial).measures == outcome.measures and again.looks(trial) == kept.looks(trial) != []
    assert again.find(trial_of(name="other name")).labels == {"system": "other name"}
    assert again.find(trial_of(["train.rounds=7"])) is None and len(again) == 1
    line = json.loads(again.path.read_text())
    del line["looks"]  # as lines were before
    again.path.write_text(json.dumps(line) + "\n")
    older = outcomes.OutcomeLines("toy", Path("/data"))
    assert older.find(trial).measures == outcome.measures and older.looks(trial) == []


def test_scores_of_strangers_do_not_count():
    outcomes = load("outcomes")
    trial, kept = trial_of(), outcomes.OutcomeLines("toy", Path("/data"), judged=[1])
    kept.keep(trial, Outcome.of_events("ring", trial.labels, 0, 1e-3, "x", events(), trial.config))
    measures = kept.find(trial).measures
    assert measures["mean client"] == measures["worst client"] == 0.9
    assert measures["training rows"] == sum(trial.config.batches) * trial.config.train.local_steps * 4  # of both
    assert [look.mean for look in kept.looks(trial)] == [0.7, 0.9]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({0.1: 0.5, 0.2: 0.7, 0.4: 0.6}, []),
        ({0.1: 0.5, 0.2: 0.6, 0.4: 0.7}, [0.8]),
        ({0.1: 0.7, 0.2: 0.6, 0.4: 0.7}, [0.05]),  # the lowest of equals
        ({0.1: 0.5, 0.4: 0.6, 0.8: 0.7}, [1.0]),
        ({0.1: 0.5, 0.8: 0.6, 1.0: 0.7}, []),
        ({0.1 * 2**i: float(i) for i in range(6)}, []),
    ],
)
def test_a_tuned_setting_grows_at_an_edge(scores, expected):
    tuning, tuned = load("study_tuning"), load("study_base").Tuned("algorithm.gamma", (0.1, 0.2, 0.4), at_most=1.0)
    assert tuning.next_values(scores, tuned) == expected


def test_tuning_runs_are_those_of_the_search():
    base, tuning = load("study_base"), load("study_tuning")
    tuned = base.Tuned("algorithm.gamma", (0.1, 0.2))
    systems = {"choco": base.learned({"name": "choco", "codec": "sign"}), "dec-lora": base.learned()}
    tree = base.grid("sst2", base.base("sst2", Path("/data")) | {"topology": {"kind": "ring"}}, systems)
    tried = []

    def run(grid):
        tried.append(grid)
        lines = [
            Line({"tried": value}, {"mean client": Estimate(0.9 if value == "0.2" else 0.5)})
            for value in grid["axes"]["tried"]
        ]
        return Result(lines)

    grids, scores = tuning.tuned_grids([tree], {"choco": tuned}, run)
    assert scores == {"choco": {0.1: 0.5, 0.2: 0.9, 0.4: 0.5}}  # 0.2 was at the edge
    assert list(grids[0]["axes"]["system"]) == ["choco (gamma = 0.2)", "dec-lora"]
    assert "gamma" not in tree["axes"]["system"]["choco"]["algorithm"]
    kept = load("outcomes").OutcomeLines("toy", Path("/data"))
    made = {kept._key(trial) for grid in tried for trial in plan_trials(load_grid(grid)).trials}
    needed = [t for t in plan_search(load_grid(grids[0])).trials if t.setting.startswith("choco")]
    assert len(needed) == 6 and {kept._key(trial) for trial in needed} <= made and len(made) == 3 * 6


class Estimate:
    def __init__(self, mean):
        self.mean = mean


class Line:
    diverged = 0

    def __init__(self, labels, estimates):
        self.labels, self.estimates = labels, estimates


class Result:
    def __init__(self, lines):
        self.lines = lines


def tiny_parts(tree, data):
    """Two grids of one toy table."""
    base = load("study_base")
    common = tree | {"topology": {"kind": "ring"}, "clients": 3, "partition": {"kind": "iid"}}
    rows = [{"dec-lora": base.learned()}, {"choco": base.learned({"name": "choco", "codec": "sign"})}]
    found = []
    for systems, rates in zip(rows, ([1e-3, 2e-3], [1e-2, 2e-2]), strict=True):
        each = base.grid("sst2", common, systems, rates) | {"seeds": [0, 1], "share_prefix": False}
        each["search"] |= {"most": 2, "holdout": 0.2}
        found.append(each)
    return found


@pytest.mark.slow
def test_a_toy_study_end_to_end(models, cache, tmp_path, monkeypatch):
    studies, base, tuning = load("studies"), load("study_base"), load("study_tuning")
    monkeypatch.setattr(tuning, "MOST", 2)
    data = tmp_path / "data"
    (data / "glue/sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        texts = [f"w{i % 7} w{i % 5}" for i in range(60)]
        table = pa.table({"sentence": texts, "label": [i % 2 for i in range(60)]})
        pq.write_table(table, data / "glue/sst2" / f"{split}.parquet")
    tree = base.base("sst2", data, rounds=2) | {"model": {"source": models("bert")}, "eval": {"every": 1}}
    tree["adapter"] = {"rank": 2}
    tree["train"] |= {"local_steps": 1, "batch": 4}
    study = base.Study(
        lambda folder: tiny_parts(tree, folder),
        "toy.md",
        {"system": "dec-lora"},
        tuned={"choco": base.Tuned("algorithm.gamma", (0.2, 0.4))},
        judged=[0, 1],
        costs=True,
    )
    page = studies.PAGES / study.page
    page.parent.mkdir(parents=True)
    page.write_text("<!-- study-toy -->\n<!-- /study-toy -->\n")
    found = studies.conduct("toy", study, data)
    studies.write("toy", study, found, data)
    told, text = json.loads((tmp_path / "bench/results/study-toy.json").read_text()), page.read_text()
    (chosen,) = [row for row in found.looks if row.startswith("choco (gamma = ")]
    assert [row["labels"]["system"] for row in told["rows"]] == ["dec-lora", chosen]
    assert f"| {chosen} |" in text and "At equal cost, over seeds 0, 1" in text and "Tuned on rows set aside" in text
    assert [each["setting"] for each in told["search"]] == ["dec-lora", chosen]
    assert set(told["looks"][chosen]) == {"0", "1"} and len(told["looks"][chosen]["0"]) == 2
    assert str(tmp_path) not in json.dumps(told["grids"])
    lines = (tmp_path / "bench/results/outcomes/toy.jsonl").read_text().splitlines()
    assert len(lines) == 8 + 4 + 4  # of the tuned row's search nothing is run twice
    monkeypatch.setattr("peerlora.experiments.runner.simulate", None)  # all is known by its lines
    assert studies.conduct("toy", study, data).result.lines == found.result.lines


def test_a_setting_at_its_default_is_no_part_of_a_runs_key_but_training_is():
    """So that outcomes outlive new settings of peerlora, and a default that changes takes none of another run."""
    lines = load("outcomes").OutcomeLines("toy", Path("/data"))

    def key(*words):
        config = load_config(None, ["clients=2", "topology=ring", *words])
        return lines._key(Trial({}, config, "x", "ring"))

    assert key() == key("train.clip=null", "threads=3", "train.optimizer_state=round")
    assert len({key(), key("train.clip=1"), key("train.optimizer_state=keep"), key("train.lr=0.5")}) == 4
