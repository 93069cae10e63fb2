"""The harness of the studies: kept outcomes, equal cost, tuned settings, and a toy study from end to end."""

import importlib
import json
import multiprocessing
import re
from dataclasses import MISSING, fields, replace
from math import inf
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from peerlora.config.loading import load_config
from peerlora.errors import Stopped
from peerlora.experiments.grid import load_grid
from peerlora.experiments.rate_search import RateScore, RateSearch, next_rate
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.trials import Trial, expand_settings, plan_search, plan_trials, searched_settings
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
    assert rows["dear"] == f"| dear | 4 | 400 | 0.00 | {end} | {middle} | {end} | baseline | – |"  # 210 bytes allowed
    assert (
        "| 0.750 ± 0.000 (0.700) | 0.750 ± 0.000 (0.700) | 0.550 ± 0.000 (0.500) | -0.300 [no interval] |"
        in rows["cheap"]
    )
    assert rows["none"].count(end) == 3 and "| +0.000 [no interval] |" in rows["none"]
    assert "At equal cost, over seeds 0, 1:" in table and "diverged" not in table


def cells(table, row):
    return next(line for line in table.splitlines() if line.startswith(f"| {row} |")).strip("| ").split(" | ")


def test_differences_at_equal_cost_are_corrected_for_the_rows():
    """Two rows of which one is told from the baseline by itself, and of both together none is."""
    costs, clock = load("study_costs"), load_config(None, CLOCK)

    def runs(gaps):
        shifted = ((0.5, 0.5), (0.6, 0.7))
        return {
            seed: costs.follow(events(100, (*shifted, (0.5 + gap, 0.5 + gap))), clock) for seed, gap in enumerate(gaps)
        }

    gaps = {"b": (0.125, 0.25, 0.1875), "c": (-0.125, 0.25, 0.125)}
    raw = {row: float(stats.ttest_1samp(own, 0).pvalue) for row, own in gaps.items()}
    rows = {"a": runs((0.0, 0.0, 0.0)), **{row: runs(own) for row, own in gaps.items()}}
    table = costs.cost_table(rows, "a")
    assert raw["b"] < 0.05 < 2 * raw["b"] < raw["c"]
    assert cells(table, "a")[-2:] == ["baseline", "–"]
    assert cells(table, "b")[-2:] == ["+0.188 [+0.032, +0.343] ≈", f"{2 * raw['b']:.3f}"]
    assert cells(table, "c")[-1] == f"{raw['c']:.3f}" and " ≈" in cells(table, "c")[-2]
    assert "adjusted by Holm over the rows of this table. ≈ Not distinguishable" in table
    alone = costs.cost_table({row: rows[row] for row in "ab"}, "a")
    assert cells(alone, "b")[-2:] == ["+0.188 [+0.032, +0.343]", f"{raw['b']:.3f}"] and "≈" not in alone


def test_the_same_runs_are_compared_with_a_further_row():
    """Relayed models stand beside own ones, and p is adjusted over the rows of that comparison by itself."""
    studies, base = load("studies"), load("study_base")
    study = base.Study(lambda data: [], "toy.md", {"system": "one place"}, further={"system": "complete"})
    own = {"one place": (0.75, 0.75, 0.75), "complete": (0.5, 0.625, 0.5), "sparse": (0.625, 0.875, 0.6875)}
    found = [
        Outcome(row, {"system": row}, seed, 0.1, "", {"mean client": score}, metric="accuracy")
        for row, scores in own.items()
        for seed, score in enumerate(scores)
    ]
    relayed = {"mean client": 0.25, "relayed client": 0.75, "worst relayed client": 0.5}
    found += [Outcome("r", {"system": "r"}, seed, 0.1, "", relayed, metric="accuracy") for seed in range(3)]
    table = studies.further_table(studies.compared("toy", replace(study, baseline=study.further), found))
    assert table.startswith("The same runs, set against complete:") and "one place | +0.208" in table
    raw = float(stats.ttest_1samp((0.125, 0.25, 0.1875), 0).pvalue)
    assert cells(table, "sparse")[1:3] == ["+0.188 [+0.032, +0.343] ≈", f"{2 * raw:.3f}"]  # the second lowest of three
    assert cells(table, "r")[1].startswith("-0.292") and cells(table, "r")[5].startswith("+0.208")
    assert "| complete |" not in table and "adjusted by Holm over the rows of this table" in table
    first = studies.compared("toy", study, found)
    assert {line.setting for line in first.lines if line.differences} == {"complete", "sparse", "r"}


def test_rows_that_diverged_or_sent_nothing_do_not_stop_the_table_of_costs():
    costs, clock = load("study_costs"), load_config(None, CLOCK)
    whole = costs.follow(events(100), clock)
    quiet = costs.follow(events(0), clock)
    runs = {"base": {0: whole, 1: whole}, "once": {0: whole, 1: []}, "never": {0: [], 1: []}}
    table = costs.cost_table(runs, "base")
    end = "0.850 ± 0.000 (0.800)"
    assert cells(table, "base")[4:6] == [end, end] and cells(table, "once")[4] == "0.850 (0.800)"
    assert cells(table, "once")[-2:] == ["+0.000 [no interval]", "–"]
    assert cells(table, "never")[1:] == ["–"] * 8
    assert "only those count that ended: once over seeds 0; never in none." in table
    nothing = costs.cost_table({"base": {0: quiet}, "alone": {0: quiet}}, "base")
    assert cells(nothing, "alone")[3:6] == ["0.00", "0.850 (0.800)", "–"]  # nobody sent a byte
    lost = costs.cost_table({"base": {0: []}, "once": {0: whole}}, "base")
    assert cells(lost, "once")[4:] == ["0.850 (0.800)", "0.850 (0.800)", "–", "–", "–"]


def test_accumulated_minibatches_take_their_time():
    costs = load("study_costs")
    words = ["clients=2", "train.local_steps=5", "train.accumulate=4", "topology=ring"]
    assert costs.follow(events(sent=0), load_config(None, words))[0].seconds == 2 * 5 * 4


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


def kept_twice(outcomes):
    """A file with the lines of two runs."""
    lines = outcomes.OutcomeLines("toy", Path("/data"))
    for words in ((), ("train.rounds=7",)):
        trial = trial_of(words)
        lines.keep(trial, Outcome.of_events("ring", trial.labels, 0, 1e-3, "x", events(), trial.config))
    return lines.path


def test_a_line_that_was_cut_off_is_skipped_and_told_and_the_next_one_is_whole(capsys):
    outcomes = load("outcomes")
    path = kept_twice(outcomes)
    first, second = path.read_text().splitlines()
    for cut in (len(second) // 2, 1):
        path.write_text(f"{first}\n{second[:cut]}")
        lines = outcomes.OutcomeLines("toy", Path("/data"))
        assert "the last line was cut off and is skipped" in capsys.readouterr().err
        assert len(lines) == 1 and lines.find(trial_of()) and lines.find(trial_of(["train.rounds=7"])) is None
        trial = trial_of(["train.rounds=9"])
        lines.keep(trial, Outcome.of_events("ring", trial.labels, 0, 1e-3, "x", events(), trial.config))
        assert len(outcomes.OutcomeLines("toy", Path("/data"))) == 2 and not capsys.readouterr().err
    path.write_text(f"{first}\n{second}")  # cut off at its very end, so nothing is lost
    assert len(outcomes.OutcomeLines("toy", Path("/data"))) == 2
    outcomes.append_line(path, first)
    assert path.read_text() == f"{first}\n{second}\n{first}\n"
    path.write_text(f"{second[:9]}")
    outcomes.append_line(path, first)
    assert path.read_text() == f"{first}\n"
    path.write_text(f"{second[:9]}\n{first}\n")
    with pytest.raises(SystemExit, match="toy.jsonl, line 1: this is no JSON"):
        outcomes.OutcomeLines("toy", Path("/data"))


def append_many(path, text, count):
    for _ in range(count):
        load("outcomes").append_line(path, text)


def test_lines_of_two_processes_do_not_mix(tmp_path):
    """Long lines, which no single write of the system need hold together."""
    path, texts = tmp_path / "lines.jsonl", [json.dumps(letter * 100_000) for letter in "ab"]
    processes = [multiprocessing.get_context("fork").Process(target=append_many, args=(path, t, 20)) for t in texts]
    for each in processes:
        each.start()
    for each in processes:
        each.join(60)
    assert [each.exitcode for each in processes] == [0, 0]
    assert sorted(path.read_text().splitlines()) == sorted(texts * 20)


def test_a_key_tells_models_and_adapters_apart_whatever_their_defaults_become(monkeypatch):
    outcomes = load("outcomes")
    lines = outcomes.OutcomeLines("toy", Path("/data"))
    trial, changes = trial_of(), ["model.source=./other", "adapter.rank=4", "adapter.alpha=8", "adapter.targets=[key]"]
    keys = {change: lines._key(trial_of([change])) for change in changes}
    plain = lines._key(trial)
    assert len({plain, *keys.values()}) == 5
    later = {"model": {"source": "./other"}, "adapter": {"rank": 4}}
    for name, settings in later.items():  # as if these were the defaults, under which the dump leaves them out
        change = [f"{name}.{setting}={value}" for setting, value in settings.items()]
        own = trial_of(change)
        dump = type(own.config).model_dump

        def later_dump(self, _dump=dump, _name=name, **options):
            told = _dump(self, **options)
            return {key: value for key, value in told.items() if key != _name or not options.get("exclude_defaults")}

        with monkeypatch.context() as patch:
            patch.setattr(type(own.config), "model_dump", later_dump)
            assert lines._key(own) == keys[change[0]] != plain
    assert outcomes.without_first({"a": 1, "new": 2}, {}, {"a": 1}) == {}
    assert outcomes.without_first({"a": 1, "new": 2}, {"new": 2}, {"a": 3}) == {"a": 1, "new": 2}


def test_the_machine_of_every_run_is_known():
    outcomes, studies = load("outcomes"), load("studies")
    path = kept_twice(outcomes)
    first, second = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(line) + "\n" for line in (first | {"machine": "z"}, second | {"machine": "y"})))
    lines = outcomes.OutcomeLines("toy", Path("/data"))
    assert lines.used == []
    assert lines.find(trial_of()) and lines.find(trial_of()) and not lines.find(trial_of(["train.rounds=3"]))
    known = {"row": "ring", "seed": 0, "rate": 1e-3, "purpose": "report", "machine": "z"}
    assert lines.used == [known]
    assert studies.machine_note(lines.used) == "Computed on: z (1 run), those of the search included.\n"
    several = studies.machine_note([known, known, {**known, "machine": "y"}])
    assert several.startswith("Computed on: z (2 runs), y (1 run)") and "round differently" in several


def test_all_rows_of_a_study_have_one_precision_which_it_keeps():
    outcomes, base, notes = load("outcomes"), load("study_base"), load("study_notes")
    tree = {"base": {"train": {"batch": 2}}, "axes": {"system": {"a": {}}}}
    about = {"base": {"train": {"batch": 2}}, "axes": {"dtype": {"bf16": {"train": {"dtype": "bf16"}}}}}
    study = base.Study(lambda data: [tree, about], "toy.md", {})
    first, second = base.in_dtype(study, "bf16").parts(Path("data"))
    assert first == tree | {"base": {"train": {"batch": 2, "dtype": "bf16"}}} and second is about
    assert base.in_dtype(study, "fp32") is study
    assert "in bf16 in all rows" in notes.dtype_note([first]) and notes.dtype_note([tree, about]) == ""
    lines = outcomes.OutcomeLines("toy", Path("/data"))
    assert lines.dtype == "fp32"
    trial = trial_of(["train.dtype=bf16"])
    lines.keep(trial, Outcome.of_events("ring", trial.labels, 0, 1e-3, "x", events(), trial.config))
    assert lines.dtype == outcomes.OutcomeLines("toy", Path("/data")).dtype == "bf16"
    assert lines.find(trial_of()) is None  # never a run of another precision
    line = json.loads(lines.path.read_text())
    del line["dtype"]  # as lines were before
    lines.path.write_text(json.dumps(line) + "\n")
    assert outcomes.OutcomeLines("toy", Path("/data")).dtype == "fp32"


@pytest.mark.parametrize(
    ("words", "kept", "dtype"),
    [((), (), "fp32"), ((), ("train.dtype=bf16",), "bf16"), (("--dtype", "fp32"), (), "fp32")],
)
def test_a_study_is_conducted_in_its_precision(words, kept, dtype, monkeypatch, tmp_path, capsys):
    studies, outcomes = load("studies"), load("outcomes")
    trial, seen = trial_of(["train.dtype=bf16"]), []
    if kept:
        lines = outcomes.OutcomeLines("sparse-sst2", tmp_path)
        lines.keep(trial, Outcome.of_events("ring", trial.labels, 0, 1e-3, "x", events(), trial.config))
    monkeypatch.setattr("sys.argv", ["studies.py", "sparse-sst2", "--data", str(tmp_path), *words])
    monkeypatch.setattr(studies, "conduct", lambda name, study, *_: seen.append(study))
    monkeypatch.setattr(studies, "write", lambda *_: None)
    studies.main()
    (study,) = seen
    assert {tree["base"]["train"].get("dtype", "fp32") for tree in study.parts(tmp_path)} == {dtype}


def test_the_study_of_precisions_takes_none(monkeypatch, capsys):
    studies = load("studies")
    monkeypatch.setattr("sys.argv", ["studies.py", "dtype", "--data", "data", "--dtype", "bf16"])
    with pytest.raises(SystemExit) as told:
        studies.main()
    assert told.value.code == 2 and "the rows of this study are about it; drop it" in capsys.readouterr().err


def test_a_study_runs_in_one_process_at_a_time(monkeypatch, capsys):
    studies = load("studies")
    with studies.only_process("toy"):
        with pytest.raises(SystemExit, match="toy is being run by another process"):
            with studies.only_process("toy"):
                pass
        with studies.only_process("other"):
            pass
    with studies.only_process("toy"):
        pass


@pytest.mark.parametrize("kind", [Stopped("peerlora compare --resume"), KeyboardInterrupt()])
def test_a_study_that_is_stopped_says_how_it_goes_on(kind, monkeypatch, capsys):
    studies = load("studies")
    words = ["studies.py", "paper-budget", "--data", "my data", "--rate", "dec-lora=0.004", "--dtype", "bf16"]
    monkeypatch.setattr("sys.argv", words)

    def conduct(*_):
        raise kind

    monkeypatch.setattr(studies, "conduct", conduct)
    with pytest.raises(SystemExit) as told:
        studies.main()
    assert told.value.code == 130
    again = "python bench/studies.py paper-budget --data 'my data' --rate dec-lora=0.004 --dtype bf16"
    assert capsys.readouterr().err == f"stopped; 0 runs of paper-budget are kept; go on with: {again}\n"


def test_a_study_of_which_every_run_diverged_has_no_table():
    studies, base = load("studies"), load("study_base")
    study = base.Study(lambda data: [], "toy.md", {"system": "a"})
    lost = Outcome("a", {"system": "a"}, 0, 0.1, "", {}, diverged="nan")
    with pytest.raises(SystemExit, match="toy: every reported run diverged"):
        studies.compared("toy", study, [lost], [])
    ended = replace(lost, measures={"mean client": 0.5}, metric="accuracy", diverged=None)
    result = studies.compared("toy", study, [lost, ended], [])
    assert result.metric == "accuracy" and result.details == "bench/results/study-toy.json"


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
        ({0.1: 0.3, 0.2: 0.1 + 0.2, 0.4: 0.2}, [0.05]),  # equal but for rounding
        ({0.1: 0.5, 0.4: 0.6, 0.8: 0.7}, [1.0]),
        ({0.1: 0.5, 0.8: 0.6, 1.0: 0.7}, []),
        ({0.1 * 2**i: float(i) for i in range(6)}, []),
        ({0.1: float("-inf"), 0.2: 0.5, 0.4: float("-inf")}, []),
    ],
)
def test_a_tuned_setting_grows_at_an_edge(scores, expected):
    tuning, tuned = load("study_tuning"), load("study_base").Tuned("algorithm.gamma", (0.1, 0.2, 0.4), at_most=1.0)
    assert tuning.next_values(scores, "choco", tuned) == expected


def searches_of(grid, reached):
    """The search of every tried value; ``reached``: what one value reaches at one rate, None where it diverged."""
    grid, found = load_grid(grid), []
    for setting in expand_settings(grid):
        scores = {rate: reached(setting.name, rate) for rate in grid.search.rates}
        kept = tuple(
            RateScore(rate, {} if value is None else {100: value, 101: value}, 2 * (value is None))
            for rate, value in scores.items()
        )
        best = max(scores, key=lambda rate: (scores[rate] is not None, scores[rate] or 0.0))
        found.append(RateSearch(setting.name, setting.labels, kept, best, (best,), best))
    return found


def choco_grid():
    base = load("study_base")
    tuned = base.Tuned("algorithm.gamma", (0.1, 0.2))
    systems = {"choco": base.learned({"name": "choco", "codec": "sign"}), "dec-lora": base.learned()}
    return base.grid("sst2", base.base("sst2", Path("/data")) | {"topology": {"kind": "ring"}}, systems), tuned


def test_tuning_runs_are_those_of_the_search():
    tuning, (tree, tuned) = load("study_tuning"), choco_grid()
    tried = []

    def search(grid):
        tried.append(grid)
        return searches_of(grid, lambda name, rate: 0.9 if name == "choco, gamma = 0.2" and rate == 4e-3 else 0.5)

    grids, found = tuning.tuned_grids([tree], {"choco": tuned}, search)
    scores = {value: tuning.score(each) for value, each in found["choco"].items()}
    assert scores == {0.1: 0.5, 0.2: 0.9, 0.4: 0.5}  # 0.2 was at the edge
    assert {rate.rate for rate in found["choco"][0.4].rates} == {2e-3, 4e-3, 8e-3}
    assert list(grids[0]["axes"]["system"]) == ["choco (gamma = 0.2)", "dec-lora"]
    assert "gamma" not in tree["axes"]["system"]["choco"]["algorithm"]
    kept = load("outcomes").OutcomeLines("toy", Path("/data"))
    made = {kept._key(trial) for grid in tried for trial in plan_search(load_grid(grid)).trials}
    needed = [t for t in plan_search(load_grid(grids[0])).trials if t.setting.startswith("choco")]
    assert len(needed) == 6 and {kept._key(trial) for trial in needed} <= made and len(made) == 3 * 6


def test_the_rates_of_every_tuned_value_grow():
    """Each value is a group of the search by itself, which goes on beyond an edge as the study's own search does."""
    tuning, (tree, tuned) = load("study_tuning"), choco_grid()
    grid = load_grid(tuning.tuning_grid(tree, "choco", tuned, (0.1, 0.2)))
    assert [setting.name for setting in searched_settings(grid).values()] == [
        "choco, gamma = 0.1",
        "choco, gamma = 0.2",
    ]
    assert grid.search.grow and grid.search.seeds == load("study_base").SEARCHED
    (low, high) = searches_of(grid.model_dump(), lambda name, rate: rate if name.endswith("0.2") else -rate)
    assert next_rate(low, grid.search) == 1e-3 and next_rate(high, grid.search) == 1.6e-2


def test_values_that_diverged_at_every_rate_are_told():
    tuning, (tree, tuned) = load("study_tuning"), choco_grid()
    with pytest.raises(SystemExit, match=r"choco: every run with algorithm.gamma = 0.1, 0.2 diverged at every rate"):
        tuning.tuned_grids([tree], {"choco": tuned}, lambda grid: searches_of(grid, lambda name, rate: None))
    some = tuning.try_values(
        tree, "choco", tuned, lambda grid: searches_of(grid, lambda name, rate: 0.5 if name.endswith("0.1") else None)
    )
    assert {value: tuning.score(each) for value, each in some.items()} == {0.05: -inf, 0.1: 0.5, 0.2: -inf}


def test_the_page_has_every_rate_of_every_value():
    studies, tuning, (tree, tuned) = load("studies"), load("study_tuning"), choco_grid()
    values = {"choco, gamma = 0.1": 0.5, "choco, gamma = 0.2": 0.7, "choco, gamma = 0.4": None}

    def search(grid):
        return searches_of(grid, lambda name, rate: values[name] and values[name] + rate)

    _, tried = tuning.tuned_grids([tree], {"choco": tuned}, search)
    text = studies.tuning_table(tried)
    assert "| searched on | 0.002 | 0.004 | 0.008 |" in text and studies.tuning_table({}) == ""
    row = "| choco, gamma = 0.2 | 0.702 ± 0.000 | 0.704 ± 0.000 | 0.708 ± 0.000 (taken) | at the edge |"
    assert row in text and text.count("diverged") == 3


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


def toy_study(models, data):
    """Write rows to ``data``, and return a study of two small grids."""
    base = load("study_base")
    (data / "glue/sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        texts = [f"w{i % 7} w{i % 5}" for i in range(60)]
        table = pa.table({"sentence": texts, "label": [i % 2 for i in range(60)]})
        pq.write_table(table, data / "glue/sst2" / f"{split}.parquet")
    tree = base.base("sst2", data, rounds=2) | {"model": {"source": models("bert")}, "eval": {"every": 1}}
    tree["adapter"] = {"rank": 2}
    tree["train"] |= {"local_steps": 1, "batch": 4}
    return base.Study(
        lambda folder: tiny_parts(tree, folder),
        "toy.md",
        {"system": "dec-lora"},
        further={"system": "dec-lora"},
        tuned={"choco": base.Tuned("algorithm.gamma", (0.2, 0.4))},
        judged=[0, 1],
        costs=True,
    )


def kept_measures(path):
    """What runs reached, by config; without what they took."""
    lines = map(json.loads, path.read_text().splitlines())
    return {
        line["config"]: {**line["outcome"]["measures"], "seconds": 0, "looks": [look["mean"] for look in line["looks"]]}
        for line in lines
    }


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.filterwarnings("ignore")
def test_workers_run_a_study_to_the_same_results(models, cache, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed; pip install 'peerlora[cluster]'")
    studies, data, path = load("studies"), tmp_path / "data", tmp_path / "bench/results/outcomes/toy.jsonl"
    monkeypatch.setattr(load("study_tuning"), "MOST", 2)
    study = toy_study(models, data)
    with studies.workers(1) as here:
        assert here is None
        alone = studies.conduct("toy", study, data, here)
    one = kept_measures(path)
    path.unlink()
    monkeypatch.setattr("peerlora.experiments.trial_run.simulate", None)  # this process runs nothing
    with studies.workers(2) as pool:
        found = studies.conduct("toy", study, data, pool)
    assert kept_measures(path) == one and len(one) == 16
    assert [line.labels for line in found.result.lines] == [line.labels for line in alone.result.lines]


@pytest.mark.slow
def test_a_toy_study_end_to_end(models, cache, tmp_path, monkeypatch):
    studies, base, data = load("studies"), load("study_base"), tmp_path / "data"
    monkeypatch.setattr(load("study_tuning"), "MOST", 2)
    study = toy_study(models, data)
    page = studies.PAGES / study.page
    page.parent.mkdir(parents=True)
    page.write_text("<!-- study-toy -->\n<!-- /study-toy -->\n")
    found = studies.conduct("toy", study, data)
    studies.write("toy", study, found, data)
    told, text = json.loads((tmp_path / "bench/results/study-toy.json").read_text()), page.read_text()
    (chosen,) = [row for row in found.looks if row.startswith("choco (gamma = ")]
    assert [row["labels"]["system"] for row in told["rows"]] == ["dec-lora", chosen]
    assert "The same runs, set against dec-lora:" in text and told["further"]["baseline"] == {"system": "dec-lora"}
    assert told["further"]["rows"] == told["rows"]
    assert f"| {chosen} |" in text and "At equal cost, over seeds 0, 1" in text and "Tuned on rows set aside" in text
    assert [each["setting"] for each in told["search"]] == ["dec-lora", chosen]
    assert [set(each) for each in told["tuned"].values()] == [{"0.2", "0.4"}]
    assert {(run["purpose"], run["seed"]) for run in told["runs"]} == {
        *(("report", seed) for seed in (0, 1)),
        *(("search", seed) for seed in base.SEARCHED),
    }
    assert len(told["runs"]) == 8 + 4 + 4 and {run["machine"] for run in told["runs"]} == {load("outcomes").machine()}
    assert f"Computed on: {load('outcomes').machine()} (16 runs)" in text
    named = re.search(r"The sign-flip test, in (\S+), assumes", text)
    assert (tmp_path / named[1]).is_file() and "p_sign_flip" in (tmp_path / named[1]).read_text()
    assert not re.search(r"table\.csv|the report", text)
    assert set(told["looks"][chosen]) == {"0", "1"} and len(told["looks"][chosen]["0"]) == 2
    assert str(tmp_path) not in json.dumps(told["grids"])
    lines = (tmp_path / "bench/results/outcomes/toy.jsonl").read_text().splitlines()
    assert len(lines) == 8 + 4 + 4  # of the tuned row's search nothing is run twice
    monkeypatch.setattr("peerlora.experiments.trial_run.simulate", None)  # all is known by its lines
    assert studies.conduct("toy", study, data).result.lines == found.result.lines
    path = tmp_path / "bench/results/outcomes/toy.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines[:-1]))  # the last run is of the second grid
    part = studies.conduct("toy", study, data, only_finished=True)
    assert part.missing == [chosen] and [line.labels for line in part.result.lines] == [{"system": "dec-lora"}]
    studies.write("toy", study, part, data)
    assert f"have not all finished: {chosen}.\n" in page.read_text()
    path.write_text("")
    with pytest.raises(Stopped):  # of the tuned row, no value is known
        studies.conduct("toy", study, data, only_finished=True)


def test_a_setting_at_its_default_is_no_part_of_a_runs_key_but_training_is():
    """So that outcomes outlive new settings of peerlora, and a default that changes takes none of another run."""
    lines = load("outcomes").OutcomeLines("toy", Path("/data"))

    def key(*words):
        config = load_config(None, ["clients=2", "topology=ring", *words])
        return lines._key(Trial({}, config, "x", "ring"))

    assert key() == key("train.clip=null", "threads=3", "train.optimizer_state=round")
    assert len({key(), key("train.clip=1"), key("train.optimizer_state=keep"), key("train.lr=0.5")}) == 4
