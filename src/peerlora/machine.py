"""What this machine has."""

import os


def main_memory() -> int:
    """Bytes of main memory, used or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
