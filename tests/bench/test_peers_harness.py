"""The comparison with other frameworks: the common work is the same work, and programs are measured whole."""

# pyright: reportMissingImports=false
# The harness is a folder of scripts, not a package.

import json
import os
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

PEERS = Path(__file__).parents[2] / "bench" / "peers"

CHILD = """
import os, time
held = bytearray(b"1") * 100_000_000
open("child", "w").write(str(os.getpid()))
time.sleep(60)
"""
FORGETS_ITS_CHILD = f"""
import os, subprocess, sys, time
held = bytearray(b"1") * 100_000_000
middle = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
subprocess.run([sys.executable, "-c", middle, {CHILD!r}])
while not os.path.exists("child"):
    time.sleep(0.05)
time.sleep(0.5)
"""


@pytest.fixture(autouse=True)
def on_path(monkeypatch, cache):
    monkeypatch.syspath_prepend(str(PEERS))


@pytest.mark.slow
def test_plain_loop_and_peerlora_do_the_same_work(tmp_path):
    import run_peerlora
    import run_plain
    import work

    folder = tmp_path / "work"
    job = work.Job(rounds=2, steps=3, nodes=4, rows=24, evaluated=20, batch=8, rank=2, vocabulary=120, width=16)
    work.write_work(folder, job)
    run_plain.run(folder, tmp_path / "plain.json")
    run_peerlora.run(folder, tmp_path / "peerlora.json", threads=1)
    plain, ours = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "peerlora"))
    assert set(plain) == set(ours)
    assert ours["accuracy_mean"] == pytest.approx(plain["accuracy_mean"])
    theirs = load_file(tmp_path / "plain.safetensors")
    start = load_file(folder / "adapter" / "adapter_model.safetensors")
    found = load_file(tmp_path / "peerlora.safetensors")
    assert set(found) == set(theirs)
    assert max(abs(found[name] - theirs[name]).max() for name in theirs) < 1e-4
    assert max(abs(theirs[f"0.{name}"] - start[name]).max() for name in start) > 1e-3, "nothing was trained"


def test_measures_and_ends_a_process_that_left_its_parent(tmp_path):
    from measure import measure

    seen = measure([sys.executable, "-c", FORGETS_ITS_CHILD], dict(os.environ), tmp_path, 30)
    child = int((tmp_path / "child").read_text())
    assert seen.ended == ""
    assert seen.peak_bytes > 200_000_000
    assert seen.cpu_seconds > 0
    assert not runs(child)


def runs(process):
    """Whether it is there, and not merely waiting for somebody to ask for its exit code."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_program_that_does_not_end_is_stopped_and_says_so(tmp_path):
    from measure import measure

    words = "import time; print('still here', flush=True); time.sleep(600)"  # longer than a test may take
    seen = measure([sys.executable, "-c", words], dict(os.environ), tmp_path, 2)
    assert "stopped after 2 s" in seen.ended
    assert "still here" in seen.ended


def test_a_failed_installation_is_a_reason_not_an_error(tmp_path, monkeypatch):
    from environments import Unavailable, make_place, step

    monkeypatch.chdir(tmp_path)
    make_place()
    with pytest.raises(Unavailable, match="no such wheel"):
        step([sys.executable, "-c", "raise SystemExit('no such wheel')"], time.monotonic() + 30)


def test_a_row_holds_medians_of_its_repeats(tmp_path):
    from cells import FIGURES, RUNNERS, Cell

    cell = Cell(RUNNERS["plain loop"], Path(sys.executable), tmp_path)
    cell.runs = [dict.fromkeys(FIGURES, value) | {"bytes_kind": "computed", "note": ""} for value in (1.0, 5.0, 2.0)]
    row = cell.row()
    assert {row[figure] for figure in FIGURES} == {2.0}
    assert row["round_seconds_range"] == [1.0, 5.0]
    assert (row["repeats"], row["graph"], row["bytes_kind"]) == (3, "ring", "computed")


def test_reasons_name_no_place_of_this_machine():
    from cells import without_places

    text = without_places(f"{Path.cwd()}/x failed, {Path.home()}/y, see https://example.org/simple")
    assert text == "./x failed, ~/y, see ADDRESS"
