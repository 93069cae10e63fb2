"""The federated systems on hard federations, each beside what it was made to beat: SST-2, MiniLM, ten clients.

    python bench/systems.py label-skew --data FOLDER

FOLDER holds glue/sst2 and extra/ag_news, each with train.parquet and validation.parquet.  Conditions: label-skew,
label-skew-sgd, stragglers, attackers, compression, strangers.  Runs lie below .bench/studies and can be stopped and
gone on with.  At the end the table goes to bench/results and between the condition's markers of
docs/results/hard-federations.md.

``label-skew`` and ``label-skew-sgd`` search a learning rate per method, on training rows set aside; the others take
the rates that ``label-skew`` found, systems that it does not hold that of dec-lora.  Every condition has clients alone
with the prior-adjusted loss among its rows.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from markers import insert
from outcomes import without_folder
from peerlora.algorithms import method_class
from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.experiments.grid import load_grid
from peerlora.experiments.trials import plan_trials
from peerlora.runs.events import Evaluated, Event, RoundDone
from peerlora.runs.metrics import evaluated_within, select_events
from peerlora.runs.resume import run_facts
from peerlora.runs.store import read_events
from studies import ALONE, PAGES, PLACE, RESULTS, ROUNDS, SEEDS, base, read, run, task

Tree = dict[str, Any]
STEPS = 5
SLOW = 10.0
UPLINK = 1e6
"""Bytes a virtual second of every client, where a condition has no clock; a gradient of a minibatch then takes 1 s."""
STRANGERS = [8, 9]


@dataclass(frozen=True)
class Condition:
    """A kind of hard federation: its graph, who takes part, and what counts as equal cost."""

    told: str
    topology: Any
    methods: Callable[[dict[str, float]], Tree]
    """Of the rates by row, empty where they are searched."""
    rates: tuple[float, ...] = ()
    """Searched; none: those of label-skew."""
    rounds: int = ROUNDS
    """At which rounds are compared."""
    seconds: float | None = None
    """Virtual, at which time is compared; null: what the table's first dec-lora takes."""
    settings: Tree = field(default_factory=dict)
    judged: Sequence[int] = range(10)
    """The clients whose accuracy is reported."""


SECTIONS = ("train", "exchange", "adversary", "clock", "eval")


def method(name: str, rate: float | None = None, **changes: Any) -> Tree:
    """A change to the base: the algorithm and, beside it, settings of other sections or of the algorithm itself."""
    sections = {key: value for key, value in changes.items() if key in SECTIONS}
    own = {key: value for key, value in changes.items() if key not in sections}
    found = {"algorithm": {"name": name, **own}, **sections}
    if rate is not None:
        found["train"] = {**found.get("train", {}), "lr": rate}
    return found


PRIOR = {"label_prior": "uniform"}


def label_skew(_rates: dict[str, float]) -> Tree:
    adamw = {"optimizer": "adamw"}
    return {
        "alone": method("local"),
        ALONE: method("local", train=PRIOR),
        "dec-lora": method("dec-lora"),
        "dec-lora, prior-adjusted": method("dec-lora", train=PRIOR),
        "adf-lora": method("adf-lora"),
        "adf-lora, prior-adjusted": method("adf-lora", train=PRIOR),
        "k-gt": method("k-gt"),
        "k-gt, prior-adjusted": method("k-gt", train=PRIOR),
        "fedspeed": method("fedspeed", train=adamw),
        "dfedadmm": method("dfedadmm", train=adamw),
        "dfedadmm, prior-adjusted": method("dfedadmm", train=adamw | PRIOR),
    }


def label_skew_sgd(_rates: dict[str, float]) -> Tree:
    """All but one row with the adjusted loss, which takes SGD further in so few steps."""
    plain = {"optimizer": "sgd"}
    sgd = plain | PRIOR
    return {
        ALONE: method("local", train=sgd),
        "dec-lora": method("dec-lora", train=plain),
        "dec-lora, prior-adjusted": method("dec-lora", train=sgd),
        "adf-lora, prior-adjusted": method("adf-lora", train=sgd),
        "k-gt, prior-adjusted": method("k-gt", train=sgd),
        "fedspeed, prior-adjusted": method("fedspeed", train=sgd),
        "dfedadmm, lambda = 1, prior-adjusted": method("dfedadmm", train=sgd),
        "dfedadmm, lambda = 10, prior-adjusted": method("dfedadmm", penalty=0.1, train=sgd),
    }


def stragglers(rates: dict[str, float]) -> Tree:
    """A job takes the fast 5 s and the slow 50 s, so six rounds that wait for all take 300 s.

    In 35 s the slow come through the forward passes and two of seven layers back, one of them the head.
    """
    dec, adf = rates["dec-lora"], rates["adf-lora"]
    on_time = {"deadline": 6.0}
    return {
        # Who is alone waits for nobody: as with a deadline, the fast go on.
        ALONE: method("local", rates[ALONE], clock=on_time, train=PRIOR | {"rounds": 50}, eval={"every": 24}),
        "dec-lora, waits": method("dec-lora", dec, eval={"every": 6}),
        "adf-lora, waits": method("adf-lora", adf, eval={"every": 6}),
        "dec-lora, deadline 6 s": method("dec-lora", dec, clock=on_time, train={"rounds": 50}, eval={"every": 24}),
        "adf-lora, deadline 6 s": method("adf-lora", adf, clock=on_time, train={"rounds": 50}, eval={"every": 24}),
        "salf, deadline 35 s": method("salf", dec, depth="deadline", deadline=35.0, eval={"every": 8}),
        "aedfl": method("aedfl", dec, train={"rounds": 33}, eval={"every": 24}),
        "ad-psgd": method("ad-psgd", dec, train={"rounds": 33}, eval={"every": 24}),
    }


def attackers(rates: dict[str, float]) -> Tree:
    dec, adf = rates["dec-lora"], rates["adf-lora"]
    flips, alie = ({"clients": 2, "attack": attack} for attack in ("sign-flip", "alie"))
    trimmed, clipped = ({"robust": {"kind": kind, "drop": 2}} for kind in ("trimmed-mean", "clipped-gossip"))
    balance = {"robust": {"kind": "balance"}}
    return {
        ALONE: method("local", rates[ALONE], train=PRIOR),
        "dec-lora, nobody attacks": method("dec-lora", dec),
        "dec-lora, sign-flip": method("dec-lora", dec, adversary=flips),
        "dec-lora, trimmed mean, sign-flip": method("dec-lora", dec, adversary=flips, exchange=trimmed),
        "dec-lora, clipped gossip, sign-flip": method("dec-lora", dec, adversary=flips, exchange=clipped),
        "dec-lora, balance, sign-flip": method("dec-lora", dec, adversary=flips, exchange=balance),
        "adf-lora, sign-flip": method("adf-lora", adf, adversary=flips),
        "adf-lora, trimmed mean, sign-flip": method("adf-lora", adf, adversary=flips, exchange=trimmed),
        "dec-lora, alie": method("dec-lora", dec, adversary=alie),
        "dec-lora, trimmed mean, alie": method("dec-lora", dec, adversary=alie, exchange=trimmed),
        "dec-lora, balance, alie": method("dec-lora", dec, adversary=alie, exchange=balance),
    }


def compression(rates: dict[str, float]) -> Tree:
    """Fewer exchanges of full adapters are the other way to a tenth of the bytes."""
    dec, adf = rates["dec-lora"], rates["adf-lora"]
    rare = {"rounds": 2, "local_steps": ROUNDS * STEPS // 2}
    top = {"kind": "top-k", "share": 0.05}
    return {
        ALONE: method("local", rates[ALONE], train=PRIOR),
        "dec-lora": method("dec-lora", dec),
        "adf-lora": method("adf-lora", adf),
        "dec-lora, 2 rounds of 60 steps": method("dec-lora", dec, train=rare, eval={"every": 1}),
        "choco, top-k 5 %": method("choco", dec, codec="top-k", share=0.05),
        "choco, sign": method("choco", dec, codec="sign"),
        "choco, qsgd 7 levels": method("choco", dec, codec="qsgd", levels=7),
        "adf-lora over choco, top-k 5 %": method("adf-lora", adf, exchange={"codec": top}),
    }


def strangers(rates: dict[str, float]) -> Tree:
    dec, adf = rates["dec-lora"], rates["adf-lora"]
    return {
        ALONE: method("local", rates[ALONE], train=PRIOR),
        "dec-lora": method("dec-lora", dec),
        "adf-lora": method("adf-lora", adf),
        "flood": method("flood", dec, every=6),
        "flood, rows only": method("flood", dec, every=6, beta=0.0),
        "flood, clients only, beta = 1": method("flood", dec, every=6, alpha=0.0, beta=1.0),
    }


CONDITIONS = {
    "label-skew": Condition(
        "three clients with 90 % of one label, three with 90 % of the other", {"kind": "random", "p": 0.1}, label_skew,
        rates=(2e-3, 5e-3),
    ),
    "label-skew-sgd": Condition(
        "the same shards and graph, SGD in place of AdamW", {"kind": "random", "p": 0.1}, label_skew_sgd,
        rates=(0.2, 0.6), rounds=2 * ROUNDS,
    ),
    "stragglers": Condition(
        "five of ten clients are ten times as slow; a ring", "ring", stragglers, seconds=300.0,
        settings={"clock": {"step": 1.0, "speed": [1.0, 1 / SLOW] * 5}},
    ),
    "attackers": Condition("two of ten clients attack; everybody is linked to everybody", "complete", attackers),
    "compression": Condition("about a tenth of the bytes; a ring", "ring", compression),
    "strangers": Condition(
        "two of ten clients hold AG News under random labels", {"kind": "random", "p": 0.5}, strangers,
        judged=range(8),
    ),
}  # fmt: skip


def grid(name: str, data: Path, rates: dict[str, float]) -> Tree:
    """The whole condition as a grid of ``peerlora compare``."""
    condition = CONDITIONS[name]
    common = base(condition.rounds) | task("SST-2", data / "glue")
    common["data"] |= {"eval_per_class": 200}
    common["eval"] = {"every": condition.rounds // 2, "rows": 400}  # the same rows every time
    common["topology"] = condition.topology
    common |= condition.settings
    if name == "strangers":
        common["data"]["train"] = f"parquet:{with_strangers(data)}"
        common["partition"] = {"kind": "column", "column": "client"}
    search = {"rates": list(condition.rates), "holdout": 500 / 67349, "each": ["algorithm.name", "train.label_prior",
              "algorithm.penalty"]}  # fmt: skip
    found = {"base": common, "axes": {"system": condition.methods(rates)}, "seeds": SEEDS}
    return found | ({"search": search} if condition.rates else {})


def with_strangers(data: Path) -> Path:
    """SST-2 rows for eight clients, 1,000 each with the usual skew, and AG News with random labels for two."""
    draw = np.random.default_rng(0)
    own = pq.read_table(data / "glue/sst2/train.parquet", columns=["sentence", "label"])
    labels = own["label"].to_numpy()
    rows = {label: list(draw.permutation(np.flatnonzero(labels == label))) for label in (0, 1)}
    parts = []
    for client, share in enumerate([0.9] * 3 + [0.1] * 3 + [0.5] * 2):
        counts = {0: round(1000 * share), 1: 1000 - round(1000 * share)}
        taken = [rows[label].pop() for label, count in counts.items() for _ in range(count)]
        part = own.take(taken).cast(pa.schema({"sentence": pa.string(), "label": pa.int64()}))
        parts.append(part.append_column("client", pa.array([client] * len(taken))))
    news = pq.read_table(data / "extra/ag_news/train.parquet", columns=["text"])
    for client in STRANGERS:
        texts = news.take(draw.choice(len(news), 1000, replace=False))["text"].cast(pa.string())
        columns = {"sentence": texts, "label": draw.integers(0, 2, 1000), "client": [client] * 1000}
        parts.append(pa.table(columns))
    path = (PLACE / "strangers.parquet").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(parts), path)
    return path


@dataclass(frozen=True)
class Run:
    """One finished cell."""

    rate: float
    events: list[Event]

    @property
    def end(self) -> Evaluated:
        """The last evaluation."""
        return select_events(self.events, Evaluated)[-1]

    @property
    def sent(self) -> float:
        """Bytes."""
        return float(sum(done.bytes_sent for done in select_events(self.events, RoundDone)))

    def at_round(self, rounds: int) -> Evaluated | None:
        """The evaluation at this round, or the last before it."""
        found = [score for score in select_events(self.events, Evaluated) if 0 < score.round <= rounds]
        return found[-1] if found else None


def finished(name: str, data: Path, tree: Tree, rates: dict[str, float]) -> dict[str, list[Run]]:
    """Row -> its runs by seed; ``rates``: those that the search found, by row."""
    found: dict[str, list[Run]] = {}
    for cell in plan_trials(load_grid(tree), rates).trials:
        folder = PLACE / name / cell.folder
        if (folder / "summary.json").is_file():
            events = timed(read_events(folder), cell.config)
            found.setdefault(cell.labels["system"], []).append(Run(cell.config.train.lr, events))
    return found


def timed(events: Sequence[Event], config: RunConfig) -> list[Event]:
    """The events of a run, with the virtual seconds that a clock of equal clients would have counted.

    A clock that waits for all changes no bit of a run, so it need not have been there.  A client's upload is the mean
    over clients.
    """
    if config.clock is not None:
        return list(events)
    step = config.train.local_steps * method_class(config.algorithm.name).traits.gradients
    taken = [step + done.bytes_sent / config.clients / UPLINK for done in select_events(events, RoundDone)]
    now = [0.0, *accumulate(taken)]
    return [replace(each, virtual_seconds=now[each.round]) if isinstance(each, Evaluated) else each for each in events]


def table(condition: Condition, runs: dict[str, list[Run]]) -> list[Tree]:
    """One row per system: mean client and worst client at the end, and at equal rounds, bytes and virtual time."""
    judged = list(condition.judged)
    least = [min(run.sent for run in same if run.sent) for same in zip(*runs.values(), strict=True)]  # by seed
    plain = next((own for system, own in runs.items() if system.startswith("dec-lora")), next(iter(runs.values())))
    rows = []
    for system, own in runs.items():
        ends = [run.end for run in own]
        row: Tree = {"system": system, "rate": own[0].rate, "seeds": len(own), "rounds": ends[0].round}
        row |= {"sent": float(np.mean([run.sent for run in own])), "seconds": float(ends[0].virtual_seconds)}
        looks = {"end": ends, "rounds": [run.at_round(condition.rounds) for run in own]}
        bought = [evaluated_within(run.events, sent=1.05 * most) for run, most in zip(own, least, strict=True)]
        looks["bytes"] = [_after_training(look) for look in bought]
        limits = [condition.seconds or 1.05 * run.end.virtual_seconds for run in plain]
        in_time = [evaluated_within(run.events, seconds=limit) for run, limit in zip(own, limits, strict=True)]
        looks["time"] = [_after_training(look) for look in in_time]
        rows.append(row | {"at": {name: summed_up(found, judged) for name, found in looks.items()}})
    return rows


def _after_training(found: Evaluated | None) -> Evaluated | None:
    return found if found is not None and found.round else None


def summed_up(scores: Sequence[Evaluated | None], judged: Sequence[int]) -> Tree | None:
    """Mean and worst client over seeds, with the standard deviation; None where a seed has no such evaluation."""
    known = [np.array(score.own)[judged] for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    means, worst = [float(np.nanmean(own)) for own in known], [float(np.nanmin(own)) for own in known]
    return {"mean": means, "worst": worst, "round": [score.round for score in scores if score is not None]}


def render(condition: Condition, rows: Sequence[Tree]) -> str:
    """For docs/results/hard-federations.md."""
    looks = ["end", "rounds", "bytes", "time"]
    titles = {
        "end": "mean (worst) client at its end",
        "rounds": f"at {condition.rounds} rounds",
        "bytes": "at the fewest bytes",
        "time": f"at {condition.seconds:g} virtual s" if condition.seconds else "at dec-lora's virtual time",
    }
    head = ["system", "rate", "rounds", "virtual s", "sent, MB"]
    lines = [head + [titles[look] for look in looks]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        cells = [row["system"], f"{row['rate']:g}", str(row["rounds"])]
        cells += [f"{row['seconds']:.0f}", f"{row['sent'] / 1e6:.2f}"]
        lines.append(cells + [_told(row["at"][look]) for look in looks])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _told(look: Tree | None) -> str:
    if look is None:
        return "-"
    spread = f" ± {np.std(look['mean'], ddof=1):.3f}" if len(look["mean"]) > 1 else ""
    return f"{np.mean(look['mean']):.3f}{spread} ({np.mean(look['worst']):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("condition", choices=CONDITIONS)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    name, condition = options.condition, CONDITIONS[options.condition]
    known = {} if condition.rates else {row["system"]: row["rate"] for row in read("label-skew")["rows"]}
    tree = grid(name, options.data, known)
    found = run(name, tree)
    rates = {line.setting: line.rate for line in found.lines} if condition.rates else {}
    rows = table(condition, finished(name, options.data, tree, rates))
    study = {"date": str(date.today()), "condition": condition.told, "facts": run_facts(load_config(tree["base"]))}
    study |= {"grid": without_folder(without_folder(tree, options.data), Path.cwd()), "rows": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"study-{name}.json").write_text(json.dumps(study, indent=1) + "\n")
    insert(PAGES / "hard-federations.md", f"system-{name}", render(condition, rows))


if __name__ == "__main__":
    main()
