"""Methods, topologies, tasks and partitions of other packages: found by entry point, checked, and named in errors."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from peerlora import plugins
from peerlora.algorithms import build_algorithm, describe_algorithms, find_method, register_method
from peerlora.algorithms.dec_lora import DecLoRA
from peerlora.cli.methods import command as list_methods
from peerlora.config.base import Section
from peerlora.config.loading import load_config, parse_spec
from peerlora.config.task_kinds import TaskKind, register_task
from peerlora.data.dataset import Dataset
from peerlora.data.partition import partition
from peerlora.errors import CompositionError, ConfigError, DataError, TopologyError
from peerlora.plugins import METHODS, PARTITIONS, TASKS, TOPOLOGIES
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.checks import check_composition
from peerlora.runtime.simulate import simulate
from peerlora.topology.schedule import build_topology

SOURCE = '''
from dataclasses import dataclass
from typing import ClassVar, Literal
import numpy as np
from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import SGD, Traits
from peerlora.cli.methods import command as list_methods
from peerlora.config.base import Section
from peerlora.config.topology import Graph, WeightedGraph
from peerlora.plugins import Kind
from peerlora.topology.weight_sequence import WeightSequence, averaging

@dataclass(frozen=True)
class Lazy(FactorGossip):
    """Mix and forget."""
    word: str = "some"
    traits: ClassVar = Traits(source="nowhere", train_defaults=SGD)
    def round(self, t, x, learner, peers):
        return peers.mix(learner.fit(x, "AB"))

class Wheel(Graph):
    kind: Literal["wheel"]
    spokes: int = 2

def wheel(settings, clients, seed):
    W = np.zeros((clients, clients), dtype=bool)
    W[0, 1:] = W[1:, 0] = True
    return W

class Halves(WeightedGraph):
    kind: Literal["halves"]

def halves(settings, clients, seed):
    groups = [[list(range(i, clients, 2)) for i in (0, 1)], [list(range(clients))]]
    return WeightSequence(lambda seed, t: averaging(clients, groups[t % 2]), symmetric=True, period=2)

class Blocks(Section):
    kind: Literal["blocks"]
    shift: int = 0

def blocks(settings, labels, clients, seed):
    return np.array_split(np.roll(np.arange(len(labels)), settings.shift), clients)

WHEEL, HALVES, BLOCKS = Kind(Wheel, wheel), Kind(Halves, halves), Kind(Blocks, blocks)
'''
ENTRIES = {
    "peerlora.methods": {"lazy": "{0}:Lazy"},
    "peerlora.topologies": {"wheel": "{0}:WHEEL", "halves": "{0}:HALVES"},
    "peerlora.partitions": {"blocks": "{0}:BLOCKS"},
}


SIX_ROWS = Dataset(np.arange(6, dtype=np.int32), np.arange(7), None, np.array([0, 1, 0, 1, 0, 1]), ("a", "b"))


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test registers ends with it."""
    for registry in (METHODS, TOPOLOGIES, PARTITIONS, TASKS):
        monkeypatch.setattr(registry, "_plugins", dict(registry._plugins))
        monkeypatch.setattr(registry, "_scanned", False)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package with these entry points, as pip would."""

    def install(name, entries=ENTRIES, source=SOURCE):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        (tmp_path / f"{name}-1.2.dist-info").mkdir()
        (tmp_path / f"{name}-1.2.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.2\n", encoding="utf-8")
        lines = [
            line
            for group, names in entries.items()
            for line in (f"[{group}]", *(f"{own} = {where.format(name)}" for own, where in names.items()))
        ]
        (tmp_path / f"{name}-1.2.dist-info" / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


def test_a_method_of_an_installed_package_is_built_described_and_refuses_by_default(installed, capsys):
    assert find_method("lazy") is None
    METHODS._scanned = False
    installed("own_a")
    config = load_config({"algorithm": {"name": "lazy", "word": "other"}, "topology": "ring"}, ["train.rounds=3"])
    assert (config.train.optimizer, config.train.lr, config.train.rounds) == ("sgd", 0.1, 3)
    assert load_config(yaml.safe_load(config.to_yaml())) == config
    algorithm = build_algorithm("lazy", {"word": "other"})
    assert check_composition(config, algorithm, build_topology(config.topology, 10, 0)) == ()
    coded = load_config({"algorithm": "lazy", "topology": "ring", "exchange": {"codec": "sign"}})
    with pytest.raises(CompositionError, match="cannot be used with lazy: its exchange is more than one mixing"):
        check_composition(coded, algorithm, build_topology(config.topology, 10, 0))
    with pytest.raises(ConfigError, match="algorithm.word: 3 given; expected a word"):
        build_algorithm("lazy", {"word": 3})
    with pytest.raises(
        ConfigError, match=r"'lazzy' is unknown \(did you mean 'lazy'\?\); expected one of local, .*lazy"
    ):
        build_algorithm("lazzy", {})
    assert describe_algorithms()["lazy"]["package"] == "own_a 1.2"
    list_methods()
    assert "(own_a 1.2)" in capsys.readouterr().out


def test_a_topology_of_an_installed_package_is_read_checked_and_built(installed):
    installed("own_b")
    config = load_config({"topology": "wheel", "clients": 5}, ["topology.spokes=3", "topology.drop_links=0.1"])
    assert (config.topology.kind, config.topology.spokes) == ("wheel", 3)
    assert load_config(yaml.safe_load(config.to_yaml())) == config
    topology = build_topology(parse_spec("wheel"), 5, 0)
    assert topology.at(0).degrees.tolist() == [4, 1, 1, 1, 1] and topology.properties.doubly_stochastic
    assert build_topology(parse_spec("halves"), 6, 0).period == 2
    with pytest.raises(
        ConfigError, match=r"unknown key 'topology.spoke' \(did you mean 'spokes'\?\); expected one of .*"
    ):
        parse_spec("wheel spoke=3")
    with pytest.raises(ConfigError, match="topology.spokes: 'x' given; input should be a valid integer"):
        parse_spec("wheel spokes=x")
    with pytest.raises(ConfigError, match=r"topology.kind 'weel' is unknown \(did you mean 'wheel'\?\)"):
        parse_spec("weel")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (np.zeros((5, 5)), "float64 .5, 5. given; expected a bool array of 5 x 5"),
        (np.ones((5, 5), dtype=bool), "links of clients with themselves"),
        (np.triu(np.ones((5, 5), dtype=bool), 1), "one-way links in an undirected graph"),
        (np.zeros((5, 5), dtype=bool), "is disconnected"),
        ([], "list given; expected a bool array"),
    ],
)
def test_what_is_no_graph_is_refused(installed, made, told):
    installed("own_c")
    config = parse_spec("wheel")
    other = plugins.Kind(type(config), lambda settings, clients, seed: made)
    sys.modules["own_c"].WHEEL = other  # type: ignore[attr-defined]
    with pytest.raises(TopologyError, match=told):
        build_topology(config, 5, 0)


def test_a_partition_of_an_installed_package_divides_the_rows(installed):
    installed("own_d")
    config = load_config({"partition": {"kind": "blocks", "shift": 1}, "clients": 3})
    assert [shard.tolist() for shard in partition(config.partition, SIX_ROWS, 3, 0).shards] == [[0, 5], [1, 2], [3, 4]]
    assert load_config(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ([[0], [1]], "blocks made 2 shards for 3 clients"),
        ([[0], [1], [9]], "expected row numbers from 0 to 5"),
        ([[0], [1], []], "gave client 2 no rows"),
        ([[0], [1], [1]], "gave row 1 to 2 clients"),
    ],
)
def test_shards_that_are_none_are_refused(installed, made, told):
    installed("own_j")
    config = load_config({"partition": "blocks"}).partition
    sys.modules["own_j"].BLOCKS = plugins.Kind(type(config), lambda *given: made)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=told):
        partition(config, SIX_ROWS, 3, 0)


def test_two_packages_with_one_name_are_both_named(installed):
    installed("own_e")
    installed("own_f")
    with pytest.raises(
        ConfigError, match="method 'lazy' is registered twice, by package own_. 1.2 and by package own_"
    ):
        find_method("lazy")


def test_a_name_of_peerlora_is_taken(installed):
    installed("own_g", {"peerlora.methods": {"dec-lora": "{0}:Lazy"}})
    assert find_method("dec-lora") is DecLoRA
    with pytest.raises(ConfigError, match="'dec-lora' is registered twice, by peerlora and by package own_g 1.2"):
        describe_algorithms()


def test_a_script_and_a_package_with_one_name_are_both_named(installed):
    installed("own_h")
    with pytest.raises(ConfigError, match="by package own_h 1.2 and by module test_plugins"):
        register_method("lazy")(_own(DecLoRA, __module__="test_plugins"))


def _own(base, **more):
    return type("Own", (base,), {"traits": base.traits, **more})


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        (SimpleNamespace(__module__="x"), "expected a dataclass that derives from"),
        (type("Bare", (DecLoRA,), {}), "Bare declares no traits of its own"),
    ],
)
def test_what_is_no_method_is_refused(thing, told):
    with pytest.raises(ConfigError, match=told):
        register_method("new")(thing)
    assert "new" not in METHODS.names()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("class Other: pass", "AttributeError: .*Lazy"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("Lazy = Lzy", "NameError: name 'Lzy' is not defined"),
        ("Lazy = len(3)", "TypeError: object of type 'int' has no len"),
        ("raise RuntimeError('of two\\nlines')", r"RuntimeError: of two\)"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named(installed, source, told):
    installed("own_i", source=source)
    with pytest.raises(ConfigError, match=f"'lazy' of package own_i 1.2 cannot be loaded .{told}") as raised:
        find_method("lazy")
    assert raised.value.__cause__ is not None
    METHODS._scanned = False
    with pytest.raises(ConfigError, match="'lazy' of package own_i 1.2 cannot be loaded"):
        list_methods()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (plugins.Kind(Section, len), "expected a subclass of .*Links"),
        (len, "expected a peerlora.plugins.Kind"),
        (plugins.Kind(type(parse_spec("ring")), len), "has no field `kind: Literal.'new'.`"),
    ],
)
def test_what_is_no_kind_is_refused(kind, told):
    with pytest.raises(ConfigError, match=told):
        TOPOLOGIES.register("new", kind, "test_plugins")


TASK = '''
from peerlora.config.task_kinds import TaskKind
from peerlora.train.tasks import Regression

class Absolute(Regression):
    """Absolute in place of squared error."""

    kind = TaskKind("absolute", "number", __name__ + ":Absolute", "SEQ_CLS", "AutoModelForSequenceClassification")

    def row_losses(self, logits, batch):
        return super().row_losses(logits, batch).sqrt()

ABSOLUTE = Absolute.kind
'''
SCORES = ["task.kind=regression", "data.label=score", "train.rounds=1", "topology=ring"]


def test_a_task_of_an_installed_package_trains(installed, config, tmp_path):
    installed("own_t", {"peerlora.tasks": {"absolute": "{0}:ABSOLUTE"}}, TASK)
    plain = select_events(
        read_events(simulate(config("bert", *SCORES), tmp_path / "plain", report=False).run), RoundDone
    )
    words = [*SCORES, "task.kind=absolute"]
    own = select_events(read_events(simulate(config("bert", *words), tmp_path / "own", report=False).run), RoundDone)
    assert own[0].loss != plain[0].loss and np.isfinite(own[0].loss).all()


def test_a_task_of_a_script_is_registered_by_its_decorator():
    from peerlora.train.tasks import Regression, task

    @register_task("own-number", "number", "SEQ_CLS")
    class Own(Regression):
        pass

    globals()["Own"] = Own
    TASKS.register("again", TaskKind("again", "number", f"{__name__}:Own", "SEQ_CLS", "Auto"), __name__)
    assert isinstance(task("again"), Own) and load_config({}, ["task.kind=own-number"]).task.kind == "own-number"
    with pytest.raises(ConfigError, match="'classification' is registered twice"):
        register_task("classification", "class", "SEQ_CLS")(Own)
    with pytest.raises(ConfigError, match="expected a peerlora.config.task_kinds.TaskKind"):
        TASKS.register("bad", Own, __name__)
    with pytest.raises(ConfigError, match="'nothing' given; input should be 'classification', .*'own-number'"):
        load_config({}, ["task.kind=nothing"])
