"""Privacy accounting: what so many noisy releases cost, by the accountants of opacus (extra ``privacy``)."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq

from peerlora.config.privacy import Accountant
from peerlora.errors import ConfigError

ORDERS = (1.1, 1.25, 1.5, 1.75, 2.5, 3.5, 4.5, *range(2, 65), 80, 96, 128, 192, 256, 512)
"""Renyi orders that are tried; whole ones are quick, and any set of them gives a valid epsilon."""
_PRECISION = 1e-3  # relative, of the noise that is looked for
_LEAST, _MOST = 0.05, 1e5  # noise multipliers that are considered
_LARGEST_PRV = 100.0  # epsilon; beyond, opacus' grid of privacy losses grows to minutes and gigabytes
_WIDER = 1.5  # factor between two guesses until the noise that is looked for lies between them


def has_accountants() -> bool:
    """Whether the extra is installed, without the seconds that its import takes."""
    return find_spec("opacus") is not None


def require_accountants() -> Any:
    """The module ``opacus.accountants``; raises ConfigError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a library, at its import
            from opacus import accountants  # pyright: ignore[reportMissingImports] # of an extra
    except ImportError:
        raise ConfigError(
            "privacy needs opacus, which counts epsilon and is not installed; run `pip install '.[privacy]'` in "
            "peerlora's repository"
        ) from None
    return accountants


@lru_cache(maxsize=4096)
def spent_epsilon(noise: float, rate: float, releases: int, delta: float, accountant: Accountant) -> float:
    """Epsilon of so many releases of the sampled Gaussian mechanism, an upper bound.

    ``noise``: standard deviation by clipping norm; ``rate``: probability with which each row, or the client, is in
    a release.  With rate 1, and where it finds more than 100, the Renyi accountant counts for both: opacus' other one
    divides by 1 - rate, and takes time and memory that grow with epsilon.  Elsewhere prv is the smaller of the two
    bounds, since that of few releases with little loss is the rounding of its grid.  Both fall below 0 where delta
    alone covers the loss, as of a handful of rows, and epsilon is 0 there.
    Source: Mironov et al. 2019, arXiv 1908.10530 (rdp); Gopi et al. 2021, arXiv 2106.02848 (prv).
    """
    if releases == 0:
        return 0.0
    if noise == 0:
        return math.inf
    accountants = require_accountants()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the ")  # told as well where no better one exists
        renyi = releases * _renyi_divergences(noise, rate)
        epsilon, _ = accountants.analysis.rdp.get_privacy_spent(orders=list(ORDERS), rdp=renyi, delta=delta)
        if accountant == "prv" and rate < 1 and epsilon <= _LARGEST_PRV:
            counter = accountants.PRVAccountant()
            counter.history = [(noise, rate, releases)]
            epsilon = min(epsilon, counter.get_epsilon(delta=delta))
        return max(0.0, float(epsilon))


@lru_cache(maxsize=4096)
def _renyi_divergences(noise: float, rate: float) -> Float[np.ndarray, " order"]:
    """Of one release, which add up: what takes the time, and is the same after every round."""
    rdp = require_accountants().analysis.rdp
    return np.asarray(rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=list(ORDERS)))


@lru_cache(maxsize=4096)
def noise_for(epsilon: float, rate: float, releases: int, delta: float, accountant: Accountant) -> float:
    """The least noise multiplier, up to 0.1 %, with which so many releases spend at most ``epsilon``; at least 0.05.

    Raises ConfigError where no noise is enough.
    """
    if accountant == "prv" and rate < 1:  # begin where the quick one ends, which is slightly above
        high = noise_for(epsilon, rate, releases, delta, "rdp")
    else:
        high = 1.0

    def excess(logarithm: float) -> float:
        return spent_epsilon(math.exp(logarithm), rate, releases, delta, accountant) - epsilon

    low = high
    while excess(math.log(high)) > 0:
        low, high = high, high * _WIDER
        if high > _MOST:
            raise ConfigError(
                f"privacy.epsilon={epsilon:g} cannot be had with delta={delta:.3g} in {releases} releases at a "
                f"sampling rate of {rate:.3g}; ask for a larger epsilon, or for fewer rounds"
            )
    while excess(math.log(low)) <= 0:
        if low <= _LEAST:  # of an epsilon that promises next to nothing
            return _LEAST
        low, high = max(low / _WIDER, _LEAST), low
    root: Any = brentq(excess, math.log(low), math.log(high), xtol=_PRECISION / 2)
    found = math.exp(root)
    while spent_epsilon(found, rate, releases, delta, accountant) > epsilon:  # a root is met from either side
        found *= 1 + _PRECISION / 2
    return found
