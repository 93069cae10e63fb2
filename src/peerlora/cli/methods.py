"""``peerlora methods``."""

from typing import Any

from peerlora.cli.options import AsJson, print_json


def command(json: AsJson = False) -> None:
    """List every algorithm: its paper, what it trains and mixes, what it requires of the topology.

    The operator says what an exchange averages: factors (product-sum), products (sum-product), both at once because a
    factor is common to all, or nothing.  A method of another package has that package's name below its own.  The last
    table says what does not go with which methods, and why: a run that asks for it is refused, or warned where that is
    said.
    """
    from peerlora.algorithms import describe_algorithms

    described = describe_algorithms()
    if json:
        print_json(described)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    methods, asks = (Table(title=title) for title in ("methods", "what they ask for, and their settings"))
    for table in (methods, asks):
        table.add_column("name, other names", no_wrap=True)
    for table, words in ((methods, ("paper", "trains", "mixes", "operator")), (asks, ("topology", "settings"))):
        for word in words:
            table.add_column(word, overflow="fold")
    for name, facts in described.items():
        own = facts["settings"] | {f"train.{key}": value for key, value in facts["train"].items()}
        settings = ", ".join(f"{key}={value}" for key, value in own.items())
        package = [] if facts["package"] == "peerlora" else [f"({facts['package']})"]
        names = "\n".join([name, *(f"= {alias}" for alias in facts["aliases"]), *package])
        methods.add_row(names, facts["source"], facts["trains"], facts["mixes"], facts["operator"])
        topology = facts["requires"].replace("row stochastic, column stochastic", "doubly stochastic") or "-"
        asks.add_row(name, topology + ("; no common rounds" if facts["asynchronous"] else ""), settings or "-")
    refused = Table("setting", "methods", "because", title="not together", show_lines=True)
    for (what, reason), names in _alike(described).items():
        refused.add_row(what, ", ".join(names), reason)
    console.print(methods, asks, refused)


def _alike(described: dict[str, dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """The methods that do not go with a thing for one reason, things in the order of the first method that has them."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, facts in described.items():
        for pair in facts["not_with"].items():
            found.setdefault(pair, []).append(name)
    things = list(dict.fromkeys(what for what, _ in found))
    return dict(sorted(found.items(), key=lambda item: things.index(item[0][0])))
