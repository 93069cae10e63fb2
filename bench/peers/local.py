"""What the plain PEFT loop and the frameworks' runners share: the model, local steps, the score, the answer.

Runs under each framework's own versions of torch, transformers and peft, so it uses only what is in all of them.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
LAUNCHED = float(os.environ.get("PEERS_LAUNCHED", time.time()))  # when the harness started this program
State = dict[str, torch.Tensor]


class Work:
    """The common folder, and one PEFT model into which the adapters of the nodes are put in turn."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.job = json.loads((folder / "job.json").read_text())
        self.W = torch.tensor(self.job["W"], dtype=torch.float32)
        self.ids, self.labels = read_rows(folder / "train.parquet")
        batches = pq.read_table(folder / "batches.parquet").to_pylist()
        self.batches = {(row["node"], row["round"], row["step"]): row["rows"] for row in batches}
        self.model = build_model(folder, self.job)
        self.trained = {plain(name): p for name, p in self.model.named_parameters() if p.requires_grad}

    def start(self) -> State:
        """A copy of what the model holds now: after loading, the common initial adapter."""
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def put(self, state: State) -> None:
        """Copy an adapter into the model."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state[name])

    def train(self, state: State, node: int, t: int) -> State:
        """The local steps of one node in round ``t``, with a fresh optimiser."""
        self.put(state)
        optimizer = torch.optim.AdamW(list(self.trained.values()), lr=self.job["lr"], weight_decay=0.0)
        for k in range(self.job["steps"]):
            rows = self.batches[node, t, k]
            optimizer.zero_grad()
            self.model(**inputs(self.ids[rows]), labels=self.labels[rows]).loss.backward()
            optimizer.step()
        return self.start()

    @torch.no_grad()
    def accuracy(self, state: State) -> float:
        """The share of evaluation rows that a node's own model gets right."""
        self.put(state)
        ids, labels = read_rows(self.folder / "eval.parquet")
        found = [self.model(**inputs(part)).logits.argmax(1) for part in ids.split(64)]
        return float((torch.cat(found) == labels).float().mean())


def build_model(folder: Path, job: dict):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(str(folder / "base"))
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=job["rank"],
        lora_alpha=job["alpha"],
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(base, lora)
    set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    return model.eval()  # no dropout: the same work for all, whatever each one draws from


def plain(name: str) -> str:
    """PEFT's name of a tensor in an adapter file."""
    return name.replace(".default", "").replace(".modules_to_save", "")


def read_rows(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    table = pq.read_table(path, columns=["ids", "label"])
    ids = np.array(table["ids"].to_pylist(), dtype=np.int64)  # all rows are equally long
    return torch.from_numpy(ids), torch.tensor(table["label"].to_pylist())


def inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def mean_of(states: list[State], weights: list[float]) -> State:
    """The weighted sum of adapters, tensor by tensor."""
    pairs = list(zip(weights, states, strict=True))
    return {name: torch.stack([weight * state[name] for weight, state in pairs]).sum(0) for name in states[0]}


def message_bytes(state: State) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


def ring_bytes(work: Work) -> int:
    """What the graph asks for: every node's numbers to every neighbour in every round, without any envelope."""
    links = int((work.W > 0).sum()) - work.job["nodes"]
    return links * work.job["rounds"] * message_bytes(work.start())


def write_answer(
    out: Path,
    work: Work,
    states: list[State],
    began: float,
    ended: float,
    sent: int | None,
    sent_kind: str,
    note: str = "",
) -> None:
    """Score every node's own model, save all of them beside ``out``, and write what the harness reads.

    ``began`` and ``ended``: time.time() at the start and the end of the rounds.
    """
    scores = [work.accuracy(state) for state in states]
    flat = {f"{i}.{name}": value.clone() for i, state in enumerate(states) for name, value in state.items()}
    save_file(flat, str(out.with_suffix(".safetensors")))
    answer = {
        "startup_seconds": began - LAUNCHED,
        "round_seconds": ended - began,
        "rounds": work.job["rounds"],
        "accuracy_mean": statistics.mean(scores),
        "accuracy_worst": min(scores),
        "bytes": sent,
        "bytes_kind": sent_kind,
        "note": note,
    }
    out.write_text(json.dumps(answer))


def arguments() -> tuple[Path, Path, list[str]]:
    """The folder of the work, the file for the answer, and what else the runner takes."""
    return Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3:]
