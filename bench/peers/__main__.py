"""peerlora beside the frameworks that its users would otherwise take: the same work, measured from outside.

    python bench/peers --repeats 3

Each framework gets an environment of its own below .bench; one that cannot be installed or does not get through is
named under "unavailable" and the others go on.  The repeats are interleaved, and figures are medians over them.
"""

import argparse
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import CORES, RUNNERS, Cell, environment, without_places
from environments import HERE, PLACE, Unavailable, make_place, python_of, versions
from work import JOBS

from peerlora.environment import main_memory


def main() -> None:
    options = read_options()
    make_place()
    works = {job: write_work(job) for job in options.jobs}
    pythons, unavailable = set_up(options.runners, options.install_limit)
    result = {
        "machine": machine(),
        "versions": {name: versions(python) for name, python in pythons.items()},
        "command": shlex.join(["python", "bench/peers", *map(without_places, sys.argv[1:])]),
        "job": {job: vars(JOBS[job]) for job in works},
        "rows": [],
        "unavailable": unavailable,
    }
    cells = {(job, name): Cell(RUNNERS[name], pythons[name], works[job]) for job in works for name in pythons}
    for job, name in cells:
        if f"{job}:{name}" in options.without:
            cells[job, name].failed = "left out of this run by --without"
    references: dict[tuple[str, str], dict[str, Any]] = {}
    for repeat in range(options.repeats):
        for (job, name), cell in cells.items():
            if cell.failed:
                continue
            adapters = cell.run(options.limit)
            if adapters:
                cell.compare(references.setdefault((job, cell.runner.rule), adapters), adapters)
            print(f"{repeat} {job}: {name}: {cell.told()}", flush=True)
        result["rows"] = [{"runner": name, "job": job} | cell.row() for (job, name), cell in cells.items() if cell.runs]
        failed = [{"runner": name, "job": job, "reason": c.failed} for (job, name), c in cells.items() if c.failed]
        write(options.out, result | {"unavailable": unavailable + failed})


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--without", nargs="+", default=[], metavar="JOB:RUNNER", help="e.g. 'long:p2pfl, stock'")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--install-limit", type=float, default=1800, help="seconds for one installation")
    parser.add_argument("--out", type=Path, default=Path("bench/results/peers.json"))
    return parser.parse_args()


def write_work(job: str) -> Path:
    """The common inputs of a job, written anew."""
    folder = (PLACE / "work" / job).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, HERE / "work.py", "--job", job, "--to", folder], check=True, env=environment())
    return folder


def set_up(names: Sequence[str], limit: float) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """The interpreter of every runner in their order, and why the others have none."""
    pythons, unavailable, reasons = {}, [], {}
    for name in sorted(names, key=list(RUNNERS).index):
        place = RUNNERS[name].environment
        try:
            if place in reasons:
                raise reasons[place]
            pythons[name] = python_of(place, limit)
        except Unavailable as reason:
            reasons[place] = reason
            unavailable.append({"runner": name, "reason": without_places(str(reason))})
    return pythons, unavailable


def machine() -> dict[str, Any]:
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": CORES,
        "memory_bytes": main_memory(),
        "system": f"{platform.system()} {platform.release()}",
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
