"""What a run leaves where it fails: nothing before its first round, else something to go on from."""

import errno
import os
from dataclasses import replace
from importlib.util import find_spec

import pytest

from peerlora.errors import DivergenceError, RunError, TooManyFiles
from peerlora.runs.events import CheckpointSaved, Evaluated, RoundDone, Warned
from peerlora.runs.metrics import select_events
from peerlora.runs.store import RunStore, read_events
from peerlora.runtime.simulate import resume, simulate

QUICK = ["train.rounds=4", "train.local_steps=1", "train.batch=2", "topology=complete", "clients=2", "train.dtype=fp32"]


def adapters(run):
    return (run / "adapters" / "all.safetensors").read_bytes()


@pytest.fixture
def poisoned(monkeypatch):
    """Let the mixing of one round give every client what a neighbour with huge values would."""
    from peerlora.exchange.stacked import StackedExchange

    mix = StackedExchange.mix

    def begin(round, value=1e30):
        def bad(self, x, target=None):
            mixed = mix(self, x, target)
            return replace(mixed, flat=mixed.flat + value) if self.t == round else mixed

        monkeypatch.setattr(StackedExchange, "mix", bad)

    yield begin
    monkeypatch.setattr(StackedExchange, "mix", mix)


@pytest.mark.parametrize("round", [0, 1, 3])
def test_a_run_that_a_message_made_diverge_goes_on_from_the_checkpoint_before(round, config, tmp_path, poisoned):
    whole = simulate(config("bert", *QUICK), tmp_path / "whole", report=False)
    poisoned(round)
    back = f"round-{round:06d}" if round else "the start"
    with pytest.raises(DivergenceError, match=f"after {round + 1} rounds has been set aside; to go on from {back}: "):
        simulate(config("bert", *QUICK), tmp_path / "run", report=False)
    poisoned(-1)
    again = resume(tmp_path / "run", report=False)
    assert adapters(again.run) == adapters(whole.run)
    notes = [event.message for event in select_events(read_events(again.run), Warned)]
    assert round == 0 or any(f"round-{round + 1:06d} is one that training diverged from" in note for note in notes)


def test_a_state_that_is_not_finite_is_never_saved(config, tmp_path, poisoned):
    poisoned(1, float("nan"))
    with pytest.raises(DivergenceError, match="not finite after 2 rounds"):
        simulate(config("bert", *QUICK), tmp_path / "run", report=False)
    assert [event.round for event in select_events(read_events(tmp_path / "run"), CheckpointSaved)] == [1]


def test_a_run_that_fails_in_its_first_round_leaves_its_folder_free(config, tmp_path):
    with pytest.raises(DivergenceError):
        simulate(config("bert", *QUICK, "train.lr=1e30", "train.local_steps=3"), tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()
    assert simulate(config("bert", *QUICK), tmp_path / "run", report=False).summary["rounds"] == 4


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracked_run_that_fails_in_its_first_round_leaves_its_folder_free(config, tmp_path, monkeypatch, tracker):
    if find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": tmp_path, "WANDB_CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("peerlora.runs.trackers.tracking._PATIENCE", 200.0)  # seconds: the machine may be slow
    words = [*QUICK, f"track=[{tracker}]"]
    with pytest.raises(DivergenceError):
        simulate(config("bert", *words, "train.lr=1e30", "train.local_steps=3"), tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()


def test_a_damaged_log_costs_a_finished_training_nothing_but_a_warning(config, tmp_path):
    whole = simulate(config("bert", *QUICK), tmp_path / "whole", report=False)

    def harm(event):
        if isinstance(event, Evaluated) and event.final:  # the last moment before the results are written
            log = tmp_path / "run" / "events.jsonl"
            lines = log.read_bytes().split(b"\n")
            log.write_bytes(b"\n".join([b"{" + lines[0][2:], *lines[1:3], b"\xff" + lines[3][1:], *lines[4:]]))

    run = simulate(config("bert", *QUICK), tmp_path / "run", sinks=[harm]).run
    assert adapters(run) == adapters(whole.run) and (run / "report.html").is_file()
    assert (run / "adapters" / "average" / "adapter_model.safetensors").is_file()
    (warning,) = [event for event in select_events(read_events(run), Warned) if "damaged" in event.message]
    assert "2 lines are damaged and left out (line 1: " in warning.message


def test_all_that_a_finished_run_holds_is_on_the_disk_before_it_says_so(config, tmp_path, monkeypatch):
    synced, when = [], {}

    def note(number):
        synced.append(os.readlink(f"/proc/self/fd/{number}"))

    real = os.replace
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda one, other: (when.setdefault(str(other), len(synced)), real(one, other)))
    run = simulate(config("bert", *QUICK), tmp_path / "run", report=False).run
    before = set(synced[: when[str(run / "summary.json")]])
    for path in [run, *run.rglob("*")]:
        name = str(path)
        if path.name not in ("lock", "summary.json", "events.jsonl"):
            assert {name, f"{name}.tmp"} & before, name


def test_a_checkpoint_for_which_no_file_may_be_opened_is_left_out_with_a_warning(config, tmp_path, monkeypatch):
    save, failed = RunStore.save_checkpoint, []

    def refuse(self, round, tensors, facts):
        if round == 2:
            failed.append(round)
            raise TooManyFiles(os.strerror(errno.EMFILE))
        save(self, round, tensors, facts)

    monkeypatch.setattr(RunStore, "save_checkpoint", refuse)
    events = read_events(simulate(config("bert", *QUICK), tmp_path / "run", report=False).run)
    assert failed and len(select_events(events, RoundDone)) == 4
    assert any(
        "no checkpoint after 2 rounds: Too many open files" in event.message for event in select_events(events, Warned)
    )


def test_a_full_disk_at_the_end_is_one_message_and_the_run_goes_on_from_there(config, tmp_path, monkeypatch):
    whole = simulate(config("bert", *QUICK), tmp_path / "whole", report=False)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "")

    with monkeypatch.context() as patch:
        patch.setattr("peerlora.runtime.export.save_file", full)
        with pytest.raises(RunError, match="no room left in .*make room, then go on with: peerlora train --resume"):
            simulate(config("bert", *QUICK), tmp_path / "run", report=False)
    assert adapters(resume(tmp_path / "run", report=False).run) == adapters(whole.run)
