"""``peerlora launch``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peerlora.cli.options import AsJson, Out, Overrides, print_json
from peerlora.cli.watch import Watch, watched
from peerlora.display import format_fixed

if TYPE_CHECKING:
    from rich.table import Table

    from peerlora.runtime.launch.peer_process import PeerProcess

Kill = Annotated[
    list[str] | None, typer.Option("--kill", help="3@5s: SIGKILL peer 3, 5 s after round 0 began; 3@5s:2s: restart it")
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="2@4s:3s: SIGSTOP peer 2 for 3 s; 2@4s: for good")]
Cut = Annotated[
    list[str] | None, typer.Option("--cut", help="1-2@4s:3s: cut the link for 3 s; 1>2@4s: one direction, for good")
]


def command(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="a config, as for train")],
    words: Overrides = None,
    peers: Annotated[int | None, typer.Option("--peers", help="how many; default: the config's clients")] = None,
    out: Out = None,
    kill: Kill = None,
    stop: Stop = None,
    cut: Cut = None,
    watch: Watch = False,
    json: AsJson = False,
) -> None:
    """Run a whole federation as real processes on this machine, with throw-away identities."""
    import signal

    from peerlora.cli.progress import stop_on_interrupt
    from peerlora.config.loading import load_config
    from peerlora.runs.store import new_folder
    from peerlora.runtime.launch.faults import parse_fault

    chosen = load_config(config, [*(words or []), *([f"clients={peers}"] if peers is not None else [])])
    faults = [parse_fault("kill", word, chosen.clients) for word in kill or ()]
    faults += [parse_fault("stop", word, chosen.clients) for word in stop or ()]
    faults += [parse_fault("cut", word, chosen.clients) for word in cut or ()]
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        signals.append(signal.SIGHUP)  # the peers, in sessions of their own, don't hear that the terminal was closed
    if watch and out is None:
        out = new_folder("launch")  # known before the run begins
    with watched(watch, out), LaunchProgress() as progress, stop_on_interrupt(*signals) as stopping:
        from peerlora.runtime.launch.processes import launch

        summary = launch(chosen, out, faults, listener=progress, stop=stopping)
    print_launch(summary)
    if json:
        print_json(summary)
    if not summary["ok"]:  # 2: a mistake in what all of them were given
        raise typer.Exit(2 if all(peer["ended"] == "failed (2)" for peer in summary["peers"]) else 1)


class LaunchProgress:
    """Shows a live table on a terminal, and prints the notices of peers; a context manager."""

    def __init__(self):
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True)
        self.live = Live(console=self.console, transient=True) if self.console.is_terminal else None
        self.printed: dict[int, tuple[str, int]] = {}

    def __enter__(self) -> LaunchProgress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, peers: Sequence[PeerProcess]) -> None:
        """Show the state of the peers."""
        for peer in peers:
            state, count = self.printed.get(peer.client, ("", 0))
            lines = [peer.state] if peer.state != state else []
            for line in lines + peer.notices[count:]:
                self.console.print(f"peer {peer.client}: {line}", highlight=False, markup=False, soft_wrap=True)
            self.printed[peer.client] = peer.state, len(peer.notices)
        if self.live:
            self.live.update(tabulate(peers))


def tabulate(peers: Sequence[PeerProcess]) -> Table:
    """Tabulate the state of the peers."""
    from rich.table import Table

    table = Table("peer", "state", "round", "loss", "metric", "missed links", "starts")
    for peer in peers:
        scores = format_fixed(peer.loss), format_fixed(peer.metric)
        table.add_row(str(peer.client), peer.state, str(peer.round), *scores, str(peer.missed), str(peer.starts))
    return table


def print_launch(summary: dict[str, Any]) -> None:
    """One line per peer, and where everything lies."""
    from rich.console import Console
    from rich.table import Table

    scores = ["metric", *(["relayed"] if "deployed" in summary else [])]
    table = Table("peer", "ended", "rounds", *scores, "missed links", "rounds left out", "starts", title_justify="left")
    for peer in summary["peers"]:
        keys = ("client", "ended", "rounds", *scores, "missed", "skipped", "starts")
        table.add_row(*(format_fixed(peer[key]) if key in scores else str(peer[key]) for key in keys))
    console = Console(width=110)
    console.print(table)
    reached = _reached(summary, "own")
    if "deployed" in summary:
        reached += f"; relayed models {_reached(summary, 'relayed')}; deployed: the {summary['deployed']} ones"
    console.print(f"{summary['method']}: {reached}; {summary['run']}", highlight=False, markup=False, soft_wrap=True)
    if late := summary.get("not_injected"):
        late = f"not injected, since the peer or the run had ended before: {', '.join(late)}"
        console.print(late, highlight=False, markup=False, soft_wrap=True)


def _reached(summary: dict[str, Any], models: str) -> str:
    return ", ".join(f"{name} {format_fixed(summary[f'{models}_{name}'])}" for name in ("mean", "min", "max"))
