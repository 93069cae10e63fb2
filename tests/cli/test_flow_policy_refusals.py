"""Bad input of flow policies on the command line: one message, exit code 2, nothing written; a critic that diverges."""

import re
from importlib.util import find_spec

import pytest
import yaml

from flow_runs import TINY

needs_gymnasium = pytest.mark.skipif(find_spec("gymnasium") is None, reason="gymnasium (extra rl) is not installed")


@pytest.fixture
def policy_file(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def refused(cli, tmp_path, policy_file, *words):
    """What the command says of these settings, in one line of words."""
    answer = cli("train", policy_file, *words, "--out", tmp_path / "run")
    assert answer.code == 2 and not (tmp_path / "run").exists() and answer.out == ""
    assert answer.err.startswith("peerlora: ") and answer.err.count("peerlora: ") == 1
    return re.sub(r"\s+", " ", answer.err)


@needs_gymnasium
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.env=CartPole-v1"], "its actions are Discrete(2); a flow policy needs a Box"),
        (["task.env=Pendulum-v2"], "is unknown (did you mean 'Pendulum-v1'?)"),
        (["task.env=point-mas"], "is unknown (did you mean 'point-mass'?)"),
        (["task.env=Pendulum-v1", "partition.vary={gravity: [8, 12]}"], "Pendulum-v1 has no attribute 'gravity'"),
    ],
)
def test_an_environment_that_does_not_do_is_refused(cli, tmp_path, policy_file, words, message):
    assert message in refused(cli, tmp_path, policy_file, "partition.values={}", *words)


def test_without_gymnasium_it_is_said_what_to_install(cli, tmp_path, policy_file, monkeypatch):
    monkeypatch.setattr("peerlora.environment.find_spec", lambda name: None)
    found = refused(cli, tmp_path, policy_file, "task.env=Pendulum-v1", "partition.values={}")
    assert "gymnasium" in found and "pip install" in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["partition.each=2"], "with 2 environments each; give 6"),
        (["online.policy=steerd"], "online.policy"),
        (["online.policy=steered"], "use algorithm.name=dec-lora, adf-lora or local"),
        (["online.policy=steered", "algorithm=dec-lora", "online.beta=3"], "online.beta is not read"),
    ],
)
def test_settings_of_policies_that_do_not_go_together_are_refused(cli, tmp_path, policy_file, words, message):
    assert message in refused(cli, tmp_path, policy_file, *words)


def test_a_critic_that_diverges_names_client_and_round_and_the_checkpoint_before(cli, tmp_path, policy_file):
    """At a rate at which values run away after some rounds."""
    words = ["train.rounds=40", "train.lr=0.5", "train.optimizer=sgd", "online.discount=0.5"]
    answer = cli("train", policy_file, *words, "--out", tmp_path / "run")
    told = re.sub(r"\s+", " ", answer.err)
    assert answer.code == 2 and told.count("peerlora: ") == 1
    assert re.search(r"client \d.*in round \d+", told) and "lower train.lr" in told
    other = re.search(r"checkpoint after \d+ rounds has been set aside; to go on from (round-\d+): ", told)
    assert other and (tmp_path / "run" / "checkpoints" / f"{other[1]}.safetensors").is_file()
