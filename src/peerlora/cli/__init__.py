"""The command line: one file per command, each a call into the library, imported only when it runs."""

import sys
from typing import Annotated

import typer

from peerlora.cli import (
    compare,
    demo,
    doctor,
    export,
    identity,
    init,
    launch,
    members,
    merge,
    methods,
    peer,
    predict,
    privacy,
    push,
    schema,
    show,
    topology,
    train,
    watch,
)
from peerlora.cli.examples import add_examples
from peerlora.errors import PeerloraError

app = typer.Typer(
    name="peerlora",
    help="Fine-tune one model together without a server: LoRA adapters, gossiped over any graph.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
commands = (demo, init, train, compare, peer, launch, doctor, methods, topology, privacy, show, watch)
for module in (*commands, export, merge, predict, push, schema):
    app.command(module.__name__.rsplit(".", 1)[-1])(module.command)
app.add_typer(identity.app, name="identity")
app.add_typer(members.app, name="members")
add_examples(app)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        print(metadata.version("peerlora"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass  # the option does it, before a command is looked for


def main() -> None:
    """Run the command line; a mistake of the user is one message on stderr and exit code 2."""
    try:
        app()
    except PeerloraError as error:
        print(f"peerlora: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("peerlora: stopped", file=sys.stderr)
        sys.exit(130)
