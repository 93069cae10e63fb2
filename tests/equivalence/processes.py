"""Real peers as processes of this machine over gRPC, for tests.

Forked from a process that has loaded torch but not gRPC, so that each costs a run and not the loading.
"""

import ctypes
import multiprocessing
from pathlib import Path

from peerlora.config.loading import load_config
from peerlora.network.identity.authority import throwaway
from peerlora.runs.events import RoundDone
from peerlora.runtime.launch.processes import free_ports
from waiting import until

PRELOAD = ["peft", "transformers.models.bert.modeling_bert", "peerlora.runtime.simulate", "peerlora.runs.report"]
QUICK = ["algorithm.name=dec-lora", "train.dtype=fp32", "train.batch=8", "eval.every=1000", "eval.rows=4"]
QUICK += ["peer.quorum=0"]  # what fails on purpose is no lack of contact
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOAD)


def take_part(configs, client, folder, namespace=None, hold=None, reports=False):
    """What one process does: its part in one run after another; a killed one goes on where it was."""
    if namespace is not None:
        enter(namespace)
    if not reports:
        from peerlora.runs import report

        report.write_report = lambda *words, **options: None  # figures take longer than these runs
    from peerlora.runtime.peer.run import run_peer

    sinks = [] if hold is None else [Hold(hold, Path(folder) / f"go-{client}")]
    identities = Path(folder) / "identities"
    for name, yaml in configs.items():
        out = Path(folder) / name / f"peer-{client}"
        if not (out / "summary.json").exists():
            members = identities / "members.json"
            run_peer(load_config(Path(yaml)), identities / f"site-{client}", members, out, resume=True, sinks=sinks)


class Hold:
    """A sink in which a peer stays after so many rounds, answering others, until there is a file."""

    def __init__(self, rounds, go):
        self.rounds, self.go = rounds, go

    def __call__(self, event):
        if isinstance(event, RoundDone) and event.round + 1 == self.rounds:
            until(self.go.exists)


def enter(namespace):
    """Move this process into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as place:
        if libc.setns(place.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")


class Processes:
    """The processes of a federation; ``configs``: name -> config, run one after another.

    ``hosts``: (namespace, address) of every client's host; by default all are on this one.  ``reports``: they write
    report.html.
    """

    def __init__(self, configs, folder, hosts=None, reports=False):
        self.folder, self.clients, self.hosts = folder, next(iter(configs.values())).clients, hosts
        self.reports = reports
        local = [f"127.0.0.1:{port}" for port in free_ports(self.clients)]
        chosen = [f"{address}:7443" for _, address in hosts] if hosts else local
        addresses = {f"site-{i}": address for i, address in enumerate(chosen)}
        throwaway(folder / "identities", addresses, "test")
        self.configs = {}
        for name, config in configs.items():
            named = config.model_copy(update={"peer": config.peer.model_copy(update={"run": name})})
            self.configs[name] = str(folder / f"{name}.yaml")
            (folder / f"{name}.yaml").write_text(named.to_yaml())
        self.running = {}

    def start(self, client, hold=None):
        """``hold``: rounds after which it trains no more until `release`; it answers others meanwhile."""
        place = self.hosts[client][0] if self.hosts else None
        given = (self.configs, client, str(self.folder), place, hold, self.reports)
        process = _CONTEXT.Process(target=take_part, args=given)
        process.start()
        self.running[client] = process
        return process

    def release(self, *clients):
        """Let these go on that hold, by default all."""
        for client in clients or self.running:
            (self.folder / f"go-{client}").touch()

    def run(self, name, client):
        return self.folder / name / f"peer-{client}"

    def wait(self, *clients, seconds=600):
        """The exit codes of these, by default of all, once they have ended."""
        chosen = {client: self.running[client] for client in clients or self.running}
        for process in chosen.values():
            process.join(seconds)
        return {client: process.exitcode for client, process in chosen.items()}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.running.values():
            process.kill()
            process.join()
            process.close()
