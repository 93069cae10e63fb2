"""Checks the shape types of a function in its first call of each test and then now and then, not in every call.

Checking every call took half of the time of a tiny run, and most of that of a toy without a model.
"""

from dataclasses import is_dataclass
from functools import partial, wraps

import jaxtyping

EVERY = 50  # calls: one of so many is checked
every_call = jaxtyping.jaxtyped


class Current:
    """The number of the test that runs, since calls are counted anew in each."""

    test = 0


def sampled(fn, *, typechecker):
    """Decorate a function or class as ``jaxtyping.jaxtyped`` does, with fewer of its calls checked."""
    if isinstance(fn, (classmethod, staticmethod)):
        return type(fn)(sampled(fn.__func__, typechecker=typechecker))
    if isinstance(fn, property):
        return property(*(each and sampled(each, typechecker=typechecker) for each in (fn.fget, fn.fset, fn.fdel)))
    if isinstance(fn, type):
        if is_dataclass(fn) and not hasattr(fn.__init__, "__wrapped__"):
            fn.__init__ = sampled(fn.__init__, typechecker=typechecker)
        return fn
    checked = every_call(fn, typechecker=typechecker)
    test, calls = -1, 0

    @wraps(fn)
    def either(*args, **kwargs):
        nonlocal test, calls
        if test != Current.test:
            test, calls = Current.test, 0
        calls += 1
        return (checked if calls % EVERY == 1 else fn)(*args, **kwargs)

    return either


def install():
    """Make jaxtyping's import hook use it; before the first import of a package that the hook instruments."""
    jaxtyping.jaxtyped = lambda *, typechecker: partial(sampled, typechecker=typechecker)
