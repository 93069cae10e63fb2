"""Statistics of a comparison against numbers made by hand and against scipy; and the files written from them."""

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from peerlora.algorithms import REGISTRY
from peerlora.config.loading import load_config
from peerlora.experiments.figures import _by_p, comparison_figures
from peerlora.experiments.inference import detectable_difference
from peerlora.experiments.measures import measure_run
from peerlora.experiments.rate_search import RateScore, RateSearch
from peerlora.experiments.results import write_results
from peerlora.experiments.statistics import Outcome, assess_design, compare, estimate, pair_differences
from peerlora.runs.events import Evaluated, RoundDone, RunStarted


def events(*own, higher=True, sent=100, method="m"):
    """A run of one round per evaluation behind the first; ``own``: per evaluation, the clients' metric."""
    start = RunStarted("", method, 2, len(own) - 1, "accuracy", higher, 0, 1, {}, {}, {"kind": "ring"}, 5, [])
    rounds = [RoundDone(t, [1.0, 1.0], 0, 0, 0.5, 0.25, 0, 0.5, [], 1, 50, sent, 1, 1, 0) for t in range(len(own) - 1)]
    scores = [
        Evaluated(t, 10, list(values), 0.75, [1.0, 1.0], 1.0, 2.0, t == len(own) - 1) for t, values in enumerate(own)
    ]
    return [start, *rounds, *scores]


def outcome(method, seed, *last, graph="ring", known=(), **changes):
    """A cell of two rounds that ends with ``last``; without any it did not finish.  ``known``: further measures."""
    labels = {"method": method, "graph": graph}
    happened = events((0.5, 0.5), (0.6, 0.8), last) if last else []
    folder = f"cells/{method}-{seed}"
    found = Outcome.of_events(f"{method}, {graph}", labels, seed, 0.01, folder, happened, **changes)
    return replace(found, measures={**found.measures, **dict(known)})


def test_a_run_in_numbers():
    found = measure_run(events((0.9, 0.9), (0.5, 0.75), (0.25, 0.5)))
    assert found == {
        "mean client": 0.375,
        "worst client": 0.25,
        "averaged model": 0.75,
        "bytes sent": 200.0,
        "consensus of B·A": 0.5,
        "cross-term": 0.25,
        "seconds": 10.0,  # two rounds of 2 s, three evaluations of 2 s
    }


def test_the_best_round_is_told_where_there_is_a_choice():
    """Of more than three evaluations behind the start, which does not count."""
    scores = [(0.9, 0.9), (0.5, 0.75), (0.5, 0.5), (0.25, 0.25)]
    assert "best round" not in measure_run(events(*scores))
    found = measure_run(events(*scores, (0.25, 0.5)))
    assert found["best round"] == 0.625 and found["number of the best round"] == 1.0
    found = measure_run(events(*scores, (0.25, 0.5), higher=False))
    assert found["best round"] == 0.25 and found["number of the best round"] == 3.0


def test_where_lower_is_better_the_worst_is_the_highest():
    found = measure_run(events((0.1, 0.1), (0.5, 0.75), (0.9, 1.1), higher=False))
    assert found["worst client"] == 1.1 and found["mean client"] == 1.0


def test_a_client_without_a_value_does_not_count():
    found = measure_run(events((0.5, 0.5), (float("nan"), 0.5)))
    assert found["mean client"] == 0.5 and found["worst client"] == 0.5


def test_a_run_that_did_not_finish_has_no_numbers():
    assert measure_run([]) == {} and measure_run(events((0.5, 0.5))) == {}


def test_mean_and_deviation_by_hand():
    found = estimate([0.5, 0.6, 0.7])
    assert found.mean == pytest.approx(0.6) and found.deviation == pytest.approx(0.1) and found.seeds == 3
    assert estimate([0.5]).deviation is None


def test_differences_are_paired_by_seed():
    found = pair_differences({0: 0.5, 1: 0.75, 2: 1.0, 9: 0.0}, {2: 0.75, 1: 0.25, 0: 0.25, 8: 1.0})
    assert found is not None and found.mean == pytest.approx((0.25 + 0.5 + 0.25) / 3) and found.seeds == 3
    theirs = stats.ttest_1samp([0.25, 0.5, 0.25], 0)
    assert found.p == pytest.approx(theirs.pvalue) and found.p_sign_flip == found.p_sign_flip_smallest == 0.25
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval()))
    assert pair_differences({0: 1.0}, {1: 1.0}) is None
    alike = pair_differences({0: 0.3, 1: 0.7, 2: 0.8}, {0: 0.1 + 0.2, 1: 0.7, 2: 0.7 + 0.1})
    assert alike is not None and alike.mean == 0.0 and alike.p == alike.p_sign_flip == 1.0


def test_no_interval_for_fewer_than_three_seeds():
    found = pair_differences({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.75})
    assert found is not None and found.interval is found.p is None and found.mean == 0.375 and found.p_sign_flip == 0.5


GAPS = {"b": (0.125, 0.25, 0.1875), "c": (-0.125, 0.25, 0.125)}
"""What two methods have more than the baseline in three seeds: with p = 0.036 and 0.52."""


def compared(*more):
    """A baseline, the methods of ``GAPS``, and more outcomes."""
    base = (0.25, 0.375, 0.5)
    others = {"a": (0.0, 0.0, 0.0)} | GAPS
    found = [
        outcome(name, seed, base[seed] + gaps[seed], base[seed] + gaps[seed])
        for name, gaps in others.items()
        for seed in range(3)
    ]
    return {line.labels["method"]: line for line in compare([*found, *more], {"method": "a"})}


def test_p_is_adjusted_over_the_rows_of_a_table_and_decides_what_is_distinguishable():
    lines = compared()
    raw = {name: float(stats.ttest_1samp(gaps, 0).pvalue) for name, gaps in GAPS.items()}
    found = {name: lines[name].differences["mean client"] for name in GAPS}
    assert {name: gap.p for name, gap in found.items()} == pytest.approx(raw) and raw["b"] < 0.05 < 2 * raw["b"]
    assert found["b"].p_holm == pytest.approx(2 * raw["b"]) and found["c"].p_holm == pytest.approx(raw["c"])
    assert found["b"].distinguishable is False and not lines["a"].differences
    (alone,) = [line for line in compare([*_only("a"), *_only("b")], {"method": "a"}) if line.differences]
    assert alone.differences["mean client"].distinguishable is True


def test_p_is_adjusted_over_all_rows_of_a_table_whatever_their_baselines():
    """Two methods on one graph and one on another are three rows, each against the baseline of its own graph."""
    cells = [("ring", name) for name in "abc"] + [("path", name) for name in "ab"]
    found = [
        replace(
            outcome(method, seed, 0.5, 0.5), setting=f"{method}, {graph}", labels={"method": method, "graph": graph}
        )
        for graph, method in cells
        for seed in range(3)
    ]
    gaps = {"a": (0.0, 0.0, 0.0)} | GAPS
    found = [replace(each, measures={"mean client": 0.25 + gaps[each.labels["method"]][each.seed]}) for each in found]
    raw = float(stats.ttest_1samp(GAPS["b"], 0).pvalue)
    lines = compare(found, {"method": "a"})
    p = {each.setting: each.differences["mean client"].p_holm for each in lines if each.differences}
    assert p["b, path"] == p["b, ring"] == pytest.approx(3 * raw) and len(p) == 3
    design = assess_design(lines, "mean client")
    assert (design.tests, design.level) == (3, pytest.approx(0.05 / 3))


def test_further_differences_have_intervals_and_p_of_their_own_in_the_table(tmp_path):
    """Relayed models are set against the baseline's own, where it relays nothing."""
    relayed = {seed: {"relayed client": 0.5 + gap, "worst relayed client": 0.25} for seed, gap in enumerate(GAPS["b"])}
    base = {"mean client": 0.5, "worst client": 0.25}
    found = [outcome("a", seed, 0.5, 0.5, known=base) for seed in range(3)]
    found += [outcome("b", seed, 0.25, 0.75, known=relayed[seed]) for seed in range(3)]
    result = write_results(tmp_path, found, [], {"method": "a"}, "", {}, None)
    gap = result.lines[1].differences["relayed client"]
    assert gap.mean == pytest.approx(np.mean(GAPS["b"])) and gap.p_holm == gap.p
    text = (tmp_path / "table.md").read_text()
    head = "|  | worst client | p (Holm) | relayed client | p (Holm) | worst relayed client | p (Holm) |"
    (row,) = text.split(f"{head}\n| --- | --- | --- | --- | --- | --- | --- |\n")[1].split("\n\n")[0].splitlines()[:1]
    assert f"| {gap.mean:+.3f} [{gap.interval[0]:+.3f}, {gap.interval[1]:+.3f}] | {gap.p:.3f} |" in row
    assert row.startswith("| b, ring | +0.000 [+0.000, +0.000] ≈ | 1.000 |")
    assert "or its own where it relays nothing" in text and "Relayed client: of the average" in text


def test_a_note_explains_every_column_that_not_all_tables_have(tmp_path):
    known = {"personalised client": 0.5, "best rounds of clients": 0.5}
    write_results(tmp_path, [outcome("a", 0, 0.5, 0.5, known=known)], [], {}, "", {}, None)
    text = (tmp_path / "table.md").read_text()
    assert "Personalised client: of its own model" in text and "Best rounds of clients: the mean" in text
    assert "Relayed client:" not in text and "Of further measures" not in text


def test_a_table_of_several_metrics_says_which_row_has_which(tmp_path):
    """Rows of one metric are set against each other, a row and a baseline of two metrics are not."""
    found = [outcome(name, seed, 0.5 + gap, 0.5 + gap) for name in "ab" for seed, gap in enumerate(GAPS["b"])]
    losses = [replace(each, metric="loss", higher_is_better=False) for each in map(_on_path, found)]
    losses = [replace(each, measures={"mean client": 1.0 + each.seed * (each.setting[0] == "b")}) for each in losses]
    result = write_results(tmp_path, [*found, *losses], [], {"method": "a"}, "", {}, None)
    assert result.metrics == {"accuracy": True, "loss": False} and result.metric == "accuracy, loss"
    text = (tmp_path / "table.md").read_text()
    assert "| method | graph | metric | rate |" in text and "| b | path | loss | 0.01 |" in text
    assert "accuracy (higher is better), loss (lower is better): mean over seeds" in text
    assert "compare rows of the same metric only" in text and "Smallest difference" not in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert {row["metric"] for row in rows if row["graph"] == "path"} == {"loss"}
    assert [row["metric"] for row in result.as_json()["rows"]] == ["accuracy", "accuracy", "loss", "loss"]
    assert all(line.differences for line in result.lines if line.labels["method"] == "b")
    across = compare([*found, *losses], {"graph": "ring"})
    assert not any(line.differences for line in across)
    pictures = [each.title for each in comparison_figures([*found, *losses], "method")]
    assert "accuracy of the mean client by round, graph ring" in pictures
    assert "loss of the mean client by round, graph path" in pictures


def _on_path(each):
    return replace(each, setting=each.setting.replace("ring", "path"), labels={**each.labels, "graph": "path"})


def _only(method):
    gaps = GAPS.get(method, (0.0, 0.0, 0.0))
    return [outcome(method, seed, *[0.25 + 0.125 * seed + gaps[seed]] * 2) for seed in range(3)]


def test_the_detectable_difference_is_that_of_holms_first_level():
    lines = compared()
    for name, gaps in GAPS.items():
        expected = detectable_difference(float(np.std(gaps, ddof=1)), 3, 0.05 / 2)
        assert lines[name].differences["mean client"].detectable == pytest.approx(expected)
    design = assess_design(list(lines.values()), "mean client")
    both = float(np.sqrt(np.mean([np.var(gaps, ddof=1) for gaps in GAPS.values()])))
    assert design is not None and design.deviation == pytest.approx(both)
    assert (design.tests, design.seeds, design.level) == (2, 3, 0.025)
    assert design.detectable == pytest.approx(detectable_difference(both, 3, 0.025))
    assert assess_design(compare(_only("a"), {"method": "a"}), "mean client") is None


WORK = {"training rows": 1000.0, "row gradients": 1000.0, "gradients": 100.0}


@pytest.mark.parametrize(
    ("work", "unequal"),
    [
        (WORK, False),
        ({"row gradients": 991.0}, False),  # within 1 %
        ({"row gradients": 1009.0}, False),
        ({"row gradients": 989.0}, True),
        ({"row gradients": 1011.0}, True),
        ({**WORK, "gradients": 10.0}, False),  # larger batches, the same rows
        ({"training rows": 2000.0, "row gradients": 2000.0, "gradients": 100.0}, True),  # as many minibatches
        ({"training rows": 1000.0, "row gradients": 2000.0, "gradients": 200.0}, True),  # SAM
        ({"training rows": 2000.0, "gradients": 100.0}, True),  # stored before row gradients were
        ({"training rows": 1000.0, "gradients": 10.0}, False),
        ({}, False),  # of an outcome that was stored without
    ],
)
def test_a_row_of_unequal_work_is_told_and_not_ranked(work, unequal, tmp_path):
    outcomes = [replace(each, measures={**each.measures, **WORK}) for each in (*_only("a"), *_only("b"))]
    outcomes += [replace(each, measures={**each.measures, **work}) for each in _only("c")]
    lines = {line.labels["method"]: line for line in compare(outcomes, {"method": "a"})}
    assert bool(lines["c"].unequal_work) == unequal and not lines["b"].unequal_work
    gaps = {name: lines[name].differences["mean client"] for name in GAPS}
    assert (gaps["c"].p_holm is None) == unequal and gaps["c"].p is not None
    assert gaps["b"].distinguishable is unequal  # alone in the family, its p need not be doubled
    swapped = [each for each in outcomes if each.labels["method"] != "b"] + [*outcomes[3:6]]
    write_results(tmp_path, swapped, [], {"method": "a"}, "", {}, None)
    table = (tmp_path / "table.md").read_text()
    first, second = table.split("Of further measures")
    order = [row.split(" | ")[0][2:] for row in first.splitlines() if row.startswith("| ") and "ring" in row]
    assert order == (["a", "b", "c"] if unequal else ["a", "c", "b"])
    assert first.count(" ‡ |") == second.count(" ‡ |") == unequal and ("Unequal work" in table) == unequal
    assert ("c, ring: " in table) == unequal


def test_a_row_of_unequal_work_is_told_in_row_gradients():
    outcomes = [
        replace(each, method=method, measures={**each.measures, "training rows": 24_000.0, "gradients": minibatches})
        for runs, method, minibatches in (("a", "local", 300.0), ("b", "dec-lora", 3000.0), ("c", "dfedsam", 6000.0))
        for each in _only(runs)
    ]
    lines = {line.labels["method"]: line for line in compare(outcomes, {"method": "a"})}
    assert lines["b"].unequal_work == "" and lines["b"].differences["mean client"].p_holm is not None
    assert lines["c"].unequal_work == "48,000 row gradients, the baseline 24,000 (2.00 times)"
    assert lines["c"].estimates["row gradients"].mean == 48_000


def test_outcomes_are_compared_from_what_was_stored_of_them(tmp_path):
    outcomes = [*_only("a"), *_only("b"), outcome("c", 0, diverged="nan"), outcome("b", 3, 0.5, 0.5, p=0.5)]
    stored = [Outcome.from_json(each.to_json()) for each in outcomes]
    assert all("\n" not in each.to_json() for each in outcomes)
    assert stored == outcomes and not any(each.events for each in stored)
    assert compare(stored, {"method": "a"}) == compare(outcomes, {"method": "a"})
    result = write_results(tmp_path, stored, [], {"method": "a"}, "", {}, None)
    assert result.metric == "accuracy"
    assert "7 of 8 cells finished" in (tmp_path / "report.html").read_text()
    assert stored[0].method == "m" and stored[0].metric == "accuracy" and stored[0].higher_is_better


def test_each_setting_is_set_against_the_one_that_differs_in_the_baseline_axis_only():
    outcomes = [
        outcome(method, seed, base + seed / 8, base + seed / 8, graph=graph)
        for graph, shift in (("ring", 0.0), ("path", 0.25))
        for method, base in (("a", 0.25 + shift), ("b", 0.375 - shift))
        for seed in (0, 1, 2)
    ]
    lines = {line.setting: line for line in compare(outcomes, {"method": "a"})}
    assert lines["b, ring"].differences["mean client"].mean == pytest.approx(0.125)
    assert lines["b, path"].differences["mean client"].mean == pytest.approx(-0.375)
    assert lines["b, ring"].differences["mean client"].interval is None  # constant: no spread to infer from
    assert not lines["a, ring"].differences and not lines["a, path"].differences
    assert lines["a, ring"].estimates["mean client"].deviation == pytest.approx(0.125)
    assert not any(line.differences for line in compare(outcomes, {}))


@pytest.fixture
def written(tmp_path):
    """A comparison of two methods, one of whose runs diverged; and of a search."""
    outcomes = [
        outcome(f"a|<i>{'b' * (method == 'b')}", seed, 0.25, 0.5 + seed / 8) for method in "ab" for seed in (0, 1, 2)
    ]
    outcomes.append(outcome("c", 0, diverged="the loss of client 0 is nan"))
    searched = [outcome("a|<i>", 0, 0.5, 0.5), outcome("c", 0, diverged="nan")]
    tried = (RateScore(0.01, {0: 0.5}), RateScore(0.1, {}, diverged=1))
    searches = [RateSearch("a|<i>, ring", searched[0].labels, tried, 0.01, (0.01,), 0.01)]
    baseline = {"method": "a|<i>"}
    config, settings = load_config({}), {each.setting for each in outcomes}
    configs = dict.fromkeys(settings, config)
    result = write_results(
        tmp_path, outcomes, searched, baseline, "base: {}\n", configs, "adf-lora", searches, ["seed 0 is searched"]
    )
    return tmp_path, result


def test_the_files(written):
    folder, result = written
    lines = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    own = {(line["method"], line["measure"]): line for line in lines}
    assert float(own["a|<i>", "mean client"]["mean"]) == result.lines[0].estimates["mean client"].mean
    assert float(own["a|<i>b", "mean client"]["difference"]) == 0.0
    assert own["c", "mean client"]["mean"] == "" and own["c", "mean client"]["diverged"] == "1"
    table = pq.read_table(folder / "results.parquet").to_pylist()
    assert {row["purpose"] for row in table} == {"search", "report"}
    [last] = [
        r["value"]
        for r in table
        if r["purpose"] == "report"
        and r["method"] == "a|<i>"
        and r["seed"] == 2
        and r["metric"] == "own"
        and r["round"] == 2
        and r["client"] == 1
    ]
    assert last == 0.75
    markdown = (folder / "table.md").read_text()
    for part in (
        "a\\|<i>",
        "0.438 ± 0.062",
        "+0.000 [+0.000, +0.000] ≈ | 1.000 |",
        "95 % t interval",
        "with 3 seeds its p is 0.25 at least",
        "baseline",
        "0, 1 diverged",
        "| searched on | 0.01 | 0.1 |  |",
        "| a\\|<i>, ring | 0.500 (taken) | diverged | at the edge |",
        "seed 0 is searched",
    ):
        assert part in markdown, markdown
    for table in markdown.split("\n\n"):
        widths = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1


def test_the_report_is_one_file_with_everything(drawn, written):
    page = (written[0] / "report.html").read_text()
    page = page.replace("https://github.com/leeoniya/uPlot", "")  # the page's own script names where it comes from
    assert "<script>alert" not in page and "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "<i>" not in page and "a|&lt;i&gt;" in page
    for part in (
        *("Search of the learning rate", "0.500 (taken)", "Runs that diverged", "loss of client 0", "Second hand"),
        *("base: {}", "sign-flip, p", "1.000 (of 0.25 at least)", "seed 0 is searched"),
    ):
        assert part in page
    published = page[page.index("Beside the published numbers") :]
    for part in ("0.8505", "ADF-LoRA T=5: mean over SST-2, QNLI, QQP, MNLI", "not run", "roberta-large", "150 rounds"):
        assert part in published
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and page.count("<figure") == 4


def test_a_grid_without_a_finished_cell_can_be_written(tmp_path):
    write_results(tmp_path, [outcome("a", 0)], [], {"method": "a"}, "", {}, None)
    assert "0 of 1 cells finished" in (tmp_path / "report.html").read_text()


def on_a_clock(outcome, length):
    """The same cell, its rounds so many virtual seconds long."""
    outcomes = []
    for event in outcome.events:
        if isinstance(event, RoundDone):
            event = replace(event, virtual_seconds=length * (event.round + 1))
        elif isinstance(event, Evaluated):
            event = replace(event, virtual_seconds=length * event.round)
        outcomes.append(event)
    return replace(outcome, events=outcomes)


def test_cells_on_clocks_are_drawn_and_summed_up_by_virtual_seconds():
    timed = [on_a_clock(outcome(method, 0, 0.5, 0.9), length) for method, length in (("a", 3.0), ("b", 7.0))]
    assert [measure_run(each.events)["virtual seconds"] for each in timed] == [6.0, 14.0]
    assert "virtual seconds" not in measure_run(outcome("a", 0, 0.5, 0.9).events)

    def titles(outcomes):
        return [picture.title for picture in comparison_figures(outcomes, "method") if "virtual" in picture.title]

    assert titles(timed) == ["accuracy of the mean client by virtual seconds, graph ring"]
    assert titles([outcome("a", 0, 0.5, 0.9)]) == []
    assert titles([timed[0], outcome("b", 0, 0.5, 0.9)]) != []


def test_private_cells_are_drawn_and_summed_up_by_the_epsilon_of_the_client_that_spent_most():
    def private(each, largest):
        spent = {"epsilon": [0.0, largest], "releases": [3.0, 3.0]}
        events = [replace(event, privacy=spent) if isinstance(event, Evaluated) else event for event in each.events]
        return replace(each, events=events)

    def titles(outcomes):
        return [picture.title for picture in comparison_figures(outcomes, "method") if "epsilon" in picture.title]

    cells = [private(outcome("a", 0, 0.5, 0.9), 8.0), private(outcome("b", 0, 0.5, 0.9), np.nan)]
    assert measure_run(cells[0].events)["epsilon spent"] == 8.0
    assert "epsilon spent" not in measure_run(outcome("a", 0, 0.5, 0.9).events)
    assert titles(cells) == ["accuracy of the mean client by epsilon spent, graph ring"]
    assert titles(cells[1:]) == titles([outcome("a", 0, 0.5, 0.9)]) == []


def by_p(trials, axis):
    """Title -> legend, of the figures of accuracy by p alone, since drawing takes time; ``cells``: (labels, p)."""
    outcomes = [replace(outcome("a", seed, 0.5, 0.9), labels=labels, p=p) for labels, p in trials for seed in (0, 1)]
    return {picture.title: [key.label for key in picture.legend] for picture in _by_p(outcomes, axis)}


def test_accuracy_by_p_has_a_figure_for_each_of_the_other_axes_and_a_line_for_each_label():
    trials = [
        ({"method": method, "graph": graph, "task": task}, p)
        for method in ("a", "b")
        for graph, p in (("p=0.1", 0.1), ("p=0.5", 0.5), ("ring", None))
        for task in ("one", "other")
    ]
    title = "accuracy of the mean client by p, last evaluation"
    assert by_p(trials, "method") == {f"{title}, task one": ["a", "b"], f"{title}, task other": ["a", "b"]}
    whole = {title: ["a, one", "a, other", "b, one", "b, other"]}
    assert by_p(trials, None) == by_p(trials, "graph") == whole
    assert by_p([trial for trial in trials if trial[0]["graph"] != "p=0.5"], "method") == {}
    outcomes = [replace(outcome("a", 0, 0.5, 0.9), labels={"graph": str(p)}, p=p) for p in (0.1, 0.5)]
    assert comparison_figures(outcomes, None)[0].title == "accuracy of the mean client by p, last evaluation"
    tied = [({"method": "a", "graph": "sparse"}, 0.1), ({"method": "b", "graph": "dense"}, 0.5)]
    assert by_p(tied, None) == {}  # no line has two values: p and the method go together


def test_no_label_of_the_csv_is_a_formula_for_a_spreadsheet(tmp_path):
    names = ["=cmd|' /C calc'!A0", "@SUM(A1)", "-0.5", "-x", "plain"]
    outcomes = [outcome(name, 0, 0.5, 0.5) for name in names]
    configs = {each.setting: load_config({}) for each in outcomes}
    write_results(tmp_path, outcomes, [], {"method": "plain"}, "", configs, None)
    lines = csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert {line["method"] for line in lines} == {"'=cmd|' /C calc'!A0", "'@SUM(A1)", "-0.5", "'-x", "plain"}


def test_an_average_of_factors_in_different_coordinates_is_marked_everywhere(tmp_path):
    """Methods whose operator is sum-product, but for those that merge; and the one that turns factors."""
    kept = {"flora", "fedex-lora"}
    expected = {name for name, kind in REGISTRY.items() if kind.traits.operator == "sum-product"} - kept | {
        "fedrot-lora"
    }
    assert {"decaf", "flexlora", "fedhl"} < expected and kept < set(REGISTRY)
    scores = (0.5, 0.5), (0.5, 0.75)
    outcomes = [
        Outcome.of_events(name, {"method": name}, 0, 0.01, name, events(*scores, method=name)) for name in REGISTRY
    ]
    write_results(tmp_path, outcomes, [], {"method": "dec-lora"}, "", {}, None)
    lines = csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))
    noted = {(line["method"], line["measure"]) for line in lines if "coordinates" in line["note"]}
    assert noted == {(name, "averaged model") for name in expected}
    for row in (tmp_path / "table.md").read_text().split("Of further measures")[0].splitlines():
        if row.startswith("| ") and not row.startswith(("| method", "| ---")):
            assert row.count("0.750 †") == (row.split(" | ")[0][2:] in expected), row
    assert (tmp_path / "table.md").read_text().count("† The mean of factors") == 1
    page = (tmp_path / "report.html").read_text()
    assert page.count("0.750 †") == len(expected) and page.count("[no interval] †") == len(expected)
    write_results(tmp_path, outcomes[:1], [], {}, "", {}, None)
    assert "†" not in (tmp_path / "table.md").read_text() + (tmp_path / "report.html").read_text()
