import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peerlora.errors import RunError
from peerlora.runs.events import CheckpointSaved, Resumed, RunFinished, Warned
from peerlora.runs.store import RunStore, read_events

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
