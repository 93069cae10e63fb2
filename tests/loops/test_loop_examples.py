"""The examples of loops of one's own run as they stand, at one site over gRPC."""

import json
import re
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from peerlora.config.loading import load_config
from peerlora.hf import SequentialLearner
from peerlora.network.identity.authority import throwaway
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.launch.processes import free_ports
from peerlora.runtime.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_reports")
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TEMPLATE = "{% for each in messages %}{{ each.role }} {{ each.content }} {{ eos_token }}{% endfor %}"
needs_trl = pytest.mark.skipif(
    find_spec("trl") is None, reason="trl is not installed: pip install trl==1.16.0 --no-deps"
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script as `python examples/NAME.py MODEL ROWS PEER.yaml IDENTITY MEMBERS OUT ...` does."""

    def go(name, model, rows, *words):
        throwaway(tmp_path / "ids", {"site-0": f"127.0.0.1:{free_ports(1)[0]}"}, "test")
        config = tmp_path / "peer.yaml"
        config.write_text(
            "clients: 1\ntopology: complete\nalgorithm: {name: adf-lora, interval: 1}\npeer: {join: 1}\n"
            "train: {rounds: 2, local_steps: 2}\n"
        )
        given = [model, rows, config, tmp_path / "ids" / "site-0", tmp_path / "ids" / "members.json", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, given), *words])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return go


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def check(run, printed):
    assert "2 rounds, the adapter is in" in printed
    assert (run / "adapters" / "client-00" / "adapter_model.safetensors").is_file()
    rounds = select_events(read_events(run), RoundDone)
    assert len(rounds) == 2 and all(done.loss[0] > 0 for done in rounds)


@pytest.mark.slow
def test_a_plain_loop(run, models, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    check(tmp_path / "out", run("own_loop", models("bert"), texts))


def without_peers(source):
    """The script that a user had: without the marked lines, and those that tell of the run."""
    kept, marks = [], []
    for line in source.splitlines():
        mark = re.search(r"  # ([123])$", line)
        if mark:
            marks.append(int(mark[1]))
        if mark and line.lstrip().startswith("with "):
            kept.append("    if True:")  # what it holds stays where it is
        elif not re.search(r"\bpeer\b\.|^import peerlora$", line) and line.strip() != "break":
            kept.append(line)
    assert marks == [1, 2, 3]
    return "\n".join(kept) + "\n"


def test_a_plain_loop_without_its_marked_lines_is_a_plain_loop(models, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("itertools.repeat", lambda loader: [loader])  # one epoch: it was the run that ended the loop
    script = without_peers((EXAMPLES / "own_loop.py").read_text(encoding="utf-8"))
    code = script.split('"""', 2)[2]
    assert "peerlora" not in code and not re.search(r"\bpeer\b", code)
    seen = []

    class Watched(torch.optim.AdamW):
        def step(self, *words):
            seen.append([float(each.grad.abs().max()) for group in self.param_groups for each in group["params"]])
            return super().step(*words)

    monkeypatch.setattr("torch.optim.AdamW", Watched)
    names = {"__name__": "own_loop"}
    exec(compile(script, "own_loop.py", "exec"), names)
    names["main"](models("bert"), str(texts), "", "", "", "")
    assert len(seen) == 8, "60 rows in batches of 8"
    assert max(seen[-1]) > 0 and all(max(each[at] for each in seen) > 0 for at in range(len(seen[0])))


@pytest.fixture
def chat(models, tmp_path):
    """A tiny language model of this test alone, whose tokenizer has another chat template."""
    from transformers import AutoTokenizer

    folder = str(shutil.copytree(models("llama"), tmp_path / "llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_supervised_fine_tuning_with_trl(run, chat, tmp_path):
    turns = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5"}]
    rows = write(tmp_path / "chat.jsonl", [{"messages": turns}] * 12)
    check(tmp_path / "out" / "peer", run("trl_sft", chat, rows, "steps=4", "save=no", "cpu=1"))


@pytest.mark.slow
@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_preference_tuning_with_trl(run, chat, tmp_path):
    pair = {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6"}
    rows = write(tmp_path / "pairs.jsonl", [pair] * 12)
    check(tmp_path / "out" / "peer", run("trl_dpo", chat, rows, "steps=4", "save=no", "cpu=1"))


@pytest.mark.slow
@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_policy_optimisation_of_groups_with_trl_at_two_sites(chat, tmp_path):
    """GRPO by a reward function, two clients: rewards stand among the measures of rounds, and adapters are mixed."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **_):
        return [float(len(set(each.split()))) for each in completions]

    def make_trainer(client):
        set_seed(client)
        words = {"temperature": 1.0, "max_completion_length": 6, "num_generations": 4, "logging_steps": 1}
        return GRPOTrainer(
            model=get_peft_model(
                AutoModelForCausalLM.from_pretrained(chat), LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4)
            ),
            reward_funcs=reward,
            args=GRPOConfig(
                str(tmp_path / f"trainer-{client}"),
                per_device_train_batch_size=4,
                learning_rate=0.01,
                use_cpu=True,
                bf16=False,
                report_to="none",
                **words,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"w{1 + client} w2 w3"}] * 8),
            processing_class=AutoTokenizer.from_pretrained(chat, padding_side="left"),
        )

    settings = {"clients": 2, "topology": "complete", "train": {"rounds": 2, "local_steps": 2}}
    config = load_config(settings | {"algorithm": {"name": "dec-lora"}})
    result = simulate(config, tmp_path / "run", learner=SequentialLearner(make_trainer, "reward"), report=False)
    rounds = select_events(read_events(result.run), RoundDone)
    assert len(rounds) == 2 and all(done.measures["reward"] > 0 for done in rounds)
    flat = result.adapters.flat
    assert torch.allclose(flat[0], flat[1], rtol=0, atol=1e-6), "both have the mean"
    assert max(float(B.abs().max()) for B in result.adapters.B.values()) > 1e-4


@pytest.mark.slow
@pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed: see docs/own-loop.md")
@pytest.mark.filterwarnings("ignore")
def test_a_loop_is_a_flower_client_and_then_a_peer(run, models, texts, tmp_path, monkeypatch):
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from peerlora.errors import ModelError
    from peerlora.flower import put_arrays, to_arrays

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    script = runpy.run_path(str(EXAMPLES / "flower_bridge.py"))
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # what Flower's runtime sets
    model = script["load"](models("bert"), str(texts))[0]
    sent = to_arrays(model)
    assert all("lora_" in name or "classifier" in name for name in sent)
    message = Message(RecordDict({"arrays": sent, "config": ConfigRecord()}), dst_node_id=1, message_type="train")
    context = Context(0, 1, {}, RecordDict(), {"model": models("bert"), "rows": str(texts)})
    reply = script["train"](message, context)
    assert reply.content["metrics"]["num-examples"] == 60
    before = {name: value.numpy() for name, value in sent.items()}
    after = {name: value.numpy() for name, value in reply.content["arrays"].items()}
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    put_arrays(model, reply.content["arrays"])
    assert all((to_arrays(model)[name].numpy() == after[name]).all() for name in after)
    other = script["load"](models("bert"), str(texts))[0]
    other.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A.default.weight = torch.nn.Parameter(
        torch.zeros(2, 16)
    )
    with pytest.raises(ModelError):
        put_arrays(other, reply.content["arrays"])
    run("flower_bridge", models("bert"), texts)
    assert len(select_events(read_events(tmp_path / "out"), RoundDone)) == 2
