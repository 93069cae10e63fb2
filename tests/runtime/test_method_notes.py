"""What a method chose for its run is in the run's first event, its report and what people see."""

import math

from peerlora.algorithms.adf_lora import ADFLoRA
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import find_start, select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import simulate


def test_tad_lora_runs_as_adf_lora_with_its_interval_and_says_why(config, tmp_path):
    words = [
        "train.rounds=6",
        "clients=8",
        "train.local_steps=1",
        "train.batch=2",
        "eval.every=6",
        "checkpoint.every=6",
    ]
    chosen = config("bert", "algorithm.name=tad-lora", *words)
    federation = compose(chosen)
    rho = (1 + 2 * math.cos(2 * math.pi / 8)) / 3
    assert federation.algorithm == ADFLoRA(round(1 / math.sqrt(1 - rho)))
    (note,) = federation.notes
    ours = simulate(chosen, tmp_path / "tad")
    theirs = simulate(config("bert", "algorithm.name=adf-lora", "algorithm.interval=2", *words), tmp_path / "adf")
    assert bool((ours.adapters.flat == theirs.adapters.flat).all())
    events = read_events(tmp_path / "tad")
    assert find_start(events).method == "tad-lora" and find_start(events).notes == [note]
    assert note in (tmp_path / "tad" / "report.html").read_text().replace("&gt;", ">")
    for done in select_events(events, RoundDone):
        assert done.rho <= rho + 1e-12 and done.weak_mismatch > 0 and done.strong_mismatch > 0
    assert find_start(read_events(tmp_path / "adf")).notes == []


def test_rolora_is_measured_although_it_sends_one_factor(config, tmp_path):
    simulate(config("bert", "algorithm.name=rolora", "topology.kind=path"), tmp_path / "run")
    done = select_events(read_events(tmp_path / "run"), RoundDone)
    assert done[0].local_cross_term < 1e-14 < 1e-8 < done[2].local_cross_term
    assert all(each.strong_mismatch > 0 for each in done)
