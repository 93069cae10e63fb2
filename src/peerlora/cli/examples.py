"""Examples of every command, which its ``--help`` and the page of the command line show."""

import typer

EXAMPLES = {
    "demo": ("peerlora demo", "peerlora demo seed=1 clients=6 --out demo-run"),
    "init": (
        "peerlora init --train reviews.csv",
        "peerlora init --train rows/ --label topic --text body --to topic.yaml",
    ),
    "train": (
        "peerlora train peerlora.yaml --out runs/first",
        "peerlora train peerlora.yaml train.rounds=50 topology=ring --watch",
        "peerlora train --resume runs/first",
    ),
    "compare": ("peerlora compare grid.yaml --out comparison", "peerlora compare --preset adf-lora --data glue"),
    "peer": (
        "peerlora peer peerlora.yaml --identity identity --members members.json --out run-7 --resume",
        "peerlora peer peerlora.yaml --identity identity --members members.json --metrics 127.0.0.1:9464 --log json",
    ),
    "launch": (
        "peerlora launch peerlora.yaml --peers 3 --out launched",
        "peerlora launch peerlora.yaml --peers 4 --kill 3@5s:2s --cut 1-2@4s:3s",
    ),
    "doctor": ("peerlora doctor peerlora.yaml --identity identity --members members.json --wait 60",),
    "methods": ("peerlora methods", "peerlora methods --json"),
    "topology": ("peerlora topology ring --clients 10", "peerlora topology random p=0.3 --clients 10 --rounds 200"),
    "privacy": ("peerlora privacy peerlora.yaml privacy.epsilon=8",),
    "show": ("peerlora show runs/first", "peerlora show runs/first --json"),
    "watch": ("peerlora watch runs/first --open", "peerlora watch runs/next --wait --port 8000"),
    "export": (
        "peerlora export runs/first --average --to adapter",
        "peerlora export runs/first --client 0 --to adapter --with-base",
    ),
    "merge": ("peerlora merge runs/first --average --to model",),
    "predict": (
        "peerlora predict model --rows new.csv",
        "peerlora predict runs/first/adapters/average --rows new.csv --to answers.jsonl",
    ),
    "push": ("peerlora push model OWNER/NAME --dry-run", "peerlora push adapter OWNER/NAME --base bert-base-uncased"),
    "schema": ("peerlora schema > peerlora.schema.json",),
    "identity new": (
        "peerlora identity new identity --site hospital-a",
        "peerlora identity new authority --as-authority 'Five Hospitals'",
    ),
    "identity request": ("peerlora identity request identity --to hospital-a.csr",),
    "identity sign": ("peerlora identity sign hospital-a.csr --authority authority --to hospital-a.pem --days 60",),
    "identity show": ("peerlora identity show identity",),
    "members new": ("peerlora members new members.json --name five-hospitals",),
    "members add": (
        "peerlora members add members.json --site hospital-a --certificate hospital-a.pem"
        " --address peer.hospital-a.example:7443",
    ),
    "members agree": ("peerlora members agree members.json --site hospital-a --agreement " + "0f" * 32,),
    "members remove": ("peerlora members remove members.json --site hospital-b",),
    "members link": ("peerlora members link members.json hospital-a hospital-b",),
    "members unlink": ("peerlora members unlink members.json hospital-a hospital-b",),
    "members sign": ("peerlora members sign members.json --authority authority --days 90",),
    "members verify": ("peerlora members verify members.json --trust identity/trust.pem",),
    "members show": ("peerlora members show members.json",),
}
"""Words of a command -> lines as they are typed in a shell; the tests parse each."""


def add_examples(app: typer.Typer, group: str = "") -> None:
    """Put examples below the help of every command of ``app`` and of its groups."""
    for command in app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "")
        lines = EXAMPLES.get(f"{group} {name}".strip(), ())
        if lines:
            command.epilog = "\n\n".join(["Examples:" if len(lines) > 1 else "Example:", *lines])
    for below in app.registered_groups:
        if below.typer_instance is not None:
            add_examples(below.typer_instance, below.name or "")
