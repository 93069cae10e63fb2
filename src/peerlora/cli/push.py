"""``peerlora push``."""

from pathlib import Path
from typing import Annotated

import typer

from peerlora.cli.options import AsJson, print_json


def command(
    folder: Annotated[Path, typer.Argument(help="a folder of `peerlora merge` or `peerlora export`")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub; NAME alone: one of yours")],
    base: Annotated[str | None, typer.Option("--base", help="hub id of an adapter's base model, in its place")] = None,
    public: Annotated[bool, typer.Option("--public", help="a new repository is public; private by default")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be uploaded; no network")] = False,
    json: AsJson = False,
) -> None:
    """Upload a model or an adapter to the Hugging Face hub."""
    from peerlora.display import format_bytes
    from peerlora.runtime.hub import plan_upload, upload

    planned = plan_upload(folder, repo, not public, base)
    commit = None if dry_run else upload(planned)
    if json:
        print_json({"folder": str(folder), "repo": repo, "files": planned.files, "commit": commit})
        return
    for name, size in planned.files.items():
        print(f"{format_bytes(size):>10}  {name}")
    print(f"would upload to {repo}; nothing was sent" if dry_run else f"uploaded to {repo}: {commit}")
