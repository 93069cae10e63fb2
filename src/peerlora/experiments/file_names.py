"""Names of files and folders that are made of users' words."""

from __future__ import annotations

from collections.abc import Sequence


def number_equals(names: Sequence[str]) -> list[str]:
    """Number equal names, so that all are different; a number that would make another one's name is left out."""
    found: list[str] = []
    for at, name in enumerate(names):
        number, own = names[:at].count(name) + 1, name
        if names.count(name) > 1:
            own = f"{name}-{number}"
            while own in found or own in names:
                number += 1
                own = f"{name}-{number}"
        found.append(own)
    return found
