"""``peerlora methods``."""

from peerlora.cli.words import AsJson, print_json


def command(json: AsJson = False) -> None:
    """List every algorithm: its paper, what it trains and mixes, what it requires of the topology.

    The operator says what an exchange averages: factors (product-sum), products (sum-product), both at once because a
    factor is common to all, or nothing.  The last but one column says whether exchange.codec and exchange.robust go
    with a method; where they don't, a run that asks for them is refused with the reason.
    """
    from peerlora.algorithms import describe_algorithms

    described = describe_algorithms()
    if json:
        print_json(described)
        return
    from rich.console import Console
    from rich.table import Table

    head = ("paper", "trains", "mixes", "operator", "requires of the topology", "codec, robust", "settings")
    table = Table(title="methods")
    table.add_column("name, other names", no_wrap=True)
    for word in head:
        table.add_column(word, overflow="fold")
    for name, facts in described.items():
        own = facts["settings"] | {f"train.{key}": value for key, value in facts["train"].items()}
        settings = ", ".join(f"{key}={value}" for key, value in own.items())
        names = "\n".join([name, *(f"= {alias}" for alias in facts["aliases"])])
        table.add_row(
            names,
            facts["source"],
            facts["trains"],
            facts["mixes"],
            facts["operator"],
            (facts["requires"] or "-") + ("; no common rounds" if facts["asynchronous"] else ""),
            "yes" if facts["wrappers"] else "no",
            settings or "-",
        )
    Console().print(table)
