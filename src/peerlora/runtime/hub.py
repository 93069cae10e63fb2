"""A model or adapter folder on the Hugging Face hub: checked here, then uploaded by the hub's own library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peerlora.errors import ConfigError, ModelError, RunError, first_line
from peerlora.lora.model_folder import ADAPTER, base_name, is_adapter, read_settings, with_base
from peerlora.runtime.reading import FILE as READING

_KNOWN = (READING, "labels.json", "README.md", "chat_template.jinja", "merges.txt", "vocab.txt", "dict.txt")
_SUFFIXES = (".safetensors", ".json", ".model", ".spm", ".tokenizer", ".tiktoken", ".codes")
"""Of weights, settings and what the tokenizers of transformers write; no pickle, nor what a trainer leaves."""
_TEMPLATES = "additional_chat_templates"  # a folder of them, beside the first


@dataclass(frozen=True)
class Upload:
    """What would be uploaded, and where to."""

    folder: Path
    repo: str
    private: bool
    base: str | None
    """The hub id that an adapter's base is named by; None: as it stands in the folder."""
    files: dict[str, int]
    """Bytes by name, as they are in the folder."""


def plan_upload(folder: Path, repo: str, private: bool, base: str | None = None) -> Upload:
    """Check what an upload would do; no network is used.

    Raises ConfigError for names that no hub has, ModelError for a folder without a model, or with an adapter whose
    base nobody else can load.
    """
    for option, name in (("the name of the repository", repo), ("--base", base)):
        if name is not None and not _is_hub_id(name):
            raise ConfigError(
                f"{option} is {name!r}; expected OWNER/NAME or NAME, of letters, digits, dots, dashes and underscores"
            )
    adapter = is_adapter(folder)
    if base is not None and not adapter:
        raise ConfigError(f"--base {base} given; {folder} holds a whole model, which has no base: leave it out")
    if adapter:
        _check_base(folder, base)
    paths = [path for path in sorted(folder.iterdir()) if path.name in _KNOWN or path.name.endswith(_SUFFIXES)]
    paths += sorted((folder / _TEMPLATES).glob("*.jinja"))
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.is_file()}
    return Upload(folder, repo, private, base, files)


def _check_base(folder: Path, base: str | None) -> None:
    """Refuse an adapter whose settings are damaged, or, with no other name for it, whose base is on this machine."""
    named = base_name(read_settings(folder / ADAPTER))
    if base is None and (named is None or not _is_hub_id(named) or Path(named).exists()):
        from peerlora.train.online.base_policy import is_base_policy  # loads torch, which nothing else here needs

        acts = named is not None and is_base_policy(Path(named))  # whose base no other program loads
        whole = "" if acts else ", or upload the whole model: peerlora merge"
        raise ModelError(
            f"{folder} names its base model {named!r}, which others cannot load; give --base OWNER/NAME{whole}"
        )


def _is_hub_id(name: str) -> bool:
    """Whether the hub may have a repository of this name: OWNER/NAME, or NAME, as that of some old models."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def upload(planned: Upload) -> str:
    """Upload the files to a repository, made where there is none; returns the commit's address.

    A name without an owner becomes one of the user.  The hub's own library finds the token that its log-in keeps, and
    reads the files where they lie.  Raises RunError where the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    changed = {} if planned.base is None else with_base(planned.folder, planned.base)
    files = {name: changed[name].encode() if name in changed else planned.folder / name for name in planned.files}
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    try:
        api = HfApi()
        made = api.create_repo(planned.repo, private=planned.private, exist_ok=True)
        done = api.create_commit(made.repo_id, operations, commit_message="Upload from peerlora")
    except Exception as error:  # the hub's client raises its own, those of its HTTP library and plain ones
        raise RunError(
            f"{planned.repo} cannot be written ({first_line(error)}); log in with `hf auth login`, be online "
            "(HF_HUB_OFFLINE unset), and own the repository; --dry-run shows what would be uploaded"
        ) from None
    return str(done.commit_url)
