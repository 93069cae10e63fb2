"""Studies of hard federations: skewed labels, stragglers, attackers, few bytes, strangers; each system and its rivals.

Every row, clients alone included, has the adjusted loss, the falling rate and, where it can, the kept memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from study_base import (
    ALONE,
    BATCH,
    PLACE,
    ROUNDS,
    SGD_RATES,
    STEPS,
    Study,
    Tree,
    Tuned,
    base,
    grid,
    learned,
    named,
)

PAGE = "hard-federations.md"
RING: Tree = {"kind": "ring"}
ADF: Tree = {"name": "adf-lora", "interval": 5}
LOOKS = 3
"""Evaluations of a run, the last one at its end, for the comparison at equal cost."""


def condition(data: Path, topology: Tree, rounds: int = ROUNDS, **sections: Any) -> Tree:
    """The base of a hard federation."""
    common = base("sst2", data, rounds=rounds) | {"topology": topology, "eval": {"every": looks(rounds)}}
    return common | sections


def looks(rounds: int) -> int:
    """Rounds between evaluations."""
    return max(1, rounds // LOOKS)


def label_skew(data: Path) -> list[Tree]:
    """AdamW, meeting at random with p = 0.1: what the systems made for skewed labels add to the adjusted loss."""
    names = ("dec-lora", "k-gt", "fedprox", "dfedsam", "flood")
    systems = {ALONE: learned("local"), **{told(name): learned(name, optimizer="adamw") for name in names}}
    systems["adf-lora, T = 5"] = learned(ADF)
    return [grid("sst2", condition(data, {"kind": "random", "p": 0.1}), systems)]


def told(name: str) -> str:
    """A method's name; a reconstruction is called one."""
    return f"{name} (our reconstruction)" if name in RECONSTRUCTED else name


RECONSTRUCTED = ("flood", "aedfl", "dfedadmm", "dfedadmm-sam")
"""Made from abstracts or from memory, since the authors' formulas or code are not to be had."""
SGD: Tree = {"optimizer": "sgd", "clip": 10.0}
"""The dual methods and FedSpeed clip by default, as FedSpeed's code does; here every row does."""
SGD_ROUNDS = 96
"""After 48 most rows had not left chance."""
PENALTY = Tuned("algorithm.penalty", (0.01, 0.1, 1.0))
"""1 / lambda; lambda is the length of a dual method's step, whatever the rate."""
SGD_TUNED = {
    **{told(name): PENALTY for name in ("dfedadmm", "dfedadmm-sam", "fedspeed")},
    "consensus-admm": Tuned("algorithm.rho", (0.01, 0.1, 1.0)),
}
SGD_METHODS = ("dfedadmm", "dfedadmm-sam", "fedspeed", "consensus-admm")


def label_skew_sgd(data: Path) -> list[Tree]:
    """SGD on a ring, since d2 needs a graph that stays; d2 takes one step of 40 rows in place of 5 of 8."""
    names = ("dec-lora", "k-gt", "fedprox", "dfedsam", "flood", *SGD_METHODS)
    systems = {ALONE: learned("local", **SGD), **{told(name): learned(name, **SGD) for name in names}}
    systems["adf-lora, T = 5"] = learned(ADF, **SGD)
    systems["d2"] = learned("d2", **SGD, local_steps=1, batch=STEPS * BATCH)
    return [grid("sst2", condition(data, RING, SGD_ROUNDS), systems, SGD_RATES)]


SLOW, BUDGET = 10.0, 600.0
"""How much slower every second client is; virtual seconds that a run may take, where a fast step takes 1."""
ON_TIME, CUT = STEPS + 1.0, 42.0
"""Deadlines: the fast are ready; the slow come through the forward passes and the head and one of two blocks back."""


def stragglers(data: Path) -> list[Tree]:
    """A ring; the budget is virtual time, so every row has the rounds that fit; one waits as long as it takes."""
    waits, on_time, cut = (int(BUDGET / seconds) for seconds in (STEPS * SLOW, ON_TIME, CUT))
    free = int(BUDGET / STEPS * (1 + 1 / SLOW) / 2)  # jobs of all clients, in rounds of ten
    deadline: Tree = {"clock": {"deadline": ON_TIME}}
    systems = {
        ALONE: timed(learned("local", rounds=on_time)) | deadline,  # who is alone waits for nobody
        "dec-lora, waits": timed(learned(rounds=waits)),
        f"dec-lora, waits, {ROUNDS} rounds": timed(learned(rounds=ROUNDS)),
        "adf-lora, T = 5, waits": timed(learned(ADF, rounds=waits)),
        f"dec-lora, deadline {ON_TIME:g} s": timed(learned(rounds=on_time)) | deadline,
        f"adf-lora, T = 5, deadline {ON_TIME:g} s": timed(learned(ADF, rounds=on_time)) | deadline,
        f"salf, deadline {CUT:g} s": timed(learned({"name": "salf", "depth": "deadline", "deadline": CUT}, rounds=cut)),
        named(told("aedfl"), "aedfl"): timed(learned("aedfl", rounds=free)),
        "ad-psgd": timed(learned("ad-psgd", rounds=free)),
    }
    return [grid("sst2", condition(data, RING, clock={"step": 1.0, "speed": [1.0, 1 / SLOW] * 5}), systems)]


def timed(row: Tree) -> Tree:
    """A row with looks on the way, by its own rounds."""
    return row | {"eval": {"every": looks(row["train"]["rounds"])}}


ATTACKING = 3
"""Of ten: the fewest with which ALIE's own quantile is an attack."""


def attackers(data: Path) -> list[Tree]:
    """Everybody is linked to everybody; three attack, drawn by the seed, and their scores do not count."""
    attacks = {
        "sign-flip": {"attack": "sign-flip"},
        "alie": {"attack": "alie"},
        "alie, z = 1.5": {"attack": "alie", "scale": 1.5},
    }
    rules = {
        "": None,
        ", trimmed mean": {"kind": "trimmed-mean", "drop": ATTACKING},
        ", clipped gossip": {"kind": "clipped-gossip", "drop": ATTACKING},
        ", balance": {"kind": "balance"},
    }
    systems = {ALONE: learned("local"), "dec-lora, nobody attacks": learned()}
    systems |= {"adf-lora, T = 5, nobody attacks": learned(ADF)}
    for attack, settings in attacks.items():
        adversary: Tree = {"adversary": {"clients": ATTACKING, **settings}}
        for rule, robust in rules.items():
            guarded = {"exchange": {"robust": robust}} if robust else {}
            systems[f"dec-lora{rule}, {attack}"] = learned() | adversary | guarded
    flips: Tree = {"adversary": {"clients": ATTACKING, "attack": "sign-flip"}}
    systems["adf-lora, T = 5, trimmed mean, sign-flip"] = (
        learned(ADF) | flips | {"exchange": {"robust": rules[", trimmed mean"]}}
    )
    return [grid("sst2", condition(data, {"kind": "complete"}), systems)]


GAMMA = Tuned("algorithm.gamma", (0.05, 0.15, 0.45), at_most=1.0)
COMPRESSED: dict[str, Tree] = {
    "choco, top-k 5 %": {"name": "choco", "codec": "top-k", "share": 0.05},
    "choco, sign": {"name": "choco", "codec": "sign"},
    "choco, qsgd 7 levels": {"name": "choco", "codec": "qsgd", "levels": 7},
}
ADF_COMPRESSED = "adf-lora, T = 5, over choco, top-k 5 %"
RARE = 4
"""Exchanges in all of the row that saves bytes by meeting seldom, with full adapters."""


def compression(data: Path) -> list[Tree]:
    """A ring, which CHOCO needs fixed; its step gamma is tuned."""
    seldom = learned(rounds=RARE, local_steps=ROUNDS * STEPS // RARE)
    systems = {
        ALONE: learned("local"),
        "dec-lora": learned(),
        "adf-lora, T = 5": learned(ADF),
        f"dec-lora, {RARE} rounds of {ROUNDS * STEPS // RARE} steps": timed(seldom),
        **{name: learned(method) for name, method in COMPRESSED.items()},
        ADF_COMPRESSED: learned(ADF) | {"exchange": {"codec": {"kind": "top-k", "share": 0.05}}},
    }
    return [grid("sst2", condition(data, RING), systems)]


COMPRESSION_TUNED = {
    **dict.fromkeys(COMPRESSED, GAMMA),
    ADF_COMPRESSED: Tuned("exchange.codec.gamma", GAMMA.values, GAMMA.at_most),
}
STRANGERS, OWN_CLIENTS = [8, 9], range(8)
ROWS_EACH = 1000


def strangers(data: Path) -> list[Tree]:
    """Two of ten clients hold AG News under random labels; p = 0.5; the eight others count."""
    common = condition(data, {"kind": "random", "p": 0.5}, partition={"kind": "column", "column": "client"})
    common["data"]["train"] = f"parquet:{strangers_file()}"
    every = ROUNDS // 6
    systems = {ALONE: learned("local"), "dec-lora": learned(), "adf-lora, T = 5": learned(ADF)}
    flood = {"": {}, ", rows only": {"beta": 0.0}, ", clients only": {"alpha": 0.0, "beta": 1.0}}
    for label, settings in flood.items():
        systems[told("flood") + label] = learned({"name": "flood", "every": every, **settings})
    found = grid("sst2", common, systems)
    found["search"]["holdout"] = 0.05  # 500 of the ten clients' 10,000; a fifth is the strangers', chance for all rows
    return [found]


def strangers_file() -> Path:
    """Where ``write_strangers`` puts the rows."""
    return (PLACE / "strangers.parquet").absolute()


def write_strangers(data: Path) -> None:
    """Write SST-2 rows for eight clients, 1,000 each with the usual skew, and AG News, random labels, for two."""
    draw = np.random.default_rng(0)
    own = pq.read_table(data / "glue/sst2/train.parquet", columns=["sentence", "label"])
    labels = own["label"].to_numpy()
    rows = {label: list(draw.permutation(np.flatnonzero(labels == label))) for label in (0, 1)}
    parts = []
    for client, share in enumerate([0.9] * 3 + [0.1] * 3 + [0.5] * 2):
        counts = {0: round(ROWS_EACH * share), 1: ROWS_EACH - round(ROWS_EACH * share)}
        taken = [rows[label].pop() for label, count in counts.items() for _ in range(count)]
        part = own.take(taken).cast(pa.schema({"sentence": pa.string(), "label": pa.int64()}))
        parts.append(part.append_column("client", pa.array([client] * len(taken))))
    news = pq.read_table(data / "extra/ag_news/train.parquet", columns=["text"])
    for client in STRANGERS:
        texts = news.take(draw.choice(len(news), ROWS_EACH, replace=False))["text"].cast(pa.string())
        columns = {"sentence": texts, "label": draw.integers(0, 2, ROWS_EACH), "client": [client] * ROWS_EACH}
        parts.append(pa.table(columns))
    strangers_file().parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(parts), strangers_file())


DEC: Tree = {"system": "dec-lora"}
STUDIES: dict[str, Study] = {
    "label-skew": Study(label_skew, PAGE, DEC, costs=True),
    "label-skew-sgd": Study(label_skew_sgd, PAGE, DEC, tuned=SGD_TUNED, costs=True),
    "stragglers": Study(stragglers, PAGE, {"system": "ad-psgd"}, costs=True),
    "attackers": Study(attackers, PAGE, {"system": "dec-lora, nobody attacks"}),
    "compression": Study(compression, PAGE, DEC, tuned=COMPRESSION_TUNED, costs=True),
    "strangers": Study(strangers, PAGE, DEC, judged=OWN_CLIENTS, prepare=write_strangers),
}
