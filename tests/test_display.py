from datetime import UTC, datetime

import pytest

from peerlora.display import format_bytes, format_fixed, format_now, format_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.123456, "0.1235"),
        (1234567, "1,234,567"),
        (1234.5, "1,234"),
        (1e-9, "1e-09"),
    ],
)
def test_numbers_for_people(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (49_380, "49.38 kB"), (2.5e9, "2.5 GB")]
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 MB"), (49_380_000, "49.4 MB"), (2.5e9, "2.50 GB")])
def test_bytes_of_a_line_that_is_redrawn(count, text):
    assert format_bytes(count, fixed=True) == text


def test_numbers_of_a_terminal_have_fixed_decimals():
    assert (format_fixed(None), format_fixed(0.1234), format_fixed(12.34, ".1f")) == ("-", "0.123", "12.3")


def test_the_time_is_utc_in_iso_8601():
    assert datetime.fromisoformat(format_now("milliseconds")).tzinfo == UTC
