"""The usual way, as the reference of bench/speed.py: one PEFT model, and every client's adapter loaded into it in turn.

It reads rows, rates and weights from a federation of peerlora's, so that both sides do the same work.
"""

import warnings
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from peerlora.data.dataset import Dataset
from peerlora.lora.adapters import Adapters, Slot
from peerlora.lora.base_models import load_base
from peerlora.runtime.compose import Federation

State = dict[str, Tensor]  # what PEFT calls an adapter's state dict


class NaiveLoop:
    """All clients of a federation, one after the other, on one PEFT model with a frozen head."""

    def __init__(self, federation: Federation, start: Adapters, tokens: int | None, dtype: torch.dtype = torch.float32):
        """``tokens``: pad every batch to so many, as ``padding="max_length"`` does; None: to its longest row.

        ``dtype`` is the base's; PEFT keeps the adapters in fp32.
        """
        self.config, self.shards, self.topology = federation.config, federation.learner.shards, federation.topology
        self.pad, self.tokens, self.slots = federation.learner.pad, tokens, start.spec.slots
        self.device = start.flat.device
        self.model = _peft_model(federation, dtype).to(self.device)
        self.states = [
            {_key(slot): start.spec.view(slot, start.flat)[i].clone() for slot in self.slots}
            for i in range(start.clients)
        ]

    def round(self, t: int) -> None:
        """Local steps of every client, then averaging with the neighbours."""
        trained = [self._train(client, t) for client in range(len(self.states))]
        self.states = [_average(trained, weights) for weights in self.topology.at(t).W.tolist()]

    def _train(self, client: int, t: int) -> State:
        set_peft_model_state_dict(self.model, self.states[client])
        train = self.config.train
        parameters = [each for each in self.model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)
        for rows in self.shards.rows(client, t, train.local_steps):
            optimizer.zero_grad()
            self._loss(self.shards.data, rows).backward()
            optimizer.step()
        return {name: value.detach().clone() for name, value in get_peft_model_state_dict(self.model).items()}

    def _loss(self, data: Dataset, rows: np.ndarray) -> Tensor:
        inputs, labels = self._batch(data, rows)
        return F.cross_entropy(self.model(**inputs).logits.float(), labels)

    @torch.no_grad()
    def evaluate(self, data: Dataset, size: int) -> np.ndarray:
        """[client, 2] accuracy and mean loss of every client's own model on the same rows."""
        return np.array([self._scores(state, data, size) for state in self.states])

    def _scores(self, state: State, data: Dataset, size: int) -> tuple[float, float]:
        set_peft_model_state_dict(self.model, state)
        right, loss = 0, 0.0
        for first in range(0, len(data), size):
            inputs, labels = self._batch(data, np.arange(first, min(first + size, len(data))))
            logits = self.model(**inputs).logits.float()
            right += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        return right / len(data), loss / len(data)

    def _batch(self, data: Dataset, rows: np.ndarray) -> tuple[State, Tensor]:
        width = self.tokens or int(data.lengths[rows].max())
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for place, row in enumerate(rows):
            own = data.ids[data.starts[row] : data.starts[row + 1]]
            ids[place, : len(own)] = torch.from_numpy(own)
            mask[place, : len(own)] = 1
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        return inputs, torch.from_numpy(data.labels[rows]).to(self.device)

    def adapters(self, like: Adapters) -> Adapters:
        """Every client's adapter, in the layout of ``like``."""
        flat = torch.empty_like(like.flat)
        for client, state in enumerate(self.states):
            for slot in self.slots:
                like.spec.view(slot, flat)[client] = state[_key(slot)]
        return replace(like, flat=flat)

    def largest_difference(self, x: Adapters) -> float:
        """The largest absolute difference between these adapters and ``x``, over all clients and factors."""
        return float((self.adapters(x).flat - x.flat).abs().max())


def _peft_model(federation: Federation, dtype: torch.dtype) -> torch.nn.Module:
    config, pad = federation.config, federation.learner.pad
    names = federation.train_data.names
    base = load_base(config.model.source, config.task.kind, names, config.seed, pad, dtype)
    targets = sorted({layer.name.rsplit(".", 1)[-1] for layer in federation.start.spec.layers})
    lora = LoraConfig(r=config.ranks[0], lora_alpha=int(config.adapter.alpha), target_modules=targets)
    with warnings.catch_warnings():  # peft 0.21 calls a name that transformers 5.23 renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(base.model, lora).eval()  # pyright: ignore[reportArgumentType]


def _key(slot: Slot) -> str:
    return f"base_model.model.{slot.name}.lora_{slot.block}.weight"


def _average(states: list[State], weights: list[float]) -> State:
    return {
        name: torch.stack([weight * state[name] for weight, state in zip(weights, states, strict=True) if weight]).sum(
            0
        )
        for name in states[0]
    }
