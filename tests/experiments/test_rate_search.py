"""Which learning rate a group takes, and where its rates grow, against examples worked by hand."""

import json
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import yaml

from flow_runs import TINY
from peerlora import plugins
from peerlora.errors import ConfigError
from peerlora.experiments.comparison import Comparison
from peerlora.experiments.grid import load_grid, search_warnings
from peerlora.experiments.rate_search import choose_rates, gather_searches, next_rate
from peerlora.experiments.setting_names import require_setting
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.table_notes import rates_title, table_notes
from peerlora.experiments.tables import rate_columns, rate_rows
from peerlora.experiments.trials import plan_search


def grid_of(methods=("dec-lora",), **search):
    settings = {"rates": [0.01, 0.1], "seeds": [5, 6], **search}
    return load_grid({"axes": {"method": list(methods)}, "seeds": [0, 1], "search": settings})


def outcomes(scores, higher=True):
    """Method -> rate -> the score of every search seed, None for one that diverged."""
    return [
        Outcome(
            method,
            {"method": method},
            seed,
            rate,
            "",
            {} if score is None else {"mean client": score},
            higher_is_better=higher,
        )
        for method, rates in scores.items()
        for rate, own in rates.items()
        for seed, score in zip((5, 6), own, strict=False)
    ]


def searched(rates, higher=True, **search):
    grid = grid_of(rates=sorted(rates), **search)
    (found,) = gather_searches(grid, outcomes({"dec-lora": rates}, higher))
    return found


def test_the_best_mean_is_taken_and_the_lowest_of_equals():
    found = searched({0.01: (0.5, 0.6), 0.1: (0.7, 0.5), 1.0: (0.6, 0.6)})
    assert found.best == found.taken == 0.1 and found.ties == (0.1,) and found.edge == 0
    assert [each.estimate.mean for each in found.rates] == pytest.approx([0.55, 0.6, 0.6])
    assert found.rates[0].estimate.deviation == pytest.approx(0.1 / 2**0.5)
    assert searched({0.01: (0.5, 0.6), 0.1: (0.7, 0.5), 1.0: (0.6, 0.6)}, higher=False).best == 0.01


def test_a_rate_of_which_a_run_diverged_is_out():
    found = searched({0.01: (0.5, 0.5), 0.1: (0.9, None)})
    assert found.taken == 0.01 and found.rates[1].estimate is None and found.rates[1].diverged == 1
    grid, every = grid_of(), outcomes({"dec-lora": {0.01: (None, 0.5), 0.1: (None, None)}})
    with pytest.raises(ConfigError, match=r"diverged for dec-lora \(0.01, 0.1\)"):
        choose_rates(grid, gather_searches(grid, every))


def policy_grid(seeds):
    return load_grid(
        {
            "base": {"task": TINY["task"], "train": {"rounds": 9}},
            "axes": {"algorithm.name": ["swfp", "dec-lora"]},
            "seeds": [0, 1],
            "search": {"rates": [0.01, 0.1], "seeds": seeds},
        }
    )


def test_rates_of_policies_are_searched_in_environments_that_are_not_reported():
    planned = plan_search(policy_grid([5, 6]))
    assert not planned.refused and len(planned.trials) == 2 * 2 * 2
    assert {trial.config.seed for trial in planned.trials} == {5, 6}
    assert {trial.config.train.lr for trial in planned.trials} == {0.01, 0.1}


def test_notes_say_what_rates_were_searched_on():
    for metric, where in (("return", "in environments of seeds that are not reported"), ("accuracy", "rows set aside")):
        found = [searched({0.01: (0.5, 0.6), 0.1: (0.7, 0.5), 1.0: (0.6, 0.6)})]
        result = Comparison(Path("x"), [], {metric: True}, {}, found)
        assert where in rates_title(result) and any(where in note for note in table_notes(result))


def test_a_search_in_reported_environments_is_refused():
    planned = plan_search(policy_grid([1, 6]))
    assert not planned.trials and len(planned.refused) == 2
    assert "search.seeds and seeds share 1" in planned.refused[0][1] and "such as 101" in planned.refused[0][1]


@pytest.mark.parametrize(
    ("rates", "edge", "beyond"),
    [
        ({0.01: 0.5, 0.1: 0.6}, 1, 1.0),
        ({0.01: 0.6, 0.1: 0.5}, -1, 0.001),
        ({0.01: 0.5, 0.1: 0.6, 0.2: 0.5}, 0, None),
        ({0.01: 0.5, 0.1: 0.6, 0.2: 0.7}, 1, 0.4),  # each edge has a ratio of its own
        ({0.01: 0.8, 0.1: 0.6, 0.2: 0.7}, -1, 0.001),
        ({0.01: 0.5, 0.1: 0.6, 0.2: 0.6}, 0, None),  # as good inside
        ({0.01: 0.5, 0.1: 0.6, 1.0: None}, 0, None),  # beyond the best a rate diverged
        ({0.01: None, 0.1: None}, -1, 0.001),  # all did: lower
        ({0.002: 0.5, 0.005: 0.6}, 1, 0.0125),
        ({0.003: 0.6, 0.01: 0.5}, -1, 0.0009),
        ({0.01: 0.3, 0.1: 0.1 + 0.2, 0.2: 0.2}, -1, 0.001),  # equal but for rounding: the lowest is taken, at the edge
        ({0.01: 0.2, 0.1: 0.3, 0.2: 0.1 + 0.2}, 0, None),
    ],
)
def test_rates_grow_beyond_the_edge_at_which_the_best_lies(rates, edge, beyond):
    found = searched({rate: (score,) for rate, score in rates.items()}, grow=True, seeds=[5])
    assert found.edge == edge
    assert next_rate(found, grid_of(rates=sorted(rates), grow=True).search) == beyond
    assert next_rate(found, grid_of(rates=sorted(rates)).search) is None
    assert next_rate(found, grid_of(rates=sorted(rates), grow=True, most=len(rates)).search) is None


def test_a_grown_grid_goes_on_by_the_ratio_that_was_given():
    grid = grid_of(rates=[0.002, 0.005], grow=True)
    tried = {0.002: (0.5,), 0.005: (0.6,), 0.0125: (0.7,), 0.03125: (0.8,)}
    (found,) = gather_searches(grid, outcomes({"dec-lora": tried}))
    assert next_rate(found, grid.search) == 0.078125


METHODS = {
    # Pairs differ by .02 and -.01: .005 is below the standard error .015, so both rates are open to it.
    "dec-lora": {0.01: (0.50, 0.60), 0.1: (0.52, 0.59)},
    "ffa-lora": {0.01: (0.60, 0.60), 0.1: (0.50, 0.51)},
    "rolora": {0.01: (0.70, 0.71), 0.1: (0.60, 0.60)},
}


def test_ties_go_to_the_rate_that_most_groups_have_among_theirs():
    def taken(ties, methods=METHODS):
        grid = grid_of(methods, ties=ties)
        searches = gather_searches(grid, outcomes(methods))
        return {each.setting: (each.ties, each.best, each.taken) for each in searches}, choose_rates(grid, searches)

    found, chosen = taken("common")
    assert found["dec-lora"] == ((0.01, 0.1), 0.1, 0.01) and found["rolora"] == ((0.01,), 0.01, 0.01)
    assert chosen == dict.fromkeys(METHODS, 0.01)
    assert taken("best")[1]["dec-lora"] == 0.1
    assert taken("common", {"dec-lora": METHODS["dec-lora"]})[1] == {"dec-lora": 0.1}  # nobody else: the best


def test_a_rate_that_is_taken_at_an_edge_grows_too_or_is_marked():
    """The best of dec-lora lies inside, and the one that it shares with others is its lowest."""
    methods = {
        "dec-lora": {0.01: (0.58, 0.61), 0.1: (0.62, 0.60), 1.0: (0.5, 0.5)},
        "ffa-lora": {0.001: (0.5, 0.5), 0.01: (0.7, 0.7), 0.1: (0.5, 0.5)},
        "rolora": {0.001: (0.5, 0.5), 0.01: (0.8, 0.8), 0.1: (0.5, 0.5)},
    }
    grid = grid_of(methods, ties="common", grow=True, rates=[0.01, 0.1])
    found, *others = gather_searches(grid, outcomes(methods))
    assert (found.best, found.taken, found.edge) == (0.1, 0.01, -1) and not any(each.edge for each in others)
    assert next_rate(found, grid.search) == 0.001
    assert rate_rows([found])[0][-1] == "at the edge" and found.as_json()["at_edge"]
    lower = methods | {"dec-lora": {0.001: (0.4, 0.4), **methods["dec-lora"]}}
    inside = gather_searches(grid, outcomes(lower))[0]
    assert (inside.taken, inside.edge, next_rate(inside, grid.search)) == (0.01, 0, None)


def test_ties_within_rounding():
    """Level in one of two seeds, so that mean and standard error are the same; means that differ by their last bit."""
    for gap in (0.001, 0.003, 0.007, 0.013):
        found = searched({0.01: (0.8 - gap, 0.6), 0.1: (0.8, 0.6)}, ties="common")
        assert found.ties == (0.01, 0.1), gap
    assert searched({0.01: (0.1, 0.7), 0.1: (0.1 + 0.7 - 0.4, 0.4)}).best == 0.01
    assert searched({0.01: (0.3, 0.3), 0.1: (0.1 + 0.2, 0.1 + 0.2)}, ties="common").best == 0.01


def test_a_rate_is_scored_by_the_models_that_are_deployed():
    def taken(**relay):
        base = {"exchange": {"relay": relay}} if relay else {}
        axes = {"method": ["dec-lora"]}
        search = {"rates": [0.01, 0.1], "seeds": [5]}
        grid = load_grid({"base": base, "axes": axes, "seeds": [0], "search": search})
        known = outcomes({"dec-lora": {0.01: (0.5,), 0.1: (0.6,)}})
        for each, score in zip(known, (0.9, 0.8), strict=True):
            each.measures["relayed client"] = score
        (found,) = gather_searches(grid, known)
        return found.taken, found.measure, found.rates[0].scores[5]

    assert taken(deploy="relayed") == (0.01, "relayed client", 0.9)
    assert taken(deploy="own") == taken() == (0.1, "mean client", 0.5)


MIXED = {
    "base": {"model": {"source": "x"}, "data": {"train": "csv:a.csv", "eval": "csv:b.csv", "text": ["text"]}},
    "axes": {
        "dataset": {
            "classes": {"data": {"label": "label"}},
            "texts": {"task": {"kind": "causal-lm"}, "data": {"label": None}},
        }
    },
    "seeds": [0],
    "search": {"rates": [0.01, 0.1], "seeds": [1, 2], "each": ["task.kind"], "grow": True, "ties": "common"},
}
"""Two metrics: accuracy, of which more is better, and loss, of which less is."""


def mixed_outcomes(grid):
    """Of classes the higher rate is the better one, of texts the lower one."""
    for trial in plan_search(grid).trials:
        classes, high = trial.config.task.kind == "classification", trial.config.train.lr == 0.1
        about = {"metric": "accuracy" if classes else "loss", "higher_is_better": classes}
        reached = {"mean client": 0.9 if high else 0.5}
        yield Outcome(trial.setting, trial.labels, trial.config.seed, trial.config.train.lr, "", reached, **about)


def test_each_group_of_a_grid_with_several_metrics_takes_the_rate_that_is_best_by_its_own():
    grid = load_grid(MIXED)
    classes, texts = gather_searches(grid, list(mixed_outcomes(grid)))
    assert (classes.best, classes.taken, classes.ties) == (0.1, 0.1, (0.1,))
    assert (texts.best, texts.taken, texts.ties) == (0.01, 0.01, (0.01,))
    assert [next_rate(each, grid.search) for each in (classes, texts)] == [1.0, 0.001]
    assert [each.as_json()["metric"] for each in (classes, texts)] == ["accuracy", "loss"]
    assert rate_columns([classes, texts])[:2] == ["searched on", "metric"] and rate_rows([texts])[0][1] != "loss"
    assert [row[:2] for row in rate_rows([classes, texts])] == [["classes", "accuracy"], ["texts", "loss"]]


def test_ties_are_judged_by_paired_differences():
    """Seeds far apart do not hide that one rate is the better one in both."""
    found = searched({0.01: (0.50, 0.90), 0.1: (0.52, 0.921)}, ties="common")
    assert found.ties == (0.1,)
    alike = searched({0.01: (0.50, 0.90), 0.1: (0.52, 0.90)}, ties="common", higher=False)
    assert alike.ties == (0.01, 0.1) and alike.best == 0.01


@pytest.mark.parametrize(
    ("search", "parts"),
    [
        ({"rates": [0.1], "grow": True}, ["1 rates", "at least two"]),
        ({"rates": [0.1, 0.2, 0.3], "grow": True, "most": 2}, ["3 rates and most=2"]),
        ({"rates": [0.1, 0.2], "ties": "common", "seeds": [1]}, ["seeds=[1]", "at least two seeds"]),
        ({"rates": [0.1, 0.2], "most": 1}, ["most", "1 given"]),
        ({"rates": [0.1, 0.2], "ties": "middle"}, ["ties", "'middle' given"]),
        ({"rates": [1e-3, 0.001, 5e-3]}, ["[0.001, 0.001, 0.005] given", "list each once"]),
        ({"rates": [0.1, 0.1], "grow": True}, ["[0.1, 0.1] given", "list each once"]),
        ({"rates": [0.1, 0.10000001]}, ["to six digits"]),  # which one folder would hold
        ({"rates": [0.1], "seeds": [3, 3]}, ["search.seeds: [3, 3] given", "list each once"]),
    ],
)
def test_a_search_that_cannot_be_is_refused(search, parts):
    with pytest.raises(ConfigError) as told:
        grid_of(**search)
    for part in parts:
        assert part in str(told.value)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("topology.pp", "no setting 'topology.pp' (did you mean 'p'?)"),
        ("algorithm.nam", "(did you mean 'name'?)"),
        ("algorithm.intervall", "(did you mean 'interval'?)"),
        ("trian.lr", "(did you mean 'train'?)"),
        ("train.lr.size", "train.lr has nothing below it"),
    ],
)
def test_a_setting_that_no_config_has_is_refused(key, told):
    with pytest.raises(ConfigError, match="search.each: no setting") as error:
        plan_search(grid_of(each=["algorithm.name", key]))
    assert told in str(error.value)


def test_names_that_are_known_import_nothing_of_other_packages(monkeypatch):
    for registry in (plugins.METHODS, plugins.TOPOLOGIES, plugins.PARTITIONS):
        monkeypatch.setattr(registry, "names", lambda: pytest.fail("others are asked"))
    for key in ("algorithm.interval", "topology.p", "partition.shares", "train.lr"):
        require_setting(key, "search.each")


def test_a_setting_of_another_package_s_method_passes(monkeypatch):
    method = make_dataclass("Method", [("strength", float, 1.0)], frozen=True)
    monkeypatch.setattr(plugins.METHODS, "names", lambda: ["theirs"])
    monkeypatch.setattr(plugins.METHODS, "find", lambda name: method)
    require_setting("algorithm.strength", "search.each")
    with pytest.raises(ConfigError, match="did you mean 'strength'"):
        require_setting("algorithm.strenght", "search.each")


def test_a_setting_of_other_kinds_than_the_grids_passes():
    keys = ["topology.p", "algorithm.interval", "exchange.relay", "exchange.codec.share", "privacy.epsilon"]
    assert plan_search(grid_of(each=["algorithm.name", *keys, "clock.speed"])).trials


@pytest.mark.parametrize(
    ("reported", "searched"), [([0, 1, 2], [3, 4]), ([0], [1, 2]), ([1, 3], [0, 2]), ([100, 101], [0, 1])]
)
def test_a_search_without_seeds_takes_two_that_are_not_reported(reported, searched):
    grid = load_grid({"seeds": reported, "search": {"rates": [0.1], "ties": "common"}})
    assert grid.search.seeds == searched and search_warnings(grid) == []
    assert load_grid(yaml.safe_load(grid.to_yaml())) == grid  # written out, as other defaults are
    assert load_grid({"seeds": reported, "search": {"rates": [0.1], "seeds": [7]}}).search.seeds == [7]


def test_seeds_that_are_searched_and_reported_get_a_warning():
    (warning,) = search_warnings(grid_of(seeds=[1, 7]))
    assert "both have 1:" in warning and "search.seeds=[2, 3]" in warning
    (warning,) = search_warnings(load_grid({"seeds": [1, 3], "search": {"rates": [0.1], "seeds": [1, 2, 3]}}))
    assert "both have 1, 3:" in warning and "search.seeds=[0, 2, 4]" in warning
    assert search_warnings(grid_of(seeds=[2, 3])) == search_warnings(grid_of(rates=[], seeds=[0])) == []


def test_every_searched_rate_is_in_the_table_and_in_json():
    methods = {"dec-lora": METHODS["dec-lora"], "rolora": {0.01: (0.7, 0.71), 0.1: (None, 0.6), 0.001: (0.5, 0.5)}}
    methods["ffa-lora"] = METHODS["ffa-lora"]
    searches = gather_searches(grid_of(methods, ties="common"), outcomes(methods))
    assert rate_columns(searches) == ["searched on", "0.001", "0.01", "0.1", ""]
    assert rate_rows(searches) == [
        ["dec-lora", "–", "0.550 ± 0.071 (taken)", "0.555 ± 0.049 (best)", "at the edge"],
        ["rolora", "0.500 ± 0.000", "0.705 ± 0.007 (taken)", "diverged", ""],
        ["ffa-lora", "–", "0.600 ± 0.000 (taken)", "0.505 ± 0.007", "at the edge"],
    ]
    told = json.loads(json.dumps([each.as_json() for each in searches], allow_nan=False))
    assert told[1]["rates"][2] == {"rate": 0.1, "seeds": 1, "diverged": 1, "mean": None, "deviation": None}
    assert told[0]["taken"] == 0.01 and told[0]["best"] == 0.1 and told[0]["at_edge"] and told[0]["ties"] == [0.01, 0.1]
