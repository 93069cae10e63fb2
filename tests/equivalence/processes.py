"""Real peers as processes of this machine over gRPC, for tests.

Forked from a process that has loaded torch but not gRPC, so that each costs a run and not the loading.
"""

import multiprocessing
from pathlib import Path

from peerlora.config import load_config
from peerlora.runtime.launch import free_ports
from peerlora.transport.authority import throwaway

PRELOAD = ["peft", "transformers.models.bert.modeling_bert", "peerlora.runtime.simulate", "peerlora.runs.report"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOAD)


def take_part(configs, client, folder):
    """What one process does: its part in one run after another; a killed one goes on where it was."""
    from peerlora.runtime.peer import run_peer

    identities = Path(folder) / "identities"
    for name, yaml in configs.items():
        out = Path(folder) / name / f"peer-{client}"
        if not (out / "summary.json").exists():
            members = identities / "members.json"
            run_peer(load_config(Path(yaml)), identities / f"site-{client}", members, out, resume=True)


class Processes:
    """The processes of a federation; ``configs``: name -> config, run one after another."""

    def __init__(self, configs, folder):
        self.folder, self.clients = folder, next(iter(configs.values())).clients
        addresses = {f"site-{i}": f"127.0.0.1:{port}" for i, port in enumerate(free_ports(self.clients))}
        throwaway(folder / "identities", addresses, "test")
        self.configs = {}
        for name, config in configs.items():
            named = config.model_copy(update={"peer": config.peer.model_copy(update={"run": name})})
            self.configs[name] = str(folder / f"{name}.yaml")
            (folder / f"{name}.yaml").write_text(named.to_yaml())
        self.running = {}

    def start(self, client):
        process = _CONTEXT.Process(target=take_part, args=(self.configs, client, str(self.folder)))
        process.start()
        self.running[client] = process
        return process

    def run(self, name, client):
        return self.folder / name / f"peer-{client}"

    def wait(self, seconds=200):
        """The exit codes, once all have ended."""
        for process in self.running.values():
            process.join(seconds)
        return {client: process.exitcode for client, process in self.running.items()}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.running.values():
            process.kill()
            process.join()
            process.close()
