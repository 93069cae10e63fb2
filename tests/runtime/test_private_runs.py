"""Runs with privacy: what they promise, count, refuse and leave behind."""

import json
import os
import runpy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from cases import others_slow
from peerlora.algorithms import REGISTRY, build_algorithm, describe_algorithms
from peerlora.algorithms.base import is_asynchronous
from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits
from peerlora.config.loading import load_config
from peerlora.errors import CompositionError, ConfigError, ModelError, RunError, Stopped
from peerlora.experiments.measures import measure_run
from peerlora.plugins import METHODS, TASKS
from peerlora.runs import privacy_ledger
from peerlora.runs.events import Evaluated, RoundDone, Warned
from peerlora.runs.metrics import evaluations, select_events
from peerlora.runs.privacy_ledger import FILE, PrivacyLedger, Release
from peerlora.runs.report import write_report
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.plan import plan
from peerlora.runtime.privacy import NO_GUARANTEE, check_task, exhaustion_notice
from peerlora.runtime.privacy_plan import plan_privacy
from peerlora.runtime.simulate import resume, simulate
from peerlora.runtime.whole_model import merge_from_run
from peerlora.train import accounting
from peerlora.train.base import LocalPlan
from peerlora.train.tasks import Classification


@pytest.fixture(autouse=True)
def quick_accountant(request, monkeypatch):
    """Epsilon is a simple function of noise, rate and releases, but where the real accountants are the subject."""
    if "real_accountant" in request.fixturenames:
        return

    def epsilon(noise, rate, releases, delta, accountant):
        return 0.0 if releases == 0 else np.inf if noise == 0 else 10 * rate * releases**0.5 / noise

    def noise(epsilon, rate, releases, delta, accountant):
        return 10 * rate * releases**0.5 / epsilon

    monkeypatch.setattr("peerlora.train.privacy.spent_epsilon", epsilon)
    monkeypatch.setattr("peerlora.runtime.privacy_plan.spent_epsilon", epsilon)
    monkeypatch.setattr("peerlora.runtime.privacy.spent_epsilon", epsilon)
    monkeypatch.setattr("peerlora.runtime.privacy.noise_for", noise)
    monkeypatch.setattr("peerlora.runtime.privacy.has_accountants", lambda: True)


@pytest.fixture
def real_accountant():
    if not accounting.has_accountants():
        pytest.skip("opacus is missing; install the extra privacy")


def test_a_run_tells_what_was_planned_and_what_was_spent(config, tmp_path, real_accountant):
    chosen = config("bert", "privacy.epsilon=8", "train.batch=[2, 4, 4, 2]", "train.rounds=3", "eval.every=1")
    result = simulate(chosen, tmp_path / "run")
    told = result.summary["privacy"]
    assert told["guarantee"] == NO_GUARANTEE == "simulation, no guarantee" and told["generator"] == "seeded"
    assert told["planned"]["releases"] == told["spent"]["releases"] == [6] * 4
    rows = told["planned"]["rows"]
    assert told["planned"]["delta"] == pytest.approx([n**-1.1 for n in rows])
    assert told["planned"]["rate"] == pytest.approx([b / n for b, n in zip([2, 4, 4, 2], rows, strict=True)])
    assert all(7.9 < each <= 8 for each in told["spent"]["epsilon"])
    assert told["planned"]["noise"][1] > told["planned"]["noise"][0] > 0.2
    events = read_events(result.run)
    spent = np.array([each.privacy["epsilon"] for each in evaluations(events)])
    assert (spent[0] == 0).all() and (np.diff(spent, axis=0) > 0).all()
    assert measure_run(events, chosen)["epsilon spent"] == pytest.approx(max(told["spent"]["epsilon"]))
    page = (result.run / "report.html").read_text()
    assert "spent epsilon" in page and NO_GUARANTEE in page
    card = (result.run / "adapters/client-02/README.md").read_text()
    assert "| epsilon spent | 8 of 8 planned |" in card and NO_GUARANTEE in card
    for client in (2, None):
        whole = merge_from_run(result.run, tmp_path / f"whole-{client}", client)
        card = (whole / "README.md").read_text()
        assert "- epsilon spent: 8 of 8 planned\n" in card and NO_GUARANTEE in card
    table = result.metrics.to_pandas()
    assert len(table[table.metric == "privacy_epsilon"]) == 4 * len(spent)


def test_the_figure_of_scores_by_epsilon_is_drawn(config, tmp_path, monkeypatch):
    result = simulate(config("bert", "privacy.noise=1", "eval.every=1"), tmp_path / "run", report=False)
    monkeypatch.undo()
    assert "by epsilon spent" in write_report(result.run).read_text()


def test_without_noise_epsilon_has_no_bound(config, tmp_path, no_reports):
    result = simulate(config("bert", "privacy.noise=0"), tmp_path / "run")
    assert result.summary["privacy"]["spent"]["epsilon"] == [None] * 4
    assert "without bound of without bound" in (result.run / "adapters/client-00/README.md").read_text()
    assert json.loads((result.run / "summary.json").read_text()) == json.loads(json.dumps(result.summary))


def test_a_stopped_run_goes_on_to_the_bit_and_counts_nothing_twice(config, tmp_path, no_reports):
    chosen = config("bert", "privacy.epsilon=8", "train.rounds=5", "checkpoint.every=2", "adapter.dropout=0.2")
    whole, stopping = simulate(chosen, tmp_path / "whole"), iter([False, False, True])
    with pytest.raises(Stopped):
        simulate(chosen, tmp_path / "part", stop=lambda: next(stopping, False))
    part = resume(tmp_path / "part")
    assert torch.equal(part.adapters.flat, whole.adapters.flat)
    assert part.summary["privacy"] == whole.summary["privacy"]
    assert not (part.run / FILE).exists()


def killed_after(rounds):
    """A sink by which a run dies after so many rounds, without a checkpoint of the last."""

    def sink(event):
        if isinstance(event, RoundDone) and event.round + 1 == rounds:
            raise KeyboardInterrupt

    return sink


def test_rounds_that_a_resumed_run_repeats_are_counted_again_and_use_up_the_budget(config, tmp_path, no_reports):
    """With the system's generator rounds after the last checkpoint have been spent, and may have been sent."""
    words = ["privacy.epsilon=8", "privacy.generator=system", "train.rounds=4", "checkpoint.every=2"]
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        simulate(config("bert", *words), folder, sinks=[killed_after(3)])
    assert list(PrivacyLedger(folder).entries()) == [(client, 2) for _ in range(3) for client in range(4)]
    result = resume(folder)
    told, events = result.summary["privacy"], read_events(folder)
    assert told["spent"]["releases"] == told["planned"]["releases"] == [8] * 4
    assert told["spent"]["epsilon"] == pytest.approx([8.0] * 4)
    losses = [each.loss for each in select_events(events, RoundDone)]
    assert np.isnan(losses[3]).all() and np.isfinite(losses[2]).all()
    told = [each.message for each in select_events(events, Warned) if "used up" in each.message]
    assert told == ["clients 0, 1, 2, 3 have used up privacy.epsilon=8 by round 3: they train no more and go on mixing"]
    assert len(select_events(events, RoundDone)) == 4 and result.summary["rounds"] == 4


def test_a_run_without_any_checkpoint_still_knows_what_it_spent(config, tmp_path, no_reports):
    folder = tmp_path / "run"
    words = ["privacy.epsilon=8", "privacy.generator=system", "train.rounds=2", "checkpoint.every=2"]
    with pytest.raises(KeyboardInterrupt):
        simulate(config("bert", *words), folder, sinks=[killed_after(1)])
    assert resume(folder).summary["privacy"]["spent"]["releases"] == [4] * 4
    assert sum(releases for _, releases in PrivacyLedger(folder).entries()) == 16


@pytest.mark.parametrize("damage", [b'{"client":0}\n', b"\xff\n", b'{"client":0,"job":0,"releases":-2}\n'])
def test_a_damaged_count_is_refused_and_half_a_line_is_none(tmp_path, damage):
    ledger = PrivacyLedger(tmp_path)
    ledger.append([Release(3, 0, 10)])
    with open(ledger.path, "ab") as file:
        file.write(damage[:-1])
    assert list(ledger.entries()) == [(3, 10)]
    ledger.append([Release(1, 0, 5), Release(2, 0, 5)])
    assert list(ledger.entries()) == [(3, 10), (1, 5), (2, 5)], "the next line begins anew"
    ledger.path.write_bytes(b'{"client":3,"job":0,"releases":10}\n' + damage)
    with pytest.raises(RunError, match="line 2 is damaged"):
        list(ledger.entries())


@pytest.mark.parametrize("torn", [b"", b"{", b"\0" * 9000])
def test_a_count_reads_its_last_line_only_whatever_a_kill_left_behind(tmp_path, torn, monkeypatch):
    ledger, synced = PrivacyLedger(tmp_path), []
    monkeypatch.setattr(os, "fsync", synced.append)
    for job in range(2000):
        ledger.append([Release(client, job, 10) for client in range(2)])
    assert len(synced) == 2001, "once for each append, and once for the file's name"
    with open(ledger.path, "ab") as file:
        file.write(torn)
    read, real = [], privacy_ledger._end_of_lines

    def counted(file):
        end = real(file)
        read.append(file.tell() - end)
        return end

    monkeypatch.setattr(privacy_ledger, "_end_of_lines", counted)
    ledger.append([Release(3, 2000, 1)])
    assert max(read) <= len(torn), "nothing before the last whole line is looked for"
    found = list(ledger.entries())
    assert len(found) == 4001 and found[-1] == (3, 1) and b"\0" not in ledger.path.read_bytes()


@pytest.mark.parametrize(("method", "told"), [("dec-lora", None), ("d2", "its clients keep more than their adapters")])
def test_a_used_up_budget_is_told_with_what_it_does_to_the_method(config, method, told):
    reason = build_algorithm(method, {}).training_end_refusal
    private = compose(config("bert", "privacy.epsilon=8")).learner.privacy
    found = exhaustion_notice(private, [1], 4, reason)
    begun = "client 1 has used up privacy.epsilon=8 by round 4: it trains no more and goes on mixing"
    assert found == begun if told is None else found.startswith(f"{begun}; ") and told in found


def test_a_used_up_budget_is_told_once_however_often_a_run_is_resumed(config, tmp_path, no_reports):
    words = ["privacy.epsilon=8", "privacy.generator=system", "train.rounds=6", "checkpoint.every=1"]
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        simulate(config("bert", *words), folder, sinks=[killed_after(3)])
    PrivacyLedger(folder).append([Release(0, 3, 6)])  # client 0 has no budget left after its third round
    for rounds in (5, 6):
        with pytest.raises(KeyboardInterrupt):
            resume(folder, sinks=[killed_after(rounds)])
    resume(folder)
    told = [each.message for each in select_events(read_events(folder), Warned)]
    assert sum("client 0 has used up" in each for each in told) == 1


def test_answers_to_private_rows_are_not_printed(config, chats, tmp_path):
    words = ["task.kind=chat", f"data.train=jsonl:{chats}", "data.label=null", "data.max_length=32", "privacy.noise=1"]
    asks = "eval.generate={rows: 1, max_new_tokens: 2}"
    with pytest.raises(CompositionError, match=r"eval.generate would print rows held out of private ones"):
        compose(config("llama", *words, asks))
    compose(config("llama", *words, asks, f"data.eval=jsonl:{write_public(tmp_path, chats)}"))
    compose(config("llama", *words))


def write_public(folder, rows):
    """Other rows, which are nobody's."""
    (folder / "public.jsonl").write_text(rows.read_text())
    return folder / "public.jsonl"


def test_a_client_that_is_away_spends_less(config, tmp_path, no_reports):
    away = "clock.away=[{client: 1, leave: 1, back: 3}]"
    result = simulate(config("bert", "privacy.noise=1", "train.rounds=4", away), tmp_path / "run")
    assert result.summary["privacy"]["spent"]["releases"] == [8, 4, 8, 8]
    epsilon = result.summary["privacy"]["spent"]["epsilon"]
    assert epsilon[1] < min(epsilon[:1] + epsilon[2:])


PRIVATE = [name for name, kind in REGISTRY.items() if kind.traits.privacy_refusal("row") is None]
SETTINGS = {name: ["train.lr=0.1", "train.local_steps=1"] for name in ("dsgd", "d2")}
SETTINGS |= {"salf": ["clock.speed=[1, 0.5, 0.25, 1]", "clock.deadline=3"]}


@pytest.mark.parametrize("method", others_slow(PRIVATE, ["k-gt", "ad-psgd", "flora"]))
def test_methods_run_with_private_rows(config, tmp_path, no_reports, method):
    chosen = config("bert", f"algorithm.name={method}", "privacy.noise=0.5", *SETTINGS.get(method, []))
    told = simulate(chosen, tmp_path / "run").summary["privacy"]
    spent, planned = (sum(told[which]["releases"]) for which in ("spent", "planned"))
    assert planned == 3 * chosen.train.local_steps * 4
    if method == "salf":  # who computes no layer in time releases nothing
        assert 0 < spent < planned
    else:
        assert spent == planned or is_asynchronous(REGISTRY[method]) and spent >= planned


@pytest.mark.parametrize(("unit", "per_round"), [("row", 2), ("client", 1)])
@pytest.mark.parametrize(
    ("own", "rounds", "trained"),
    [(["algorithm.settle=1"], 7, 5), (["algorithm.settle=1", "train.quiet=0.25"], 8, 4), ([], 6, 3)],
)
def test_rounds_that_only_mix_take_nothing_of_the_budget(
    config, tmp_path, no_reports, unit, per_round, own, rounds, trained
):
    """The graph of the last one chooses 3 rounds of mixing alone for 2 that train."""
    words = ["algorithm.name=rac-lora", "algorithm.chain=2", f"train.rounds={rounds}", "eval.every=8", *own]
    chosen = config("bert", "privacy.epsilon=8", f"privacy.unit={unit}", *words)
    told = simulate(chosen, tmp_path / "run").summary["privacy"]
    assert told["spent"]["releases"] == told["planned"]["releases"] == [trained * per_round] * 4
    assert told["spent"]["epsilon"] == pytest.approx([8.0] * 4)
    found = plan_privacy(chosen)
    assert found["planned"]["noise"] == told["planned"]["noise"]
    assert found["by_round"][-1]["epsilon"] == pytest.approx([8.0] * 4)
    first = found["by_round"][0]
    assert first["round"] == 1 and first["epsilon"][0] == pytest.approx(8 / trained**0.5)
    same = next(
        each
        for each in found["choices"]
        if each["batch"] in (4, None) and each["rounds"] == chosen.train.training_rounds
    )
    assert same["epsilon"] == pytest.approx(8.0)


@pytest.mark.parametrize("method", others_slow(["dec-lora", "ad-psgd", "rolora"], [0]))
def test_clients_are_protected_as_a_whole(config, tmp_path, no_reports, method):
    words = ["privacy.unit=client", "privacy.epsilon=30", f"algorithm.name={method}", "train.label_prior=uniform"]
    told = simulate(config("bert", *words), tmp_path / "run").summary["privacy"]
    assert told["unit"] == "client" and told["planned"]["releases"] == [3] * 4 and told["planned"]["rate"] == [1.0] * 4


REFUSED = {
    "scores its own rows": ["algorithm.name=flood"],
    "two gradients": ["algorithm.name=dfedsam"],
    "sends mean gradients": ["algorithm.name=k-gt", "privacy.unit=client"],
    "label counts": ["train.label_prior=pooled", "privacy.unit=client"],
    "train.class_weights=none": ["train.class_weights=pooled", "privacy.unit=client"],
    "train.label_prior=uniform exclude": ["train.label_prior=uniform"],
    "train.class_weights=balanced exclude": ["train.class_weights=balanced"],
    "sorts a round's rows": ["train.batches=by-length"],
    "scores on private rows .eval.select.rows=own": ["eval.select={rows: own}", "eval.own=true"],
    "rows held out of data.train": ["eval.select={metric: loss}"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_tell_of_rows_is_refused_with_the_reason(config, reason):
    with pytest.raises(CompositionError, match=reason):
        plan(config("bert", "privacy.noise=1", *REFUSED[reason]))


def test_training_rows_as_evaluation_rows_are_refused_and_public_ones_are_not_warned_of(config, texts, tmp_path):
    with pytest.raises(CompositionError, match="who is among them"):
        plan(config("bert", "privacy.noise=1", f"data.eval=jsonl:{texts}"))
    public = tmp_path / "public.jsonl"
    public.write_bytes(texts.read_bytes())
    named = ["algorithm.name=dec-lora", f"data.eval=jsonl:{public}", "eval.select={metric: loss}"]
    assert not plan(config("bert", "privacy.noise=1", *named)).warnings
    assert "keep report and events" in plan(config("bert", "privacy.noise=1", named[0])).warnings[0]
    assert "eval.own=true" in plan(config("bert", "privacy.noise=1", *named[:2], "eval.own=true")).warnings[0]


def test_embeddings_and_models_that_mix_rows_are_refused(config, monkeypatch):
    words = ["adapter.modules_to_save=[word_embeddings]", "train.fast=false"]
    with pytest.raises(ModelError, match="embeddings such as"):
        compose(config("bert", "privacy.noise=1", *words))
    compose(config("bert", "privacy.noise=1", "privacy.unit=client", *words))
    from peerlora.lora.layer import Layout
    from peerlora.runtime import privacy

    federation = compose(config("bert"))
    federation.model.step.layout = Layout(rows_first=False)
    with pytest.raises(ModelError, match="mix the rows of a batch"):
        learner, chosen = federation.learner, config("bert", "privacy.noise=1")
        privacy.build_privacy(chosen, federation.algorithm, learner.shards, federation.model, learner.task, 9, False)


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_task_that_changes_the_losses_of_batches_and_not_of_rows_is_refused(config, monkeypatch):
    """Rows of the example's batches compete, so that no row has a loss of its own."""
    monkeypatch.setattr(TASKS, "_plugins", dict(TASKS._plugins))
    Contrastive = runpy.run_path(str(EXAMPLES / "own_task.py"))["Contrastive"]
    monkeypatch.setitem(globals(), "Contrastive", Contrastive)
    TASKS.register("contrastive", replace(Contrastive.kind, task=f"{__name__}:Contrastive"), __name__)
    words = ["task.kind=contrastive", "privacy.noise=1"]
    told = "Contrastive has losses of its own beside the row_losses of Classification"
    with pytest.raises(CompositionError, match=told):
        compose(config("bert", *words))
    compose(config("bert", *words, "privacy.unit=client"))
    compose(config("bert", words[0]))


class Doubled(Classification):
    """Every row counts twice: losses of batches follow, and so may be written down anew."""

    def row_losses(self, logits, batch):
        return 2 * super().row_losses(logits, batch)


class Both(Doubled):
    """Losses of both kinds."""

    def losses(self, logits, batch):
        return 2 * super().losses(logits, batch)

    def row_losses(self, logits, batch):
        return 2 * super().row_losses(logits, batch)


class Restated(Doubled):
    """Losses of batches that those of rows know nothing of."""

    def losses(self, logits, batch):
        return 3 * super().losses(logits, batch)


@pytest.mark.parametrize(("task", "refused"), [(Doubled, False), (Both, False), (Restated, True)])
def test_losses_of_rows_must_be_as_new_as_those_of_batches(task, refused):
    with pytest.raises(CompositionError, match="row_losses of Doubled") if refused else nullcontext():
        check_task(task())


@dataclass(frozen=True)
class Peeks(FactorGossip):
    """Declares nothing of rows, and scores or weighs them."""

    weighs: bool = False
    traits: ClassVar = Traits(source="nowhere", sends="adapters")

    def round(self, t, x, learner, peers):
        weights = torch.ones(x.clients, 99) if self.weighs else learner.score(x, learner.task.row_losses)
        return peers.mix(learner.fit(x, LocalPlan("AB", row_weights=weights)))


@pytest.mark.parametrize("unit", ["row", "client"])
@pytest.mark.parametrize("does", ["scores", "weighs"])
def test_a_method_that_looks_at_private_rows_without_saying_so_is_stopped(config, tmp_path, monkeypatch, does, unit):
    monkeypatch.setattr(METHODS, "_plugins", dict(METHODS._plugins))
    METHODS.register("peeks", Peeks, __name__)
    words = ["algorithm.name=peeks", f"algorithm.weighs={str(does == 'weighs').lower()}"]
    with pytest.raises(CompositionError, match=f"the method {does} rows, which no noise of privacy covers"):
        simulate(config("bert", *words, "privacy.noise=1", f"privacy.unit={unit}"), tmp_path / "run", report=False)
    simulate(config("bert", *words), tmp_path / "open", report=False)


class Undeclared(Peeks):
    """Does not say either whether it sends gradients."""

    traits: ClassVar = Traits(source="nowhere", sends="models")


def test_a_method_that_does_not_declare_what_it_sends_protects_no_client(config, monkeypatch):
    monkeypatch.setattr(METHODS, "_plugins", dict(METHODS._plugins))
    METHODS.register("undeclared", Undeclared, __name__)
    words = ["algorithm.name=undeclared", "privacy.noise=1"]
    with pytest.raises(CompositionError, match="does not declare whether its messages hold gradients"):
        plan(config("bert", *words, "privacy.unit=client"))
    plan(config("bert", *words))
    monkeypatch.setattr(Undeclared, "traits", replace(Undeclared.traits, sends_gradients=False))
    plan(config("bert", *words, "privacy.unit=client"))


@pytest.mark.parametrize("words", [[], ["privacy.epsilon=8", "privacy.noise=1"]])
def test_exactly_one_of_epsilon_and_noise_is_given(config, words):
    with pytest.raises(ConfigError, match="exactly one of them"):
        config("bert", "privacy.clip=2", *words)


def test_missing_accountants_are_told_before_anything_is_read(config, monkeypatch):
    monkeypatch.setattr("peerlora.runtime.privacy.has_accountants", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "opacus", None)
    with pytest.raises(ConfigError, match="pip install"):
        plan(config("bert", "privacy.noise=1"))


def test_shards_too_small_are_warned_of_with_numbers(config):
    loud = compose(config("bert", "privacy.noise=50", "train.rounds=100")).warnings
    (told,) = [each for each in loud if "longer than the way" in each]
    assert "4 of 4 clients" in told and "rows and noise 50" in told
    quiet = compose(config("bert", "privacy.noise=0.5", "train.rounds=1000", "train.batch=12")).warnings
    assert not any("longer than the way" in each for each in quiet)


def test_descriptions_list_methods_that_send_more_than_noise_covers():
    told = {name: facts["not_with"] for name, facts in describe_algorithms().items()}
    rows, clients = ({n for n in told if f"privacy.unit={unit}" in told[n]} for unit in ("row", "client"))
    assert rows == {"flood", "dfedsam", "dfedadmm-sam", "fedspeed", "swfp"}
    assert clients == {"flood", "k-gt", "push-diging", "swfp"}


def test_a_plan_tells_epsilon_by_round_and_of_other_choices(config, real_accountant):
    chosen = config("bert", "privacy.epsilon=8", "train.rounds=10", "train.batch=4")
    found = plan_privacy(chosen)
    ends = [each["epsilon"] for each in found["by_round"]]
    assert [each["round"] for each in found["by_round"]] == [1, 2, 5, 8, 10]
    assert (np.diff(np.array(ends), axis=0) > 0).all() and max(ends[-1]) == pytest.approx(8, rel=0.01)
    known = {(each["batch"], each["rounds"]): each["epsilon"] for each in found["choices"]}
    assert known[4, 10] == pytest.approx(8, rel=0.01)
    assert known[2, 10] < known[4, 10] < known[8, 10] and known[4, 5] < known[4, 10] < known[4, 20]
    assert found["guarantee"] == NO_GUARANTEE and found["generator"] == "seeded"


def test_a_plan_of_epochs_is_the_plan_of_the_rounds_that_they_become(config):
    tree = config("bert", "privacy.noise=1").model_dump(mode="json")
    del tree["train"]["rounds"]
    chosen = load_config(tree, ["train.epochs=5"])
    rounds = compose(chosen).config.train.rounds
    assert rounds != chosen.train.rounds, "a case in which it matters"
    assert plan_privacy(chosen) == plan_privacy(config("bert", "privacy.noise=1", f"train.rounds={rounds}"))


def test_a_site_plans_its_own_file_and_a_config_without_privacy_is_refused(config):
    own = ["partition.kind=own", "task.labels=[class0, class1, class2]", "privacy.noise=2"]
    found = plan_privacy(config("bert", *own))
    assert found["generator"] == "system" and len(found["planned"]["rows"]) == 1
    with pytest.raises(ConfigError, match="privacy is null"):
        plan_privacy(config("bert"))


def test_a_plan_of_one_client_is_that_of_a_real_peer(config):
    words = ["privacy.noise=2", "train.batch=[2, 4, 6, 8]"]
    one, all_of_them = (plan_privacy(config("bert", *words), client) for client in (2, None))
    assert one["clients"] == [2] and one["generator"] == "system" and all_of_them["generator"] == "seeded"
    assert one["planned"]["rate"] == [all_of_them["planned"]["rate"][2]]
    with pytest.raises(ConfigError, match="client 4 given; 4 clients are numbered 0 to 3"):
        plan_privacy(config("bert", *words), 4)


@pytest.mark.parametrize("listed", ["train.batch=[2, 4, 2, 2]", "adapter.rank=[2, 3, 2, 2]"])
def test_a_site_with_settings_of_its_own_says_which_it_is(config, listed):
    words = ["partition.kind=own", "task.labels=[class0, class1, class2]", "privacy.noise=2", "algorithm.name=flora"]
    with pytest.raises(ConfigError, match="depends on its number, from 0 to 3.*give it as --client N"):
        plan_privacy(config("bert", *words, listed))
    equal = listed.replace("4", "2").replace("3", "2")
    assert plan_privacy(config("bert", *words, equal)) == plan_privacy(config("bert", *words, equal), 0)


def test_a_plan_of_whole_clients_tells_other_rounds_and_no_batch(config):
    chosen = config("bert", "privacy.noise=2", "privacy.unit=client", "train.rounds=10")
    found = plan_privacy(chosen)
    assert [each["round"] for each in found["by_round"]] == [1, 2, 5, 8, 10]
    choices = [(each["batch"], each["rounds"]) for each in found["choices"]]
    assert choices == [(None, 5), (None, 10), (None, 20)]
    epsilons = [each["epsilon"] for each in found["choices"]]
    assert epsilons == pytest.approx([10 * rounds**0.5 / 2 for rounds in (5, 10, 20)]), "one release a round, of rate 1"
    assert found["by_round"][-1]["epsilon"][0] == pytest.approx(epsilons[1])


def test_evaluations_of_runs_without_privacy_say_nothing_of_it(config, tmp_path, no_reports):
    result = simulate(config("bert"), tmp_path / "run")
    assert "privacy" not in result.summary
    assert all(each.privacy == {} for each in select_events(read_events(result.run), Evaluated))
