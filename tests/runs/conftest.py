from collections.abc import Callable
from types import SimpleNamespace

import pytest

from peerlora.runs.events import (
    CaughtUp,
    CheckpointSaved,
    Evaluated,
    Event,
    Generated,
    Joined,
    NeighbourChanged,
    PolicyShown,
    Resumed,
    RoundDone,
    RunFinished,
    RunStarted,
    Warned,
)

TIME = "2025-01-01T00:00:00+00:00"


def started(clients: int = 3, rounds: int = 4, **changes) -> RunStarted:
    facts = {
        "time": TIME,
        "method": "adf-lora",
        "clients": clients,
        "rounds": rounds,
        "metric": "accuracy",
        "higher_is_better": True,
        "seed": 7,
        "threads": 2,
        "versions": {"torch": "2.6"},
        "partition": {"names": ["earn", "crude"], "counts": [[client + 1, 2] for client in range(clients)]},
        "topology": {"kind": "ring"},
        "parameters": 10,
        "warnings": [],
    }
    return RunStarted(**{**facts, **changes})


def round_done(t: int, clients: int = 3, edges: list[list[int]] | None = None) -> RoundDone:
    """Round ``t`` with numbers that can be told apart: loss of client i is t + i/10."""
    return RoundDone(
        round=t,
        loss=[t + client / 10 for client in range(clients)],
        consensus_A=0.1,
        consensus_B=0.2,
        consensus_product=0.3,
        cross_term=0.0,
        local_cross_term=0.0,
        rho=0.5,
        edges=edges,
        contacts=len(edges or []),
        bytes_per_edge=100,
        bytes_sent=200 * len(edges or []),
        seconds_train=1.0,
        seconds_mix=0.5,
        seconds_diagnostics=0.25,
        weak_mismatch=0.4,
        strong_mismatch=0.3,
    )


def evaluated(round: int, own: list[float], final: bool = False, rows: int = 20) -> Evaluated:
    return Evaluated(round, rows, own, 0.9, [1 - each for each in own], 0.1, 2.0, final)


@pytest.fixture
def made() -> SimpleNamespace:
    """The builders of single events."""
    return SimpleNamespace(started=started, round_done=round_done, evaluated=evaluated, TIME=TIME)


@pytest.fixture
def run() -> Callable[..., list[Event]]:
    """Builds the events of a whole run; ``stop`` cuts it after so many rounds."""

    def build(clients: int = 3, rounds: int = 4, stop: int | None = None, **changes) -> list[Event]:
        events: list[Event] = [started(clients, rounds, **changes)]
        events.append(evaluated(0, [0.25 + client / 100 for client in range(clients)]))
        for t in range(rounds if stop is None else stop):
            events.append(round_done(t, clients, [[0, 1]] if clients > 1 else []))
        if stop is None:
            events.append(evaluated(rounds, [0.5 + client / 10000 for client in range(clients)], final=True, rows=50))
            events.append(RunFinished(TIME, {"own_mean": 0.51}))
        return events

    return build


@pytest.fixture
def one_of_each() -> list[Event]:
    return [
        started(),
        round_done(0, edges=[[0, 1], [1, 2]]),
        evaluated(1, [0.5, 0.25, 1.0]),
        Generated(1, 2, [{"prompt": "how?", "expected": "so", "own": "thus\nand so"}], {"own": {"exact-match": 0.0}}),
        CheckpointSaved(1, "checkpoints/round-000001.safetensors", "ab"),
        Resumed(TIME, 1),
        Warned('a "quoted" café\nsecond line'),
        Joined(TIME, 0, [1, 2]),
        NeighbourChanged(TIME, 3, 2, "down", "no heartbeat"),
        PolicyShown(4, "averaged", [[[0.0, 1.0, 0.5, -0.5]]], "angle", {"0": [0.1, 0.2]}),
        CaughtUp(TIME, 3, 9, 2, True),
        RunFinished(TIME, {"accuracy": {"own_mean": 0.5}}),
    ]
