"""Which trials of a grid stand for others when it is checked: every setting tells them apart that a run may fail by."""

import json
from dataclasses import replace

import pytest
from pydantic import BaseModel

from peerlora.config.base import Section
from peerlora.config.run import RunConfig
from peerlora.errors import CompositionError
from peerlora.experiments.grid import load_grid
from peerlora.experiments.resource_cache import ResourceCache
from peerlora.experiments.trial_checks import _assembly_key, _unread_settings, check_grid
from peerlora.runtime.compose import assemble, load_run
from peerlora.runtime.plan import plan

# Known not to matter to assembling a run of rows whose method neither merges nor relays, without privacy.
UNREAD = {
    *("recipe", "checkpoint", "clock", "peer", "cluster", "track", "threads", "topology", "algorithm", "eval.every"),
    *(f"train.{name}" for name in ("lr", "schedule", "warmup", "floor", "decay", "optimizer")),
    *(f"train.{name}" for name in ("momentum", "weight_decay", "clip", "max_seconds", "local_steps", "accumulate")),
    *("train.rounds", "train.quiet"),
}


def leaves_of(tree, prefix=()):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves_of(value, (*prefix, name))
        else:
            yield (*prefix, name)


def changed(config, path):
    """The config with another value of one setting, whatever a validator would say of it."""
    name, *rest = path
    value = getattr(config, name) if isinstance(config, BaseModel) else config[name]
    other = "regression" if value == "classification" else f"another {value!r}"
    new = changed(value, rest) if rest else other
    return config.model_copy(update={name: new}) if isinstance(config, BaseModel) else {**config, name: new}


WORDS = ["exchange.robust=median", "adversary={attack: gaussian}", "eval.generate=null", "clock.speed=1.0"]
CASES = [
    ([], set()),
    (["privacy={epsilon: 8}"], {"train.local_steps", "train.accumulate", "train.rounds", "train.quiet"}),
    (["algorithm.name=flora", "topology=complete"], {"algorithm", "topology", "train.rounds", "train.quiet"}),
    (["exchange.relay={}", "algorithm.name=dec-lora"], {"algorithm"}),
    (WORDS, set()),
]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize(("words", "matter"), CASES)
def test_every_setting_tells_trials_apart_but_those_that_nothing_assembled_depends_on(config, words, matter):
    planned = plan(config("bert", *words))
    unread = UNREAD - matter
    assert {name.split(".")[0] for name in unread} <= RunConfig.model_fields.keys()
    key = _assembly_key(planned)
    paths = list(leaves_of(planned.config.model_dump(mode="json")))
    assert len(paths) > 80 and ("privacy",) in paths or words
    for path in paths:
        other = replace(planned, config=changed(planned.config, path))
        left_out = path[0] in unread or ".".join(path[:2]) in unread
        assert (_assembly_key(other) == key) == left_out, path


@pytest.fixture
def settings_read(monkeypatch):
    """The settings that are read, as section class and name."""
    found = set()
    get = Section.__getattribute__

    def watched(self, name):
        if name in type(self).__pydantic_fields__:
            found.add((type(self).__name__, name))
        return get(self, name)

    monkeypatch.setattr(Section, "__getattribute__", watched)
    return found


def test_what_is_left_out_is_not_read_when_a_run_is_assembled(config, settings_read):
    """But for the rounds, which a rule of `exchange.robust` takes, and what a schedule of rates is made of."""
    planned = plan(config("bert", "eval.own=true", "train.class_weights=balanced", "train.block=2"))
    resources = load_run(planned.config)
    settings_read.clear()
    assemble(planned, resources)
    sections = {"train": "TrainConfig", "eval": "EvalConfig"}
    left_out = [name.split(".") for name in _unread_settings(planned) if name != "train.rounds"]
    unread = {(sections[path[0]], path[1]) if len(path) > 1 else ("RunConfig", path[0]) for path in left_out}
    refuse_nothing = {("RunConfig", "algorithm")}  # its name is in messages
    refuse_nothing |= {("TrainConfig", name) for name in ("lr", "schedule", "warmup", "quiet")}
    assert not settings_read & (unread - refuse_nothing)
    assert ("TrainConfig", "class_weights") in settings_read and ("EvalConfig", "own") in settings_read


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        ({"train.class_weights": ["none", [1.0, 2.0]]}, "train.class_weights lists 2 numbers, the data have 3 labels"),
        ({"adapter.targets": [None, ["nothing"]]}, "matches adapter.targets"),
    ],
)
def test_a_value_that_only_assembling_refuses_is_found_in_a_grid(config, axis, told):
    base = config("bert").model_dump(mode="json", exclude_unset=True)
    del base["partition"]
    grid = load_grid({"base": base, "axes": axis, "seeds": [0]})
    with pytest.raises(CompositionError) as refused:
        check_grid(grid, ResourceCache())
    assert told in str(refused.value) and str(refused.value).startswith("1 of 2 cells"), json.dumps(axis)
