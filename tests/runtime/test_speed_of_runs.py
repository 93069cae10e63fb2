"""A run keeps the precision and the layout that it began with, wherever it is resumed."""

import json

import pytest
import torch
from in_memory import federation as peers

from peerlora.config.loading import load_config
from peerlora.errors import RunError, Stopped
from peerlora.lora.base_digest import base_digest
from peerlora.runs.events import RunStarted
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime import resources
from peerlora.runtime.compose import compose
from peerlora.runtime.export import exporter_of, read_adapters
from peerlora.runtime.peer.config_digest import section_hashes
from peerlora.runtime.simulate import resume, simulate
from peerlora.train.kernels.speed import Rates, Speed

pytestmark = pytest.mark.usefixtures("no_reports")

QUICK = ["train.rounds=2", "train.local_steps=1", "clients=2", "topology=complete"]
RATES = Rates(((16, 16),), plain=10.0, packed=12.0, bf16=40.0, packed_bf16=None)


@pytest.fixture
def chosen(monkeypatch):
    """Let these Speeds be chosen, one run after the other; the last one by all later runs."""

    def choose(*speeds):
        left = list(speeds)
        monkeypatch.setattr(resources, "choose_speed", lambda *_: left.pop(0) if len(left) > 1 else left[0])

    return choose


def begun_as(run):
    return json.loads((run / "run.json").read_text())["speed"]


@pytest.mark.parametrize(
    ("dtype", "speed"), [("auto", Speed("bf16", False, RATES)), ("fp32", Speed("fp32", False, RATES))]
)
def test_a_resumed_run_goes_on_as_it_began(config, chosen, tmp_path, dtype, speed):
    settings = config("bert", *QUICK, f"train.dtype={dtype}")
    chosen(speed)
    whole = simulate(settings, tmp_path / "whole", report=False)
    with pytest.raises(Stopped):
        simulate(settings, tmp_path / "run", report=False, stop=lambda: True)
    chosen(Speed("fp32", True))  # what another machine would choose
    found = resume(tmp_path / "run", report=False)
    assert begun_as(tmp_path / "run") == {"dtype": speed.dtype, "packed": False}
    assert torch.equal(found.adapters.flat, whole.adapters.flat)
    other = simulate(settings, tmp_path / "other", report=False)
    assert dtype == "fp32" or not torch.equal(other.adapters.flat, whole.adapters.flat)
    assert torch.equal(read_adapters(whole.run, exporter_of(whole.run)).flat, whole.adapters.flat)


def test_what_was_measured_and_chosen_stands_in_the_run(config, chosen, tmp_path):
    chosen(Speed("bf16", False, RATES))
    simulate(config("bert", *QUICK, "train.dtype=auto"), tmp_path / "run", report=False)
    (start,) = select_events(read_events(tmp_path / "run"), RunStarted)
    assert any(note.endswith("train.dtype=auto takes bf16") for note in start.notes)
    assert "train.dtype=bf16" not in " ".join(start.warnings)
    assert "auto" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_of_an_older_version_is_resumed_with_packed_weights(config, chosen, tmp_path):
    with pytest.raises(Stopped):
        simulate(config("bert", *QUICK, "train.dtype=fp32"), tmp_path / "run", report=False, stop=lambda: True)
    path = tmp_path / "run" / "run.json"
    facts = json.loads(path.read_text())
    del facts["speed"]
    path.write_text(json.dumps(facts))
    chosen(Speed("bf16", False))
    found = resume(tmp_path / "run", report=False)
    whole = simulate(config("bert", *QUICK, "train.dtype=fp32"), tmp_path / "whole", report=False)
    assert found.adapters.flat.dtype == torch.float32 and not torch.equal(found.adapters.flat, whole.adapters.flat)
    assert torch.allclose(found.adapters.flat, whole.adapters.flat, atol=0.05)


@pytest.mark.parametrize("damage", ["fp32", {"dtype": "int3", "packed": True}, {"dtype": "fp32"}, None])
def test_a_choice_that_is_lost_or_damaged_is_told(config, tmp_path, damage):
    with pytest.raises(Stopped):
        simulate(config("bert", *QUICK, "train.dtype=auto"), tmp_path / "run", report=False, stop=lambda: True)
    path = tmp_path / "run" / "run.json"
    facts = json.loads(path.read_text()) | {"speed": damage}
    path.write_text(json.dumps(facts))
    with pytest.raises(RunError, match="run.json tells speed=.*; expected the dtype that the run began with"):
        resume(tmp_path / "run", report=False)


def test_sites_may_choose_differently_where_all_say_auto(config, chosen, tmp_path):
    chosen(Speed("bf16", False, RATES), Speed("fp32", True))
    found = peers(config("bert", *QUICK, "train.dtype=auto"), tmp_path)
    assert {begun_as(each.run)["dtype"] for each in found} == {"fp32", "bf16"}
    assert all(each.adapters.flat.dtype == torch.float32 for each in found)
    assert torch.allclose(found[0].adapters.flat, found[1].adapters.flat)  # the last round averages both


def test_auto_is_a_setting_that_sites_have_in_common():
    auto, plain = (section_hashes(load_config({}, [f"train.dtype={word}"]), ["a"]) for word in ("auto", "fp32"))
    assert [name for name in auto if auto[name] != plain[name]] == ["train"]


def test_a_base_in_bf16_and_in_fp32_have_one_digest_if_both_are_rounded(config):
    full, half = (compose(config("bert", f"train.dtype={dtype}")) for dtype in ("fp32", "bf16"))
    assert base_digest(full.model.base) != base_digest(half.model.base)
    assert base_digest(full.model.base, halved=True) == base_digest(half.model.base, halved=True)
    auto = compose(config("bert", "train.dtype=auto"))
    assert auto.base_digest == base_digest(half.model.base, halved=True)
    next(full.model.base.parameters()).data.mul_(1.5)
    assert base_digest(full.model.base, halved=True) != base_digest(half.model.base, halved=True)


def test_slow_bf16_is_warned_of_in_the_run(config, monkeypatch):
    slow = Speed("bf16", False, Rates(((16, 16),), plain=95.0, packed=85.0, bf16=4.9, packed_bf16=4.8))
    monkeypatch.setattr(resources, "choose_speed", lambda *_: slow)
    found = compose(config("bert", "train.dtype=bf16"))
    assert any("bf16 is slower than fp32" in warning for warning in found.warnings)
    assert found.paths["packed weights"] is not None
