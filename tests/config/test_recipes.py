"""Recipes: what they fill, what goes before them, and that a written config means the same without them."""

from typing import get_args

import pytest
import yaml

from cases import ROW_METHODS
from peerlora.algorithms import REGISTRY
from peerlora.config.exchange import RelayConfig
from peerlora.config.loading import load_config
from peerlora.config.recipes import RECIPES
from peerlora.config.run import RunConfig
from peerlora.config.sections import TrainConfig
from peerlora.errors import CompositionError, ConfigError
from peerlora.runtime.peer.config_digest import section_hashes
from peerlora.runtime.plan import plan

SPARSE = {"schedule": "cosine", "optimizer_state": "keep", "label_prior": "uniform"}


def changed(train):
    """The settings of ``train`` that are not the defaults."""
    plain = load_config({}).train.model_dump()
    return {name: value for name, value in train.model_dump().items() if value != plain[name]}


def test_every_recipe_can_be_named():
    named = RunConfig.model_fields["recipe"].annotation
    assert set(RECIPES) == {word for part in get_args(named) for word in get_args(part)}


def test_a_recipe_fills_what_is_not_given():
    assert changed(load_config({"recipe": "sparse"}).train) == SPARSE
    given = {"schedule": "linear", "optimizer_state": "phase", "label_prior": "none"}
    assert load_config({"recipe": "sparse", "train": given}).train.model_dump().items() >= given.items()
    one = load_config({"recipe": "sparse"}, ["train.label_prior=pooled"]).train
    assert changed(one) == SPARSE | {"label_prior": "pooled"}


def test_a_default_that_is_given_is_given():
    assert changed(load_config({"recipe": "sparse", "train": {"schedule": "constant"}}).train) == {
        "optimizer_state": "keep",
        "label_prior": "uniform",
    }


def test_what_a_recipe_does_not_set_is_told():
    """As with a file that `init` wrote, which gives every setting."""

    def told(source, *words):
        return [note for note in plan(load_config(source, words)).notes if note.startswith("recipe=")]

    written = yaml.safe_load(load_config({"algorithm": "dec-lora", "data": {"train": "csv:x.csv"}}).to_yaml())
    (note,) = told(written, "recipe=sparse")
    kept = "train.schedule=constant, train.optimizer_state=round, train.label_prior=none, exchange.relay=null"
    assert f"which gives {kept}; delete" in note
    assert told(written) == told({}, "recipe=sparse") == []
    assert told({"exchange": {"relay": {"keep": 3}}}, "recipe=sparse", "algorithm=dec-lora") == []
    resolved = yaml.safe_load(load_config({"recipe": "sparse", "algorithm": "dec-lora"}).to_yaml())
    assert told(resolved) == []  # a run's config.yaml


@pytest.mark.parametrize("kind", ["regression", "causal-lm"])
def test_a_task_without_classes_has_no_label_prior(kind):
    label = None if kind == "causal-lm" else "y"
    found = load_config({"recipe": "sparse", "task": {"kind": kind}, "data": {"label": label}})
    assert changed(found.train) == {"schedule": "cosine", "optimizer_state": "keep"}


@pytest.mark.parametrize("method", ROW_METHODS)
def test_every_method_can_be_planned_with_the_recipe(method):
    graph = "directed-ring" if method in ("sgp", "push-diging") else "ring"
    config = load_config({"recipe": "sparse", "algorithm": method, "topology": graph, "clients": 5})
    own = REGISTRY[method].traits
    assert config.train.optimizer_state == ("round" if own.fresh_optimizer else "keep")
    assert config.train.model_dump().items() >= own.train_defaults.items()
    plan(config)


def test_a_recipe_relays_where_the_method_its_codec_and_secure_sums_can():
    assert load_config({"recipe": "sparse", "algorithm": "dec-lora"}).exchange.relay == RelayConfig()
    assert load_config({"recipe": "sparse", "algorithm": "flora"}).exchange.relay is None
    assert load_config({"recipe": "sparse", "exchange": {"relay": None}}).exchange.relay is None
    assert load_config({"recipe": "sparse", "exchange": {"relay": {"keep": 3}}}).exchange.relay == RelayConfig(keep=3)
    coded = load_config(
        {"recipe": "sparse", "algorithm": "dec-lora", "exchange": {"codec": "sign"}, "topology": "ring"}
    )
    assert coded.exchange.relay is None
    plan(coded)
    secure = load_config({"recipe": "sparse", "exchange": {"secure": True}, "topology": "ring"})
    assert secure.exchange.relay is None
    plan(secure)


@pytest.mark.parametrize(
    "guarded",
    [{"exchange": {"robust": "median"}}, {"adversary": {"clients": 1, "attack": "sign-flip"}}],
    ids=["robust", "adversary"],
)
def test_a_recipe_relays_nothing_that_a_robust_rule_would_keep_out(guarded):
    settings = {"recipe": "sparse", "topology": "complete", **guarded}
    config = load_config(settings)
    assert config.exchange.relay is None and changed(config.train) == SPARSE
    plan(config)
    exchange = {**guarded.get("exchange", {}), "relay": True}
    assert load_config({**settings, "exchange": exchange}).exchange.relay == RelayConfig()


def test_a_recipe_sets_no_loss_that_private_rows_refuse():
    config = load_config({"recipe": "sparse", "privacy": {"epsilon": 8}})
    assert changed(config.train) == {"schedule": "cosine", "optimizer_state": "keep"}
    assert config.exchange.relay == RelayConfig()
    plan(config)
    client = load_config({"recipe": "sparse", "privacy": {"epsilon": 8, "unit": "client"}})
    assert changed(client.train) == SPARSE
    plan(client)
    given = load_config({"recipe": "sparse", "privacy": {"epsilon": 8}, "train": {"label_prior": "uniform"}})
    with pytest.raises(CompositionError, match="privacy.unit=row and train.label_prior=uniform exclude"):
        plan(given)


def test_a_sites_own_privacy_decides_no_loss_that_all_sites_need():
    labels = {"task": {"labels": ["no", "yes"]}, "recipe": "sparse"}
    own = {**labels, "partition": "own"}
    private = {**own, "privacy": {"epsilon": 8}}
    with pytest.raises(ConfigError, match="recipe=sparse and privacy.unit=row .*give train.label_prior=none at all"):
        load_config(private)
    word = "train.label_prior=none"
    hashes = [section_hashes(load_config(tree, [word]), ["no", "yes"]) for tree in (own, private)]
    assert hashes[0] == hashes[1]
    assert load_config(yaml.safe_load(load_config(private, [word]).to_yaml())) == load_config(private, [word])
    load_config({**private, "privacy": {"epsilon": 8, "unit": "client"}})
    load_config({**private, "train": {"class_weights": "balanced"}})
    load_config({**private, "task": {"kind": "regression"}, "data": {"label": "y"}})
    assert load_config({**labels, "privacy": {"epsilon": 8}}).train.label_prior == "none"  # one config for all


def test_the_resolved_config_says_all_and_reads_as_it_was_written():
    config = load_config({"recipe": "sparse", "algorithm": "decaf", "train": {"lr": 0.3}})
    tree = yaml.safe_load(config.to_yaml())
    assert tree["recipe"] == "sparse" and tree["train"]["schedule"] == "cosine"
    assert load_config(tree) == config
    without = load_config({**tree, "recipe": None})
    assert without.train == config.train and without.exchange == config.exchange


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ConfigError, match="recipe: 'spares' given; input should be 'sparse'"):
        load_config({"recipe": "spares"})


def test_peers_compare_settings_wherever_they_come_from():
    named = load_config({"recipe": "sparse"})
    spelled = load_config({"train": SPARSE, "exchange": {"relay": {}}})
    assert section_hashes(named, ["a"]) == section_hashes(spelled, ["a"])
    assert section_hashes(named, ["a"])["train"] != section_hashes(load_config({}), ["a"])["train"]


def test_peers_of_an_older_version_agree_where_nothing_new_is_set():
    """Hashes as the version before schedules made them."""
    hashes = section_hashes(load_config({}), ["a", "b"])
    assert hashes["train"] == "1c30a67bec13d4d9" and "recipe" not in hashes
    for word in ("train.schedule=cosine", "train.quiet=0.1", "train.warmup=0.1", "train.head_rate=0.5"):
        assert section_hashes(load_config({}, [word]), ["a", "b"])["train"] != hashes["train"], word


def test_sites_must_read_chats_alike_and_name_their_columns_as_they_like():
    """The first hash is that of the version before chats."""
    hashes = section_hashes(load_config({}), ["a", "b"])
    assert hashes["data"] == "7cfcb13fac43b7ff"
    own = ["task.kind=chat", "partition=own", "data.label=null"]
    first = section_hashes(load_config({}, own), ())["data"]
    assert section_hashes(load_config({}, [*own, "data.columns={messages: turns}"]), ())["data"] == first
    for word in ("data.template=chatml", "data.loss_on=all", "data.too_long=drop"):
        assert section_hashes(load_config({}, [*own, word]), ())["data"] != first, word


@pytest.mark.parametrize("method", REGISTRY)
def test_a_method_whose_moments_cannot_outlast_a_round_says_so_by_default(method):
    """So that another default of train.optimizer_state would refuse none of them."""
    traits = REGISTRY[method].traits
    own = traits.own_train_defaults()
    assert (own.get("optimizer_state") == "round") == bool(traits.fresh_optimizer)
    default = TrainConfig().optimizer_state
    assert load_config({"algorithm": method}).train.optimizer_state == own.get("optimizer_state", default)
