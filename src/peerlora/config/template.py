"""A config as commented YAML."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import yaml

from peerlora.config.run import RunConfig

COMMENTS = {
    "model.source": "a hub id, a local folder, or packaged:NAME for a model inside an installed Python package",
    "model.dropout": "dropout of the base model itself; 0 switches it off",
    "adapter.rank": "rank of A and B; or a list with one rank per client",
    "adapter.alpha": "the update is alpha / rank times B A",
    "adapter.dropout": "dropout in front of A",
    "adapter.targets": "layer-name endings or one regular expression; null: PEFT's own choice for the model",
    "adapter.head": "mixed: trained and exchanged; private: trained, never exchanged; frozen: neither",
    "adapter.start": "folder of a PEFT adapter to start from; null: A random, B zero",
    "task.kind": "classification, regression or causal-lm",
    "task.labels": "class names in order of their ids; null: read from the data",
    "data.train": "kind:place with kind parquet, csv, jsonl, hub or packaged; relative to where you run the command",
    "data.eval": "rows to evaluate on, written in the same way; null: set aside a part of the training rows",
    "data.text": "one text column, or two for pairs",
    "data.label": "the column with the label; null for causal-lm",
    "data.max_length": "tokens; longer texts are cut",
    "data.train_per_class": "use at most so many training rows of each class; null: all",
    "data.eval_per_class": "use at most so many evaluation rows of each class; null: all",
    "data.holdout": "share of the training rows set aside when eval is null",
    "partition.kind": "how rows are divided among clients: iid, dirichlet, shares, column or quantity",
    "partition.concentration": "small: each client holds few classes; large: all clients hold the same mix",
    "clients": "participants; each trains on its own rows only",
    "topology.kind": "random (a new graph every round), ring, torus, path, star, complete, exponential, ...",
    "topology.p": "probability that two clients meet in a round",
    "topology.weights": "how to average: metropolis, laplacian, uniform, pairwise, push-sum or row-average",
    "topology.lazy": "true: mix with (I + W) / 2",
    "topology.drop_links": "probability per round that a link is down",
    "topology.drop_clients": "probability per round that a client takes no part in the exchange",
    "topology.allow_disconnected": "true: accept a fixed graph in which some clients never hear from others",
    "algorithm.name": "`peerlora methods` lists them all",
    "algorithm.interval": "rounds between two switches of the factor that trains",
    "exchange.codec": "compressed gossip: identity, cast, top-k, random-k, sign or qsgd; null: full vectors",
    "exchange.robust": "against attackers: trimmed-mean, median, clipped-gossip, balance, rfa or krum; null: average",
    "adversary": "clients that attack, to see what a method makes of them; null: nobody",
    "train.rounds": "exchanges in all",
    "train.local_steps": "optimiser steps of each client between two exchanges",
    "train.batch": "rows per step; or a list with one number per client",
    "train.optimizer": "adamw or sgd",
    "train.optimizer_state": "its memory starts fresh every round, at a switch of factors (phase), or never (keep)",
    "train.lr": "learning rate; the first setting to try other values of",
    "train.momentum": "of sgd",
    "train.weight_decay": "of the factors that train",
    "train.clip": "largest gradient norm of one client; null: no limit",
    "train.label_prior": "uniform or pooled: a loss adjusted for each client's own label proportions; none: as it is",
    "train.batches": "shuffled, or by-length: less padding, other batches of the same rows",
    "train.dtype": "fp32, fp64, or bf16 for a base in half precision (adapters stay in fp32)",
    "train.fast": "use the speed paths that work here; false: ordinary operations, to check a result",
    "train.block": "clients computed together; null: chosen to fit the processor's caches",
    "eval.every": "rounds between two evaluations",
    "eval.rows": "rows used during the run; null: all; the last evaluation takes all anyway",
    "eval.batch": "rows evaluated together",
    "checkpoint.every": "rounds between two points from which a stopped run can go on",
    "peer.run": "real peers only: a name for this run, the same at all sites, another one for the next run",
    "peer.deadline": "seconds that an exchange waits for neighbours",
    "peer.join": "seconds to wait for neighbours at the start",
    "peer.pull": "rounds behind from which a returning peer takes over a neighbour's state",
    "clock": "virtual time: {speed: [1, 0.1, ...], deadline: 30}, see docs/guide.md; null: count rounds only",
    "device": "cpu, or cuda for one NVIDIA GPU",
    "threads": "CPU threads; null: one per core",
    "seed": "the same seed on the same machine gives the same result, bit for bit",
}
"""What each setting of a template does, in one line."""


def template_lines(config: RunConfig, head: str) -> Iterator[str]:
    """A config as YAML with a comment behind every setting."""
    yield "# " + "".join(letter if letter.isprintable() else "?" for letter in head)
    for section, value in config.model_dump(mode="json").items():
        yield ""
        if not isinstance(value, dict):
            yield _line("", section, section, value)
            continue
        yield f"{section}:"
        for key, each in sorted(value.items(), key=lambda item: item[0] not in ("kind", "name")):
            yield _line("  ", f"{section}.{key}", key, each)


def _line(indent: str, path: str, key: str, value: Any) -> str:
    return f"{f'{indent}{key}: {_yaml(value)}':<44}  # {COMMENTS[path]}"


def _yaml(value: Any) -> str:
    """A value on one line."""
    plain = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    text = plain.removesuffix("...\n").strip("\n")
    if text.isprintable():
        return text
    # Line breaks, say, which double quotes escape.
    return yaml.safe_dump(value, default_flow_style=True, default_style='"', width=math.inf).strip("\n")
