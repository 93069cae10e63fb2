"""An environment of its own for every framework, below .bench, from the pinned requirements beside this file."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from measure import last_lines

HERE = Path(__file__).parent
PLACE = Path(".bench")
TORCH = "torch==2.13.0"
PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
TOLD = ["torch", "transformers", "peft", "numpy", "peerlora", "flwr", "ray", "nvflare", "p2pfl"]


class Unavailable(Exception):
    """Raised when a framework cannot be set up on this machine; says why."""


def python_of(name: str | None, limit: float) -> Path:
    """The interpreter that runs a framework, installed first where that is due; None: peerlora's own."""
    if name is None:
        return Path(sys.executable)
    folder, wanted = PLACE / name, HERE / f"requirements-{name}.txt"
    python = (folder / "bin" / "python").absolute()
    stamp = folder / "installed.txt"
    if stamp.is_file() and stamp.read_text() == wanted.read_text():
        return python
    print(f"installing {name} into {folder}", flush=True)
    until = time.monotonic() + limit
    make_place()
    step([sys.executable, "-m", "venv", str(folder)], until)
    refuse_gpu_runtime(python, until)
    # Torch first and alone, else a framework's own wish decides which build comes.
    step([str(python), *PIP, "install", TORCH], until)
    step([str(python), *PIP, "install", TORCH, "-r", str(wanted)], until)
    stamp.write_text(wanted.read_text())
    return python


def make_place() -> None:
    """The folder for everything that is installed and written here; git leaves it out."""
    PLACE.mkdir(exist_ok=True)
    (PLACE / ".gitignore").write_text("*\n")


def refuse_gpu_runtime(python: Path, until: float) -> None:
    """Several GB that nothing here would use."""
    report = step([str(python), *PIP, "install", "--dry-run", "--report", "-", TORCH], until)
    names = [each["metadata"]["name"] for each in json.loads(report)["install"]]
    if any(name.startswith("nvidia") for name in names):
        raise Unavailable(
            f"pip would take a {TORCH} with a GPU runtime of several GB; install its CPU build into "
            f"{python.parent.parent.relative_to(Path.cwd())} first, as README.md says under Installing"
        )


def step(command: list[str], until: float) -> str:
    """One step of an installation, with everything before ``until``."""
    log = PLACE / "install.log"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with log.open("wb") as errors:
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                timeout=max(1, until - time.monotonic()),
            )
        except subprocess.TimeoutExpired:
            raise Unavailable("the installation did not end in time") from None
    if done.returncode:
        raise Unavailable(f"the installation failed: {last_lines(log)}")
    return done.stdout


def versions(python: Path) -> dict[str, str]:
    """What is installed there, of the packages that decide a figure."""
    code = (
        "import json, platform, sys\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        found[name] = version(name)\n"
        "    except PackageNotFoundError:\n"
        "        pass\n"
        "print(json.dumps(found))\n"
    )
    return json.loads(subprocess.run([python, "-c", code, *TOLD], check=True, capture_output=True, text=True).stdout)
