"""Comparisons on the workers of a cluster: the table of one process, whatever is killed."""

import copy
import json
import signal
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import psutil
import pytest

from flow_runs import tiny
from peerlora.config.cluster import ClusterConfig
from peerlora.errors import ClusterError, CompositionError, ConfigError, ModelError, RunError, Stopped
from peerlora.experiments import runner, trial_pool
from peerlora.experiments.grid import load_grid
from peerlora.experiments.resource_cache import ResourceCache
from peerlora.experiments.runner import Callbacks, resume_grid, start_grid
from peerlora.experiments.trial_checks import check_grid
from peerlora.experiments.trial_pool import TrialPool, trial_pools
from peerlora.experiments.trial_run import is_finished
from peerlora.experiments.trial_worker import TrialJob, TrialWorker, read_files, write_files
from peerlora.experiments.trials import plan_trials
from peerlora.runtime.cluster import machines
from peerlora.runtime.compose import load_run
from peerlora.runtime.resources import load_resources
from peerlora.runtime.simulate import simulate
from trial_pools import ComputingRay, build_pool, finished, trials

SETTINGS = ClusterConfig(workers=2, timeout=300)


@contextmanager
def unwatched(status):
    yield lambda event: None


QUIET = Callbacks(unwatched)


@pytest.fixture
def grid(config, texts):
    base = config("bert", "train.rounds=2", f"data.eval=jsonl:{texts}").model_dump(mode="json")
    del base["seed"], base["cluster"], base["train"]["lr"]
    tree = {
        "base": base,
        "axes": {"method": ["dec-lora", {"algorithm": {"name": "adf-lora", "interval": 1}}]},
        "seeds": [0],
        "search": {"rates": [0.01, 0.001], "seeds": [7], "holdout": 0.3},
        "cluster": SETTINGS.model_dump(),
    }
    return load_grid(tree)


def test_a_worker_returns_the_files_of_a_run_with_the_drivers_paths(grid, tmp_path, monkeypatch):
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    trial = plan_trials(grid).trials[0]
    rows = load_resources(trial.config)
    simulate(trial.config, tmp_path / "here" / "run", resources=rows, report=False)
    worker, there = TrialWorker(False, "/nowhere"), tmp_path / "there" / "run"
    files = worker.run(TrialJob(trial.config, there, {}), "rows", rows)
    write_files(there, files)
    assert str(there).encode() in files["summary.json"]
    assert [name for name, content in files.items() if str(scratch).encode() in content] == []
    assert (there / "all.safetensors").exists() == (tmp_path / "here" / "run" / "all.safetensors").exists()
    names = [
        path.name for path in (tmp_path / "here" / "run").rglob("*.safetensors") if "adapters/client" not in str(path)
    ]
    assert {name for name in names if "adapter_model" not in name} <= {name.split("/")[-1] for name in files}


def test_a_trial_that_was_begun_goes_on_on_a_worker(grid, tmp_path):
    trial = plan_trials(grid).trials[0]
    rows, asked = load_resources(trial.config), iter([True])
    with pytest.raises(Stopped):
        simulate(trial.config, tmp_path / "run", resources=rows, stop=lambda: next(asked), report=False)
    job = TrialJob(trial.config, tmp_path / "run", read_files(tmp_path / "run"))
    files = TrialWorker(False, "/nowhere").run(job, "rows", rows)
    assert b'"Resumed"' in files["events.jsonl"] or b"resumed" in files["events.jsonl"].lower()


def test_a_trial_that_is_asked_to_stop_ends_after_its_round_and_goes_on_to_the_same_result(grid, tmp_path):
    trial = plan_trials(grid).trials[0]
    rows, run = load_resources(trial.config), tmp_path / "run"
    whole = TrialWorker(False, "/nowhere").run(TrialJob(trial.config, run, {}), "rows", rows)
    asked = TrialWorker(False, "/nowhere")
    asked.ask_stop()
    write_files(run, asked.run(TrialJob(trial.config, run, {}), "rows", rows))
    assert not is_finished(run) and any("checkpoint" in name for name in read_files(run))
    rest = TrialWorker(False, "/nowhere").run(TrialJob(trial.config, run, read_files(run)), "rows", rows)
    events = [json.loads(line) for line in rest["events.jsonl"].splitlines()]
    assert [each["round"] for each in events if each["type"] == "Resumed"] == [1]
    assert rest["adapters/all.safetensors"] == whole["adapters/all.safetensors"]


def test_a_policy_comes_to_a_worker_with_its_base(cache, tmp_path):
    chosen = tiny()
    base = load_run(chosen)
    result = simulate(chosen, tmp_path / "here", resources=base, report=False)
    job = TrialJob(chosen, tmp_path / "there", {})
    files = TrialWorker(False, "/nowhere").run(job, "policy", copy.deepcopy(base))
    assert files["adapters/all.safetensors"] == (result.run / "adapters" / "all.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out"])
def test_files_outside_a_run_are_refused(tmp_path, name):
    with pytest.raises(RunError, match="outside its run"):
        write_files(tmp_path / "run", {name: b""})
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def test_a_cluster_is_no_setting_of_a_trial():
    with pytest.raises(ConfigError, match="a key of the grid itself"):
        load_grid({"base": {"cluster": {"workers": 2}}})
    assert load_grid({}, ["cluster.workers=3"]).cluster.workers == 3


@pytest.fixture
def pool_on(monkeypatch):
    return partial(build_pool, monkeypatch)


def test_trials_go_on_with_the_workers_that_fit_when_a_machine_leaves(pool_on, tmp_path):
    ray, pool, told = pool_on(2, leave={"cell-1": 1})
    assert finished(pool, trials(5), tmp_path) == [f"cell {i}" for i in range(5)]
    assert ray.most == 2 and ray.living == 1 and any("begins again on another worker" in each for each in told)


def test_a_trial_that_begins_again_keeps_its_number(pool_on, grid, tmp_path):
    these = plan_trials(grid).trials
    _, pool, _ = pool_on(2, leave={these[-1].folder.removeprefix("cells/"): 1})
    shown = []

    @contextmanager
    def watched(status):
        shown.append((status.trial, status.number, status.trials))
        yield lambda event: None

    trial_runner = runner._TrialRunner(Callbacks(watched, pool=lambda cache: pool), tmp_path)
    trial_runner.expect(these)
    trial_runner.finish_all(these, pool.cache)
    assert len(these) == 2 and len(shown) == 3
    assert shown == [(these[0].name, 1, 2), (these[1].name, 2, 2), (these[1].name, 2, 2)]


def test_workers_are_waited_for_once_and_only_when_there_are_trials(pool_on, tmp_path, monkeypatch):
    waits, wait = [], trial_pool.await_start
    monkeypatch.setattr(
        trial_pool, "await_start", lambda ray, actors, *rest: waits.append(len(actors)) or wait(ray, actors, *rest)
    )
    ray, pool, _ = pool_on(2)
    assert ray.living == 2 and waits == []
    finished(pool, trials(2), tmp_path)
    finished(pool, trials(2), tmp_path)
    assert waits == [2]


def test_workers_go_on_with_the_rows_that_they_have_until_none_need_them(pool_on, tmp_path, monkeypatch):
    ray, pool, _ = pool_on(2)
    monkeypatch.setattr(trial_pool, "data_key", lambda config: config.rows)
    these = [trials(1, rows=rows)[0] for rows in "aaaabb"]
    for number, trial in enumerate(these):
        trial.name, trial.folder = f"{trial.config.rows}{number}", f"cell-{number}"
    begun, put = [], []
    monkeypatch.setattr(ray, "put", lambda rows: put.append(rows) or rows)
    list(pool.run(these, tmp_path, lambda trial: begun.append(trial.name), lambda: False))
    assert begun == ["a0", "b4", "a1", "b5", "a2", "a3"]
    assert len(put) == 2 and set(pool._rows) == {"a"} and [seat.key for seat in pool.seats] == ["a", "a"]


def test_workers_start_before_the_driver_checks_the_trials(grid, tmp_path, monkeypatch):
    order = []

    def check(*_):
        order.append("check")
        raise CompositionError("refused")

    monkeypatch.setattr(runner, "check_grid", check)
    with pytest.raises(CompositionError, match="refused"):
        start_grid(grid, tmp_path / "out", replace(QUIET, pool=lambda cache: order.append("workers")))
    assert order == ["workers", "check"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("long", [set(), {"cell-1"}])
def test_a_worker_in_place_of_a_lost_one_has_the_drivers_versions_before_its_results_count(pool_on, tmp_path, long):
    ray, pool, _ = pool_on(2, leave={"cell-1": 1})
    ray.long = long  # of a worker that computes for hours, too
    these, yielded = pool.run(trials(3), tmp_path, lambda trial: setattr(ray, "machines", 2), lambda: False), []
    ray.torch = "0.0.1"
    with pytest.raises(ClusterError, match=r"has torch 0\.0\.1, the driver has .*install the same versions"):
        yielded.extend(each.name for each in these)
    assert len(ray.actors) == 3 and not (tmp_path / "cell-1").exists()


def test_trials_wait_for_a_machine_where_none_is_left(pool_on, tmp_path, monkeypatch):
    ray, pool, told = pool_on(2, leave={"cell-1": 0})
    monkeypatch.setattr(machines.time, "sleep", lambda seconds: setattr(ray, "machines", 1))
    assert finished(pool, trials(3), tmp_path) == [f"cell {i}" for i in range(3)]
    assert any("machines have left" in each and "waiting up to 600 s" in each for each in told)


def test_trials_that_wait_too_long_for_a_machine_say_how_to_resume(pool_on, tmp_path):
    _, pool, _ = pool_on(2, leave={"cell-1": 0}, wait=0)
    with pytest.raises(RunError, match=f"machines have left; add machines, and go on with: .*--resume {tmp_path}"):
        finished(pool, trials(3), tmp_path)


def test_a_trial_whose_workers_are_lost_again_and_again_says_how_to_resume(pool_on, tmp_path, monkeypatch):
    ray, pool, warned = pool_on(2)
    begin = ray.begin

    def die(actor, job):
        actor.alive = False
        return begin(actor, job)

    monkeypatch.setattr(ray, "begin", die)
    with pytest.raises(
        RunError, match=f"was lost .*, and 9 before it; .*resume: peerlora compare --resume {tmp_path}$"
    ):
        finished(pool, trials(1), tmp_path)
    assert len(warned) == 9


def test_trials_with_other_threads_than_workers_have_cores_are_warned_of_once(pool_on, tmp_path):
    _, pool, told = pool_on(2)
    finished(pool, trials(2), tmp_path)
    assert told == []
    finished(pool, trials(2, threads=8), tmp_path)
    finished(pool, trials(2, threads=8), tmp_path)
    (warning,) = told
    assert "in 8 threads" in warning and "cpus_per_worker=1" in warning


def test_trials_on_a_gpu_are_refused_where_workers_have_none(pool_on, grid, tmp_path):
    _, pool, _ = pool_on(2)
    with pytest.raises(CompositionError, match="device=cuda given, and workers get no GPU"):
        finished(pool, trials(1, device="cuda"), tmp_path)
    on_gpus = grid.model_copy(update={"base": {**grid.base, "device": "cuda"}})
    with pytest.raises(CompositionError, match="device=cuda given, and workers get no GPU"):
        check_grid(on_gpus, ResourceCache(False))
    with_gpus = on_gpus.model_copy(update={"cluster": ClusterConfig(gpus_per_worker=1)})
    check_grid(with_gpus, ResourceCache(False))  # of which the driver needs none


def test_a_trial_without_its_base_says_on_which_machine(grid, tmp_path, monkeypatch):
    trial = plan_trials(grid).trials[0]
    rows = load_resources(trial.config)
    model = trial.config.model.model_copy(update={"source": "/nowhere/base"})
    job = TrialJob(trial.config.model_copy(update={"model": model}), tmp_path / "there", {})
    monkeypatch.setattr("platform.node", lambda: "node7")
    with pytest.raises(ModelError, match=r"a worker on node7: .*/nowhere/base"):
        TrialWorker(False, "/nowhere").run(job, "rows", rows)


def timeless(tree):
    """What a comparison prints, without its folder and what is measured in seconds."""
    if isinstance(tree, dict):
        return {
            name: timeless(value)
            for name, value in tree.items()
            if name not in ("folder", "report") and "second" not in name
        }
    return [timeless(each) for each in tree] if isinstance(tree, list) else tree


def test_a_comparison_that_is_stopped_in_its_cells_comes_to_the_table_of_one_process(grid, tmp_path, monkeypatch):
    here = start_grid(grid.model_copy(update={"base": {**grid.base, "threads": 1}}), tmp_path / "here", QUIET)
    ray, begun, kept = ComputingRay(2, {}), [], {}
    monkeypatch.setattr(trial_pool, "actor_class", lambda: ray)

    @contextmanager
    def watched(status):
        begun.append(status.trial)
        yield lambda event: None

    def pool(cache):
        if cache not in kept:
            kept[cache] = TrialPool(ray, SETTINGS, cache, lambda warning: None)
        return kept[cache]

    ray.long = {"any"}
    stopping = Callbacks(watched, lambda: len(begun) == 2, pool=pool)
    with pytest.raises(Stopped, match="after 0 of 6 cells; go on with: peerlora compare --resume"):
        start_grid(grid, tmp_path / "there", stopping)
    ray.long = set()
    there = resume_grid(tmp_path / "there", lambda stored: stored, replace(stopping, stop=lambda: False))
    events = [path.read_text() for path in (tmp_path / "there").rglob("events.jsonl")]
    assert len(events) == 6 and sum('"Resumed"' in each for each in events) == 2
    assert timeless(there.as_json()) == timeless(here.as_json())


needs_ray = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),
]


def title(process):
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


class TestOnRay:
    pytestmark = needs_ray

    def test_the_table_is_that_of_one_process_though_a_worker_and_the_driver_are_stopped(self, grid, tmp_path):
        pytest.importorskip("ray", reason="Ray is not installed; pip install 'peerlora[cluster]'")
        here = start_grid(grid.model_copy(update={"base": {**grid.base, "threads": 1}}), tmp_path / "here", QUIET)
        warnings, begun, killed = [], [], []

        @contextmanager
        def watched(status):
            begun.append(status.trial)
            if len(begun) == 2 and not killed:  # workers that wait for cores at the start are warned of, too
                actors = [each for each in psutil.Process().children(recursive=True) if "TrialActor" in title(each)]
                actors[0].send_signal(signal.SIGKILL)
                killed.append(actors[0])
            yield lambda event: None

        with trial_pools(SETTINGS, warnings.append) as pool:
            on_ray = Callbacks(watched, lambda: len(begun) >= 5, pool=pool)
            with pytest.raises(Stopped, match="go on with: peerlora compare --resume"):
                start_grid(grid, tmp_path / "there", on_ray)
            first = list(begun)
            assert warnings
            begun.clear()
            there = resume_grid(tmp_path / "there", lambda stored: stored, replace(on_ray, stop=lambda: False))
        assert any("begins again on another worker" in each for each in warnings), warnings
        assert len(first) >= 5 and len(begun) < 6
        assert timeless(there.as_json()) == timeless(here.as_json())
