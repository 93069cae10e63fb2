"""The usual way, without any stacking: one PEFT model per client, a loop, torch's optimiser, averages by hand."""

import copy

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from peerlora.config.task_kinds import task_kind
from peerlora.lora.base_models import load_base, load_tokenizer


def initial_models(config, federation):
    """N separate PEFT models with the federation's common start."""
    images = config.task.kind == "image-classification"
    pad = None if images else load_tokenizer(config.model.source).pad_token_id
    dtype = torch.float64 if config.train.dtype == "fp64" else torch.float32
    kind = config.task.kind
    base = load_base(config.model.source, kind, federation.train_data.names, config.seed, pad, dtype)
    models = []
    for i in range(config.clients):
        lora = LoraConfig(
            r=config.ranks[i],
            lora_alpha=config.adapter.alpha,
            lora_dropout=0.0,
            target_modules=config.adapter.targets or (["q_proj", "v_proj"] if images else None),
            modules_to_save=["classifier"] if images else None,
            task_type=task_kind(kind).peft_type or None,
            fan_in_fan_out="gpt2" in base.model.config.model_type,
        )
        model = get_peft_model(copy.deepcopy(base.model), lora, autocast_adapter_dtype=False).eval()
        set_peft_model_state_dict(model, state_of(model) | own_state(federation.start, i))
        models.append(model)
    return models


def own_state(x, i):
    """PEFT's state dict of client i, taken from our adapters."""
    rank = int(x.ranks[i])
    state = {f"base_model.model.{name}.lora_A.weight": A[i, :rank].clone() for name, A in x.A.items()}
    state |= {f"base_model.model.{name}.lora_B.weight": B[i, :, :rank].clone() for name, B in x.B.items()}
    return state | {f"base_model.model.{name}": value[i].clone() for name, value in x.head.items()}


def trained_parameters(model, active, head):
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(f"lora_{factor}." in name for factor in active) or (head and is_of_head(name))
    }


def is_of_head(name):
    return "modules_to_save" in name


def loss_of(model, data, rows, kind):
    """HF's own loss on the rows of one client, padded to this client's longest."""
    if kind == "image-classification":
        pixels = torch.tensor(data.pixels.bytes[rows], dtype=next(model.parameters()).dtype)
        scale, shift = (torch.tensor(each)[:, None, None] for each in (data.pixels.scale, data.pixels.shift))
        return model(pixel_values=pixels * scale + shift, labels=torch.tensor(data.labels[rows])).loss
    texts = [data.ids[data.starts[r] : data.starts[r + 1]] for r in rows]
    types = [data.types[data.starts[r] : data.starts[r + 1]] for r in rows] if data.types is not None else None
    longest = max(len(text) for text in texts)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, segments = ids.clone(), ids.clone()
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text.astype("int64"))
        mask[i, : len(text)] = 1
        if types is not None:
            segments[i, : len(text)] = torch.tensor(types[i].astype("int64"))
    inputs = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": segments} if types is not None else {})
    if kind == "causal-lm":
        logits = model(**inputs).logits[:, :-1]  # HF's own loss for language models rounds to fp32
        targets = ids.masked_fill(mask == 0, -100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    if kind == "chat":
        logits = model(**inputs).logits[:, :-1]
        targets = answers_of(ids)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    if kind == "sequence-to-sequence":
        written = [data.targets[data.target_starts[r] : data.target_starts[r + 1]].astype("int64") for r in rows]
        labels = torch.full((len(rows), max(map(len, written))), -100)
        for i, own in enumerate(written):
            labels[i, : len(own)] = torch.tensor(own)
        logits = model(**inputs, labels=labels).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    if kind == "token-classification":
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            labels[i, : len(texts[i])] = torch.tensor(data.targets[slice(*data.starts[row : row + 2])].astype("int64"))
        logits = model(**inputs).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    labels = torch.tensor(data.labels[rows])
    if kind in ("regression", "multi-label"):
        labels = labels.to(next(model.parameters()).dtype)
    return model(**inputs, labels=labels).loss


def answers_of(ids):
    """The labels of chats in the tests' template: what stands behind ``w39``, up to and with ``[SEP]``."""
    speaks, end = 4 + 39, 2
    labels = torch.full_like(ids, -100)
    for row, own in enumerate(ids.tolist()):
        inside = False
        for place, token in enumerate(own):
            if inside:
                labels[row, place] = token
            inside = token == speaks or (inside and token != end)
    return labels


def optimiser(config, parameters):
    """Of parameters by name; those of the head have a rate of their own."""
    train = config.train
    rates = {False: train.lr, True: train.lr * train.head_rate}
    groups = {of: [p for name, p in parameters.items() if is_of_head(name) == of] for of in rates}
    parameters = [{"params": own, "lr": rates[of]} for of, own in groups.items() if own]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)
    return torch.optim.SGD(parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)


def run_plain(config, federation, active):
    """The state dicts of all clients after the run; ``active(t)`` names the factors that train in round t."""
    models = initial_models(config, federation)
    head = config.adapter.head != "frozen"
    for t in range(config.train.rounds):
        for i, model in enumerate(models):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            parameters = trained_parameters(model, active(t), head)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            optimizer = optimiser(config, parameters)
            for rows in federation.learner.shards.rows(i, t, config.train.local_steps):
                optimizer.zero_grad()
                loss_of(model, federation.train_data, rows, config.task.kind).backward()
                if config.train.clip is not None:
                    torch.nn.utils.clip_grad_norm_(parameters.values(), config.train.clip)
                optimizer.step()
        if config.algorithm.name != "local":
            average(models, federation.topology.at(t).W, config.adapter.head == "private")
    return [state_of(model) for model in models]


def state_of(model):
    """PEFT's own state dict, without the base's other modules."""
    return {name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()}


def average(models, W, private_head):
    states = [state_of(model) for model in models]
    for i, model in enumerate(models):
        mixed = {}
        for name in states[i]:
            keep = private_head and "lora_" not in name
            total = sum(float(W[i, j]) * states[j][name] for j in range(len(models)))
            mixed[name] = states[i][name] if keep else total
        set_peft_model_state_dict(model, mixed)
