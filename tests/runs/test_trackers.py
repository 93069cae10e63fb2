"""Trackers: names and steps, the real libraries without a network, one that is down, one run over a resume."""

import json
import math
import re
import struct
import threading
import time
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import pytest

from peerlora.config.loading import load_config
from peerlora.errors import ConfigError, ExtraMissing, Stopped
from peerlora.runs.events import Evaluated, Warned
from peerlora.runs.trackers import feed, tracking
from peerlora.runs.trackers.names import PLAIN, READABLE, tidy_name, tidy_names
from peerlora.runs.trackers.series import MANY_CLIENTS, QUANTILES, series
from peerlora.runs.trackers.tracking import Tracking
from peerlora.runtime.simulate import resume, simulate

WANDB_FOLDERS = ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
REASON = "{} is not installed (pip install '.[{}]')"


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=REASON.format(name, name))


@pytest.fixture(autouse=True)
def quiet(no_reports, monkeypatch, tmp_path):
    """Nothing is sent anywhere, and nothing is written outside the test's folder."""
    for name, value in {"WANDB_MODE": "offline", **dict.fromkeys(WANDB_FOLDERS, tmp_path)}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr(tracking, "_PATIENCE", 200.0)  # seconds: no test fails because the machine is slow
    monkeypatch.chdir(tmp_path)


def test_a_round_becomes_series_in_groups(made):
    step, values = series(made.round_done(4, 3), made.started(3, rounds=9))
    assert step == 5
    assert values["train/loss"] == pytest.approx(4.1)
    assert [values[f"train_loss_by_client/{client}"] for client in range(3)] == pytest.approx([4.0, 4.1, 4.2])
    assert values["consensus/consensus_product"] == 0.3 and values["network/bytes_sent"] == 0
    assert values["time/seconds_train"] == 1.0
    assert not any(name.startswith("method/") for name in values)


def test_an_evaluation_has_the_name_of_its_metric_and_its_worst_client(made):
    step, values = series(made.evaluated(2, [0.5, 0.25, 1.0]), made.started(3))
    assert step == 2
    assert values["eval/accuracy"] == pytest.approx(1.75 / 3) and values["eval/accuracy_worst"] == 0.25
    assert values["eval/accuracy_averaged"] == 0.9 and values["eval_accuracy_by_client/2"] == 1.0
    _, values = series(made.evaluated(2, [0.5, 0.25, 1.0]), made.started(3, metric="loss", higher_is_better=False))
    assert values["eval/loss_worst"] == 1.0


def test_what_is_not_finite_is_left_out(made):
    _, values = series(made.evaluated(2, [math.nan, 0.25, math.inf]), made.started(3))
    assert all(map(math.isfinite, values.values()))
    assert values["eval/accuracy"] == 0.25 and "eval_accuracy_by_client/0" not in values


def test_many_clients_are_quantiles_and_sites_have_their_names(made):
    many = MANY_CLIENTS + 1
    _, values = series(made.round_done(0, many), made.started(many))
    assert [values[f"train_loss_quantiles/{q:02d}"] for q in QUANTILES][2] == pytest.approx((many - 1) / 20)
    assert not any("by_client" in name for name in values)
    start = made.started(2, names={"0": "hospital-a", "1": "hospital-b"})
    assert "train_loss_by_client/hospital-b" in series(made.round_done(0, 2), start)[1]


def test_settings_are_checked():
    assert load_config({"track": ["mlflow"]}).track.to == ["mlflow"]
    assert load_config(None, ["track=wandb"]).track.to == ["wandb"]
    assert load_config().track.to == []
    with pytest.raises(ConfigError, match="tensorboard keeps no files"):
        load_config({"track": {"to": ["tensorboard"], "adapters": True}})
    with pytest.raises(ConfigError, match="twice"):
        load_config({"track": ["wandb", "wandb"]})


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr("peerlora.environment.find_spec", lambda name: None)
    with pytest.raises(ExtraMissing, match=r"tensorboard.*\.\[tensorboard\]"):
        simulate(config("bert", "track=[tensorboard]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def run(run):
    """Events of a run whose evaluations are all on the same rows, so that each is a point."""

    def build(*words, **changes):
        return [replace(each, rows=20) if isinstance(each, Evaluated) else each for each in run(*words, **changes)]

    return build


class Flaky:
    """A tracker that fails until it is ``up``."""

    def __init__(self, up=False):
        self.up, self.failed, self.steps, self.ending = up, threading.Event(), [], None

    def _answer(self):
        if not self.up:
            self.failed.set()
            raise ConnectionError("no route to host")

    def begin(self, run):
        self._answer()
        self.run = run

    def log(self, step, values):
        self._answer()
        self.steps.append(step)

    def finish(self, ending, summary, adapters):
        self._answer()
        self.ending = ending


@pytest.fixture
def tracked(config, tmp_path):
    """Builds (Tracking, its tracker, what it told)."""

    def build(tracker, patience=5.0):
        (tmp_path / "run").mkdir(exist_ok=True)
        told = []
        chosen = config("bert", "track=[mlflow]")
        sink = Tracking(chosen, tmp_path / "run", told.append, build=lambda name: tracker, patience=patience)
        return sink, told

    return build


@pytest.mark.parametrize(("rows", "last", "ends"), [(10, 60, False), (60, 60, True), (10, 0, True)])
def test_the_last_evaluation_is_a_point_where_its_rows_are_those_of_the_others(tracked, made, rows, last, ends):
    """0: a training loop of the user's own has not told how many."""
    tracker = Flaky(up=True)
    sink, _ = tracked(tracker)
    with sink:
        sink(made.started())
        for done in range(3):
            sink(made.evaluated(done, [0.5], rows=last if done == 2 else rows, final=done == 2))
    assert tracker.steps == [0, 1, 2][: 3 if ends else 2]


@pytest.mark.parametrize("sample", [3, None])
def test_a_resumed_run_knows_the_rows_of_its_evaluations(config, tmp_path, monkeypatch, sample):
    tracker = Flaky(up=True)
    monkeypatch.setattr(tracking, "need_extra", lambda name: None)
    monkeypatch.setattr(Tracking.__init__, "__defaults__", (lambda name: tracker, None))
    stopped_and_resumed(config, tmp_path / "run", "track=[mlflow]", f"eval.rows={'null' if sample is None else sample}")
    points = Counter(tracker.steps)
    assert [points[step] for step in range(4)] == [1, 2, 2, 1 if sample else 2]  # of a round, and its evaluation


def test_one_that_is_down_is_told_once_and_the_run_goes_on(tracked, run, caplog):
    down = Flaky()
    sink, told = tracked(down)
    with sink:
        events = run(rounds=6)
        sink(events[0])
        assert down.failed.wait(10)
        for event in events[1:]:
            sink(event)
    assert len(told) == 1 and "no route to host" in told[0] and "the run goes on" in told[0]
    assert "mlflow lacks" in caplog.text


def test_one_that_comes_back_lacks_nothing(tracked, run, caplog):
    down = Flaky()
    sink, told = tracked(down)
    sink.feeds[0].again = 0.01
    with sink:
        first, *rest = run(rounds=6)
        sink(first)
        assert down.failed.wait(10)
        for event in rest:
            sink(event)
        down.up = True
    assert down.steps == [0, 1, 2, 3, 4, 5, 6, 6] and down.ending == "finished"
    assert len(told) <= 1 and not caplog.text


def test_one_that_hangs_holds_the_end_back_for_no_longer_than_its_patience(tracked, run, caplog):
    asleep = threading.Event()
    hanging = Flaky(up=True)
    hanging.log = lambda step, values: asleep.wait()
    sink, _ = tracked(hanging, patience=0.05)
    with sink:
        for event in run(rounds=2):
            sink(event)
    assert "not done after" in caplog.text
    asleep.set()


def test_points_that_wait_are_bounded(tracked, run, monkeypatch, caplog):
    monkeypatch.setattr(feed, "WAITING", 3)
    down = Flaky()
    sink, _ = tracked(down)
    with sink:
        for event in run(rounds=9):
            sink(event)
        assert len(sink.feeds[0]._calls) <= 4
        down.up = True
    assert down.ending == "finished" and down.steps[-1] == 9
    assert "lacks" in caplog.text


class Picky(Flaky):
    """A tracker that never takes the points of some steps."""

    def __init__(self, *refused):
        super().__init__(up=True)
        self.refused, self.tries = refused, []

    def log(self, step, values):
        self.tries.append(step)
        if step in self.refused:
            self.failed.set()
            raise ValueError(f"invalid name at step {step}")
        super().log(step, values)


def test_a_point_that_is_never_taken_is_dropped_and_told_of_once(tracked, run, caplog):
    picky = Picky(1, 2, 4)
    sink, told = tracked(picky)
    sink.feeds[0].again = 0.01
    with sink:
        first, *rest = run(rounds=6)
        sink(first)
        for event in rest[:5]:
            sink(event)
        while not sink.feeds[0].refusal:
            threading.Event().wait(0.01)
        for event in rest[5:]:
            sink(event)
    assert picky.steps == [0, 3, 5, 6, 6] and picky.ending == "finished"
    assert len([text for text in told if "takes others but not some of this run's points" in text]) == 1
    assert len(told) <= 2 and "mlflow lacks 3 of this run's points" in caplog.text


def test_at_the_end_a_point_that_is_refused_does_not_keep_the_run_open(tracked, run, caplog):
    picky = Picky(6)
    sink, _ = tracked(picky)
    with sink:
        for event in run(rounds=6):
            sink(event)
    assert picky.steps == [0, 1, 2, 3, 4, 5] and picky.ending == "finished"
    assert "mlflow lacks 2 of this run's points (invalid name at step 6)" in caplog.text


def test_points_that_are_given_up_at_the_end_are_all_counted(tracked, run, caplog):
    picky = Picky(*range(1, 31))
    sink, _ = tracked(picky)
    with sink:
        for event in run(rounds=30):
            sink(event)
    assert picky.steps == [0] and picky.ending == "finished"
    assert "mlflow lacks 31 of this run's points" in caplog.text


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"id": 3}', """{"id": "'; drop"}"""])
def test_a_damaged_id_is_told_and_costs_no_run(tracked, run, tmp_path, damage):
    tracker = Flaky(up=True)
    sink, told = tracked(tracker)
    (tmp_path / "run" / "tracking.json").write_text(damage)
    with sink:
        for event in run(rounds=2):
            sink(event)
    (message,) = told
    assert "tracking.json is damaged; trackers have the rest of this run as another one" in message
    assert json.loads((tmp_path / "run" / "tracking.json").read_text())["id"] == tracker.run.id
    assert tracker.steps == [0, 1, 2, 2]


def test_an_id_that_cannot_be_kept_is_told(tracked, run, tmp_path):
    tracker = Flaky(up=True)
    sink, told = tracked(tracker)
    (tmp_path / "run" / "tracking.json.tmp").mkdir()
    with sink:
        sink(run()[0])
    assert len(told) == 1 and "cannot be written" in told[0] and re.fullmatch("[0-9a-f]{16}", tracker.run.id)


def test_a_private_run_says_that_its_numbers_are_not_covered(config, tmp_path, run):
    told, private = [], config("bert", "track=[mlflow]", "privacy={epsilon: 8}")
    (tmp_path / "run").mkdir()
    with Tracking(private, tmp_path / "run", told.append, build=lambda name: Flaky(up=True)) as sink:
        for event in run():
            sink(event)
    assert [message for message in told if "go to mlflow without noise" in message] == told and len(told) == 1


def test_names_are_what_a_tracker_takes():
    names = ["eval/f1@5", "eval/f1#5", "a//b/../c/", "..", "x" * 300, "train_loss_by_client/a b.c-d", "\ud800\n"]
    found = tidy_names(dict.fromkeys(names, 1.0), PLAIN)
    assert len(found) == len(names) and max(map(len, found)) == 250
    assert list(found)[0] == "eval/f1_5" and re.fullmatch("eval/f1_5_[0-9a-f]{8}", list(found)[1])
    assert list(found)[2:4] == ["a/b/c", "_"] and "train_loss_by_client/a b.c-d" in found
    assert list(tidy_names({"1 – é/y\n": 0}, READABLE)) == ["1 – é/y_"]
    if find_spec("mlflow"):
        from mlflow.utils.validation import _validate_metric_name

        for name in [*found, tidy_name("..x", PLAIN)]:
            _validate_metric_name(name)


@pytest.mark.slow
@needs("mlflow")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_logs_the_config_again_where_that_failed(config, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    from peerlora.runs.trackers.base import TrackedRun
    from peerlora.runs.trackers.mlflow_run import MLflow

    settings = {"adapter": {"rank": 3}, "odd": {"name: §": 1}}
    tracked = TrackedRun("0123456789abcdef", "run", tmp_path, "trials", None, settings, {})
    log_batch = MlflowClient.log_batch
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            MLflow().begin(tracked)
    assert MlflowClient.log_batch is log_batch
    client = MlflowClient()
    for rank in (3, 4):  # of a parameter, MLflow keeps the first value
        tracker = MLflow()
        tracker.begin(replace(tracked, config={**settings, "adapter": {"rank": rank}}))
        (found,) = client.search_runs([client.get_experiment_by_name("trials").experiment_id])
        assert found.data.params == {"adapter.rank": "3", "odd.name_ _": "1"}
    assert [each.path for each in client.list_artifacts(found.info.run_id)] == ["config.json"]
    tracker.log(1, {"method/R²: §": 2.0})
    assert client.get_run(found.info.run_id).data.metrics == {"method/R²_ _": 2.0}


@pytest.mark.parametrize(("error", "ending"), [(Stopped("x"), "stopped"), (ValueError("x"), "failed")])
def test_how_a_run_ended_is_said(tracked, run, error, ending):
    tracker = Flaky(up=True)
    sink, _ = tracked(tracker)
    with pytest.raises(type(error)), sink:
        sink(run()[0])
        raise error
    assert tracker.ending == ending


def test_a_failure_is_a_warning_in_the_events_of_a_run(config, tmp_path, monkeypatch):
    down = Flaky()
    monkeypatch.setattr(tracking.Tracking.__init__, "__defaults__", (lambda name: down, 1.0))
    monkeypatch.setattr("peerlora.environment.find_spec", lambda name: True)
    seen = []

    def wait(event):
        seen.append(event)
        if len(seen) == 2:
            assert down.failed.wait(10)

    simulate(config("bert", "track=[mlflow]"), tmp_path / "run", sinks=[wait])
    assert [event.message for event in seen if isinstance(event, Warned) and "mlflow" in event.message]
    assert "no route to host" in (tmp_path / "run" / "events.jsonl").read_text()


def stopped_and_resumed(config, folder, *words):
    """A run of three rounds that is stopped after the first one and resumed."""
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 1

    with pytest.raises(Stopped):
        simulate(config("bert", *words, "eval.every=1"), folder, stop=stop)
    return resume(folder)


@needs("tensorboard")
def test_tensorboard(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = stopped_and_resumed(config, tmp_path / "run", "track=[tensorboard]")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [each.step for each in found.Scalars("train/loss")] == [1, 2, 3]
    assert [each.step for each in found.Scalars("eval/accuracy")] == [0, 1, 2, 3]
    last = found.Scalars("eval/accuracy")[-1].value
    assert last == pytest.approx(result.summary["scores"]["own_mean"], abs=1e-6)
    assert {f"train_loss_by_client/{client}" for client in range(4)} <= set(found.Tags()["scalars"])
    assert "final/own_mean" in found.Tags()["scalars"]
    texts = {name: found.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in found.Tags()["tensors"]}
    assert '"rank": 3' in texts["config/text_summary"] and '"own_mean"' in texts["summary/text_summary"]


def wandb_records(folder):
    """The records of an offline run: LevelDB's log format, a header of 7 bytes before each part."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if at > len(data):
                break  # being written
            if kind in (1, 4):  # whole, or the last part
                record = Record()
                record.ParseFromString(parts)
                parts = b""
                yield record


@pytest.mark.slow
@needs("wandb")
def test_wandb(config, tmp_path):
    words = ("track={to: [wandb], project: trials, group: first, adapters: true}",)
    result = stopped_and_resumed(config, tmp_path / "run", *words)
    records = []
    while sum(record.WhichOneof("record_type") == "exit" for record in records) < 2:
        time.sleep(0.05)  # wandb's own process writes the last bytes after ``finish`` has returned
        records = list(wandb_records(tmp_path / "run"))
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1
    assert (runs[0].project, runs[0].run_group, runs[0].display_name) == ("trials", "first", "run")
    settings = {each.key: each.value_json for each in runs[0].config.update}
    assert json.loads(settings["adapter"])["rank"] == 3
    lines = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [line["round"] for line in lines if "train/loss" in line] == [1, 2, 3]
    last = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line][-1]
    assert last == pytest.approx(result.summary["scores"]["own_mean"])
    metrics = {record.metric.name or record.metric.glob_name: record.metric for record in records}
    assert metrics["*"].step_metric == "round"
    exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert exits == [130, 0]
    assert "own_mean" in json.dumps([str(record) for record in records])
    (artifact,) = (record.artifact for record in records if record.WhichOneof("record_type") == "artifact")
    assert (artifact.name, artifact.type) == (f"adapters-{runs[0].run_id}", "model")
    folder = tmp_path / "run" / "adapters"
    expected = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {each.path for each in artifact.manifest.contents} == expected


@pytest.mark.slow
@needs("mlflow")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow(config, tmp_path):
    from mlflow import MlflowClient

    words = ("track={to: [mlflow], project: trials, adapters: true}",)
    result = stopped_and_resumed(config, tmp_path / "run", *words)
    client = MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("trials").experiment_id])
    assert len(found) == 1
    (run,) = found
    assert run.info.status == "FINISHED" and run.data.tags["method"] == "adf-lora"
    assert run.data.params["adapter.rank"] == "3"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(each.step for each in history) == [1, 2, 3]
    assert run.data.metrics["eval/accuracy"] == pytest.approx(result.summary["scores"]["own_mean"])
    assert run.data.metrics["final/scores.own_mean"] == pytest.approx(result.summary["scores"]["own_mean"])
    files = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert files == {"adapters", "config.json", "summary.json"}
    assert client.list_artifacts(run.info.run_id, "adapters")


@pytest.mark.slow
@needs("trackio")
def test_trackio(config, tmp_path, monkeypatch):
    import trackio
    from trackio.cas import blob_path
    from trackio.sqlite_storage import SQLiteStorage

    for module in ("trackio.sqlite_storage", "trackio.utils"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    result = stopped_and_resumed(config, tmp_path / "run", "track={to: [trackio], project: trials, adapters: true}")
    runs = SQLiteStorage.get_runs("trials")
    assert len(runs) == 1 and runs[0].startswith("run-")
    lines = SQLiteStorage.get_logs("trials", runs[0])
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    assert [line["final/own_mean"] for line in lines if "final/own_mean" in line] == pytest.approx(
        [result.summary["scores"]["own_mean"]]
    )
    assert trackio.Api().runs("trials")[0].config["adapter"]["rank"] == 3
    (artifact,) = SQLiteStorage.list_artifacts("trials")
    assert artifact["name"] == f"adapters-{runs[0].removeprefix('run-')}" and artifact["type"] == "model"
    assert len(artifact["versions"]) == 1
    kept = SQLiteStorage.get_artifact_manifest("trials", artifact["name"], "latest")
    folder = tmp_path / "run" / "adapters"
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert {entry["path"]: entry["size"] for entry in kept["manifest"]} == {
        name: path.stat().st_size for name, path in files.items()
    }
    assert all(
        blob_path("trials", entry["digest"]).read_bytes() == files[entry["path"]].read_bytes()
        for entry in kept["manifest"]
    )
