"""SIGKILL of a real process at any moment, and ``resume``: final adapters bit-identical to an undisturbed run.

The processes are forked from one that has loaded torch already, so that each costs a run and not the loading.
"""

import dataclasses
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest

from peerlora.config.loading import load_config
from peerlora.runs.events import (
    CheckpointSaved,
    Evaluated,
    Resumed,
    RoundDone,
    RunFinished,
    RunStarted,
    Warned,
    to_json,
)
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.simulate import resume, simulate
from waiting import until

ROUNDS, EVERY = 6, 2
SETTINGS = [
    f"train.rounds={ROUNDS}",
    f"checkpoint.every={EVERY}",
    "algorithm.interval=1",
    "adapter.dropout=0.1",
    "train.dtype=fp32",
    "topology.kind=random",
    "topology.p=0.6",
    "topology.drop_links=0.2",
]


def run_alone(yaml, folder):
    """What the process that is killed does."""
    simulate(load_config(yaml), folder)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft", "transformers.models.bert.modeling_bert", "peerlora.runtime.simulate"])
    return context


@pytest.fixture
def start(processes, config, tmp_path):
    """Start a run of some settings in a process of its own."""
    started = []

    def begin(*words):
        yaml = tmp_path / "config.yaml"
        yaml.write_text(config("bert", *SETTINGS, *words).to_yaml())
        run = tmp_path / f"run-{len(started)}"
        started.append(processes.Process(target=run_alone, args=(yaml, run)))
        started[-1].start()
        return started[-1], run

    yield begin
    for process in started:
        process.kill()
        process.join()
        process.close()


@pytest.fixture
def undisturbed(config, tmp_path):
    def run(*words):
        return simulate(config("bert", *SETTINGS, *words), tmp_path / "undisturbed").run

    return run


def adapters(run):
    """Of all clients; where they relay, their relayed models and what those were made of, too."""
    return {path.name: path.read_bytes() for path in (run / "adapters").glob("*.safetensors")}


def comparable(run):
    """The events without times, and without what only a resumed run tells."""
    timeless = []
    for event in read_events(run):
        if isinstance(event, Resumed):
            continue
        clocks = {"time": "", "seconds": 0.0, "seconds_train": 0.0, "seconds_mix": 0.0, "seconds_diagnostics": 0.0}
        known = {field.name for field in dataclasses.fields(event)}
        event = dataclasses.replace(event, **{name: value for name, value in clocks.items() if name in known})
        if isinstance(event, RunFinished):
            event = dataclasses.replace(event, summary={**event.summary, "seconds": None, "run": None})
        timeless.append(to_json(event))  # as text, because NaN does not equal itself
    return timeless


def seen(run, moment):
    """Whether a running process has come so far: a number of finished rounds, a kind of file, or ``final``."""
    if not (run / "run.json").exists():
        return False
    if moment == "folder":
        return True
    if isinstance(moment, str) and moment != "final":
        return (run / moment).exists()
    events = read_events(run)
    if moment == "final":
        return any(event.final for event in select_events(events, Evaluated))
    return len(select_events(events, RoundDone)) >= moment


def kill_at(process, run, moment, delay):
    """SIGKILL ``delay`` seconds after ``moment`` was seen; how the process ended."""
    until(lambda: seen(run, moment), process.is_alive, every=0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode


EVERYWHERE = ["folder", EVERY - 1, EVERY, ROUNDS - 2, ROUNDS - 1, "final", "adapters"]


@pytest.mark.slow
@pytest.mark.parametrize(("state", "moments"), [("keep", EVERYWHERE), ("round", EVERYWHERE), ("relay", EVERYWHERE)])
def test_killed_at_random_moments_and_resumed(state, moments, start, undisturbed):
    """Before the first checkpoint, between two, in a write, while the end is written; every kill must be a real one."""
    word = "exchange.relay={max_age: 3}" if state == "relay" else f"train.optimizer_state={state}"
    whole = undisturbed(word)
    draw, killed = random.Random(state), 0
    for moment in moments:
        process, run = start(word)
        code = kill_at(process, run, moment, draw.uniform(0, 0.01))
        killed += code == -signal.SIGKILL and not (run / "summary.json").exists()
        resume(run)
        assert adapters(run) == adapters(whole), moment
        assert comparable(run) == comparable(whole), moment
    assert killed >= len(moments) - 1  # the last moments are short; one may be missed


@pytest.mark.slow
def test_killed_again_and_again(start, undisturbed, processes):
    """A resumed run is as safe as a fresh one."""
    whole = undisturbed("train.optimizer_state=keep")
    draw = random.Random(3)
    process, run = start("train.optimizer_state=keep")
    kill_at(process, run, 1, 0.0)
    for moment in (EVERY + 1, "final"):
        again = processes.Process(target=resume, args=(run,))
        again.start()
        kill_at(again, run, moment, draw.uniform(0, 0.005))
        again.close()
    resume(run)
    assert adapters(run) == adapters(whole) and comparable(run) == comparable(whole)


APART = ["topology.kind=ring", "clock.speed=[1,0.7,0.31,0.1]", "clock.delay=0.4", "clock.bandwidth=3000"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["aedfl", "ad-psgd"])
def test_a_killed_run_without_common_rounds_has_all_that_was_on_its_way(method, start, undisturbed):
    words = [f"algorithm.name={method}", *APART]
    whole, draw = undisturbed(*words), random.Random(method)
    for moment in (EVERY - 1, EVERY + 1, ROUNDS - 1):
        process, run = start(*words)
        kill_at(process, run, moment, draw.uniform(0, 0.01))
        resume(run)
        assert adapters(run) == adapters(whole), moment
        assert comparable(run) == comparable(whole), moment


@pytest.mark.slow
def test_a_killed_run_with_a_deadline_remembers_who_was_late(start, undisturbed):
    words = ["clock.speed=[1,0.7,0.31,0.1]", "clock.deadline=2.5"]
    whole = undisturbed(*words)
    process, run = start(*words)
    kill_at(process, run, EVERY + 1, 0.0)
    resume(run)
    assert adapters(run) == adapters(whole) and comparable(run) == comparable(whole)


@pytest.mark.slow
def test_half_a_line_and_half_a_checkpoint_are_no_obstacle(start, undisturbed):
    """What a kill in the middle of a write leaves, made by hand because the moment is too short to be hit."""
    whole = undisturbed()
    process, run = start()
    kill_at(process, run, EVERY, 0.0)
    with open(run / "events.jsonl", "ab") as log:
        log.write(b'{"type":"RoundDone","ver')
    place = run / "checkpoints"
    place.mkdir(exist_ok=True)
    (place / f"round-{ROUNDS:06d}.safetensors").write_bytes(b"half")
    (place / f"round-{ROUNDS:06d}.json.tmp").write_bytes(b"{")
    resume(run)
    assert adapters(run) == adapters(whole) and comparable(run) == comparable(whole)
    assert not list(place.glob("*.tmp"))


def test_the_same_seed_twice_gives_the_same_bytes(config, tmp_path):
    runs = [simulate(config("bert", *SETTINGS), tmp_path / name).run for name in ("one", "two")]
    assert adapters(runs[0]) == adapters(runs[1])
    assert comparable(runs[0]) == comparable(runs[1])
    for folder in sorted(path for path in (runs[0] / "adapters").iterdir() if path.is_dir()):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            other = Path(runs[1] / "adapters" / folder.name / file)
            assert (folder / file).read_bytes() == other.read_bytes()


def test_the_comparison_sees_what_it_should(config, tmp_path):
    """Guards the tests above: another seed changes adapters and events, and a whole log is what is compared."""
    one = simulate(config("bert", *SETTINGS), tmp_path / "one").run
    other = simulate(config("bert", *SETTINGS, "seed=1"), tmp_path / "other").run
    assert adapters(one) != adapters(other) and comparable(one) != comparable(other)
    kinds = {type(event) for event in read_events(one)}
    assert kinds >= {RunStarted, RoundDone, Evaluated, CheckpointSaved, RunFinished} and Warned not in kinds
