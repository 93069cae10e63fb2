"""Studies of flow policies: what fine-tuning, blocks in turn and gossip bring where clients' environments differ.

Six clients act in environments of their own, drawn by the seed.  A row's rate is searched in the environments of two
seeds that are not reported, once for both graphs.  Rows alone, in one place and on graphs take equal steps, and equally
many episodes in every environment; "behaviour cloning only" takes one round, in which no policy trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study_base import SEARCHED, SEEDS, Study, Tree

CLIENTS = 6
CLONED, PLACE = "behaviour cloning only", "all environments in one place"
GRAPHS: dict[str, Tree] = {"p = 0.1": {"kind": "random", "p": 0.1}, "ring": {"kind": "ring"}}
NOBODY: Tree = {"kind": "edges", "edges": [], "allow_disconnected": True}
ALTERNATING = {"name": "swfp", "interval": 1}
EXCHANGED: dict[str, Tree] = {
    "noise steering (DSRL-like)": {"algorithm": "dec-lora", "online": {"policy": "steered"}},
    "one-step (FQL-like)": {"algorithm": "dec-lora", "online": {"policy": "one-step"}},
    "whole flow, dec-lora": {"algorithm": "dec-lora"},
    "swfp": {"algorithm": "swfp"},
    "swfp, adf-lora (T = 1)": {"algorithm": ALTERNATING},
}
"""What is exchanged on every graph."""
GROUPS = ["algorithm.name", "algorithm.interval", "online.policy", "clients"]
"""Settings by which rates differ; a row alone, on p = 0.1 and on the ring has the same."""


def environments(name: str, vary: Tree, online: Tree, train: Tree) -> Tree:
    """What the rows of one table have in common."""
    return {
        "task": {"kind": "flow-policy", "env": name},
        "clients": CLIENTS,
        "partition": {"kind": "environment", "vary": vary},
        "topology": GRAPHS["p = 0.1"],
        "online": online,
        "train": {"optimizer_state": "keep", **train},
        "eval": {"every": train["rounds"]},
        "checkpoint": {"every": train["rounds"]},
        "threads": 1,
    }


COMMON: dict[str, Tree] = {
    "point-mass": environments(
        "point-mass",
        {"goal_x": [0.0, 0.9], "goal_y": [-0.4, 0.4]},
        {"reward_scale": 3, "evaluated": 16},
        {"rounds": 60, "local_steps": 30, "batch": 16},
    ),
}


def rows(common: Tree) -> dict[str, Tree]:
    """Label -> change to the base: each method on each graph, alone, and with all environments at one client."""
    found: dict[str, Tree] = {CLONED: cloned()}
    found["swfp, alone"] = {"algorithm": "swfp", "topology": NOBODY}
    found["whole flow, alone"] = {"algorithm": "dec-lora", "topology": NOBODY}
    for label, change in EXCHANGED.items():
        found |= {f"{label}, {graph}": {**change, "topology": topology} for graph, topology in GRAPHS.items()}
    found[f"{PLACE}, swfp"] = {"algorithm": "swfp"} | in_one_place(common)
    found[f"{PLACE}, whole flow"] = {"algorithm": "dec-lora"} | in_one_place(common)
    return found


def cloned() -> Tree:
    """The policy as demonstrations made it, which one round does not change."""
    one = {"every": 1}
    online = {"policy": "cloned", "critic_rounds": 0}
    return {"algorithm": "local", "online": online, "train": {"rounds": 1}, "eval": one, "checkpoint": one}


def in_one_place(common: Tree) -> Tree:
    """One client that acts in all environments, whose steps take the batches of all."""
    replay = CLIENTS * common["online"].get("replay", 20_000)
    return {
        "clients": 1,
        "partition": {"each": CLIENTS},
        "topology": {"kind": "complete"},
        "online": {"replay": replay},
        "train": {"batch": CLIENTS * common["train"]["batch"]},
    }


def policies(env: str, rates: tuple[float, ...]) -> Study:
    """All rows in one environment, against blocks in turn on a sparse graph."""

    def parts(data: Path) -> list[Tree]:
        search: dict[str, Any] = {"rates": list(rates), "seeds": SEARCHED, "each": GROUPS, "grow": True, "most": 5}
        common = COMMON[env]
        return [
            {
                "base": common,
                "axes": {"system": rows(common)},
                "seeds": SEEDS,
                "search": search | {"ties": "common"},
            }
        ]

    return Study(parts, "flow-policies.md", {"system": "swfp, p = 0.1"})


STUDIES: dict[str, Study] = {"policies-point-mass": policies("point-mass", (1e-3, 3e-3, 9e-3))}
