"""``peerlora privacy``, and what ``train`` and ``show`` tell of privacy."""

import json

import pytest

from peerlora.train import accounting

pytestmark = pytest.mark.skipif(not accounting.has_accountants(), reason="opacus is missing; install the extra privacy")
FEW = ["train.rounds=2", "eval.every=2", "privacy.noise=2"]


def test_it_tells_noise_epsilon_by_round_and_other_choices(cli, yaml_file):
    path = yaml_file(*FEW)
    answer = cli("privacy", path)
    assert answer.code == 0 and "simulation, no guarantee" in answer.out
    assert all(word in answer.out for word in ("sampling rate", "epsilon by round", "round 2", "4 rounds", "warning:"))
    found = json.loads(cli("privacy", path, "--json").out.splitlines()[-1])
    assert found["planned"]["noise"] == [2.0] * 4 and [each["round"] for each in found["by_round"]] == [1, 2]
    assert not (path.parent / "runs").exists()


def test_of_whole_clients_it_tells_other_rounds(cli, yaml_file):
    answer = cli("privacy", yaml_file(*FEW, "privacy.unit=client"))
    assert answer.code == 0 and all(word in answer.out for word in ("4 rounds", "any", "with the same noise"))


def test_a_site_with_a_batch_of_its_own_says_which_client_it_is(cli, yaml_file):
    words = ["partition.kind=own", "task.labels=[class0, class1, class2]", "train.batch=[2, 12, 2, 2]"]
    path = yaml_file(*FEW, *words)
    refused = cli("privacy", path)
    assert refused.code == 2 and "--client N" in refused.err and "\n" not in refused.err.strip()
    first, second = (json.loads(cli("privacy", path, "--client", i, "--json").out.splitlines()[-1]) for i in (0, 1))
    assert (first["clients"], second["clients"]) == ([0], [1])
    assert second["planned"]["rate"][0] == pytest.approx(6 * first["planned"]["rate"][0])
    assert second["planned"]["epsilon"] > first["planned"]["epsilon"]
    assert cli("privacy", path, "--client", 4).code == 2


def test_a_config_without_privacy_is_one_message(cli, yaml_file):
    answer = cli("privacy", yaml_file())
    assert answer.code == 2 and answer.err.startswith("peerlora: privacy is null") and "\n" not in answer.err.strip()
    assert cli("privacy", yaml_file(), "privacy.clip=-1", "privacy.noise=1").code == 2


def test_a_run_and_show_tell_what_was_spent(cli, yaml_file, tmp_path, no_reports):
    answer = cli("train", yaml_file(*FEW), "--out", tmp_path / "run")
    shown = cli("show", tmp_path / "run")
    for told in (answer.out, shown.out):
        assert "privacy of each row: spent epsilon" in told and "(simulation, no guarantee)" in told
    summary = json.loads(cli("show", tmp_path / "run", "--json").out.splitlines()[-1])
    assert summary["privacy"]["spent"]["releases"] == [4] * 4
