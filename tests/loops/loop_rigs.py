"""PEFT models, rows and plain loops that take the same local steps as our own learner."""

from contextlib import contextmanager

import torch
from in_memory import names, network, together
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
TOLERANCE = 1e-6


def peft_model(config, federation, seed=0, **settings):
    """A PEFT model with the task, base and head of a config, in evaluation mode: nothing drops out."""
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
    return get_peft_model(base.model, lora, autocast_adapter_dtype=False).eval()


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
        return torch.optim.SGD(parameters, lr=config.train.lr)
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


def memory_run(net, thread, client, clients, folder, **options):
    """Takes part over the memory transport."""

    def run(config, *, loop):
        site = Site(client, names(clients), "run")
        return train_peer(config, site, net.transport(site.names[client]), thread, folder, loop=loop, **options)

    return run


def joined(config, folder, client, net, thread, model, optimizer, options=None, **settings):
    run = memory_run(net, thread, client, config.clients, folder / f"peer-{client}", **(options or {}))
    return JoinedPeer(model, optimizer, own_settings(config), run, **settings)


def plain_loops(config, folder, steps=take_steps, seed=lambda client: 0, **settings):
    """The results of one plain loop per client over the memory transport, and their models."""
    federation = compose(config)
    models = [peft_model(config, federation, seed(client), **settings) for client in range(config.clients)]
    with network(config.clients) as (net, thread):

        def one(client):
            optimizer = optimizer_of(config, models[client])
            with joined(config, folder, client, net, thread, models[client], optimizer) as peer:
                steps(peer, models[client], optimizer, config, federation, batches(config, federation, client))
            return peer.result

        return together([lambda client=client: one(client) for client in range(config.clients)]), models


def matched(x, row, spec):
    """One client's adapters in the order of another layout."""
    named = {(slot.block, slot.name): x.spec.view(slot, x.flat)[row] for slot in x.spec.slots}
    return torch.cat([named[slot.block, slot.name].flatten() for slot in spec.slots])


def require_equal(whole: Adapters, parts, tolerance=TOLERANCE):
    """Every part is the simulation's client, and something was learned."""
    for client, part in enumerate(parts):
        found, expected = part.flat[0], matched(whole, client, part.spec)
        assert torch.allclose(found, expected, rtol=0, atol=tolerance), float((found - expected).abs().max())
        assert part.B and max(float(B.abs().max()) for B in part.B.values()) > 1e-4


@contextmanager
def alone(config, folder, model, optimizer, **settings):
    """A federation of one peer, for what does not depend on others."""
    with network(1) as (net, thread), joined(config, folder, 0, net, thread, model, optimizer, **settings) as peer:
        yield peer


def read(model):
    return PeftAdapter(model).read()
