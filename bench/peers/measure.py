"""Wall time, CPU time and memory of a program with everything that it starts, from /proc (Linux).

Ray and NVFlare start processes that outlive or leave their parent, so a process counts when it descends from the
program or has our mark in its environment.  Memory is the resident size, added over all processes: pages that
processes share are counted in each.  CPU time lacks what a process used after the last look at it.
"""

import os
import resource
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK = "PEERS_MARK"
PAUSE = 0.2  # seconds between two looks
TICK, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Measured:
    """One finished program."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    loopback_bytes: int
    """Of the whole machine in that time."""
    ended: str
    """Empty, or why it did not end well, with its last lines."""


@dataclass
class Family:
    """The processes of one program, as far as they were seen."""

    root: int
    mark: str
    ours: dict[tuple[int, int], bool] = field(default_factory=dict)
    """(process, its start) -> whether it is one of them."""
    cpu: dict[tuple[int, int], float] = field(default_factory=dict)
    peak: int = 0

    def look(self) -> list[int]:
        """Update what is known; returns the processes that are there now."""
        there = {process: stat for process in _processes() if (stat := _stat(process))}
        now, resident = [], 0
        for process, stat in there.items():
            key = (process, stat.started)
            if key not in self.ours:
                self.ours[key] = self._descends(process, there) or _marked(process, self.mark)
            if self.ours[key] and stat.state != "Z":
                now.append(process)
                self.cpu[key] = stat.cpu
                resident += stat.resident
        self.peak = max(self.peak, resident)
        return now

    def _descends(self, process: int, there: "Mapping[int, _Stat]") -> bool:
        while process in there and process != self.root:
            process = there[process].parent
        return process == self.root

    def end(self) -> None:
        """End what is left of it: politely, then not."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in self.look():
                _send(process, sign)
            give_up = time.monotonic() + 5
            while self.look() and time.monotonic() < give_up:
                time.sleep(PAUSE)


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    started: int
    cpu: float
    resident: int


def measure(command: Sequence[str], environment: Mapping[str, str], place: Path, limit: float) -> Measured:
    """Run a program in ``place`` for at most ``limit`` seconds; its output goes to ``place``/log.txt."""
    mark = uuid.uuid4().hex
    loopback, used = loopback_bytes(), _children_cpu()
    began = time.time()
    with (place / "log.txt").open("wb") as log:
        marked = {**environment, MARK: mark, "PEERS_LAUNCHED": repr(began)}
        program = subprocess.Popen(
            command, env=marked, cwd=place, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        family = Family(program.pid, mark)
        try:
            while program.poll() is None and time.time() - began < limit:
                family.look()
                with suppress(subprocess.TimeoutExpired):
                    program.wait(PAUSE)
            wall, late = time.time() - began, program.poll() is None
        finally:  # also when somebody stops the benchmark
            family.end()
            program.wait()
    ended = f"stopped after {limit:.0f} s" if late else f"exit code {program.returncode}" if program.returncode else ""
    # What was waited for is exact, what was looked at is complete: neither is both.
    cpu = max(sum(family.cpu.values()), _children_cpu() - used)
    tail = last_lines(place / "log.txt") if ended else ""
    return Measured(wall, cpu, family.peak, loopback_bytes() - loopback, f"{ended}: {tail}" if ended else "")


def last_lines(path: Path, lines: int = 6) -> str:
    return " | ".join(path.read_text(errors="replace").strip().splitlines()[-lines:])[-1500:]


def loopback_bytes() -> int:
    """What the loopback device has received since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _stat(process: int) -> _Stat | None:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return None
    cpu = (int(fields[11]) + int(fields[12])) / TICK
    return _Stat(fields[0], int(fields[1]), int(fields[19]), cpu, int(fields[21]) * PAGE)


def _marked(process: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or belongs to somebody else
        return False


def _send(process: int, sign: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, sign)


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
