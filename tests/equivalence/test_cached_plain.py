"""Cached-DFL equals N separate PEFT models, each with a dictionary of others' state dicts, averaged by hand."""

import numpy as np
import pytest
from peft import set_peft_model_state_dict
from plain import initial_models, state_of
from test_plain_loop import largest_difference, run_in_two_shards, run_stacked
from test_rules_plain import gradients, local_steps

from cases import others_slow
from peerlora.runtime.compose import compose


def run_plain(config, federation, active, max_age=None, rows=False, pull=0.0, contacts=False):
    models = initial_models(config, federation)
    held = [{} for _ in models]  # origin -> (round, its state dict)
    rows_of = [len(shard) for shard in federation.partition.shards]
    for t in range(config.train.rounds):
        for i, model in enumerate(models):
            at = (config, federation, model, i, t, active(t), gradients)
            local_steps(*at, lambda name, now, before: pull * (now - before))
        trained, linked = [state_of(model) for model in models], federation.topology.at(t).adjacency
        before = [{j: each for j, each in own.items() if max_age is None or t - each[0] <= max_age} for own in held]
        held = [dict(own) for own in before]
        for i, own in enumerate(held):
            for j in np.flatnonzero(linked[i]).tolist():
                for origin, each in before[j].items():
                    if origin not in own or each[0] > own[origin][0]:
                        own[origin] = each
            for j in [i, *np.flatnonzero(linked[i]).tolist()]:
                own[j] = (t, trained[j])
            if contacts and not linked[i].any():
                continue
            alpha = {j: rows_of[j] if rows else 1 for j in own}
            mixed = {}
            for name, value in trained[i].items():
                mean = sum(alpha[j] * state[name] for j, (_, state) in own.items()) / sum(alpha.values())
                mixed[name] = value if config.adapter.head == "private" and "lora_" not in name else mean
            set_peft_model_state_dict(models[i], mixed)
    assert any(t - each[0] > 0 for own in held for each in own.values()), "nothing came over more than one link"
    return [state_of(model) for model in models]


CASES = [
    (["topology=path", "train.weight_decay=0.1"], {}, {}),
    (["topology=path", "adapter.head=private"], {"max_age": 1, "pull": 0.5}, {"max_age": 1, "pull": 0.5}),
    (
        ["topology.kind=random", "topology.p=0.3", "train.rounds=5", "train.block=3", "seed=5"],
        {"interval": 1, "weights": "rows", "when": "contacts"},
        {"rows": True, "contacts": True},
    ),
]


@pytest.mark.parametrize(("words", "own", "by_hand"), others_slow(CASES, [2]))
def test_cached_dfl_equals_a_plain_loop(config, words, own, by_hand):
    given = [f"algorithm.{name}={value}" for name, value in own.items()]
    chosen = config("bert", "algorithm.name=cached-dfl", *given, *words)
    active = (lambda t: "BA"[t % 2]) if "interval" in own else (lambda t: "AB")
    plain = run_plain(chosen, compose(chosen), active, **by_hand)
    assert largest_difference(run_stacked(compose(chosen)), plain) < 1e-9


def test_two_shards_of_two_equal_one_of_four(config):
    chosen = config("bert", "algorithm.name=cached-dfl", "topology=path", "adapter.dropout=0.3")
    whole = run_stacked(compose(chosen))
    assert float((run_in_two_shards(chosen) - whole.flat).abs().max()) < 1e-12
