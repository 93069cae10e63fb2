"""``peerlora topology``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from peerlora.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from peerlora.topology.schedule import Topology


def command(
    spec: Annotated[list[str], typer.Argument(metavar="SPEC", help="as in a config: ring, or random p=0.1")],
    clients: Annotated[int, typer.Option("--clients", min=1, max=10_000, help="number of clients")] = 10,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="rounds to look at")] = 100,
    parameters: Annotated[
        int, typer.Option("--parameters", min=1, help="scalars per adapter, for the bytes (MiniLM, rank 8: 73728)")
    ] = 73_728,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    json: AsJson = False,
) -> None:
    """Describe a topology: degree, connectivity, stochasticity, spectral gap, bytes per round."""
    from peerlora.config.loading import parse_spec
    from peerlora.topology.describe import describe
    from peerlora.topology.schedule import build_topology

    topology = build_topology(parse_spec(spec), clients, seed)
    facts = describe(topology, rounds, 4 * parameters)
    facts["noise_averaged_over"] = _averaged(topology, rounds)
    if json:
        print_json(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("property", "value", title=f"{' '.join(spec)}, {clients} clients")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _text(value))
    Console().print(table)


def _averaged(topology: Topology, rounds: int) -> dict[str, float] | None:
    """Over how many clients models average the noise of steps, by schedule; None of more clients than is affordable."""
    from peerlora.config.train import TrainConfig
    from peerlora.topology.averaging import MOST, average_over, noise_left
    from peerlora.train.schedule import rate_factor

    if topology.clients > MOST:
        return None
    left, found = noise_left(topology, rounds), {}
    for schedule in ("constant", "cosine"):
        settings = TrainConfig(rounds=rounds, schedule=schedule)
        found[schedule] = average_over(left, [rate_factor(settings, t) for t in range(rounds)])
    return found


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
