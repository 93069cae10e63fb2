"""All refusals of a run, before any data is read."""

from __future__ import annotations

from typing import Any

from peerlora.algorithms.base import Algorithm, is_asynchronous
from peerlora.algorithms.merging import Merging
from peerlora.config.run import RunConfig
from peerlora.config.sections import ClockConfig
from peerlora.errors import CompositionError
from peerlora.runtime.virtual_clock import VirtualClock


def build_clock(config: RunConfig, algorithm: Algorithm[Any]) -> VirtualClock | None:
    """The virtual clock of a run; an asynchronous method without one gets equal speeds.

    Raises CompositionError for a clock that the method cannot keep.
    """
    name, settings = config.algorithm.name, config.clock
    if not is_asynchronous(algorithm):
        if settings and (settings.deadline or settings.away) and isinstance(algorithm, Merging):
            raise CompositionError(
                f"{name} cannot do without a client in a round (clock.deadline, clock.away): what others merge must "
                "reach everybody; drop these settings, or use algorithm.name=dec-lora"
            )
        reason = getattr(algorithm, "needs_clock", None)
        if reason and not settings:
            raise CompositionError(f"{name}: {reason}; give the section clock, such as clock.speed=1.0")
        return VirtualClock(settings, config.clients, config.seed) if settings else None
    if settings and settings.deadline:
        raise CompositionError(
            f"{name} waits for nobody, so clock.deadline={settings.deadline:g} has no round to cut short; drop "
            "clock.deadline, or use a synchronous method such as algorithm.name=dec-lora"
        )
    if settings and any(absence.unit == "rounds" for absence in settings.away):
        raise CompositionError(
            f"the clients of {name} have no rounds in common, and clock.away counts in rounds; use unit: seconds"
        )
    if config.train.optimizer_state == "phase":
        raise CompositionError(
            f"the clients of {name} switch factors at moments of their own, so the optimiser's memory has no common "
            "phase (train.optimizer_state=phase); use train.optimizer_state=round or keep"
        )
    clock = VirtualClock(settings or ClockConfig(), config.clients, config.seed)
    if all(clock.back(client, 0) is None for client in range(config.clients)):
        raise CompositionError("clock.away leaves no client that ever begins; let at least one of them stay")
    return clock
