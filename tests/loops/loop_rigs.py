"""PEFT models, rows and plain loops that take the same local steps as our own learner."""

from contextlib import contextmanager

import torch
from in_memory import names, network, sites_agreements, together
from peft import LoraConfig, get_peft_model
from plain import loss_of

from peerlora.lora.adapters import Adapters
from peerlora.lora.base_models import load_base, load_tokenizer
from peerlora.lora.peft_model import PeftAdapter
from peerlora.runtime.compose import compose
from peerlora.runtime.peer.join import JoinedPeer
from peerlora.runtime.peer.site import Site
from peerlora.runtime.peer.train import train_peer

CLIENTS = 3
TOLERANCE = 1e-9  # fp64: in fp32, AdamW makes steps of the last bits of small gradients, on each processor others


def peft_model(config, federation, seed=0, **settings):
    """A PEFT model with the task, base and head of a config; nothing drops out."""
    tokenizer, kind = load_tokenizer(config.model.source), config.task.kind
    dtype = torch.float64 if config.train.dtype == "fp64" else torch.float32
    base = load_base(config.model.source, kind, federation.train_data.names, config.seed, tokenizer.pad_token_id, dtype)
    torch.manual_seed(seed)
    head = federation.model.targets.heads
    lora = LoraConfig(
        **{
            "r": config.ranks[0],
            "lora_alpha": config.adapter.alpha,
            "target_modules": [layer.name for layer in federation.model.targets.layers],
            "modules_to_save": list(head) or None,
            **settings,
        }
    )
    model = get_peft_model(base.model, lora, autocast_adapter_dtype=False).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def own_settings(config):
    """The settings of a config that a loop does not decide itself."""
    tree = config.model_dump(mode="json")
    kept = {name: tree[name] for name in ("clients", "topology", "algorithm", "exchange", "peer", "checkpoint", "seed")}
    train = ("rounds", "local_steps", "optimizer_state", "quiet")
    return kept | {"train": {name: tree["train"][name] for name in train}, "adapter": {"head": tree["adapter"]["head"]}}


def batches(config, federation, client):
    """The rows of all local steps that our learner takes for a client, in order."""
    rounds = range(config.train.rounds)
    return [rows for t in rounds for rows in federation.learner.shards.rows(client, t, config.train.local_steps)]


def optimizer_of(config, model):
    parameters = [each for each in model.parameters() if each.requires_grad]
    if config.train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.train.lr, momentum=config.train.momentum)
    return torch.optim.AdamW(parameters, lr=config.train.lr, weight_decay=config.train.weight_decay)


def take_steps(peer, model, optimizer, config, federation, rows):
    """A plain loop over minibatches."""
    for own in rows:
        loss = loss_of(model, federation.train_data, own, config.task.kind)
        loss.backward()
        if config.train.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad()
        peer.log({"loss": loss.item()})
        peer.step()


def memory_run(net, thread, client, clients, folder, agreement=None, **options):
    """Takes part over the memory transport."""

    def run(config, *, loop):
        site = Site(client, names(clients), "run")
        transport = net.transport(site.names[client], agreement=agreement)
        return train_peer(config, site, transport, thread, folder, loop=loop, **options)

    return run


def joined(config, folder, client, net, thread, model, optimizer, options=None, settings=None, **more):
    run = memory_run(net, thread, client, config.clients, folder / f"peer-{client}", **(options or {}))
    return JoinedPeer(model, optimizer, settings or own_settings(config), run, **more)


def plain_loops(config, folder, steps=take_steps, seed=lambda client: 0, **settings):
    """The results of one plain loop per client over the memory transport, and their models."""
    federation = compose(config)
    models = [peft_model(config, federation, seed(client), **settings) for client in range(config.clients)]
    agreements = list(sites_agreements(names(config.clients).values()).values())
    with network(config.clients) as (net, thread):

        def one(client):
            optimizer = optimizer_of(config, models[client])
            options = {"agreement": agreements[client]}
            with joined(config, folder, client, net, thread, models[client], optimizer, options) as peer:
                steps(peer, models[client], optimizer, config, federation, batches(config, federation, client))
            return peer.result

        return together([lambda client=client: one(client) for client in range(config.clients)]), models


def matched(x, row, spec):
    """One client's adapters in the order of another layout."""
    named = {(slot.block, slot.name): x.spec.view(slot, x.flat)[row] for slot in x.spec.slots}
    return torch.cat([named[slot.block, slot.name].flatten() for slot in spec.slots])


def require_equal(whole: Adapters, parts):
    """Every part is the simulation's client, and something was learned."""
    for client, part in enumerate(parts):
        found, expected = part.flat[0], matched(whole, client, part.spec)
        assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE), float((found - expected).abs().max())
        assert part.B and max(float(B.abs().max()) for B in part.B.values()) > 1e-4


@contextmanager
def alone(config, folder, model, optimizer, **settings):
    """A federation of one peer, for what does not depend on others."""
    with network(1) as (net, thread), joined(config, folder, 0, net, thread, model, optimizer, **settings) as peer:
        yield peer


def read(model):
    return PeftAdapter(model).read()


class Rows(torch.utils.data.Dataset):
    """Rows of a run's training data, in a given order, as a Trainer takes them."""

    def __init__(self, federation, numbers):
        self.data, self.numbers = federation.train_data, [int(number) for number in numbers]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, place):
        row = self.numbers[place]
        ids = self.data.ids[self.data.starts[row] : self.data.starts[row + 1]]
        return {"input_ids": ids.tolist(), "labels": int(self.data.labels[row])}


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([r["labels"] for r in rows])}


def trainer_of(config, federation, client, folder, model, callbacks=(), kind=None, **settings):
    """A transformers.Trainer that takes the same local steps as our learner: AdamW, rows in order."""
    from transformers import Trainer, TrainingArguments

    train = config.train
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": config.batches[client],
        "learning_rate": train.lr,
        "weight_decay": train.weight_decay,
        "lr_scheduler_type": "constant",
        "max_grad_norm": train.clip or 0.0,
        "max_steps": train.rounds * train.local_steps,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": "adamw_torch",
        "dataloader_drop_last": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    } | settings
    rows = Rows(federation, torch.cat([torch.as_tensor(own) for own in batches(config, federation, client)]))
    evaluation = Rows(federation, federation.learner.shards.shards[client])
    return (kind or Trainer)(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        eval_dataset=evaluation,
        data_collator=collate,
        callbacks=list(callbacks),
    )
