"""Sequences of sparse graphs whose product is the exact mean: one peer a round, and agreement after a few rounds."""

from functools import lru_cache

import numpy as np

from peerlora.errors import TopologyError
from peerlora.topology.equitopo import shift
from peerlora.topology.storage import Matrix, from_entries, identity
from peerlora.topology.weight_sequence import WeightSequence, averaging

Group = list[int]
Pair = tuple[int, int, float]  # two clients that average with this weight on each other


def one_peer(clients: int) -> WeightSequence:
    """Round m: client i sends to ``i + 2^m`` and keeps half; the product of a period is J if N is a power of two.

    Source: Assran, Loizou, Ballas, Rabbat 2019, "Stochastic gradient push", arXiv 1811.10792; finite-time agreement:
    Ying et al. 2021, arXiv 2110.13363.
    """
    period = max(1, (clients - 1).bit_length())

    def W(seed: int, t: int) -> Matrix:
        return (identity(clients) + shift(clients, 2 ** (t % period))) / 2

    return WeightSequence(W, symmetric=clients <= 2, period=period)


def hypercube(clients: int) -> WeightSequence:
    """Round m: client i averages with ``i xor 2^m``."""
    period = (clients - 1).bit_length()
    if clients != 2**period:
        raise TopologyError(
            f"hypercube of {clients} clients does not exist; use a power of two such as {2**period}, or "
            "topology.kind=base-k, which agrees as fast for every number"
        )

    def W(seed: int, t: int) -> Matrix:
        bit = 2 ** (t % max(1, period))
        return averaging(clients, [[i, i ^ bit] for i in range(clients) if i < i ^ bit < clients])

    return WeightSequence(W, symmetric=True, period=max(1, period))


def base_graph(clients: int, k: int) -> WeightSequence:
    """The Base-(k+1) graph: after one period everybody holds the exact mean, with at most k neighbours a round.

    The smooth part of N (its prime factors up to k + 1) is factored out where that makes the period shorter: copies of
    the simple graph then run side by side, and the copies average at the end.

    Source: Takezawa, Sato, Bao, Niwa, Yamada 2023, arXiv 2305.11420 (algorithms 1 to 3, from their description).
    Differs: a set that is ready earlier than others waits without sending.
    """
    smooth, rest = _smooth_part(clients, k)
    copies = np.arange(clients).reshape(smooth, rest)
    beside = [
        _side_by_side(clients, rounds) for rounds in zip(*(_simple(row.tolist(), k) for row in copies), strict=True)
    ]
    across = [averaging(clients, groups) for groups in _across(copies.T.tolist(), k)]
    alone = [_round(clients, *each) for each in _simple(list(range(clients)), k)]
    rounds = min([*beside, *across], alone, key=len) or [identity(1)]
    return WeightSequence(lambda seed, t: rounds[t % len(rounds)], symmetric=True, period=len(rounds))


def hyper_hypercube(members: Group, k: int) -> list[list[Group]]:
    """Rounds of groups of at most k + 1 members after which all hold the mean; needs only prime factors up to k + 1."""
    rounds, stride = [], 1
    for size in _factors(len(members), k + 1) or ():
        starts = [i for i in range(len(members)) if i // stride % size == 0]
        rounds.append([[members[i + j * stride] for j in range(size)] for i in starts])
        stride *= size
    return rounds


Round = tuple[list[Group], list[Pair]]


def _simple(members: Group, k: int) -> list[Round]:
    """The simple Base-(k+1) graph of ``members``: who averages in groups and who in weighted pairs, round by round.

    The members are divided by the digits of their number in base k + 1 into sets of ``digit`` parts of equal size.
    First every part averages.  Then, set by set from the largest, everybody behind the set averages with one member of
    each of its parts, after which the set's sum is that of the overall mean.  Last, each set averages.
    """
    if _factors(len(members), k + 1) is not None:
        return [(groups, []) for groups in hyper_hypercube(members, k)]
    sets = _digit_sets(members, k + 1)
    first = [[hyper_hypercube(part, k) for part in parts] for parts in sets]
    last = [hyper_hypercube([i for part in parts for i in part], k) for parts in sets]
    spread = [_spread(sets, level) for level in range(len(sets) - 1)]
    before = max(len(rounds) for rounds in first[0])
    ready = [before + min(level + 1, len(spread)) for level in range(len(sets))]
    plan: list[Round] = [([], []) for _ in range(max(at + len(rounds) for at, rounds in zip(ready, last, strict=True)))]
    for parts in first:
        for rounds in parts:
            _place(plan, rounds, 0)
    for level, pairs in enumerate(spread):
        plan[before + level][1].extend(pairs)
    for at, rounds in zip(ready, last, strict=True):
        _place(plan, rounds, at)
    return plan


def _digit_sets(members: Group, base: int) -> list[list[Group]]:
    """For each digit of the number of members, largest power first: so many parts of that power's size."""
    sets, power, left = [], 1, list(members)
    while power * base <= len(members):
        power *= base
    while left:
        digit = len(left) // power
        if digit:
            sets.append([left[i * power : (i + 1) * power] for i in range(digit)])
            left = left[digit * power :]
        power //= base
    return sets


def _spread(sets: list[list[Group]], level: int) -> list[Pair]:
    """Everybody behind a set averages with one member of each of its parts."""
    parts, behind = sets[level], [i for later in sets[level + 1 :] for part in later for i in part]
    size = sum(map(len, parts))
    weight = size / (len(parts) * (size + len(behind)))
    return [(i, part[place], weight) for place, i in enumerate(behind) for part in parts]


def _place(plan: list[Round], rounds: list[list[Group]], at: int) -> None:
    for m, groups in enumerate(rounds):
        plan[at + m][0].extend(groups)


def _round(clients: int, groups: list[Group], pairs: list[Pair]) -> Matrix:
    i = np.array([pair[0] for pair in pairs], dtype=int)
    j = np.array([pair[1] for pair in pairs], dtype=int)
    weight, own = np.array([pair[2] for pair in pairs]), np.ones(clients)
    for ends in (i, j):
        np.subtract.at(own, ends, weight)
    here = np.arange(clients)
    rows, columns = np.concatenate([here, i, j]), np.concatenate([here, j, i])
    paired = from_entries(clients, rows, columns, np.concatenate([own, weight, weight]))
    return averaging(clients, groups) + (paired - identity(clients))  # who averages in a group is in no pair


def _side_by_side(clients: int, rounds: tuple[Round, ...]) -> Matrix:
    """One round of several copies, which share no client."""
    return _round(clients, [g for groups, _ in rounds for g in groups], [p for _, pairs in rounds for p in pairs])


def _across(columns: list[Group], k: int) -> list[list[Group]]:
    """Rounds after which each column has averaged, all columns at once."""
    return [
        [g for groups in rounds for g in groups]
        for rounds in zip(*(hyper_hypercube(c, k) for c in columns), strict=True)
    ]


def _smooth_part(number: int, k: int) -> tuple[int, int]:
    """``number`` as a product whose first factor holds all primes up to k + 1."""
    smooth = 1
    for prime in range(2, k + 2):
        while number % prime == 0:
            smooth, number = smooth * prime, number // prime
    return smooth, number


@lru_cache(maxsize=4096)
def _factors(number: int, largest: int) -> tuple[int, ...] | None:
    """As few factors up to ``largest`` as possible with this product; None where there are none."""
    if number == 1:
        return ()
    if number <= largest:
        return (number,)
    divisors = [size for size in range(largest, 1, -1) if number % size == 0]
    found = [(size, *rest) for size in divisors if (rest := _factors(number // size, largest)) is not None]
    return min(found, key=len) if found else None
