"""A model or adapter folder on the Hugging Face hub: checked here, then uploaded by the hub's own library."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from peerlora.errors import ConfigError, ModelError, RunError, first_line
from peerlora.runtime.reading import FILE as READING

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z", re.ASCII)
_KNOWN = (READING, "labels.json", "README.md", "chat_template.jinja", "merges.txt", "vocab.txt", "spiece.model")
_SUFFIXES = (".safetensors", ".json", ".model")


@dataclass(frozen=True)
class Upload:
    """What would be uploaded, and where to."""

    folder: Path
    repo: str
    private: bool
    base: str | None
    """The hub id that an adapter's base is named by; None: as it stands in the folder."""
    files: dict[str, int]
    """Bytes by name."""


def plan_upload(folder: Path, repo: str, private: bool, base: str | None = None) -> Upload:
    """Check what an upload would do; no network is used.

    Raises ConfigError for names that no hub has, ModelError for a folder without a model, or with an adapter whose
    base nobody else can load.
    """
    for told, name in (("the name of the repository", repo), ("--base", base)):
        if name is not None and not _REPO.match(name):
            raise ConfigError(f"{told} is {name!r}; expected OWNER/NAME of letters, digits, dots, dashes, underscores")
    adapter, whole = folder / "adapter_config.json", folder / "config.json"
    if not adapter.is_file() and not whole.is_file():
        raise ModelError(
            f"{folder} holds neither config.json nor adapter_config.json; give a folder of `peerlora merge` or "
            "`peerlora export`"
        )
    if adapter.is_file() and base is None:
        named = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not isinstance(named, str) or not _REPO.match(named):
            raise ModelError(
                f"{folder} names its base model {named!r}, which others cannot load; give --base OWNER/NAME, or upload "
                "the whole model: peerlora merge"
            )
    if base is not None and not adapter.is_file():
        raise ConfigError(f"--base {base} given; {folder} holds a whole model, which has no base: leave it out")
    found = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    files = {name: size for name, size in found.items() if name in _KNOWN or name.endswith(_SUFFIXES)}
    return Upload(folder, repo, private, base, files)


def upload(planned: Upload) -> str:
    """Upload the files to a repository, made where there is none; returns the commit's address.

    The hub's own library finds the token that its log-in keeps.  Raises RunError where the hub cannot be reached, or
    refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        for name in planned.files:
            shutil.copyfile(planned.folder / name, copy / name)
        if planned.base is not None:
            _name_base(copy, planned.base)
        try:
            api = HfApi()
            api.create_repo(planned.repo, private=planned.private, exist_ok=True)
            done = api.upload_folder(folder_path=copy, repo_id=planned.repo, commit_message="Upload from peerlora")
        except Exception as error:  # the hub's client raises its own, those of its HTTP library and plain ones
            raise RunError(
                f"{planned.repo} cannot be written ({first_line(error)}); log in with `hf auth login`, be online "
                "(HF_HUB_OFFLINE unset), and own the repository; --dry-run shows what would be uploaded"
            ) from None
    return str(done.commit_url)


def _name_base(folder: Path, base: str) -> None:
    """Name an adapter's base model by a hub id, for PEFT and on the card."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    before, settings["base_model_name_or_path"] = settings.get("base_model_name_or_path"), base
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = folder / "README.md"
    if card.is_file():
        text = re.sub(r'^  "base_model": ".*"', f'  "base_model": {json.dumps(base)}', card.read_text(), flags=re.M)
        card.write_text(text.replace(str(before), base), encoding="utf-8")
