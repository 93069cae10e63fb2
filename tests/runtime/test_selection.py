"""Best rounds and the early end of training: by hand, against shorter runs, resumed, and by real peers."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from in_memory import federation
from peft import PeftModel
from safetensors.torch import load_file
from toys import SPEC, adapters
from transformers import AutoModelForSequenceClassification

from cases import others_slow
from peerlora.algorithms import REGISTRY
from peerlora.errors import CompositionError, RunError, Stopped
from peerlora.runs.events import Evaluated, RoundDone, RunStarted, Warned
from peerlora.runs.metrics import evaluations, select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.export import export_from_run
from peerlora.runtime.model_choice import ModelChoice
from peerlora.runtime.plan import plan
from peerlora.runtime.selection import BestRounds, Selection
from peerlora.runtime.simulate import resume, simulate

pytestmark = pytest.mark.usefixtures("no_reports")

NAN = float("nan")


# --- the rule


def best(mode="max", patience=None, clients=(0, 1), honest=(0, 1)):
    return BestRounds(Selection("accuracy", mode, "common", "own"), patience, clients, honest)


def x_of(*values):
    return adapters(torch.tensor(values, dtype=torch.float64)[:, None].repeat(1, SPEC.parameters))


def offered(kept, *evaluations):
    """Offer values whose adapters are filled with 10 times the evaluation's number plus the row."""
    return [
        kept.offer(done, np.array(values, dtype=float), x_of(*(10 * done + row for row in range(len(values)))))
        for done, values in enumerate(evaluations)
    ]


def test_each_client_keeps_the_first_of_its_best_evaluations():
    kept = best()
    offered(kept, [0.5, 0.9], [0.7, 0.9], [0.7, 0.3], [0.6, 0.95])
    assert kept.rounds == [1, 3] and kept.values.tolist() == [0.7, 0.95]
    assert kept.x.flat[:, 0].tolist() == [10.0, 31.0]
    kept = best("min")
    offered(kept, [0.5, 0.9], [0.7, 0.9], [0.4, 0.3])
    assert kept.rounds == [2, 2]


def test_a_value_that_is_no_number_is_never_better_and_does_not_count():
    kept = best(patience=2)
    ended = offered(kept, [NAN, 0.5], [NAN, NAN], [0.1, NAN], [0.1, 0.4], [NAN, 0.3])
    assert kept.rounds == [2, 0] and ended == [[], [], [], [], [1]]
    assert kept.x.flat[:, 0].tolist() == [20.0, 1.0]


def test_a_client_that_is_never_scored_keeps_its_newest_adapters_and_trains_on():
    kept = best(patience=1)
    ended = offered(kept, [NAN, 0.5], [NAN, 0.6], [NAN, 0.7])
    assert ended == [[], [], []] and kept.rounds == [2, 2] and kept.x.flat[0, 0] == 20.0


def test_patience_counts_evaluations_in_a_row_and_ends_training_for_good():
    kept = best(patience=2)
    ended = offered(kept, [0.5, 0.5], [0.5, 0.6], [0.6, 0.6], [0.6, 0.5], [0.5, 0.9], [0.9, 0.9])
    assert ended == [[], [], [], [1], [0], []] and kept.stopped == {0, 1}
    assert kept.rounds == [5, 4], "its best is looked for on, since it mixes on"


def test_the_last_evaluation_ends_nobodys_training():
    kept = best(patience=1)
    offered(kept, [0.5, 0.5], [0.4, 0.6])
    assert kept.stopped == {0} and kept.offer(2, np.array([0.9, 0.1]), x_of(20, 21), last=True) == []
    assert kept.stopped == {0} and kept.rounds == [2, 1], "the best is looked for, to the end"


def test_attackers_do_not_follow_the_rule():
    kept = best(patience=1, clients=(4, 7), honest=(0,))
    assert offered(kept, [0.5, 0.5], [0.5, 0.5]) == [[], [4]]
    assert np.isnan(kept.as_fields()["best"][1]) and kept.as_fields()["stopped"] == [4]


def test_what_is_kept_goes_through_a_checkpoint():
    kept, again = best(patience=2), best(patience=2)
    offered(kept, [0.5, NAN], [0.4, NAN], [0.3, 0.2], [0.2, 0.1])
    tensors, facts = kept.state_dict()
    facts = json.loads(json.dumps(facts).replace("NaN", "null"))
    again.load_state_dict(tensors, facts, x_of(0, 0))
    more = [0.6, 0.1]
    assert again.offer(4, np.array(more), x_of(7, 8)) == kept.offer(4, np.array(more), x_of(7, 8)) == [1]
    assert again.as_fields() == kept.as_fields() and torch.equal(again.x.flat, kept.x.flat)
    assert again.stopped == {0, 1} and again.rounds == [4, 2]


# --- runs

EVERY = ["train.rounds=6", "eval.every=1", "train.lr=0.03", "algorithm.name=dec-lora"]
LOSS = ["eval.select.metric=loss", "eval.own=true"]


def told(run):
    """What a run tells, without seconds and times; as text, because NaN does not equal itself."""
    events = read_events(run)
    rounds = [(each.loss, each.measures, each.bytes_sent) for each in select_events(events, RoundDone)]
    scores = [replace(each, seconds=0.0) for each in select_events(events, Evaluated)]
    return str((rounds, scores, [each.message for each in select_events(events, Warned)]))


@pytest.mark.parametrize("rows", ["common", "own"])
def test_the_best_adapters_are_those_of_a_run_that_ends_there(config, tmp_path, rows):
    chosen = config("bert", *EVERY, *LOSS, f"eval.select.rows={rows}")
    result = simulate(chosen, tmp_path / "run")
    found = evaluations(read_events(result.run))
    field = "own_loss" if rows == "common" else "personal_loss"
    summary = result.summary["best"]
    for client in range(4):
        values = [getattr(each, field)[client] for each in found]
        assert summary["rounds"][client] == int(np.argmin(values)) and summary["values"][client] == min(values)
    assert len(set(summary["rounds"])) > 1, "a case that tells the clients apart"
    for done in set(summary["rounds"]) - {0}:
        shorter = simulate(config("bert", *EVERY, *LOSS, f"train.rounds={done}"), tmp_path / f"short-{done}")
        for client in [i for i in range(4) if summary["rounds"][i] == done]:
            assert torch.equal(result.best.flat[client], shorter.adapters.flat[client])


def test_of_a_sample_the_last_evaluation_counts_as_the_others_do(config, tmp_path):
    chosen = config("bert", *EVERY, "eval.select={}", "eval.rows=3", "data.holdout=0.3")
    found = simulate(chosen, tmp_path / "run")
    thirds = [value * 3 for value in found.summary["best"]["values"]]
    assert thirds == pytest.approx([round(value) for value in thirds]) and found.summary["best"]["metric"] == "accuracy"


def test_a_client_that_has_had_patience_trains_no_more(config, tmp_path):
    """Without an exchange its adapters stay what they are when it ends, and those of others go on."""
    words = [*EVERY, *LOSS, "algorithm.name=local", "train.lr=0.1", "eval.patience=1"]
    whole = simulate(config("bert", *words), tmp_path / "run")
    events = read_events(whole.run)
    ended = {}
    for each in select_events(events, Evaluated):
        ended |= {client: each.round for client in each.stopped if client not in ended}
    assert ended and max(ended.values()) < 6
    for client, done in ended.items():
        losses = [each.loss[client] for each in select_events(events, RoundDone)]
        assert [np.isnan(loss) for loss in losses] == [t >= done for t in range(6)]
        shorter = simulate(config("bert", *words, f"train.rounds={done}"), tmp_path / f"short-{client}")
        assert torch.equal(whole.adapters.flat[client], shorter.adapters.flat[client])
    assert any("no more after round" in each.message for each in select_events(events, Warned))


MIXED = [
    ["algorithm.name=adf-lora", "algorithm.interval=1", "train.optimizer_state=keep"],
    ["algorithm.name=dec-lora", "exchange.relay={}", "train.schedule=cosine"],
    ["algorithm.name=dec-lora", "clock.speed=[1, 1, 0.7, 0.3]", "clock.deadline=2.5"],
]


@pytest.mark.parametrize("words", others_slow(MIXED, [0, 2]))
@pytest.mark.parametrize("rounds", [2, 4])
def test_a_stopped_run_goes_on_to_the_bit(config, tmp_path, words, rounds):
    given = [*EVERY, *LOSS, "eval.patience=1", "train.lr=0.1", "eval.metrics=[auroc, macro-f1]", *words]
    chosen = config("bert", *given)
    whole, stopping = simulate(chosen, tmp_path / "whole"), iter([False] * (rounds - 1) + [True])
    with pytest.raises(Stopped):
        simulate(chosen, tmp_path / "part", stop=lambda: next(stopping, False))
    again = resume(tmp_path / "part")
    assert torch.equal(again.adapters.flat, whole.adapters.flat) and torch.equal(again.best.flat, whole.best.flat)
    assert told(again.run) == told(whole.run) and whole.summary["best"]["stopped"]


def test_a_run_that_ends_with_patience_tells_of_nobody_who_trained_to_its_end(config, tmp_path):
    given = [*EVERY, "train.rounds=1", "eval.select.metric=loss", "eval.select.mode=max", "eval.patience=1"]
    result = simulate(config("bert", *given), tmp_path / "run")
    assert 0 in result.summary["best"]["rounds"], "a client that has waited"
    assert result.summary["best"]["stopped"] == []
    assert not any("no more" in each.message for each in select_events(read_events(result.run), Warned))


def test_a_client_that_ends_on_a_clock_takes_no_more_time(config, tmp_path):
    given = [*EVERY, "eval.select.metric=loss", "eval.select.mode=max", "eval.patience=1", "clock.step=1"]
    ended = simulate(config("bert", *given, "train.lr=1e-9"), tmp_path / "run")  # nothing changes to speak of
    seconds = [each.virtual_seconds for each in select_events(read_events(ended.run), RoundDone)]
    stopped = [each.round for each in evaluations(read_events(ended.run)) if len(each.stopped) == 4][0]
    assert seconds == pytest.approx([2.0 * min(t + 1, stopped) for t in range(6)])


def test_what_is_deployed_is_what_is_kept(config, tmp_path):
    given = [*EVERY, *LOSS, "exchange.relay={}", "eval.select.rows=own"]
    result = simulate(config("bert", *given, "exchange.relay.deploy=relayed"), tmp_path / "run")
    best = result.summary["best"]
    assert best["model"] == "relayed" and result.summary["scores"]["personal_relayed_mean"] is not None
    found = evaluations(read_events(result.run))
    values = np.array([each.personal_relayed_loss for each in found])
    assert best["values"] == values.min(0).tolist() and best["rounds"] == values.argmin(0).tolist()
    for client in range(4):
        if best["rounds"][client] == 6:
            assert torch.equal(result.best.flat[client], result.relayed.flat[client])


def test_real_peers_decide_as_the_simulation_does(config, tmp_path):
    peer = ["peer.deadline=60", "peer.join=60", "train.block=1", "eval.metrics=[macro-f1]"]
    chosen = config("bert", *EVERY, *LOSS, *peer, "train.lr=0.1", "eval.patience=1", "eval.select.rows=own")
    whole, parts = simulate(chosen, tmp_path / "whole"), federation(chosen, tmp_path)
    (last,) = [each for each in select_events(read_events(whole.run), Evaluated) if each.final]
    assert last.stopped, "a case in which somebody ends"
    for client, part in enumerate(parts):  # of sums over other shapes the last bits may differ
        assert torch.allclose(part.adapters.flat[0], whole.adapters.flat[client], rtol=0, atol=1e-9)
        assert torch.allclose(part.best.flat[0], whole.best.flat[client], rtol=0, atol=1e-9)
        (own,) = [each for each in select_events(read_events(part.run), Evaluated) if each.final]
        assert own.best_rounds == [last.best_rounds[client]]
        assert own.best == pytest.approx([last.best[client]], rel=1e-9)
        assert own.stopped == [client] * (client in last.stopped)
        assert own.personal == [last.personal[client]]
        assert own.metrics["personal"]["macro-f1"] == [last.metrics["personal"]["macro-f1"][client]]
        assert not any(each.missed for each in select_events(read_events(part.run), RoundDone))


def test_a_run_tells_by_what_it_selects_and_leaves_a_peft_folder_of_it(config, tmp_path, monkeypatch):
    result = simulate(config("bert", *EVERY, *LOSS), tmp_path / "run")
    (start,) = select_events(read_events(result.run), RunStarted)
    assert start.select == {"metric": "loss", "mode": "min", "rows": "common", "model": "own"}
    card = (result.run / "adapters" / "best" / "client-01" / "README.md").read_text()
    assert f"round {result.summary['best']['rounds'][1]}, by loss" in card and "on the common rows" in card
    with monkeypatch.context() as patch:
        patch.setattr("peerlora.runtime.export.exporter_of", lambda run: pytest.fail("the base was loaded"))
        export_from_run(result.run, tmp_path / "exported", ModelChoice(1, model="best"))
    shutil.rmtree(result.run / "adapters" / "best")  # as a run of many clients, which writes none
    export_from_run(result.run, tmp_path / "made", ModelChoice(1, model="best"))
    written, made = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exported", "made"))
    assert written.keys() == made.keys() and all(torch.equal(written[name], made[name]) for name in made)
    assert (tmp_path / "made" / "README.md").read_text() == card
    chosen, rows = compose(config("bert", *EVERY, *LOSS)), 5
    ours = chosen.learner.logits(result.best, chosen.eval_data, 64)[1, :rows]
    base = AutoModelForSequenceClassification.from_pretrained(chosen.config.model.source, num_labels=3)
    loaded = PeftModel.from_pretrained(base.double(), tmp_path / "exported").eval()
    data = chosen.eval_data
    for row in range(rows):
        ids = torch.from_numpy(data.ids[data.starts[row] : data.starts[row + 1]].astype(np.int64))[None]
        with torch.no_grad():
            assert torch.allclose(loaded(input_ids=ids).logits[0].double(), torch.from_numpy(ours[row]), atol=1e-4)


def test_a_run_that_keeps_none_has_none_to_export(config, tmp_path):
    result = simulate(config("bert", "algorithm.name=dec-lora"), tmp_path / "run")
    assert result.best is None and "best" not in result.summary
    with pytest.raises(RunError, match="has kept no best adapters"):
        export_from_run(result.run, tmp_path / "exported", ModelChoice(0, model="best"))


def test_attackers_neither_end_nor_count(config, tmp_path):
    given = [*EVERY, *LOSS, "adversary.clients=[2]", "eval.patience=1", "train.lr=0.1"]
    result = simulate(config("bert", *given), tmp_path / "run")
    best = result.summary["best"]
    assert best["values"][2] is None and best["stopped"] and 2 not in best["stopped"]


# --- refusals

ALONE = {"dec-lora", "adf-lora", "tad-lora", "ffa-lora", "rolora", "fedit", "fedsa-lora", "decaf", "flexlora", "local"}
ALONE |= {"fedrot-lora", "lora-fair", "dsgd", "dfedavg", "dfedavgm", "dfedsam", "fedprox", "sgp"}
TIED = {"k-gt", "d2", "dfedadmm", "choco", "hetlora", "qg-adam", "noloco", "push-diging", "consensus-admm", "ad-psgd"}


def words_of(name):
    one = ["train.local_steps=1"] if REGISTRY[name].traits.one_step else []
    pushes = ["topology.weights=push-sum"] if name in ("sgp", "push-diging") else []
    return [f"algorithm.name={name}", "eval.select={}", *one, *pushes]


@pytest.mark.parametrize("name", sorted(ALONE | TIED))
def test_a_client_may_end_where_its_rounds_train_and_mix_and_no_more(config, name):
    plan(config("bert", *words_of(name)))
    if name in ALONE:
        plan(config("bert", *words_of(name), "eval.patience=2"))
        return
    with pytest.raises(CompositionError, match=f"{name} cannot let a client end its training .*; drop eval.patience"):
        plan(config("bert", *words_of(name), "eval.patience=2"))


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_methods_that_merge_keep_no_best_round(config, name):
    plan(config("bert", f"algorithm.name={name}", "topology=complete"))
    with pytest.raises(CompositionError, match=f"{name} cannot keep the adapters of a best round"):
        plan(config("bert", f"algorithm.name={name}", "topology=complete", "eval.select={}"))


def test_a_run_of_an_older_version_goes_on_to_the_bit(config, tmp_path):
    """Its stored config knows none of the settings of this page."""
    chosen = config("bert", "algorithm.name=adf-lora", "train.rounds=5", "train.optimizer_state=keep")
    whole, stopping = simulate(chosen, tmp_path / "whole"), iter([False, True])
    with pytest.raises(Stopped):
        simulate(chosen, tmp_path / "part", stop=lambda: next(stopping, False))
    place = tmp_path / "part" / "config.yaml"
    tree = yaml.safe_load(place.read_text())
    for section, names in {
        "train": ("accumulate", "class_weights", "max_seconds"),
        "eval": ("metrics", "own", "select", "patience"),
    }.items():
        for name in names:
            del tree[section][name]
    place.write_text(yaml.safe_dump(tree))
    again = resume(tmp_path / "part", expected=lambda stored: chosen)
    assert torch.equal(again.adapters.flat, whole.adapters.flat) and told(again.run) == told(whole.run)
