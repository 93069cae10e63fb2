"""Tiny flow policies that several tests run."""

from peerlora.config.loading import load_config

TINY = {
    "task": {"kind": "flow-policy", "env": "point-mass", "blocks": 2, "width": 8},
    "adapter": {"rank": 2, "alpha": 4},
    "clients": 3,
    "partition": {"kind": "environment", "values": {"goal_x": [0.2, 0.5, 0.8]}},
    "topology": {"kind": "ring"},
    "algorithm": {"name": "swfp"},
    "train": {"rounds": 4, "local_steps": 2, "batch": 8, "lr": 0.01, "dtype": "fp64"},
    "online": {
        "episodes": 2,
        "horizon": 5,
        "evaluated": 2,
        "demonstrations": 4,
        "pretraining": 5,
        "replay": 40,
        "critic_rounds": 0,
    },
    "eval": {"every": 2},
    "checkpoint": {"every": 1},
    "threads": 1,
}


def tiny(*words):
    """The config of a run of three clients on the point mass."""
    return load_config(TINY, words)
