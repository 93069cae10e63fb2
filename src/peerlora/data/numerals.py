"""How numbers are written."""

import re

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"(0|-?[1-9]\d*)(\.0)?", re.ASCII)
_LONGEST = 1000  # digits; Python refuses to read numbers of more than 4300


def is_number(word: str) -> bool:
    """Whether a word is a decimal number; infinities and NaN are none."""
    return _NUMBER.fullmatch(word) is not None


def whole_number(word: str) -> int | None:
    """The whole number that a word is, written as a program writes it: 10, -3 or 2.0, but not 010, +1 or 1e3."""
    found = _WHOLE.fullmatch(word) if len(word) <= _LONGEST else None
    return int(found[1]) if found else None
