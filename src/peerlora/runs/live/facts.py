"""What a page says of a run as a whole, from the run's first event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peerlora.runs.live.follow import LineFacts


def describe_run(event: LineFacts, held: Sequence[int], counts: list[Any]) -> dict[str, Any]:
    """The settings that the page shows; ``counts``: [client] rows of each label, into which those held are entered.

    Raises KeyError, ValueError, TypeError or AttributeError for a damaged event.
    """
    partition = event.get("partition") or {}
    for client, row in zip(held or range(len(counts)), partition.get("counts") or [], strict=False):
        counts[client] = row
    found = {
        "method": event["method"],
        "clients": int(event["clients"]),
        "rounds": int(event["rounds"]),
        "metric": event["metric"],
        "higher": bool(event["higher_is_better"]),
        "seed": event.get("seed"),
        "started": event.get("time"),
        "topology": (event.get("topology") or {}).get("kind"),
        "names": dict(event.get("names") or {}),
        "labels": partition.get("names"),
        "counts": counts,
        "peers": bool(event.get("held")),
        "clock": _interruptions(event.get("clock")),
    }
    return found | _environments(partition)


def _interruptions(clock: dict[str, Any] | None) -> dict[str, bool] | None:
    """Why clients may miss rounds in virtual time; None without a clock."""
    return {"deadline": bool(clock.get("deadline")), "away": bool(clock.get("away"))} if clock else None


def _environments(partition: dict[str, Any]) -> dict[str, Any]:
    """The environment of flow policies, and the values in which those of clients differ; nothing where they have rows.

    Raises ValueError or TypeError for values that are no numbers.
    """
    if "environment" not in partition:
        return {}
    values = {str(name): [float(each) for each in own] for name, own in partition["values"].items()}
    return {"environment": str(partition["environment"]), "values": values}
