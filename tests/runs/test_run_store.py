import builtins
import errno
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from peerlora.errors import RunError, TooManyFiles
from peerlora.runs.checkpoints import Checkpoints, _with_memory_of_their_own
from peerlora.runs.events import CheckpointSaved, Resumed, RunFinished, Warned
from peerlora.runs.metrics import rows, summarise
from peerlora.runs.report import metric_curves, write_report
from peerlora.runs.store import (
    START_FILE,
    TENSORBOARD_FOLDER,
    TRACKING_FILE,
    WANDB_FOLDER,
    RunStore,
    read_events,
    require_free,
)

CONFIG = "clients: 3\n"


def tensors(round: int) -> dict[str, torch.Tensor]:
    return {"A": torch.full((3, 2, 4), float(round)), "steps": torch.tensor(round)}


def go(store: RunStore, events, start: int = 0, stop: int | None = None, every: int = 2) -> None:
    """What a runtime does: the first events, then rounds, with a checkpoint after every second."""
    rounds = [event for event in events if type(event).__name__ == "RoundDone"]
    if start == 0:
        store.emit(events[0])
    for t in range(start, len(rounds) if stop is None else stop):
        store.emit(rounds[t])
        if (t + 1) % every == 0:
            store.save_checkpoint(t + 1, tensors(t + 1), {"t": t + 1})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_create_writes_config_and_facts_and_open_reads_them(tmp_path):
    folder = tmp_path / "new" / "run"
    with RunStore.create(folder, CONFIG, {"seed": 1, "rate": float("nan")}) as store:
        assert store.config_yaml == CONFIG and not store.finished
    with RunStore.open(folder) as store:
        assert store.config_yaml == CONFIG and store.facts == {"seed": 1, "rate": None}
    assert read_events(folder) == []


def test_a_folder_with_anything_in_it_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match=r"in use; choose another --out or resume it with --resume"):
        RunStore.create(tmp_path, CONFIG, {})
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        RunStore.create(tmp_path / "run", CONFIG, {})


def test_a_start_that_was_killed_before_it_wrote_anything_can_be_repeated(tmp_path):
    (tmp_path / "lock").touch()
    RunStore.create(tmp_path, CONFIG, {}).close()


def test_a_start_that_was_killed_while_it_wrote_can_be_repeated_but_a_users_config_is_left(tmp_path):
    for name in ("lock", "config.yaml", "run.json.tmp"):
        (tmp_path / name).write_text("half")
    RunStore.create(tmp_path, CONFIG, {}).close()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("mine")  # without the lock, it is no run's
    with pytest.raises(RunError, match="in use"):
        RunStore.create(other, CONFIG, {})
    assert (other / "config.yaml").read_text() == "mine"


def test_a_start_does_not_put_away_what_another_process_is_beginning(tmp_path):
    begun = RunStore.create(tmp_path / "run", CONFIG, {})
    (tmp_path / "run" / "run.json").unlink()  # the moment before it is written
    with pytest.raises(RunError):
        RunStore.create(tmp_path / "run", CONFIG, {})
    assert (tmp_path / "run" / "config.yaml").is_file() and (tmp_path / "run" / "lock").is_file()
    begun.close()


def test_a_run_that_fails_before_its_first_round_leaves_nothing_and_a_later_one_everything(tmp_path, run):
    start, _, done, *_ = run()
    (tmp_path / "given").mkdir()
    for folder in (tmp_path / "made", tmp_path / "given"):
        with pytest.raises(IndexError), RunStore.create(folder, CONFIG, {}) as store:
            store.emit(start)
            for name in (START_FILE, TRACKING_FILE):
                (folder / name).touch()
            for name in (TENSORBOARD_FOLDER, WANDB_FOLDER):
                (folder / name / "below").mkdir(parents=True)
            raise IndexError
    assert [path.name for path in tmp_path.iterdir()] == ["given"] and not any((tmp_path / "given").iterdir())
    with pytest.raises(IndexError), RunStore.create(tmp_path / "made", CONFIG, {}) as store:
        store.emit(done)
        raise IndexError
    for error in (KeyboardInterrupt, SystemExit):  # a second Ctrl-C is no failure: such a run goes on
        with pytest.raises(error), RunStore.create(tmp_path / error.__name__, CONFIG, {}) as store:
            raise error
        RunStore.open(tmp_path / error.__name__).close()
    with pytest.raises(IndexError), RunStore.open(tmp_path / "made") as store:
        raise IndexError
    RunStore.open(tmp_path / "made").close()


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_open_needs_a_run_folder(tmp_path, name):
    RunStore.create(tmp_path / "run", CONFIG, {}).close()
    (tmp_path / "run" / name).unlink()
    with pytest.raises(RunError, match=f"not a run folder .no {name}"):
        RunStore.open(tmp_path / "run")
    with pytest.raises(RunError, match="not a run folder"):
        read_events(tmp_path / "run")


def test_a_damaged_run_json_is_refused_and_the_lock_freed(tmp_path):
    RunStore.create(tmp_path / "run", CONFIG, {}).close()
    (tmp_path / "run" / "run.json").write_text("{")
    for _ in range(2):
        with pytest.raises(RunError, match="not valid JSON"):
            RunStore.open(tmp_path / "run")


def test_a_second_process_is_kept_out_until_the_first_is_killed(tmp_path):
    RunStore.create(tmp_path / "run", CONFIG, {}).close()
    code = (
        "import sys, time; from peerlora.runs.store import RunStore\n"
        "store = RunStore.open(sys.argv[1]); print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "ready\n"
            with pytest.raises(RunError, match="another process is running in"):
                RunStore.open(tmp_path / "run")
        finally:
            other.kill()
    RunStore.open(tmp_path / "run").close()


def test_a_checkpoint_comes_back_with_tensors_that_shared_memory(tmp_path):
    flat = torch.arange(12.0).reshape(2, 6)
    state = {
        "A": flat[:, :4].unflatten(1, (2, 2)),
        "B": flat[:, 4:],
        "flat": flat,
        "mass": torch.ones(2, dtype=torch.float64),
    }
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        store.save_checkpoint(3, state, {"order": [1, 2], "phase": "B"})
        found = store.load_checkpoint()
    assert found and found.round == 3 and found.facts == {"order": [1, 2], "phase": "B"} and found.notes == []
    assert found.tensors.keys() == state.keys()
    assert all(torch.equal(found.tensors[name], each) for name, each in state.items())
    assert found.tensors["mass"].dtype == torch.float64


def test_the_newest_two_checkpoints_are_kept(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run(rounds=8))
    names = ["round-000006", "round-000008"]
    assert files(tmp_path / "run") == [name + end for name in names for end in (".json", ".safetensors")]


def test_a_checkpoint_is_kept_until_another_one_is(tmp_path, run):
    events = run(rounds=12)
    kept = Checkpoints(tmp_path / "run")
    kept.keep_newest()  # of none

    def rounds_there():
        return [int(name[6:12]) for name in files(tmp_path / "run") if name.endswith(".json")]

    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, events, stop=2)
        kept.keep_newest()
        go(store, events, start=2, stop=8)
        assert rounds_there() == [2, 6, 8]
        assert store.load_checkpoint().round == 8
        assert store.load_checkpoint(lambda tensors: "late" if tensors["steps"] > 2 else "").round == 2
        kept.keep_newest()
        go(store, events, start=8)
        assert rounds_there() == [8, 10, 12]


def test_the_event_names_the_file_and_its_checksum(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run(rounds=2))
    (saved,) = [event for event in read_events(tmp_path / "run") if isinstance(event, CheckpointSaved)]
    side = json.loads((tmp_path / "run" / "checkpoints" / "round-000002.json").read_text())
    assert saved.sha256 == side["sha256"] and (tmp_path / "run" / saved.file).is_file()


def test_no_checkpoint_means_from_the_start_with_an_empty_log(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run(), stop=1)
    with RunStore.open(tmp_path / "run") as store:
        found = store.load_checkpoint()
        store.rewind(found)
        assert found is None and read_events(tmp_path / "run") == []


# What a kill may leave behind.
def torn_line(folder: Path) -> None:
    with open(folder / "events.jsonl", "ab") as log:
        log.write(b'{"type":"RoundDone","version":1,"loss":[0.1,')


def half_tensors(folder: Path) -> None:
    (folder / "checkpoints" / "round-000006.safetensors.tmp").write_bytes(b"half")


def no_side_file(folder: Path) -> None:
    with RunStore.open(folder) as store:
        store.save_checkpoint(6, tensors(6), {})
    (folder / "checkpoints" / "round-000006.json").rename(folder / "checkpoints" / "round-000006.json.tmp")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize("leave", [nothing, torn_line, half_tensors, no_side_file])
@pytest.mark.parametrize("stop", [4, 5])
def test_a_resumed_run_writes_the_same_events_as_an_undisturbed_one(tmp_path, run, leave, stop):
    events = run(rounds=8)
    with RunStore.create(tmp_path / "whole", CONFIG, {}) as store:
        go(store, events)
    with RunStore.create(tmp_path / "killed", CONFIG, {}) as store:
        go(store, events, stop=stop)
    leave(tmp_path / "killed")
    with RunStore.open(tmp_path / "killed") as store:
        found = store.load_checkpoint()
        assert found and found.round == 4 and torch.equal(found.tensors["steps"], torch.tensor(4))
        store.rewind(found)
        store.emit(Resumed("now", 4))
        go(store, events, start=4)
    resumed = [event for event in read_events(tmp_path / "killed") if not isinstance(event, Resumed)]
    assert resumed == read_events(tmp_path / "whole")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_second_resume_keeps_what_the_first_wrote(tmp_path, run):
    events = run(rounds=6)
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, events, stop=3)
    for stop in (5, None):
        with RunStore.open(tmp_path / "run") as store:
            found = store.load_checkpoint()
            store.rewind(found)
            store.emit(Resumed("now", found.round))
            go(store, events, start=found.round, stop=stop)
    rounds = [event.round for event in read_events(tmp_path / "run") if type(event).__name__ == "RoundDone"]
    assert rounds == [0, 1, 2, 3, 4, 5]
    assert [event.round for event in read_events(tmp_path / "run") if isinstance(event, Resumed)] == [2, 4]


def flip_a_byte(data: Path) -> None:
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)


def cut_short(data: Path) -> None:
    data.write_bytes(data.read_bytes()[:-8])


def spoil_side(data: Path) -> None:
    data.with_suffix(".json").write_text('{"round": 4')


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip_a_byte, "checksum"),
        (cut_short, "checksum"),
        (Path.unlink, "round-000004.safetensors missing"),
        (spoil_side, "round-000004.json unreadable"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_note(tmp_path, run, harm, reason):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run())
    harm(tmp_path / "run" / "checkpoints" / "round-000004.safetensors")
    with RunStore.open(tmp_path / "run") as store:
        found = store.load_checkpoint()
        assert found and found.round == 2
        assert found.notes == [f"checkpoint round-000004 is damaged ({reason}); using round-000002"]
        store.rewind(found)
    assert files(tmp_path / "run") == ["round-000002.json", "round-000002.safetensors"]
    assert isinstance(read_events(tmp_path / "run")[-1], CheckpointSaved)


def test_every_change_of_the_file_beside_a_checkpoint_is_found(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run())
    side = tmp_path / "run" / "checkpoints" / "round-000004.json"
    whole = side.read_bytes()
    with RunStore.open(tmp_path / "run") as store:
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << (place % 7)
            side.write_bytes(changed)
            found = store.load_checkpoint()
            same = json.loads(whole) == (json.loads(changed) if found.round == 4 else None)
            assert found.round == 2 or same, bytes(changed)  # a blank may become another


def test_a_checkpoint_of_an_older_version_has_no_check_and_must_end_a_line(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run())
    side = tmp_path / "run" / "checkpoints" / "round-000004.json"
    facts = json.loads(side.read_text())
    del facts["check"]
    for cut, reached in ((0, 4), (3, 2)):
        side.write_text(json.dumps(facts | {"events_bytes": facts["events_bytes"] - cut}))
        with RunStore.open(tmp_path / "run") as store:
            assert store.load_checkpoint().round == reached
    side.write_text(json.dumps(facts | {"round": 5}))
    with RunStore.open(tmp_path / "run") as store:
        assert store.load_checkpoint().round == 2


def test_a_checkpoint_that_training_diverged_from_is_passed_over(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run())
        assert store.mark_diverged(3) is None
        assert store.mark_diverged(4) == "round-000002"
    with RunStore.open(tmp_path / "run") as store:
        found = store.load_checkpoint()
        assert found.round == 2
        assert found.notes == ["checkpoint round-000004 is one that training diverged from; using round-000002"]
        assert store.mark_diverged(2) == "the start" and store.load_checkpoint() is None
        store.rewind(None)
        assert files(tmp_path / "run") == [] and read_events(tmp_path / "run") == []


class Full:
    """A log for which the disk has room for a few bytes more."""

    def __init__(self, log, room=5, code=errno.ENOSPC):
        self.log, self.room, self.code = log, room, code

    def write(self, data):
        written, self.room = self.log.write(bytes(data[: self.room])), 0
        if not written:
            raise OSError(self.code, "")
        return written

    def __getattr__(self, name):
        return getattr(self.log, name)


def test_an_event_for_which_there_is_no_room_is_one_message_and_leaves_nothing(tmp_path, run):
    events = run()
    with RunStore.create(tmp_path / "a run", CONFIG, {}) as store:
        go(store, events, stop=3)
        before, store._log = (tmp_path / "a run" / "events.jsonl").read_bytes(), Full(store._log)
        told = r"no room left in .*a run .No space.*make room, then go on with: peerlora train --resume '.*a run'"
        with pytest.raises(RunError, match=told):
            store.emit(events[1])
    assert (tmp_path / "a run" / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "told", "kind"),
    [
        (OSError(errno.ENOSPC, ""), "no room left", RunError),
        (OSError(errno.EDQUOT, ""), "no room left", RunError),
        (SafetensorError("Error while serializing: I/O error: (os error 28)"), "no room left", RunError),
        (OSError(errno.EROFS, ""), "cannot be written .Read-only", RunError),
        (OSError(errno.EMFILE, ""), "cannot be written .Too many open files", TooManyFiles),
        (SafetensorError("shape"), "shape", SafetensorError),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, run, monkeypatch, error, told, kind):
    def fail(*_, metadata):
        raise error

    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run(rounds=3))
        monkeypatch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(kind, match=told):
            store.save_checkpoint(3, tensors(3), {})
        assert files(tmp_path / "run") == ["round-000002.json", "round-000002.safetensors"]


def test_what_a_kill_leaves_of_safetensors_is_cleared_away(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run(), stop=2)
        (tmp_path / "run" / "adapters" / "client-00").mkdir(parents=True)
        for place in ("checkpoints", "adapters/client-00"):
            (tmp_path / "run" / place / ".tmpa1B2c3").write_bytes(b"half")
        store.rewind(store.load_checkpoint())
    assert not list((tmp_path / "run").rglob(".tmp*")) and len(files(tmp_path / "run")) == 2


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    RunStore.create(tmp_path / "run", CONFIG, {}).close()
    before = builtins.open

    def refuse(path, *mode, **more):
        if str(path).endswith("lock"):
            raise OSError(errno.EROFS, "")
        return before(path, *mode, **more)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(RunError, match="cannot be written .Read-only file system.; make it writable"):
        RunStore.open(tmp_path / "run")


def test_a_folder_that_may_not_be_looked_into_is_one_message(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "")

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(RunError, match="cannot be written .Permission denied.; choose another --out"):
        require_free(tmp_path)


def test_a_checkpoint_whose_events_are_lost_is_passed_over(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run())
    log = tmp_path / "run" / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-5])
    with RunStore.open(tmp_path / "run") as store:
        found = store.load_checkpoint()
    assert found and found.round == 2 and "event log too short" in found.notes[0]


def test_only_damaged_checkpoints_are_an_error(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run())
    for data in (tmp_path / "run" / "checkpoints").glob("*.safetensors"):
        flip_a_byte(data)
    with (
        RunStore.open(tmp_path / "run") as store,
        pytest.raises(RunError, match="no checkpoint.*checksum.*again"),
    ):
        store.load_checkpoint()


def test_finish_writes_the_last_event_the_table_and_the_summary(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        go(store, run())
        store.finish({"rounds": 4, "own_mean": float("nan")})
        assert store.finished
        last = read_events(tmp_path / "run")[-1]
        assert isinstance(last, RunFinished) and last.summary == {"rounds": 4, "own_mean": None}
        store.rewind(store.load_checkpoint())
        assert not store.finished
    assert (tmp_path / "run" / "metrics.parquet").is_file()
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_reading_leaves_out_a_torn_last_line_and_warns_of_damaged_ones(tmp_path):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        store.emit(Warned("é"))
        log = tmp_path / "run" / "events.jsonl"
        whole = log.read_bytes()
        log.write_bytes(whole + whole[:-4])
        assert read_events(tmp_path / "run") == [Warned("é")]
        log.write_bytes(whole[:-4] + b"\n" + whole)
        (warning, good) = read_events(tmp_path / "run")
    assert good == Warned("é") and "a line is damaged and left out (line 1: " in warning.message


def test_a_damaged_byte_costs_lines_and_never_the_rest(tmp_path, run):
    with RunStore.create(tmp_path / "run", CONFIG, {}) as store:
        for event in run():
            store.emit(event)
    log = tmp_path / "run" / "events.jsonl"
    whole, events = log.read_bytes(), read_events(tmp_path / "run")
    draw = random.Random(1)
    for place in [*draw.sample(range(len(whole)), 150), whole.index(b"\n") + 5]:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        log.write_bytes(changed)
        found = read_events(tmp_path / "run")
        lost = [event for event in events if event not in found]
        assert len(lost) <= 2 or place < whole.index(b"\n"), place  # two, where a newline is gone
        summarise(found), list(rows(found)), metric_curves(found)
    assert "damaged and left out" in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_tensors_of_a_checkpoint_may_share_memory_and_a_whole_one_is_not_copied(tmp_path):
    buffer, alone = torch.arange(6.0), torch.ones(2, 3)
    given = {"first": buffer[:3], "last": buffer[3:], "whole": buffer, "again": buffer, "turned": alone.T}
    assert _with_memory_of_their_own({"alone": alone})["alone"].data_ptr() == alone.data_ptr()
    (tmp_path / "events.jsonl").touch()
    kept = Checkpoints(tmp_path)
    kept.complete(1, kept.save_tensors(1, given | {"alone": alone}, {}), 0)
    found = kept.load().tensors
    assert found.keys() == {*given, "alone"}
    assert all(torch.equal(found[name], each) for name, each in given.items()) and torch.equal(found["alone"], alone)
