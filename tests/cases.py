"""Which cases of a test run always, and which with the slow tests only."""

import pytest

from peerlora.algorithms import REGISTRY

ROW_METHODS = {name: kind for name, kind in REGISTRY.items() if not kind.traits.flow_policies_only}
"""The methods that learn from rows, by name."""


def others_slow(cases, always):
    """All cases; those that ``always`` does not name, by place or, of texts, by value, are marked slow.

    A case of several parameters is a tuple.
    """
    chosen = []
    for place, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        slow = place not in always and not (isinstance(case, str) and case in always)
        chosen.append(pytest.param(*values, marks=[pytest.mark.slow] if slow else []))
    return chosen
