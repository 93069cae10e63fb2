"""The transport beside raw asyncio TCP, and what a killed process costs.

    python bench/transport.py --peers 8 --sizes 4 32 --passes 3 --kills 5 --out bench/results/transport.json

Throughput: every peer is a process in a ring; in each round it sends one message to both neighbours and gets one from
both.  TCP and gRPC take turns, so that a noisy machine disturbs both; what counts is the ratio of a pass.  TCP neither
encrypts nor checks anything.  Failure: a peer is killed by SIGKILL while messages fly, and started again 4 s later.
Times are of the system's monotonic clock, which all processes share.
"""

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from transport_peer import neighbours, site


def free_ports(count: int) -> list[int]:
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


class Process:
    """A peer's process and the lines that it prints."""

    def __init__(self, folder: Path, role: str, number: int, peers: int, size: float, count: int):
        words = [f"--role={role}", f"--number={number}", f"--peers={peers}", f"--size={size}", f"--rounds={count}"]
        command = [sys.executable, str(Path(__file__).with_name("transport_peer.py")), *words, f"--folder={folder}"]
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"GRPC_VERBOSITY": "ERROR"},
        )
        self.number, self.spawned = number, time.monotonic()

    def until(self, event: str, peer: str | None = None, after: float = 0.0) -> dict:
        """The next line of this event (of this peer, not before ``after``); earlier lines are dropped."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            facts = json.loads(line)
            if facts["event"] == event and peer in (None, facts.get("peer")) and facts["at"] >= after:
                return facts
        raise SystemExit(f"{site(self.number)} ended without saying {event!r}")

    def go(self) -> None:
        """Let it go on."""
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    def stop(self) -> None:
        """Kill it, if it still runs."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()


def federation(folder: Path, peers: int) -> None:
    """Identities, list and ports of a ring."""
    from peerlora.network.identity.authority import throwaway

    ports = free_ports(peers)
    edges = sorted({(min(i, j), max(i, j)) for i in range(peers) for j in neighbours(i, peers)})
    addresses = {site(number): f"127.0.0.1:{port}" for number, port in enumerate(ports)}
    throwaway(folder, addresses, edges=[(site(i), site(j)) for i, j in edges])
    (folder / "ports.json").write_text(json.dumps(ports))


def throughput(role: str, peers: int, size: float, count: int) -> float:
    """MB received by all peers together in a second, from the first start to the last end."""
    with tempfile.TemporaryDirectory() as name:
        federation(Path(name), peers)
        processes = [Process(Path(name), role, number, peers, size, count) for number in range(peers)]
        try:
            for process in processes:
                process.until("ready")
            for process in processes:
                process.go()
            times = [process.until("rounds") for process in processes]
        finally:
            for process in processes:
                process.stop()
    seconds = max(each["ended"] for each in times) - min(each["began"] for each in times)
    return count * sum(len(neighbours(number, peers)) for number in range(peers)) * size / seconds


def kill(peers: int, size: float, away: float) -> dict[str, list[float]]:
    """Kill one peer and start it again after ``away`` seconds: seconds until its neighbours know, until it receives."""
    with tempfile.TemporaryDirectory() as name:
        federation(Path(name), peers)
        processes = [Process(Path(name), "talk", number, peers, size, 0) for number in range(peers)]
        try:
            victim = peers // 2
            for other in neighbours(victim, peers):  # not "ready" before: a message may come earlier than that line
                processes[other].until("first", site(victim))
            time.sleep(1.0)
            killed = time.monotonic()
            processes[victim].popen.send_signal(signal.SIGKILL)
            near = [processes[other] for other in neighbours(victim, peers)]
            noticed = [each.until("down", site(victim), killed)["at"] - killed for each in near]
            time.sleep(away)
            processes[victim].stop()
            processes[victim] = back = Process(Path(name), "talk", victim, peers, size, 0)
            start = back.until("start")["at"]
            firsts = [back.until("first")["at"] for _ in near]
        finally:
            for process in processes:
                process.stop()
    return {
        "noticed": noticed,
        "receives_after_start": [at - start for at in firsts],
        "receives_after_spawn": [at - back.spawned for at in firsts],
    }


def measure(options: argparse.Namespace) -> dict:
    rows = []
    for size in options.sizes:
        count = options.rounds or max(3, round(160 / size))
        for number in range(options.passes):
            roles = ("tcp", "grpc") if number % 2 == 0 else ("grpc", "tcp")
            row = {"mb": size, "rounds": count} | {role: throughput(role, options.peers, size, count) for role in roles}
            row["ratio"] = row["grpc"] / row["tcp"]
            print(f"{size:g} MB: TCP {row['tcp']:.0f} MB/s, gRPC {row['grpc']:.0f} MB/s, ratio {row['ratio']:.2f}")
            rows.append(row)
    kills: dict[str, list[float]] = {}
    for _ in range(options.kills):
        for what, seconds in kill(options.peers, options.kill_size, options.away).items():
            kills.setdefault(what, []).extend(seconds)
    for what, seconds in kills.items():
        print(f"{what.replace('_', ' ')}: median {median(seconds):.3f} s, largest {max(seconds):.3f} s")
    return {
        "peers": options.peers,
        "throughput": rows,
        "ratio": {f"{size:g}": median(row["ratio"] for row in rows if row["mb"] == size) for size in options.sizes},
        "kills": kills,
        "kills_median": {what: median(seconds) for what, seconds in kills.items()},
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "grpcio": version("grpcio")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--sizes", type=float, nargs="+", default=[4, 32], help="MB a message")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=0, help="rounds a pass; as many as make sense by default")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--kill-size", type=float, default=4, help="MB of a message in flight at a kill")
    parser.add_argument("--away", type=float, default=4.0, help="seconds that a killed peer stays away")
    parser.add_argument("--out", type=Path, default=Path("bench/results/transport.json"))
    options = parser.parse_args()
    result = {"command": " ".join(["bench/transport.py", *sys.argv[1:]])} | measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
