"""Numbers and protocols that papers report, to stand beside ours in a comparison's report.

All of it is second hand: taken from others' notes on the papers, not from the papers themselves.  Two independent notes
agree on the set-up of ADF-LoRA, one gives numbers; for TAD-LoRA a reproduction and an audit agree on the set-up, one
source gives numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peerlora.config import RunConfig

TASKS = ("SST-2", "QNLI", "QQP", "MNLI")


@dataclass(frozen=True)
class Number:
    """One published accuracy."""

    value: float
    tasks: tuple[str, ...]
    """What it is the mean over."""
    labels: dict[str, str]
    """The place in our preset that it belongs to."""


@dataclass(frozen=True)
class Paper:
    """What a paper reports, and how it was measured: aspect -> theirs."""

    name: str
    protocol: dict[str, str]
    numbers: tuple[Number, ...]


_PROTOCOL = {
    "model": "RoBERTa-large",
    "data": "SST-2, QNLI, QQP and MNLI; sizes of the clients' shards not found",
    "tokens": "128",
    "clients": "10",
    "adapter": "rank 8, alpha 16, dropout 0.1, on query, value; head frozen",
    "partition": "shares: two classes 3 x [0.9, 0.1], 3 x [0.1, 0.9], 4 x [0.5, 0.5]; MNLI 4, 3 and 3 clients at 0.9",
    "budget": "150 rounds x 20 steps x 32 rows",
    "optimiser": "AdamW with library defaults; when its memory starts afresh not found; schedule not found",
}


def _both(p: str, lora: float, tad: float) -> tuple[Number, ...]:
    topology = {"topology": f"random p={p}"}
    return (
        Number(lora, TASKS, {"method": "LoRA", **topology}),
        Number(tad, TASKS, {"method": "TAD-LoRA", **topology}),
    )


PAPERS = {
    "adf-lora": Paper(
        "ADF-LoRA, arXiv 2511.18291",
        _PROTOCOL
        | {
            "topology": "every pair meets with p = 0.1; half and half in a pair; rule for several contacts not found",
            "rates": "searched among 5e-4, 1e-3, 2e-3, 5e-3; on which rows not found",
            "seeds": "not found",
            "evaluation": "every client's own model on the validation rows, mean over clients; which round not found",
        },
        (
            Number(0.8458, TASKS, {"method": "LoRA"}),
            Number(0.7304, ("MNLI",), {"method": "LoRA"}),
            Number(0.8268, TASKS, {"method": "FFA-LoRA"}),
            Number(0.8284, TASKS, {"method": "RoLoRA"}),
            Number(0.8435, TASKS, {"method": "ADF-LoRA T=1"}),
            Number(0.8505, TASKS, {"method": "ADF-LoRA T=5"}),
            Number(0.7624, ("MNLI",), {"method": "ADF-LoRA T=5"}),
            Number(0.8393, TASKS, {"method": "ADF-LoRA T=10"}),
            Number(0.8421, TASKS, {"method": "ADF-LoRA T=20"}),
        ),
    ),
    "tad-lora": Paper(
        "TAD-LoRA, arXiv 2602.00451",
        _PROTOCOL
        | {
            "topology": "every link active with p from 0.5 to 0.01, and a ring; weighting rule not found",
            "rates": "searched among 2e-4, 5e-4, 1e-3, 2e-3, 5e-3; on which rows not found",
            "seeds": "3; whether the spread is variance or standard deviation is said in two ways",
            "evaluation": "every client's own model on the validation rows, mean over clients; T chosen among "
            "1, 2, 3, 5, 10, 15, per cell not found",
        },
        (*_both("0.5", 0.8754, 0.8731), *_both("0.1", 0.8375, 0.8418), *_both("0.02", 0.7798, 0.8032)),
    ),
}
"""Figures that are not here were not found."""


def ours(config: RunConfig, rates: list[float], seeds: list[int]) -> dict[str, str]:
    """The same aspects of one of our runs; ``rates``: those searched, empty where the rate was given."""
    tree, train = config.model_dump(mode="json"), config.train
    searched = f"searched among {', '.join(f'{rate:g}' for rate in rates)}; on training rows set aside"
    return {
        "model": config.model.source,
        "data": f"{_name(config.data.train)}, evaluated on {_name(config.data.eval)}{_limits(config)}",
        "tokens": str(config.data.max_length),
        "clients": str(config.clients),
        "adapter": _adapter(config),
        "partition": _words(tree["partition"]),
        "budget": f"{train.rounds} rounds x {train.local_steps} steps x {train.batch} rows",
        "optimiser": f"{train.optimizer}, weight decay {train.weight_decay:g}, constant rate, memory afresh every "
        f"{train.optimizer_state}",
        "topology": _words({key: value for key, value in tree["topology"].items() if value}),
        "rates": searched if rates else f"{train.lr:g}, given",
        "seeds": f"{len(seeds)}; standard deviation",
        "evaluation": "every client's own model on the evaluation rows, mean over clients; last round",
    }


def _adapter(config: RunConfig) -> str:
    own = config.adapter
    where = own.targets if isinstance(own.targets, str) else ", ".join(own.targets or ["PEFT's choice"])
    return f"rank {own.rank}, alpha {own.alpha:g}, dropout {own.dropout:g}, on {where}; head {own.head}"


def _limits(config: RunConfig) -> str:
    most = {"training": config.data.train_per_class, "evaluation": config.data.eval_per_class}
    return "".join(f", at most {rows} {name} rows per class" for name, rows in most.items() if rows)


def _name(source: str | None) -> str:
    """The end of a source: folders are of one machine."""
    return "training rows set aside" if source is None else "/".join(source.split("/")[-2:])


def dataset(config: RunConfig) -> str:
    """The task that a run's rows are of, as papers call it, where the source's name tells; else that name."""
    name = _name(config.data.train)
    return next((task for task in TASKS if task.replace("-", "").lower() in name.lower()), name)


def _words(section: dict[str, Any]) -> str:
    return ", ".join([str(section["kind"]), *(f"{key} {value}" for key, value in section.items() if key != "kind")])
