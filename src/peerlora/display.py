"""Numbers, sizes and times in the forms that people read."""

from datetime import UTC, datetime

Cell = str | int | float | None
"""What a table for people may hold."""


def format_number(value: Cell) -> str:
    """A number with four digits and thousands separated; a dash for None and NaN, text unchanged."""
    if value is None or value != value:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e9):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_fixed(value: float | None, form: str = ".3f") -> str:
    """A number for a terminal's column, with a fixed number of decimals; a hyphen for None and for NaN."""
    return "-" if value is None or value != value else format(value, form)


def format_bytes(count: float, fixed: bool = False) -> str:
    """Bytes in powers of 1000, with four digits.

    ``fixed``: in MB or GB with a fixed number of decimals, for a line that is redrawn.
    """
    if fixed:
        return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
    factor, unit = byte_unit(count)
    return f"{count / factor:.4g} {unit}"


def byte_unit(count: float) -> tuple[float, str]:
    """(bytes per unit, name of the unit) in which ``count`` bytes have one to three digits before the point."""
    units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    return next(((factor, unit) for factor, unit in units if count >= factor), (1.0, "bytes"))


def format_now(timespec: str = "seconds") -> str:
    """Give the time in UTC as ISO 8601; ``timespec`` as in ``datetime.isoformat``."""
    return utc_now().isoformat(timespec=timespec)


def utc_now() -> datetime:
    """Return the time in UTC, with its zone: that which is shown, and that by which lists and certificates end."""
    return datetime.now(UTC)
