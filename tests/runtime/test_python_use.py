"""The same from Python: a config, a run, a result object."""

import re

import pytest

from peerlora.config.loading import load_config
from peerlora.errors import RunError
from peerlora.runs.events import Evaluated, RoundDone, RunFinished, RunStarted
from peerlora.runs.report import write_report
from peerlora.runtime.simulate import simulate


@pytest.fixture
def result(models, texts, cache, tmp_path):
    config = load_config(
        {
            "model": {"source": models("bert")},
            "data": {"train": f"jsonl:{texts}", "eval": None, "text": ["text"], "label": "label", "max_length": 12},
            "clients": 4,
            "topology": "ring",
            "algorithm": {"name": "adf-lora", "interval": 1},
            "train": {"rounds": 2, "local_steps": 2, "batch": 4},
            "threads": 1,
        },
        ["eval.every=1"],
    )
    return simulate(config, tmp_path / "run")


def test_a_result_holds_summary_metrics_adapters_and_folder(result, tmp_path):
    assert result.run == tmp_path / "run"
    assert result.summary["method"] == "adf-lora" and result.summary["rounds"] == 2
    assert result.adapters.clients == 4 and result.adapters.flat.isfinite().all()
    table = result.metrics
    assert table.column_names == ["client", "round", "metric", "value"]
    rows = table.to_pylist()
    own = [row["value"] for row in rows if row["metric"] == "own" and row["round"] == 2]
    assert len(own) == 4
    assert result.summary["accuracy"]["own_mean"] == pytest.approx(sum(own) / 4)
    assert result.summary["accuracy"]["own_min"] == min(own) and result.summary["accuracy"]["own_max"] == max(own)
    sent = [row["value"] for row in rows if row["metric"] == "bytes_sent"]
    assert result.summary["bytes_sent"] == sum(sent) and {row["client"] for row in rows} == {None, 0, 1, 2, 3}


def test_a_run_may_leave_its_report_for_later(result, drawn, tmp_path):
    bare = simulate(load_config(result.run / "config.yaml"), tmp_path / "bare", report=False)
    assert not (bare.run / "report.html").exists()
    assert bare.adapters.flat.equal(result.adapters.flat)
    assert "<svg" in write_report(bare.run).read_text()


def test_the_report_is_one_file_that_opens_without_a_network(drawn, result):
    page = re.sub(r"<script.*?</script>", "", (result.run / "report.html").read_text(), flags=re.DOTALL)
    assert "<svg" in page and "adf-lora, 4 clients" in page  # scripts are looked at in tests/runs/test_run_report.py
    assert not re.search(r"<link|<img|@import|\burl\(\s*['\"]?http|\bsrc\s*=", page)
    # A reference inside the page is fine; an SVG's name space is a name, which nobody fetches.
    targets = re.findall(r"""href\s*=\s*["']?([^"'\s>]*)""", page)
    assert all(target.startswith("#") for target in targets)


def test_the_folder_holds_every_part_of_the_record(result):
    names = {path.name for path in result.run.iterdir()}
    assert names >= {"config.yaml", "run.json", "events.jsonl", "metrics.parquet", "summary.json", "report.html"}
    assert load_config(result.run / "config.yaml").clients == 4
    clients = [f"client-{i:02d}" for i in range(4)]
    assert {path.name for path in (result.run / "adapters").iterdir()} == {*clients, "average", "all.safetensors"}
    for name in [*clients, "average"]:
        held = {path.name for path in (result.run / "adapters" / name).iterdir()}
        assert held >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"}


def test_a_sink_takes_every_event_in_order(config, tmp_path):
    heard = []
    simulate(
        config("bert", "train.rounds=2", "eval.every=1", "checkpoint.every=2"), tmp_path / "run", sinks=[heard.append]
    )
    kinds = [type(event) for event in heard if type(event).__name__ not in ("Warned", "CheckpointSaved", "RunFinished")]
    assert kinds == [RunStarted, Evaluated, RoundDone, Evaluated, RoundDone, Evaluated]
    assert [event.final for event in heard if isinstance(event, Evaluated)] == [False, False, True]
    assert not any(isinstance(event, RunFinished) for event in heard[:-1])


def test_a_run_folder_is_never_used_twice(result, config):
    before = (result.run / "events.jsonl").read_bytes()
    with pytest.raises(RunError, match="in use"):
        simulate(config(), result.run)
    assert (result.run / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("words", [["seed=1"], ["train.lr=0.02"], ["algorithm.name=dec-lora"]])
def test_another_seed_or_setting_gives_another_result(words, config, tmp_path):
    one = simulate(config("bert", "algorithm.interval=1"), tmp_path / "one").adapters.flat
    other = simulate(config("bert", *words), tmp_path / "other").adapters.flat
    assert one.shape == other.shape and not one.equal(other)
