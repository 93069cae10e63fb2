"""Private peers over the in-memory transport: with seeded noise what the simulation gives; else noise of their own."""

import pytest
import torch
from in_memory import federation
from test_peers_in_memory import check

from peerlora.runs.privacy_ledger import PrivacyLedger
from peerlora.runtime.peer.config_digest import section_hashes
from peerlora.runtime.simulate import simulate
from peerlora.train import accounting

pytestmark = [
    pytest.mark.usefixtures("no_reports"),
    pytest.mark.skipif(not accounting.has_accountants(), reason="opacus is missing; install the extra privacy"),
]
WORDS = ("bert", "algorithm.name=adf-lora", "algorithm.interval=1", "peer.deadline=60", "peer.join=60")


@pytest.mark.parametrize("unit", ["row", "client"])
def test_seeded_noise_gives_what_the_simulation_gives(config, tmp_path, unit):
    words = [*WORDS, "privacy.noise=0.4", f"privacy.unit={unit}", "privacy.clip=0.5"]
    chosen = config(*words, "privacy.generator=seeded")
    whole, parts = simulate(chosen, tmp_path / "whole"), federation(chosen, tmp_path)
    check(whole, parts)
    for client, part in enumerate(parts):
        own, told = part.summary["privacy"], whole.summary["privacy"]
        assert own["guarantee"] == "simulation, no guarantee"
        assert own["spent"] == {name: values[client : client + 1] for name, values in told["spent"].items()}


def test_by_default_peers_take_the_systems_noise_and_write_down_what_they_spend(config, tmp_path):
    chosen = config(*WORDS, "privacy.noise=0.4", "topology=path", "clients=2")
    first, second = (federation(chosen, tmp_path / name) for name in ("one", "two"))
    for client, (one, other) in enumerate(zip(first, second, strict=True)):
        assert not torch.equal(one.adapters.flat, other.adapters.flat)
        told = one.summary["privacy"]
        assert told["generator"] == "system" and told["guarantee"].startswith("each row")
        assert list(PrivacyLedger(one.run).entries()) == [(client, 2)] * 3 and told["spent"]["releases"] == [6]


def test_sites_need_not_agree_on_their_privacy(config):
    usual, private = (section_hashes(config("bert", *words), ["a"]) for words in ([], ["privacy.noise=1"]))
    assert usual == private and not any("privacy" in name for name in usual)
