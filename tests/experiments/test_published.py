"""Published numbers beside ours: which belong there, and what is said to differ."""

import re
from functools import cache

import pytest

from peerlora.config.loading import load_config
from peerlora.experiments.grid import load_grid
from peerlora.experiments.presets import preset
from peerlora.experiments.published import compare_protocols, dataset, describe_protocol, find_papers, fits
from peerlora.experiments.published_numbers import GLUE, PAPERS
from peerlora.experiments.results import write_results
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.trials import plan_trials
from peerlora.runs.events import Evaluated, RoundDone, RunStarted


def events(value, averaged):
    """A run of one round of two clients, both with this accuracy."""
    done = RoundDone(0, [1.0, 1.0], 0, 0, 0.5, 0.25, 0, 0.5, [], 1, 50, 100, 1, 1, 0)
    start = RunStarted("", "m", 2, 1, "accuracy", True, 0, 1, {}, {}, {"kind": "ring"}, 5, [])
    return [start, done, Evaluated(1, 10, [value, value], averaged, [1.0, 1.0], 1.0, 2.0, True)]


def glue(task, method, **changes):
    """A run on a task of GLUE."""
    data = {"train": f"hub:nyu-mll/glue/{task.replace('-', '').lower()}:train"}
    return load_config({"data": data, "algorithm": {"name": method}, **changes})


def rows(folder, results, published=None):
    """First column -> the other two, of all published tables; ``results``: (labels, config, mean client, averaged)."""
    told, configs = [], {}
    for labels, config, value, averaged in results:
        place = ", ".join(labels.values())
        configs[place] = config
        told.append(Outcome.of_events(place, labels, 0, 0.01, place, events(value, averaged)))
    write_results(folder, told, [], {}, "", configs, published)
    page = (folder / "report.html").read_text()
    found = re.findall(
        r'<tr><th scope="row">(.*?)</th><td class=number>(.*?)</td><td class=number>(.*?)</td></tr>', page
    )
    return {name: (theirs, here) for name, theirs, here in found}


DIFFERENT = {
    ("adf-lora", "full"): {"optimiser", "weights"},
    ("tad-lora", "full"): {"optimiser"},
    ("adf-lora", "small"): {"optimiser", "weights", "model", "evaluation rows", "tokens", "budget", "rates"},
    ("tad-lora", "small"): {"optimiser", "model", "evaluation rows", "tokens", "budget", "rates"},
}


@pytest.mark.parametrize(("name", "budget"), DIFFERENT)
def test_presets_compute_in_the_precision_that_is_faster_and_say_so(name, budget):
    configs = planned(name, budget)[1]
    assert {config.train.dtype for config in configs} == {"auto"}
    assert describe_protocol(configs[0], [], [0], "")["precision"] == "fp32 or bf16, by the machine"
    assert describe_protocol(glue("SST-2", "dec-lora"), [], [0], "")["precision"] == "fp32"


@cache
def planned(name, budget, data=None):
    """The grid of a preset and the configs of its trials."""
    grid = load_grid(preset(name, budget, data))
    return grid, [trial.config for trial in plan_trials(grid).trials]


@pytest.mark.parametrize(("name", "budget"), DIFFERENT)
def test_what_is_equal_is_not_listed_as_different(name, budget, tmp_path):
    """Also with the rows in a folder; what was not found is said to be so."""
    for data in (None, tmp_path) if budget == "small" else (None,):
        (grid, configs), paper = planned(name, budget, data), PAPERS[name]
        here = [describe_protocol(config, grid.search.rates, grid.seeds, paper.measure) for config in configs]
        listed = {aspect: theirs for aspect, theirs, _ in compare_protocols(paper, here)}
        assert {aspect for aspect, theirs in listed.items() if theirs != "not found"} == DIFFERENT[name, budget]
        unknown = {"training rows per client", "optimiser's memory", "round reported"}
        assert unknown <= {aspect for aspect, theirs in listed.items() if theirs == "not found"}


def test_what_differs_is_listed_with_both_sides():
    config = glue("SST-2", "dec-lora", topology={"kind": "ring"}, partition={"kind": "dirichlet", "concentration": 0.1})
    listed = {
        aspect: (theirs, here)
        for aspect, theirs, here in compare_protocols(PAPERS["fedrot-lora"], [describe_protocol(config, [], [0], "")])
    }
    assert listed["topology"] == ("complete (a server)", "ring") and listed["weights"] == ("by rows", "metropolis")
    theirs = "; ".join(f"dirichlet, concentration {alpha}" for alpha in (0.5, 1.0, 100.0))
    assert listed["partition"] == (theirs, "dirichlet, concentration 0.1")
    assert listed["seeds"] == ("not found", "1") and listed["rank"] == ("4", "8")
    server = describe_protocol(glue("SST-2", "fedit", topology={"kind": "complete"}), [], [0], "")
    assert "topology" not in {aspect for aspect, _, _ in compare_protocols(PAPERS["fedrot-lora"], [server])}


@pytest.mark.parametrize("name", ["adf-lora", "tad-lora"])
def test_every_number_of_a_preset_has_its_place_in_the_full_one(name):
    _, known = planned(name, "full")
    for number in PAPERS[name].numbers:
        for task in number.tasks:
            assert any(fits(number, config) and dataset(config) == task for config in known), number


def test_every_paper_is_whole():
    """Fractions of 1, registered methods, aspects that we can say of our runs."""
    from peerlora.algorithms import REGISTRY

    here = describe_protocol(glue("SST-2", "dec-lora"), [], [0], "mean client")
    for paper in PAPERS.values():
        assert set(paper.protocol) <= set(here), paper.name
        assert paper.trust.endswith(".")
        for number in paper.numbers:
            assert 0.3 < number.value < 1 and set(number.tasks) <= set(GLUE) and set(number.methods) <= set(REGISTRY)
            assert all(key.count(".") == 1 for key in number.settings)


def test_the_printed_averages_are_those_of_the_tasks():
    """The tables' own averages, from the notes, against what was copied."""
    averages = {
        ("rolora", "50 clients, rank 4"): (0.7072, 0.7648, 0.5467, 0.8581),
        ("fedrot-lora", "3 clients"): (0.8712, 0.8698, 0.8448, 0.8862, 0.8932),
        ("fedrot-lora", "10 clients"): (0.8362, 0.7966, 0.8258, 0.8786, 0.8818),
        ("fedrot-lora", "50 clients"): (0.7680, 0.7066, 0.7718, 0.8244, 0.8734),
    }
    for (name, context), expected in averages.items():
        found: dict[str, list[float]] = {}
        for number in PAPERS[name].numbers:
            if number.label.endswith(f", {context}") and len(number.tasks) == 1:
                found.setdefault(number.label, []).append(number.value)
        assert [sum(values) / 5 for values in found.values()] == pytest.approx(expected, abs=6e-5)


def test_a_grid_without_a_preset_gets_the_numbers_that_fit_it(tmp_path):
    grid = [
        ({"method": method, "graph": graph}, glue("SST-2", method, topology={"kind": graph}), value, 0.875)
        for method, value in (("dec-lora", 0.5), ("rolora", 0.25))
        for graph in ("ring", "complete")
    ]
    found = rows(tmp_path, grid)
    assert found["RoLoRA, 10 clients: SST-2"] == ("0.9560", "ring: 0.2500; complete: 0.2500")
    assert found["Dec-LoRA, ring, rank 16, 1 step: SST-2"] == (
        "0.9381",
        "0.8750",
    )  # the averaged model, on the ring only
    assert found["FedIT: mean over CoLA, RTE, MRPC, SST-2, QNLI, STS-B"][1].endswith("complete: 0.5000 (SST-2 only)")
    assert found["LoRA with all rows in one place: mean over CoLA, RTE, MRPC, SST-2, QNLI, STS-B"][1] == "–"
    assert "topology" in found and not any("FFA" in name or "MNLI" in name.split(":")[0] for name in found)


def test_no_published_numbers_for_other_tasks_or_methods():
    assert find_papers([load_config({})], None) == []
    assert find_papers([glue("SST-2", "local")], None) == []
    assert find_papers([glue("WNLI", "dec-lora")], None) == []


def besides(method, **changes):
    listed = {
        aspect: (theirs, here)
        for aspect, theirs, here in compare_protocols(PAPERS["adf-lora"], [own(method, **changes)])
    }
    return listed.get("besides", ("nothing", "nothing"))


def own(method, **changes):
    return describe_protocol(glue("SST-2", method, **changes), [], [0], "mean client")


def test_what_no_paper_tells_of_is_listed():
    assert besides("dec-lora") == besides("adf-lora", algorithm={"name": "adf-lora", "interval": 1})
    assert besides("dec-lora") == ("nothing", "nothing")
    changes = {
        "train": {"label_prior": "uniform", "clip": 1, "batches": "by-length"},
        "exchange": {"codec": "sign", "robust": {"kind": "trimmed-mean", "drop": 2}},
        "adversary": {"attack": "ipm"},
        "clock": {},
    }
    told = "loss adjusted for the label prior (uniform); gradients clipped at 1; batches by-length; compressed: sign; "
    told += "in place of the average: trimmed-mean, drop 2; attackers: ipm; a virtual clock"
    assert besides("dec-lora", **changes) == ("nothing", told)
    turned = besides("fedrot-lora", algorithm={"name": "fedrot-lora", "strength": 1.0})
    assert turned[1] == "fedrot-lora strength 1.0"
    assert besides("rac-lora")[1] == "rounds without training"
    for settings, told in (
        ({"settle": 2}, "rac-lora settle 2; rounds without training"),
        ({"settle": 0}, "rac-lora settle 0"),
        ({"mix_merged": True}, "rac-lora mix_merged True"),
        ({"mix_merged": True, "settle": 1}, "rac-lora mix_merged True, settle 1; rounds without training"),
    ):
        assert besides("rac-lora", algorithm={"name": "rac-lora", **settings})[1] == told


def test_the_optimiser_starts_afresh_by_phase_only_where_factors_switch():
    kept = {"train": {"optimizer_state": "phase"}}
    for name in ("dec-lora", "ffa-lora", "rac-lora", "fedspeed"):
        assert own(name, **kept)["optimiser's memory"] == "kept"
    for name in ("adf-lora", "tad-lora", "rolora"):
        assert own(name, **kept)["optimiser's memory"] == "afresh every phase"
    in_turn = {"algorithm": {"name": "dfedavg", "interval": 2}}
    assert own("dfedavg", **kept, **in_turn)["optimiser's memory"] == "afresh every phase"
    assert own("dec-lora")["optimiser's memory"] == "afresh every round"


def test_rolora_switches_every_round_in_papers():
    numbers = [number for paper in PAPERS.values() for number in paper.numbers if number.methods == ("rolora",)]
    assert numbers and all(number.settings["algorithm.interval"] == 1 for number in numbers)
    config = glue("SST-2", "rolora", algorithm={"name": "rolora", "interval": 5})
    assert not any(fits(number, config) for number in numbers)


def test_settings_that_a_number_asks_for_may_be_defaults():
    at_five = next(number for number in PAPERS["adf-lora"].numbers if number.label == "ADF-LoRA T=5")
    assert fits(at_five, glue("QQP", "adf-lora"))
    assert not fits(at_five, glue("QQP", "adf-lora", algorithm={"name": "adf-lora", "interval": 1}))


@pytest.mark.parametrize(
    ("source", "task"),
    [
        ("csv:sorted.csv", "csv:sorted.csv"),
        ("csv:a/my-rte_dev.csv", "RTE"),
        ("parquet:/x/sst2/train.parquet", "SST-2"),
        ("hub:nyu-mll/glue/stsb:train", "STS-B"),
    ],
)
def test_a_task_is_known_by_its_name_as_a_word(source, task):
    assert dataset(load_config({"data": {"train": source, "text": ["text"], "label": "label"}})) == task


def test_tasks_are_averaged_only_where_all_are_there(tmp_path):
    tasks = {"SST-2": 0.5, "QNLI": 0.25, "QQP": 0.75, "MNLI": 1.0}
    for count, expected in (
        (4, ["0.6250", "1.0000"]),
        (3, ["0.5000 (SST-2 only); 0.2500 (QNLI only); 0.7500 (QQP only)", "not run"]),
    ):
        grid = [
            ({"method": "LoRA", "dataset": task}, glue(task, "dec-lora"), value, 0.75)
            for task, value in list(tasks.items())[:count]
        ]
        found = rows(tmp_path, grid, "adf-lora")
        assert [found[name][1] for name in ("LoRA: mean over SST-2, QNLI, QQP, MNLI", "LoRA: MNLI")] == expected
