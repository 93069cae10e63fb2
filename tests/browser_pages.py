"""Pages in a real browser: Debian's Chromium, driven by playwright; see the fixture ``opened``."""

import shutil
from importlib.util import find_spec

import pytest

CHROMIUM = shutil.which("chromium")
in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or find_spec("playwright") is None,
        reason="needs chromium (apt-get install chromium) and playwright (pip install playwright)",
    ),
]


def until(page, expression):
    """Wait for an expression to become true; playwright's own way is forbidden by the page's security policy."""
    while not page.evaluate(expression):
        page.wait_for_timeout(50)
