import doctest
from dataclasses import replace

import pytest
import yaml

from cases import ROW_METHODS
from peerlora.algorithms import ALIASES, REGISTRY, base, build_algorithm, describe_algorithms
from peerlora.config.loading import load_config
from peerlora.errors import CompositionError, ConfigError
from peerlora.runtime.checks import check_composition
from peerlora.runtime.compose import compose
from peerlora.topology.schedule import build_topology


def test_every_method_is_built_with_its_defaults():
    assert set(REGISTRY) >= {"local", "dec-lora", "adf-lora"}
    for name, kind in REGISTRY.items():
        assert isinstance(build_algorithm(name, {}), kind)
    assert build_algorithm("adf-lora", {}).interval == 5
    assert build_algorithm("adf-lora", {"interval": 2}).interval == 2


def test_the_example_in_the_contract_runs():
    found = doctest.testmod(base)
    assert found.attempted > 10 and found.failed == 0


REFUSED = [
    (
        "adf-lra",
        {},
        r"algorithm.name 'adf-lra' is unknown \(did you mean 'adf-lora'\?\); expected one of local, dec-lora",
    ),
    ("xyz", {}, r"algorithm.name 'xyz' is unknown; expected one of"),
    ("adf-lora", {"intervall": 3}, r"'algorithm.intervall' \(did you mean 'interval'\?\); adf-lora takes interval"),
    ("dec-lora", {"interval": 3}, "unknown key 'algorithm.interval'; dec-lora has no settings"),
    ("adf-lora", {"interval": "3"}, "algorithm.interval: '3' given; expected a whole number, such as 5"),
    ("adf-lora", {"interval": 2.0}, r"algorithm.interval: 2\.0 given"),
    ("adf-lora", {"interval": True}, "algorithm.interval: True given"),
    ("adf-lora", {"interval": None}, "algorithm.interval: None given"),
    ("adf-lora", {"interval": 0}, "algorithm.interval: 0 given; expected at least 1 round"),
    ("adf-lora", {"interval": -2}, "expected at least 1 round"),
]


@pytest.mark.parametrize(("name", "parameters", "told"), REFUSED)
def test_what_a_method_does_not_take_is_refused(name, parameters, told):
    with pytest.raises(ConfigError, match=told):
        build_algorithm(name, parameters)


@pytest.mark.parametrize(("name", "parameters", "told"), REFUSED)
def test_a_run_refuses_the_same_before_anything_is_loaded(tmp_path, name, parameters, told):
    tree = {"model": {"source": str(tmp_path / "nowhere")}, "algorithm": {"name": name, **parameters}}
    with pytest.raises(ConfigError, match=told):
        compose(load_config(tree))


def test_another_method_forgets_the_settings_of_the_old_one():
    tree = {"algorithm": {"name": "adf-lora", "interval": 3}}
    assert load_config(tree, ["algorithm.name=dec-lora"]).algorithm.parameters == {}
    assert load_config(tree, ["algorithm.interval=4"]).algorithm.parameters == {"interval": 4}


def test_the_description_says_what_a_table_needs():
    described = describe_algorithms()
    assert set(described) == set(REGISTRY)
    assert described["adf-lora"]["settings"] == {"interval": 5}
    assert described["adf-lora"]["requires"] == "row stochastic, column stochastic"
    assert described["local"] | {"source": "", "trains": ""} == {
        "source": "",
        "trains": "",
        "aliases": [],
        "mixes": "nothing",
        "operator": "none",
        "requires": "",
        "unequal_ranks": True,
        "not_with": {
            "exchange.codec": "it exchanges nothing",
            "exchange.robust": "it exchanges nothing",
            "exchange.relay": "it exchanges nothing",
            "exchange.secure": "it exchanges nothing",
            "adversary": "all but label-flip: it exchanges nothing",
        },
        "asynchronous": False,
        "settings": {},
        "train": {},
        "package": "peerlora",
    }
    assert not described["dec-lora"]["unequal_ranks"] and not described["dec-lora"]["not_with"]
    assert [name for name, facts in described.items() if facts["asynchronous"]] == ["aedfl", "ad-psgd"]
    assert all(text["source"] and text["trains"] for text in described.values())


def composition(*overrides):
    chosen = load_config({"clients": 4, "topology": "ring", "train": {"rounds": 10}}, overrides)
    algorithm = build_algorithm(chosen.algorithm.name, chosen.algorithm.parameters)
    return check_composition(chosen, algorithm, build_topology(chosen.topology, chosen.clients, chosen.seed))


@pytest.mark.parametrize("method", ["dec-lora", "adf-lora"])
def test_unequal_ranks_are_refused_where_factors_are_averaged(method):
    with pytest.raises(
        CompositionError, match=rf"{method} cannot work with different ranks \[1, 2\].*use local, decaf"
    ):
        composition(f"algorithm.name={method}", "adapter.rank=[1, 2, 2, 2]")
    assert composition("algorithm.name=local", "adapter.rank=[1, 2, 2, 2]") == ()
    assert composition(f"algorithm.name={method}", "adapter.rank=[2, 2, 2, 2]") == ()


@pytest.mark.parametrize("interval", [10, 11])
def test_a_run_that_never_switches_is_warned_about(interval):
    (warning,) = composition(f"algorithm.interval={interval}")
    assert f"algorithm.interval={interval}" in warning and "only B" in warning
    assert composition("algorithm.interval=9") == ()


# --- methods that were made for SGD, for one step, or for a fixed graph

TRAIN_DEFAULTS = {name: kind.traits.train_defaults for name, kind in REGISTRY.items() if kind.traits.train_defaults}
TRAIN_DEFAULTS |= {alias: TRAIN_DEFAULTS[name] for alias, name in ALIASES.items() if name in TRAIN_DEFAULTS}
MADE_FOR_SGD = ["dfedadmm", "feddyn", "dfedadmm-sam", "fedspeed", "d2", "consensus-admm"]


def test_methods_bring_their_own_defaults_for_what_is_not_said():
    train = load_config({"algorithm": "fedspeed"}).train
    assert (train.optimizer, train.lr, train.clip, train.local_steps) == ("sgd", 0.1, 10.0, 10)
    assert load_config({"algorithm": "fedspeed"}, ["train.lr=0.3", "train.clip=null"]).train.lr == 0.3
    assert load_config({"algorithm": "fedspeed"}, ["train.lr=0.3", "train.clip=null"]).train.clip is None
    assert load_config({"algorithm": "dfedavgm"}).train.momentum == 0.9
    assert load_config({"train": {"optimizer": "adamw"}}, ["algorithm.name=dsgd"]).train.optimizer == "adamw"
    assert load_config({}, ["algorithm.name=d2"]).train.local_steps == 1
    for method in ("adf-lora", "k-gt", "dfedavg"):
        assert load_config({"algorithm": method}).train == load_config().train
    for name, own in TRAIN_DEFAULTS.items():
        assert load_config({"algorithm": name}).train.model_dump() == load_config().train.model_dump() | own


def test_a_resolved_config_reads_as_it_was_written():
    for name in TRAIN_DEFAULTS:
        chosen = load_config({"algorithm": name}, ["train.momentum=0.5"])
        assert load_config(yaml.safe_load(chosen.to_yaml())) == chosen


def test_own_defaults_belong_to_methods_and_bad_sections_are_still_told():
    assert {"dsgd", "d-psgd", "d2", "feddyn", "fedspeed", "dfedavgm", "push-diging"} < set(TRAIN_DEFAULTS)
    for alias, method in ALIASES.items():
        assert load_config({"algorithm": alias}).train == load_config({"algorithm": method}).train
    with pytest.raises(ConfigError, match="train: 'fast' given"):
        load_config({"algorithm": "fedspeed", "train": "fast"})
    with pytest.raises(ConfigError, match="unknown key 'train.rate'"):
        load_config({"algorithm": "fedspeed", "train": {"rate": 1}})


@pytest.mark.parametrize("method", [*ROW_METHODS, *ALIASES])
def test_every_method_composes_by_its_name_alone(method):
    topology = ["topology.kind=complete"] if method == "d2" else []
    assert composition(f"algorithm.name={method}", *topology) == ()


@pytest.mark.parametrize("method", MADE_FOR_SGD)
def test_adamw_is_warned_about_where_a_method_was_made_for_sgd(method):
    steps = ["train.local_steps=1"] if method == "d2" else []
    (warning,) = composition(f"algorithm.name={method}", "train.optimizer=adamw", *steps)
    assert warning.startswith(f"{method} with train.optimizer=adamw: ") and "train.optimizer=sgd" in warning


REFUSED_TOGETHER = [
    (["dsgd", "train.local_steps=5"], "dsgd cannot take train.local_steps=5: .*; use train.local_steps=1"),
    (["d2", "train.local_steps=5"], "d2 cannot take train.local_steps=5: .*k-gt takes any number"),
    (["dfedavgm", "train.optimizer=adamw"], "dfedavgm cannot use train.optimizer=adamw: .*; use train.optimizer=sgd"),
    (["d2", "topology.kind=random"], r"d2 needs .* is static; .* is not \(.*k-gt .*\); use a fixed graph"),
    (["d2", "topology.drop_links=0.1"], "d2 needs .* is static; ring with metropolis weights is not"),
    (["d2", "topology.weights=pairwise"], "d2 needs .* is symmetric and static; .*topology.weights=metropolis"),
    (["consensus-admm", "topology.weights=pairwise"], "consensus-admm needs .* symmetric and neighbours only"),
    (["fedspeed", "adapter.rank=[1, 2, 2, 2]"], "fedspeed cannot work with different ranks"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED_TOGETHER)
def test_combinations_that_cannot_work_are_refused(words, told):
    with pytest.raises(CompositionError, match=told):
        composition(f"algorithm.name={words[0]}", *words[1:])


@pytest.mark.parametrize("method", ["k-gt", "scaffold", "dfedadmm", "d2"])
def test_weights_that_are_only_row_stochastic_are_refused(method):
    chosen = load_config({"clients": 4, "topology": "ring", "algorithm": method})
    topology = build_topology(chosen.topology, 4, 0)
    topology.__dict__["properties"] = replace(topology.properties, column_stochastic=False)
    with pytest.raises(CompositionError, match=f"{method} needs a topology whose mixing matrix is column stochastic"):
        check_composition(chosen, build_algorithm(method, {}), topology)


SETTINGS = {
    "exchange.codec": "exchange.codec=sign",
    "exchange.robust": "exchange.robust=median",
    "adversary": "adversary.attack=ipm",
    "train.local_steps > 1": "train.local_steps=3",
    "train.quiet": "train.quiet=0.1",
    "train.optimizer=adamw": "train.optimizer=adamw",
}


@pytest.mark.parametrize("method", ROW_METHODS)
def test_what_the_description_says_does_not_go_is_what_a_run_refuses_or_warns_of(method):
    told = describe_algorithms()[method]["not_with"]
    graph = ["topology=directed-ring"] if method in ("sgp", "push-diging") else ["topology=complete"]
    for what, word in SETTINGS.items():
        reason = told.get(what, "").removeprefix("all but label-flip: ")
        try:
            warnings = composition(f"algorithm.name={method}", *graph, word)
        except CompositionError as error:
            assert reason and reason in str(error), (what, error)
        else:
            assert bool(warnings) == reason.startswith("only warned of: "), (what, warnings)
            assert all(reason.removeprefix("only warned of: ") in warning for warning in warnings)
            assert warnings or not reason, what


def test_with_factors_in_turn_a_run_that_never_switches_is_warned_about():
    (warning,) = composition("algorithm.name=k-gt", "algorithm.interval=10")
    assert "algorithm.interval=10" in warning and "only B" in warning


def test_a_bad_combination_is_refused_before_anything_is_loaded(tmp_path):
    tree = {
        "model": {"source": str(tmp_path / "nowhere")},
        "clients": 2,
        "adapter": {"rank": [1, 2]},
        "topology": "path",
    }
    with pytest.raises(CompositionError, match="different ranks"):
        compose(load_config(tree))
