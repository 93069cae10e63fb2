"""Choose the published numbers for a comparison, and describe its own runs in the papers' words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from peerlora.config.run import RunConfig
from peerlora.experiments.published_numbers import GLUE, OWN_MODELS, PAPERS, SERVER, Number, Paper

if TYPE_CHECKING:
    from peerlora.algorithms.base import Algorithm
    from peerlora.config.train import TrainConfig

_TASK = {task: re.compile(rf"(?<![a-z]){task.lower().replace('-', '[-_]?')}(?![a-z])") for task in GLUE}


def find_papers(configs: Collection[RunConfig], name: str | None) -> list[Paper]:
    """Return the paper of that name with all its numbers; for no name every paper, with the numbers that fit a config.

    A paper whose only fitting numbers are references without clients is left out.
    """
    if name is not None:
        return [PAPERS[name]]
    found = []
    for paper in PAPERS.values():
        fitting = tuple(each for each in paper.numbers if any(fits(each, config) for config in configs))
        if any(each.methods for each in fitting):
            found.append(replace(paper, numbers=fitting))
    return found


def fits(number: Number, config: RunConfig) -> bool:
    """Whether a run has one of the number's tasks, one of its methods and its settings."""
    from peerlora.algorithms import ALIASES, method_class

    if dataset(config) not in number.tasks:
        return False
    name = ALIASES.get(config.algorithm.name, config.algorithm.name)
    if number.methods and name not in number.methods:
        return False
    for key, value in number.settings.items():
        section, setting = key.split(".")
        own = {each.name: each.default for each in fields(method_class(name))} if section == "algorithm" else {}
        if (own | getattr(config, section).model_dump(mode="json")).get(setting) != value:
            return False
    return True


def describe_protocol(config: RunConfig, rates: Sequence[float], seeds: Sequence[int], measure: str) -> dict[str, str]:
    """Describe a run in every aspect of a paper's protocol; ``rates``: those searched, empty where one was given."""
    train, adapter, data = config.train, config.adapter, config.data
    graph = {key: value for key, value in config.topology.model_dump(mode="json").items() if value}
    weights = str(graph.pop("weights", "none"))
    server = graph == {"kind": "complete"} and weights in ("metropolis", "uniform")
    where = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets or ["PEFT's choice"])
    listed = ", ".join(f"{rate:g}" for rate in rates)
    return {
        "model": _last(config.model.source),
        "data": dataset(config),
        "training rows per client": "all, divided" + _limit(data.train_per_class),
        "evaluation rows": _split(data.eval) + _limit(data.eval_per_class),
        "tokens": str(data.max_length),
        "clients": str(config.clients),
        "rank": str(adapter.rank),
        "alpha": f"{adapter.alpha:g}",
        "dropout": f"{adapter.dropout:g}",
        "adapted layers": where,
        "head": adapter.head,
        "partition": _partition(config.partition.model_dump(mode="json")),
        "budget": f"{train.rounds} rounds x {train.local_steps} steps x {train.batch} rows",
        "optimiser": f"{train.optimizer}, weight decay {train.weight_decay:g}",
        "optimiser's memory": _memory(config),
        "schedule of the rate": _schedule(train),
        "precision": "fp32 or bf16, by the machine" if train.dtype == "auto" else train.dtype,
        "topology": SERVER if server else _words(graph),
        "weights": "equal" if server else weights,
        "rates": f"searched among {listed}" if rates else f"{train.lr:g}, given",
        "rows of the search": "training rows set aside" if rates else "none",
        "seeds": str(len(seeds)),
        "evaluation": OWN_MODELS if measure == "mean client" else "the averaged model",
        "round reported": "the last",
        "besides": "; ".join(_besides(config)) or "nothing",
    }


def _memory(config: RunConfig) -> str:
    """When it starts afresh; a method that always trains the same factors has one phase."""
    state = config.train.optimizer_state
    one_phase = state == "phase" and not _method(config).alternates
    return "kept" if state == "keep" or one_phase else f"afresh every {state}"


def _schedule(train: TrainConfig) -> str:
    """The shape of the rate over the rounds, with what differs from its defaults."""
    given = {"warm-up": train.warmup, "floor": train.floor, "decline": train.decay}
    rounds = " rounds" if train.warmup >= 1 else ""
    parts = (f", {name} {value:g}{rounds if name == 'warm-up' else ''}" for name, value in given.items() if value)
    return train.schedule + "".join(parts)


def _besides(config: RunConfig) -> Iterator[str]:
    """Settings that no notes on a paper mention.  The interval is left out: it distinguishes the numbers themselves."""
    train, exchange, method = config.train, config.exchange, config.algorithm.parameters
    if train.label_prior != "none":
        yield f"loss adjusted for the label prior ({train.label_prior})"
    if train.head_rate != 1:
        yield f"the head's rate {train.head_rate:g} times that of the factors"
    if train.clip is not None:
        yield f"gradients clipped at {train.clip:g}"
    if train.batches != "shuffled":
        yield f"batches {train.batches}"
    if method.keys() - {"interval"}:
        own = ", ".join(f"{key} {value}" for key, value in method.items() if key != "interval")
        yield f"{config.algorithm.name} {own}"
    if _method(config).settles or train.quiet_rounds:
        yield "rounds without training"
    if exchange.codec:
        yield f"compressed: {_words(exchange.codec.model_dump(mode='json', exclude_none=True))}"
    if exchange.robust:
        yield f"in place of the average: {_words(exchange.robust.model_dump(mode='json', exclude_none=True))}"
    if config.adversary:
        yield f"attackers: {config.adversary.attack}"
    if config.clock:
        yield "a virtual clock"


def _method(config: RunConfig) -> Algorithm[Any]:
    from peerlora.algorithms import build_algorithm

    return build_algorithm(config.algorithm.name, config.algorithm.parameters)


def compare_protocols(paper: Paper, here: Sequence[dict[str, str]]) -> list[tuple[str, str, str]]:
    """List (aspect, theirs, ours) where a run of ours differs from the paper; last, what was not found there."""
    found, unknown = [], []
    for aspect, theirs in {**paper.protocol, "besides": ("nothing",)}.items():
        values = dict.fromkeys(each[aspect] for each in here)
        if not theirs:
            unknown.append((aspect, "not found", "; ".join(values)))
        elif not {_key(each) for each in values} <= {_key(each) for each in theirs}:
            found.append((aspect, "; ".join(theirs), "; ".join(values)))
    return [*found, *unknown]


def _key(value: str) -> str:
    return value.casefold()


def dataset(config: RunConfig) -> str:
    """The task of a run's rows as papers call it, where the source's name contains it; else that name."""
    name = _name(config.data.train)
    return next((task for task, pattern in _TASK.items() if pattern.search(name.lower())), name)


def _name(source: str | None) -> str:
    """The end of a source: folders are of one machine."""
    return "training rows set aside" if source is None else "/".join(source.split("/")[-2:])


def _last(source: str) -> str:
    """A model's name without owner and folder."""
    return source.rstrip("/").rsplit("/", 1)[-1]


def _split(source: str | None) -> str:
    return "validation" if source is not None and "validation" in _name(source) else _name(source)


def _limit(rows: int | None) -> str:
    return f", at most {rows} per class" if rows else ""


def _partition(section: dict[str, Any]) -> str:
    if section["kind"] != "shares":
        return _words(section)
    return ", ".join(
        f"{count} x [{', '.join(f'{share:g}' for share in shares)}]"
        for count, shares in zip(section["counts"], section["shares"], strict=True)
    )


def _words(section: dict[str, Any]) -> str:
    return ", ".join([str(section["kind"]), *(f"{key} {value}" for key, value in section.items() if key != "kind")])
