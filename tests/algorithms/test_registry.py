import pytest

from peerlora.algorithms import REGISTRY, build_algorithm, describe_algorithms
from peerlora.config import load_config
from peerlora.errors import CompositionError, ConfigError
from peerlora.runtime.compose import check_composition, compose
from peerlora.topology.schedule import build_topology


def test_every_method_is_built_with_its_defaults():
    assert set(REGISTRY) >= {"local", "dec-lora", "adf-lora"}
    for name, kind in REGISTRY.items():
        assert isinstance(build_algorithm(name, {}), kind)
    assert build_algorithm("adf-lora", {}).interval == 5
    assert build_algorithm("adf-lora", {"interval": 2}).interval == 2


REFUSED = [
    (
        "adf-lra",
        {},
        r"algorithm.name 'adf-lra' is unknown \(did you mean 'adf-lora'\?\); expected one of local, dec-lora",
    ),
    ("xyz", {}, r"algorithm.name 'xyz' is unknown; expected one of"),
    ("adf-lora", {"intervall": 3}, r"'algorithm.intervall' \(did you mean 'interval'\?\); adf-lora takes interval"),
    ("dec-lora", {"interval": 3}, "unknown key 'algorithm.interval'; dec-lora has no settings"),
    ("adf-lora", {"interval": "3"}, "algorithm.interval: '3' given; expected a int such as 5"),
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
        "wrappers": False,
        "settings": {},
    }
    assert not described["dec-lora"]["unequal_ranks"]
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


def test_a_bad_combination_is_refused_before_anything_is_loaded(tmp_path):
    tree = {
        "model": {"source": str(tmp_path / "nowhere")},
        "clients": 2,
        "adapter": {"rank": [1, 2]},
        "topology": "path",
    }
    with pytest.raises(CompositionError, match="different ranks"):
        compose(load_config(tree))
