"""Studies of flow policies: what fine-tuning, blocks in turn and gossip bring where clients' environments differ.

Six clients act in environments of their own, drawn by the seed.  A row's rate is searched in the environments of two
seeds that are not reported, once for both graphs.  Rows alone, in one place and on graphs take equal steps, and equally
many episodes in every environment; "behaviour cloning only" takes one round, in which no policy trains.  A round of
swfp moves one of four blocks, so its beta is four times that of the whole flow: the same reach.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study_base import SEARCHED, SEEDS, Study, Tree

CLIENTS = 6
CLONED, PLACE = "behaviour cloning only", "all environments in one place"
GRAPHS: dict[str, Tree] = {"p = 0.1": {"kind": "random", "p": 0.1}, "ring": {"kind": "ring"}}
NOBODY: Tree = {"kind": "edges", "edges": [], "allow_disconnected": True}
BLOCKS = 4
BETAS: dict[str, tuple[float, float]] = {"point-mass": (1, 10), "Pendulum-v1": (10, 50)}
"""Of the whole flow, and of the one-step net, whose anchor stays where it is; by single runs at seed 100."""
GROUPS = ["algorithm.name", "algorithm.interval", "online.policy", "clients"]
"""Settings by which rates differ; on p = 0.1, where it is searched, on the ring and alone a row has the same."""


def environments(name: str, vary: Tree, online: Tree, train: Tree) -> Tree:
    """What the rows of one table have in common."""
    return {
        "task": {"kind": "flow-policy", "env": name, "blocks": BLOCKS},
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
    "Pendulum-v1": environments(
        "Pendulum-v1",
        {"g": [8, 13], "l": [0.8, 1.3]},
        {
            "reward_scale": 0.1,
            "pretraining": 1500,
            "episodes": 2,
            "discount": 0.97,
            "target_rate": 0.05,
            "noise": 0.4,
            "noise_end": 0.1,
        },
        {"rounds": 40, "local_steps": 100, "batch": 64},
    ),
}


def rows(common: Tree) -> dict[str, Tree]:
    """Label -> change to the base: each method on each graph, alone, and with all environments at one client."""
    whole, one_step = BETAS[common["task"]["env"]]
    turns = {"algorithm": {"name": "swfp"}, "online": {"beta": BLOCKS * whole}}
    flow = {"algorithm": {"name": "dec-lora"}, "online": {"beta": whole}}
    exchanged: dict[str, Tree] = {
        "noise steering (DSRL-like)": {**flow, "online": {"policy": "steered"}},
        "one-step (FQL-like)": {**flow, "online": {"policy": "one-step", "beta": one_step}},
        "whole flow": flow,
        "swfp": turns,
        "swfp, A and B in turn": {**turns, "algorithm": {"name": "swfp", "interval": 1}},
    }
    found: dict[str, Tree] = {CLONED: cloned()}
    for label, change in exchanged.items():
        found |= {f"{label}, {graph}": {**change, "topology": topology} for graph, topology in GRAPHS.items()}
    for label, change in (("whole flow", flow), ("swfp", turns)):
        pooled = in_one_place(common)
        found[f"{label}, alone"] = {**change, "topology": NOBODY}
        found[f"{PLACE}, {label}"] = {**change, **pooled, "online": change["online"] | pooled["online"]}
    return found


def cloned() -> Tree:
    """The policy as demonstrations made it, which one round does not change."""
    one = {"every": 1}
    online = {"policy": "cloned", "critic_rounds": 0}
    return {"algorithm": {"name": "local"}, "online": online, "train": {"rounds": 1}, "eval": one, "checkpoint": one}


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


STUDIES: dict[str, Study] = {
    "policies-point-mass": policies("point-mass", (1e-3, 3e-3, 9e-3)),
    "policies-pendulum": policies("Pendulum-v1", (1e-3, 2e-3)),
}
