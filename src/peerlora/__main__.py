"""``python -m peerlora``."""

from peerlora.cli import main

main()
