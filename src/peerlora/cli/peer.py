"""``peerlora peer``."""

from pathlib import Path
from typing import Annotated

import typer

from peerlora.cli.options import AsJson, Out, Overrides, print_json
from peerlora.cli.watch import Watch, watched

Identity = Annotated[Path, typer.Option("--identity", help="folder with this site's key and certificate")]
Members = Annotated[Path, typer.Option("--members", help="the consortium's signed member list")]
Listen = Annotated[
    str | None, typer.Option("--listen", help="host:port to open; default: the port of the own address on the list")
]

Log = Annotated[str, typer.Option("--log", help="plain, or json: one object a line, with time and level, on stderr")]


def command(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="the run's config, as at all sites")],
    identity: Identity,
    members: Members,
    words: Overrides = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in --out, or begin one there if there is none")
    ] = False,
    listen: Listen = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", help="host:port for /metrics, /healthz and /readyz, such as 127.0.0.1:9464"),
    ] = None,
    log: Log = "plain",
    watch: Watch = False,
    json: AsJson = False,
) -> None:
    """Train as one site of a real federation, with the other sites on the member list."""
    import signal

    from peerlora.cli.log import open_log
    from peerlora.cli.progress import print_summary, stop_on_interrupt
    from peerlora.config.loading import load_config
    from peerlora.runs.resume import default_folder

    with open_log(log) as shown:  # all that is told, errors too
        wanted = load_config(config, words or [])
        ended = resume and out is not None and (Path(out) / "summary.json").is_file()
        if watch and out is None and not resume:  # to resume needs a folder, and is refused below
            out = default_folder(wanted)  # known before the run begins
        stopping = stop_on_interrupt(signal.SIGINT, signal.SIGTERM)
        with watched(watch, out, piped=log == "json"), shown as sink, stopping as stop:
            from peerlora.runtime.peer.participation import check_quorum
            from peerlora.runtime.peer.run import run_peer

            result = run_peer(
                wanted,
                identity,
                members,
                out,
                resume=resume,
                listen=listen,
                metrics=metrics,
                sinks=[sink],
                stop=stop,
            )
        print_summary([(result.summary["method"], result.summary)])
        if json:
            print_json(result.summary)
        if not ended:  # of a run that was over before, a supervisor has heard; it need not start it again and again
            check_quorum(result.summary, wanted)
