"""``peerlora export``: a PEFT folder from a run that is over."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def run(cli, yaml_file, tmp_path):
    folder = tmp_path / "run"
    assert cli("train", yaml_file(), "--out", folder).code == 0
    return folder


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(one, other):
    assert json.loads((one / "adapter_config.json").read_text()) == json.loads(
        (other / "adapter_config.json").read_text()
    )
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()


def test_a_clients_adapter_is_that_of_the_run_and_peft_loads_it(cli, run, models, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    to = tmp_path / "mine"
    answer = cli("export", run, "--client", "2", "--to", to, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out) == {"run": str(run), "client": 2, "to": str(to)}
    assert_same_adapter(to, run / "adapters" / "client-02")
    base = AutoModelForSequenceClassification.from_pretrained(models("bert"), num_labels=3, dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base, to).state_dict()
    for name, value in tensors(to).items():
        stem, kind = name.rsplit(".", 1)
        module = stem if ".lora_" in name else stem + ".modules_to_save"
        assert torch.equal(loaded[f"{module}.default.{kind}"], value), name


def test_clients_differ_and_the_average_is_their_mean(cli, run, tmp_path):
    to = tmp_path / "average"
    answer = cli("export", run, "--average", "--to", to)
    assert answer.code == 0 and str(to) in answer.out
    assert_same_adapter(to, run / "adapters" / "average")
    clients = [tensors(run / "adapters" / f"client-{i:02d}") for i in range(4)]
    for name, value in tensors(to).items():
        torch.testing.assert_close(value, torch.stack([own[name] for own in clients]).mean(0))
    # All clients share A while only B is trained, so it is B that tells them apart.
    factor = next(name for name in clients[0] if "lora_B" in name)
    assert not torch.equal(clients[0][factor], clients[1][factor])


def test_ranks_that_were_cut_have_no_average(cli, yaml_file, tmp_path):
    run = tmp_path / "cut"
    words = ["algorithm.name=hetlora", "algorithm.gamma=0.5", "algorithm.penalty=0.1"]
    assert cli("train", yaml_file(), *words, "--out", run).code == 0
    answer = cli("export", run, "--average", "--to", tmp_path / "to")
    assert answer.code == 2 and "different ranks" in answer.err and "--client" in answer.err
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("client", ["4", "-1"])
def test_unknown_client(client, cli, run, tmp_path):
    answer = cli("export", run, "--client", client, "--to", tmp_path / "to")
    assert answer.code == 2 and f"--client {client} given" in answer.err and "clients 0 to 3" in answer.err
    assert not (tmp_path / "to").exists()


def test_target_in_use(cli, run, tmp_path):
    to = tmp_path / "to"
    to.mkdir()
    (to / "mine.txt").touch()
    answer = cli("export", run, "--client", "0", "--to", to)
    assert answer.code == 2 and "to is not empty" in answer.err
    assert "--resume" not in answer.err  # a target is no run
    assert [path.name for path in to.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("left", ["nothing", "half a file", "no summary"])
def test_unfinished_run(left, cli, run, tmp_path):
    """A kill while the run's end is written leaves adapters that are not whole, or whole ones without a summary."""
    place = run / "adapters" / "all.safetensors"
    (run / "summary.json").unlink()
    if left == "nothing":
        shutil.rmtree(run / "adapters")
    elif left == "half a file":
        place.write_bytes(place.read_bytes()[:1000])
    answer = cli("export", run, "--client", "0", "--to", tmp_path / "to")
    assert answer.code == 2 and f"peerlora train --resume {run}" in answer.err
    assert not (tmp_path / "to").exists()


def test_the_data_are_not_needed_to_export(cli, run, texts, tmp_path, monkeypatch):
    """The adapters are in the run folder; rows may have been deleted since, as private rows should be."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(texts), str(tmp_path / "gone.jsonl")))
    answer = cli("export", run, "--client", "1", "--to", tmp_path / "to")
    assert answer.code == 0, answer.err
    assert_same_adapter(tmp_path / "to", run / "adapters" / "client-01")


def test_models_of_a_run_that_relays(cli, yaml_file, tmp_path):
    run = tmp_path / "run"
    assert cli("train", yaml_file("exchange.relay=true", "algorithm.interval=1"), "--out", run).code == 0
    answer = cli("export", run, "--client", "1", "--model", "relayed", "--exact", "--to", tmp_path / "exact", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["model"] == "relayed"
    assert json.loads((tmp_path / "exact" / "adapter_config.json").read_text())["r"] == 12  # 4 clients of rank 3
    assert cli("export", run, "--client", "1", "--model", "own", "--to", tmp_path / "own").code == 0
    assert cli("export", run, "--client", "1", "--to", tmp_path / "default").code == 0
    assert_same_adapter(tmp_path / "default", run / "adapters" / "client-01")
    assert cli("export", run, "--model", "averaged", "--to", tmp_path / "averaged").code == 0
    assert_same_adapter(tmp_path / "averaged", run / "adapters" / "average")
    for words, told in (
        (["--client", "1", "--model", "mine"], "expected one of own, relayed, averaged"),
        (["--client", "1", "--model", "averaged"], "exactly one of --client I and --average"),
        (["--model", "own"], "exactly one of --client I and --average"),
        (["--average", "--model", "own"], "needs --client I"),
        (["--average", "--model", "best"], "a client's best model needs --client I"),
        (["--client", "1", "--model", "own", "--exact"], "--exact is for relayed models"),
        (["--client", "1", "--exact", "--rank", "2"], "drop one of them"),
    ):
        answer = cli("export", run, *words, "--to", tmp_path / "none")
        assert answer.code == 2 and told in answer.err and not (tmp_path / "none").exists(), words
