"""Runs whose clients relay adapters: what changes, what does not, and what they leave behind."""

import dataclasses
import json
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from peerlora.errors import Stopped
from peerlora.runs.events import Evaluated, RoundDone, RunStarted, contradiction, from_json, to_json
from peerlora.runs.metrics import select_events, summarise
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import build_rounds, resume, simulate

QUICK = ["train.rounds=4", "train.local_steps=1", "eval.every=2", "topology=path"]
RELAY = "exchange.relay={}"


def of(run, kind):
    return select_events(read_events(run), kind)


def without_relay(event):
    """An event of a run with relaying as it is without; times left out."""
    gone = {"measures": {}, "relayed": [], "relayed_loss": [], "relayed_cut": float("nan"), "bytes_sent": 0}
    gone |= {name: 0.0 for name in ("seconds", "seconds_train", "seconds_mix", "seconds_diagnostics")}
    known = {field.name for field in dataclasses.fields(event)}
    return to_json(dataclasses.replace(event, **{name: value for name, value in gone.items() if name in known}))


@pytest.mark.parametrize(
    "words",
    [
        ["algorithm.name=dec-lora"],
        ["algorithm.name=adf-lora", "algorithm.interval=1", "adapter.head=private"],
        ["algorithm.name=decaf", "adapter.rank=[1,2,3,3]", "train.optimizer_state=round"],
        ["algorithm.name=ffa-lora", "adapter.head=frozen"],
        ["algorithm.name=k-gt", "algorithm.step=0.5"],
        ["algorithm.name=dec-lora", "topology=complete", "adversary.attack=sign-flip", "exchange.robust=median"],
        ["algorithm.name=dec-lora", "clock.speed=[1,1,1,0.2]", "clock.deadline=3"],
    ],
    ids=lambda words: words[0].removeprefix("algorithm.name=") + str(len(words)),
)
def test_training_is_bit_identical_with_and_without(config, tmp_path, words):
    plain = simulate(config("bert", *QUICK, *words), tmp_path / "plain", report=False)
    relayed = simulate(config("bert", *QUICK, *words, RELAY), tmp_path / "relayed", report=False)
    assert torch.equal(plain.adapters.flat, relayed.adapters.flat)
    for kind in (RoundDone, Evaluated):
        ours, theirs = ([without_relay(event) for event in of(each.run, kind)] for each in (relayed, plain))
        assert ours == theirs
    assert plain.relayed is None and relayed.relayed is not None
    assert not torch.equal(relayed.relayed.flat, relayed.adapters.flat)
    assert "relayed_mean" in relayed.summary["scores"] and "relayed_mean" not in plain.summary["scores"]


def test_a_stopped_and_resumed_run_equals_an_undisturbed_one(config, tmp_path):
    words = [*QUICK, "train.rounds=7", "topology.kind=random", "topology.p=0.4", "algorithm.interval=2"]
    words += ["exchange.relay={max_age: 4, weights: rows}", "eval.rows=5", "checkpoint.every=100"]
    whole = simulate(config("bert", *words), tmp_path / "whole", report=False).run
    rounds = iter(range(100))
    with pytest.raises(Stopped):
        simulate(config("bert", *words), tmp_path / "cut", report=False, stop=lambda: next(rounds) == 3)
    assert len(of(tmp_path / "cut", RoundDone)) == 4
    cut = resume(tmp_path / "cut", report=False).run
    for name in ("all", "relayed", "entries"):
        file = f"adapters/{name}.safetensors"
        assert (whole / file).read_bytes() == (cut / file).read_bytes(), file
    for kind in (RoundDone, Evaluated):
        one, other = ([timeless(event) for event in of(run, kind)] for run in (whole, cut))
        assert one == other
    again = resume(cut, report=False)  # from the last checkpoint: what was held is evaluated and written again
    assert torch.equal(again.relayed.flat, load_file(whole / "adapters" / "relayed.safetensors")["flat"])
    assert (whole / "adapters/entries.safetensors").read_bytes() == (cut / "adapters/entries.safetensors").read_bytes()


def timeless(event):
    """An event as text, without what a clock on the wall has measured."""
    known = {field.name for field in dataclasses.fields(event)}
    clocks = ("seconds", "seconds_train", "seconds_mix", "seconds_diagnostics")
    return to_json(dataclasses.replace(event, **{name: 0.0 for name in clocks if name in known}))


def test_a_checkpoint_of_a_run_without_relaying_keeps_its_names(config, tmp_path):
    run = simulate(config("bert", *QUICK), tmp_path / "run", report=False).run
    with safe_open(run / "checkpoints" / "round-000004.safetensors", "pt") as file:
        assert not any("relay" in name for name in file.keys())


def test_events_measures_summary_and_table_tell_of_relayed_models(config, tmp_path):
    result = simulate(config("bert", *QUICK, RELAY), tmp_path / "run", report=False)
    last, done = of(result.run, Evaluated)[-1], of(result.run, RoundDone)[-1]
    federation = compose(config("bert", *QUICK, RELAY))
    scores = federation.learner.evaluate(result.relayed, federation.eval_data, 64)
    assert last.relayed == scores.metric.tolist() and last.relayed_loss == scores.loss.tolist()
    assert 0 < last.relayed_cut < 1
    told = result.summary["scores"]
    assert told["relayed_mean"] == pytest.approx(np.mean(last.relayed)) and told["relayed_worst"] == min(last.relayed)
    assert result.summary["deployed"] == "relayed"
    assert done.measures["relayed_known_min"] == 4 and done.measures["relayed_age_max"] == 2
    assert done.measures["relayed_entries"] > 0
    plain = of(simulate(config("bert", *QUICK), tmp_path / "plain", report=False).run, RoundDone)[-1]
    assert done.bytes_sent == plain.bytes_sent + done.measures["relayed_bytes"]
    table = result.metrics.to_pylist()
    rows = [row for row in table if row["metric"] == "relayed" and row["round"] == 4]
    assert [(row["client"], row["value"]) for row in rows] == list(enumerate(last.relayed))
    assert {"relayed_loss", "relayed_cut", "relayed_age_mean", "relayed_bytes"} <= {row["metric"] for row in table}


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, "fp64"), (1e305, "fp64"), (1e30, "fp32")])
def test_an_attacker_has_no_relayed_score_and_ends_no_run(config, tmp_path, scale, dtype):
    words = ["algorithm.name=dec-lora", "topology=complete", "exchange.robust=median", f"train.dtype={dtype}"]
    words += [f"adversary={{clients: [2], attack: sign-flip, scale: {scale}}}", RELAY]
    result = simulate(config("bert", *QUICK, *words), tmp_path / "run", report=False)
    for score in of(result.run, Evaluated):
        assert np.isnan(score.relayed[2]) and np.isnan(score.own[2])
        assert len(score.relayed) == 4 and not np.isnan(score.relayed[0])
    assert result.summary["scores"]["relayed_mean"] is not None


def test_before_training_everybody_deploys_the_common_start(config, tmp_path):
    run = simulate(config("bert", *QUICK, RELAY), tmp_path / "run", report=False).run
    first = of(run, Evaluated)[0]
    assert first.round == 0 and first.relayed == first.own


def test_an_event_of_an_older_version_has_no_relayed_models():
    line = json.loads(to_json(Evaluated(1, 2, [0.5], 0.5, [1.0], 1.0, 0.0, True)))
    for name in ("relayed", "relayed_loss", "relayed_cut"):
        del line[name]
    event = from_json(json.dumps(line))
    assert event.relayed == [] and event.relayed_loss == []
    assert "relayed_mean" not in summarise([event])["scores"]
    start = RunStarted("", "m", 1, 2, "accuracy", True, 0, 1, {}, {}, {}, 1, [])
    assert not contradiction(event, start)
    assert "of 2 clients" in contradiction(
        dataclasses.replace(event, relayed=[0.1, 0.2], relayed_loss=[1.0, 1.0]), start
    )


def test_two_shards_of_two_hold_what_one_of_four_holds(config):
    """Each process gathers what all put into the mixing, and so knows what every client has heard of."""
    chosen = config("bert", *QUICK, RELAY, "algorithm.name=dec-lora")
    shared, barrier = {}, threading.Barrier(2)

    def gather(first):
        def collect(rows):
            shared[first] = rows
            barrier.wait(timeout=60)
            everybody = torch.cat([shared[key] for key in sorted(shared)])
            barrier.wait(timeout=60)
            return everybody

        return collect

    def run(federation):
        rounds = build_rounds(federation)
        state = federation.algorithm.start(federation.start, federation.exchange)
        for t in range(4):
            state, told = rounds.advance(t, state)
        return federation.exchange.relayed_models(federation.algorithm.model(state)).adapters.flat, told.bytes_sent

    whole, sent = run(compose(chosen))
    parts = {clients[0]: compose(chosen, clients=clients, gather=gather(clients[0])) for clients in ([0, 1], [2, 3])}
    found = {}
    threads = [
        threading.Thread(target=lambda first=first, part=part: found.update({first: run(part)}))
        for first, part in parts.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    torch.testing.assert_close(torch.cat([found[0][0], found[2][0]]), whole, rtol=0, atol=1e-12)
    assert found[0][1] + found[2][1] == sent
