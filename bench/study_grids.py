"""Studies of sparse graphs, alternating factors, methods, optimisers and momenta, whose rows are of equal work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study_base import (
    ALONE,
    BATCH,
    LEARNED,
    RESULTS,
    ROUNDS,
    SGD_RATES,
    STEPS,
    Study,
    Tree,
    base,
    grid,
    learned,
    named,
    pooled,
    row,
    search,
)

COMPLETE: Tree = {"kind": "complete"}
POOLED = "all data in one place"
DENSE = "recipe, complete graph"


QUIET_ROUNDS = 15
QUIET: dict[str, Any] = {"rounds": ROUNDS + QUIET_ROUNDS, "quiet": QUIET_ROUNDS / (ROUNDS + QUIET_ROUNDS)}
"""As many rounds with training as other rows have, and then some in which clients only mix: the same work, and more
contacts."""


def sparse(task: str) -> Study:
    """From plain dec-lora to the recipe, one change at a time; then the recipe over other methods and graphs.

    60 rounds, 24,000 rows in all, in every row; "all data in one place" is one client whose steps take all batches.
    Differences to it are both gaps together, those to the recipe on the complete graph the graph's alone.  The rows of
    the second grid came later: in a grid of their own they change no common rate of the first, whose runs are kept.
    """

    def parts(data: Path) -> list[Tree]:
        prior = {"label_prior": "uniform"}
        systems = {
            "dec-lora": row(),
            "+ adjusted loss": row(**prior),
            "+ cosine": row(**prior, schedule="cosine"),
            "+ kept memory, relayed (recipe)": row(relay=True, **LEARNED),
            "constant rate, kept memory, relayed": row(relay=True, **{**LEARNED, "schedule": "constant"}),
            "recipe, adf-lora T = 1": row({"name": "adf-lora", "interval": 1}, relay=True, **LEARNED),
            "recipe, adf-lora T = 5": row({"name": "adf-lora", "interval": 5}, relay=True, **LEARNED),
            f"recipe, {QUIET_ROUNDS} quiet rounds at the end": row(relay=True, **LEARNED, **QUIET),
            "recipe, p = 0.01": row(graph={"kind": "random", "p": 0.01}, relay=True, **LEARNED),
            "recipe, p = 0.1": row(graph={"kind": "random", "p": 0.1}, relay=True, **LEARNED),
            DENSE: row(graph=COMPLETE, **LEARNED),
            POOLED: pooled(**LEARNED),
            f"{POOLED}, constant rate": pooled(**{**LEARNED, "schedule": "constant"}),
        }
        more = {
            f"{DENSE}, constant rate": row(graph=COMPLETE, **{**LEARNED, "schedule": "constant"}),
            f"{DENSE}, memory fresh in every round": row(graph=COMPLETE, **{**LEARNED, "optimizer_state": "round"}),
            ALONE: learned("local"),
        }
        return [grid(task, base(task, data), rows) | {"search": search(task)} for rows in (systems, more)]

    return Study(parts, "sparse.md", {"system": POOLED}, further={"system": DENSE})


GRAPHS: dict[str, Any] = {
    "p = 0.5": {"kind": "random", "p": 0.5},
    "p = 0.1": {"kind": "random", "p": 0.1},
    "p = 0.02": {"kind": "random", "p": 0.02},
    "ring": {"kind": "ring"},
}
ADF = {f"adf-lora, T = {T}": {"name": "adf-lora", "interval": T} for T in (1, 5, 10)}
FACTORS: dict[str, Any] = {"dec-lora": "dec-lora", **ADF, "ffa-lora": "ffa-lora", "rolora": "rolora"}
TAD_INTERVALS = {"p = 0.5": 1, "p = 0.1": 2, "p = 0.02": 5, "ring": 3}
"""T that tad-lora chooses; where a row of adf-lora has the same, that row is tad-lora."""
BUDGETS = (24, 48, 96)
ALTERNATING_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
"""What the deficit of alternating methods was put down to is a rate of their own, so both ends are tried at once."""


def alternating(rounds: int, schedule: str) -> Study:
    """Whether alternating factors helps: every graph and method at one budget and schedule, each at its best rate."""

    def parts(data: Path) -> list[Tree]:
        systems = {}
        for graph, topology in GRAPHS.items():
            methods = dict(FACTORS)
            interval = {"name": "adf-lora", "interval": TAD_INTERVALS[graph]}
            if interval not in methods.values():
                methods[f"tad-lora (T = {TAD_INTERVALS[graph]})"] = interval
            for name, method in methods.items():
                systems[f"{graph}: {name}"] = row(method, topology, **{**LEARNED, "schedule": schedule})
        alone = learned("local", COMPLETE, schedule=schedule)
        each = [systems, *({f"{graph}: {ALONE}": alone} for graph in GRAPHS)]  # the same runs, so in grids of their own
        rates, common = search("sst2", rates=ALTERNATING_RATES), base("sst2", data, rounds=rounds)
        return [grid("sst2", common, rows) | {"search": rates} for rows in each]

    return Study(parts, "alternating.md", {"method": "dec-lora"}, split=("graph", "method"))


LORA_METHODS: dict[str, Any] = {
    ALONE: "local",
    "dec-lora (= fedit)": "dec-lora",
    "adf-lora, T = 1": {"name": "adf-lora", "interval": 1},
    "adf-lora, T = 5": {"name": "adf-lora", "interval": 5},
    "decaf (= flexlora)": "decaf",
    **{
        name: name
        for name in (
            "tad-lora", "rolora", "ffa-lora", "fedsa-lora", "hetlora", "fedrot-lora", "lora-fair", "rac-lora", "flora",
            "fedex-lora", "fedhl",
        )
    },
}  # fmt: skip
"""On graphs without a server fedit is dec-lora, and with equal ranks flexlora is decaf."""
METHOD_ROUNDS = 48


def methods(graph: str, names: Mapping[str, Any]) -> Study:
    """Every LoRA method on one graph, 48 rounds; where a method can't keep its optimiser's memory its label says so."""

    def parts(data: Path) -> list[Tree]:
        common = base("sst2", data, rounds=METHOD_ROUNDS)
        topology = {"kind": "ring", "weights": "laplacian"} if graph == "drift" else GRAPHS[graph]
        systems = {named(label, method): learned(method) for label, method in names.items()}
        return [grid("sst2", common | {"topology": topology}, systems)]

    return Study(parts, "lora-methods.md", {"system": next(name for name in names if name.startswith("dec-lora"))})


MERGING: dict[str, Any] = {
    "dec-lora": "dec-lora",
    "flora": "flora",
    "fedex-lora": "fedex-lora",
    "rac-lora": "rac-lora",
    "rac-lora, mix_merged": {"name": "rac-lora", "mix_merged": True},
}
"""What is merged is never mixed again, and differences grow along negative eigenvalues of W (docs/methods.md), which
the ring of ``drift`` does not have; dec-lora shows what else these weights change."""


def optimisers(p: float | None) -> Study:
    """The second gap: why even the complete graph is behind all data in one place; ``p``: null, the complete graph.

    60 rounds x 5 steps x 8 rows a client in every row, in other portions where the label says so.
    """

    def parts(data: Path) -> list[Tree]:
        adamw = {
            "batch 8": learned(),
            "batch 16, half the steps": learned(rounds=75, local_steps=2, batch=2 * BATCH),
            "batch 40, 1 step a round": learned(local_steps=1, batch=STEPS * BATCH),
            "batch 8, 5 accumulated, 1 step a round": learned(local_steps=1, accumulate=STEPS),
            named("decaf", "decaf"): learned("decaf"),
            named("fedrot-lora", "fedrot-lora"): learned("fedrot-lora"),
            "adf-lora, T = 1": learned(ADF["adf-lora, T = 1"]),
            "rank 4": learned() | {"adapter": {"rank": 4, "alpha": 8}},
            "rank 16": learned() | {"adapter": {"rank": 16, "alpha": 32}},
            "warm-up 0.1": learned(warmup=0.1),
            "head's rate a quarter": learned(head_rate=0.25),
            f"{POOLED}, head's rate a quarter": pooled(**LEARNED, head_rate=0.25),
            "qg-adam": learned("qg-adam"),
            "noloco": learned("noloco"),
            POOLED: pooled(**LEARNED),
        }
        if p is None:  # on a rare graph five times the rounds are five times the contacts, so another question
            adamw["batch 8, 1 step a round"] = learned(rounds=300, local_steps=1)
            adamw["batch 8, labels at random"] = learned() | {"partition": {"kind": "iid"}}
        momentum = {"optimizer": "sgd", "momentum": 0.9}
        sgd = {"sgd, momentum 0.9": learned(**momentum), f"{POOLED}, sgd, momentum 0.9": pooled(**LEARNED, **momentum)}
        common = base("sst2", data)
        common["topology"] = COMPLETE if p is None else {"kind": "random", "p": p}
        return [grid("sst2", common, adamw), grid("sst2", common, sgd, SGD_RATES)]

    return Study(parts, "optimisers.md", {"system": POOLED})


MOMENTA = ("dec-lora", "qg-adam", "noloco", "cached-dfl")
"""Methods whose rates are AdamW's; cached-dfl averages what others' newest models were into training."""
SGD_MOMENTA = ("qg-dsgdm",)


def momenta(data: Path) -> list[Tree]:
    """Momentum that saw the mixing, outer steps, cached models, at p = 0.02 with the recipe's training, not relayed."""
    common = base("sst2", data)
    return [
        grid("sst2", common, {name: learned(name) for name in MOMENTA}),
        grid("sst2", common, {name: learned(name) for name in SGD_MOMENTA}, SGD_RATES),
    ]


PAPER = {name: method for name, method in FACTORS.items() if name != "adf-lora, T = 10"}
PAPER_SEEDS = [0]


def paper_budget(p: float, rates: Mapping[str, float]) -> Study:
    """The papers' own budget, 150 rounds x 20 steps x 32 rows, head frozen; ``rates``: by row, none is searched.

    What ``rates`` lacks is taken from the study alternating-96-cosine, at the same p.
    """

    def parts(data: Path) -> list[Tree]:
        missing = [name for name in PAPER if name not in rates]
        known = {**found_rates("alternating-96-cosine", f"p = {p:g}", missing), **rates}
        common = base("sst2", data, p, rounds=150)
        common["train"] |= {"local_steps": 20, "batch": 32}
        common["adapter"] |= {"head": "frozen"}
        systems = {name: row(method, **LEARNED, lr=known[name]) for name, method in PAPER.items()}
        return [{"base": common, "axes": {"system": systems}, "seeds": PAPER_SEEDS, "share_prefix": True}]

    return Study(parts, "alternating.md", {"system": "dec-lora"})


def found_rates(study: str, graph: str, rows: Sequence[str]) -> dict[str, float]:
    """Read the rates that a finished study took on a graph; SystemExit with what to do where it has not been run."""
    path = RESULTS / f"study-{study}.json"
    if not rows:
        return {}
    if not path.is_file():
        raise SystemExit(f"no rates for {', '.join(rows)}: run the study {study} first, or give --rate 'ROW=RATE' each")
    found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    known = {each["labels"]["method"]: each["rate"] for each in found if each["labels"]["graph"] == graph}
    return {name: known[name] for name in rows}


STUDIES: dict[str, Study] = {
    **{f"sparse-{task}": sparse(task) for task in ("sst2", "agnews")},
    **{
        f"alternating-{rounds}-{schedule}": alternating(rounds, schedule)
        for rounds in BUDGETS
        for schedule in ("constant", "cosine")
    },
    "methods": methods("p = 0.1", LORA_METHODS),
    "methods-ring": methods("ring", LORA_METHODS),
    "drift": methods("drift", MERGING),
    "optimisers": optimisers(None),
    "optimisers-sparse": optimisers(0.02),
    "momenta": Study(momenta, "optimisers.md", {"system": "dec-lora"}),
}
