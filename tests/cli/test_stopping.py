"""Runs that stop early, for whatever reason, and the command that goes on with them."""

import shlex
import signal

import pytest

from peerlora.errors import Stopped
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import RunStore, read_events
from peerlora.runtime.simulate import simulate
from waiting import until


def adapters(run):
    return (run / "adapters" / "all.safetensors").read_bytes()


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


@pytest.fixture
def stopped(config, tmp_path):
    """A run of 4 rounds that was stopped after 2, with a checkpoint of each, and the same run undisturbed."""
    run, settings = tmp_path / "run", config("bert", "train.rounds=4")
    simulate(settings, tmp_path / "undisturbed")
    answers = iter([False, True])
    with pytest.raises(Stopped) as told:
        simulate(settings, run, stop=lambda: next(answers))
    assert "stopped after 2 of 4 rounds" in str(told.value)
    return run


def test_resume_gives_what_an_undisturbed_run_gives(stopped, cli, tmp_path):
    answer = cli("train", "--resume", stopped)
    assert answer.code == 0 and "going on after round 2" in answer.err
    assert adapters(stopped) == adapters(tmp_path / "undisturbed")


def test_resume_accepts_the_same_config_and_settings(stopped, cli, yaml_file, tmp_path):
    answer = cli("train", yaml_file(), "train.rounds=4", "train.lr=0.01", "--resume", stopped)
    assert answer.code == 0, answer.err
    assert adapters(stopped) == adapters(tmp_path / "undisturbed")


@pytest.mark.parametrize("file", [True, False])
def test_resume_with_a_changed_config_lists_the_differences_and_loses_nothing(file, stopped, cli, yaml_file, tmp_path):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    given = [yaml_file("train.rounds=4")] if file else []
    answer = cli("train", *given, "train.lr=0.5", "topology.kind=star", "--resume", stopped)
    assert answer.code == 2 and answer.err.count("\n") == 1
    for difference in (
        "train.lr: 0.01 then, 0.5 now",
        "topology.kind: 'ring' then, 'star' now",
        "same settings",
        "--out",
    ):
        assert difference in answer.err
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before
    assert cli("train", "--resume", stopped).code == 0
    assert adapters(stopped) == adapters(tmp_path / "undisturbed")


@pytest.mark.parametrize("file", ["round-000002.safetensors", "round-000002.json"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(file, stopped, cli, tmp_path):
    assert checkpoints(stopped) == [f"round-00000{i}.{kind}" for i in (1, 2) for kind in ("json", "safetensors")]
    if file.endswith("json"):
        (stopped / "checkpoints" / file).write_text("{")
    else:
        flip_a_byte(stopped / "checkpoints" / file)
    answer = cli("train", "--resume", stopped)
    assert answer.code == 0
    assert "going on after round 1" in answer.err
    assert "warning: checkpoint round-000002 is damaged" in answer.err and "using round-000001" in answer.err
    assert adapters(stopped) == adapters(tmp_path / "undisturbed")


def test_only_damaged_checkpoints_are_refused(stopped, cli):
    for path in (stopped / "checkpoints").glob("*.safetensors"):
        flip_a_byte(path)
    answer = cli("train", "--resume", stopped)
    assert answer.code == 2 and answer.err.count("\n") == 1
    for told in ("round-000002 is damaged (checksum)", "round-000001 is damaged (checksum)", "another --out"):
        assert told in answer.err


def test_a_loss_that_is_not_finite_stops_the_run_and_sets_aside_the_checkpoint_that_led_to_it(cli, yaml_file, tmp_path):
    run = tmp_path / "run"
    # Round 1 begins before the first update, so its one local step is finite; what it leads to is not.
    path = yaml_file("train.dtype=fp32", "train.local_steps=1", "train.lr=1e30", "algorithm.interval=1")
    for words in (["--out", run], ["--resume", run]):
        answer = cli("train", path, *words)
        assert answer.code == 2
        message = answer.err.splitlines()[-1]
        parts = ("loss of client 0", "nan", "round 2", "local step 1", "lower train.lr (now 1e+30)", "train.clip")
        for part in (*parts, "checkpoint after 1 rounds has been set aside; to go on from the start"):
            assert part in message, answer.err
        with RunStore.open(run) as store:
            assert store.load_checkpoint() is None
        assert (run / "checkpoints" / "round-000001.safetensors").is_file()  # it may still be looked at
        assert not (run / "summary.json").exists()


@pytest.mark.parametrize("rounds", [1, 3])
def test_an_update_that_overflows_is_neither_saved_nor_called_a_result(rounds, cli, yaml_file, tmp_path):
    """A round's last loss is computed before its last update, so it does not tell that the update is infinite."""
    run = tmp_path / "run"
    words = [f"train.rounds={rounds}", "train.local_steps=1", "train.dtype=fp32", "train.lr=1e39"]
    answer = cli("train", yaml_file(*words), "--out", run)
    assert answer.code == 2 and "finite" in answer.err and "round 1" in answer.err, answer
    assert not list(run.glob("checkpoints/*"))


def wait_for_rounds(run, count, started):
    def reached():
        return (run / "run.json").exists() and len(select_events(read_events(run), RoundDone)) >= count

    until(reached, lambda: started.poll() is None)


@pytest.mark.slow
@pytest.mark.alone
def test_interrupt_saves_and_names_the_command_that_goes_on(process, cli, config, yaml_file, tmp_path):
    run = tmp_path / "run"
    words = ["train.rounds=30", "checkpoint.every=1000", "eval.every=1000"]
    started = process("train", yaml_file(*words), "--out", run)
    wait_for_rounds(run, 2, started)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert "Traceback" not in err and "stopping after this round" in err
    done = len(select_events(read_events(run), RoundDone))
    assert 2 <= done < 30 and checkpoints(run) == [f"round-{done:06d}.json", f"round-{done:06d}.safetensors"]
    command = shlex.split(err.splitlines()[-1].partition("go on with: ")[2])
    assert command[:2] == ["peerlora", "train"]
    answer = cli(*command[1:])
    assert answer.code == 0, answer.err
    simulate(config("bert", *words), tmp_path / "undisturbed")
    assert adapters(run) == adapters(tmp_path / "undisturbed")


def test_the_second_interrupt_does_not_wait():
    from peerlora.cli.progress import stop_on_interrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_two_processes_never_share_a_run_folder(stopped, cli):
    with RunStore.open(stopped):
        answer = cli("train", "--resume", stopped)
    assert answer.code == 2 and "another process is running" in answer.err


def test_going_on_with_a_finished_run_changes_nothing(cli, yaml_file, tmp_path):
    run = tmp_path / "run"
    assert cli("train", yaml_file(), "--out", run).code == 0
    before = adapters(run)
    assert cli("train", "--resume", run).code == 0
    assert adapters(run) == before
