"""``peerlora methods``."""

from peerlora.cli.words import AsJson, print_json


def command(json: AsJson = False) -> None:
    """List every algorithm: its paper, what it trains and mixes, what it requires of the topology."""
    from peerlora.algorithms import describe_algorithms

    described = describe_algorithms()
    if json:
        print_json(described)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "paper", "trains", "mixes", "requires of the topology", "settings", title="methods")
    for name, facts in described.items():
        settings = ", ".join(f"{key}={value}" for key, value in facts["settings"].items())
        table.add_row(name, facts["source"], facts["trains"], facts["mixes"], facts["requires"] or "-", settings or "-")
    Console().print(table)
