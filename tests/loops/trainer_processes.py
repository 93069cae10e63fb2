"""Trainers with PeerCallback as processes of this machine over gRPC, for tests."""

import multiprocessing
from pathlib import Path

from processes import PRELOAD

from peerlora.config.loading import load_config
from peerlora.network.identity.authority import throwaway
from peerlora.runtime.launch.processes import free_ports

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([*PRELOAD, "transformers.trainer"])


def train(names, client, folder, resume=False, fails_at=None, kills_at=None, holds_at=None, **settings):
    """What one process does: a Trainer's part in one run after another."""
    import os
    import signal
    import time

    import torch
    from loop_rigs import own_settings, peft_model, trainer_of
    from transformers import Trainer

    from peerlora.hf import PeerCallback
    from peerlora.runs import report
    from peerlora.runtime.compose import compose

    torch.set_num_threads(1)
    report.write_report = lambda *words, **options: None  # figures take longer than these runs

    class Failing(Trainer):
        def training_step(self, *words, **options):
            if self.state.global_step == fails_at:
                raise ValueError("the loop's own error")
            if self.state.global_step == kills_at:
                os.kill(os.getpid(), signal.SIGKILL)
            while self.state.global_step == holds_at and not (folder / "go").exists():
                time.sleep(0.05)
            return super().training_step(*words, **options)

    folder = Path(folder)
    identity, members = folder / "identities" / f"site-{client}", folder / "identities" / "members.json"
    for name in names:
        config = load_config(folder / f"{name}.yaml")
        federation = compose(config)
        callback = PeerCallback(own_settings(config), identity, members)
        out = folder / name / f"trainer-{client}"
        trainer = trainer_of(
            config, federation, client, out, peft_model(config, federation), [callback], Failing, **settings
        )
        trainer.train(resume_from_checkpoint=resume)


class Trainers:
    """The processes of a federation; ``configs``: name -> config, run one after another."""

    def __init__(self, configs, folder):
        self.folder, self.names, self.running = folder, list(configs), {}
        self.clients = next(iter(configs.values())).clients
        addresses = {f"site-{i}": f"127.0.0.1:{port}" for i, port in enumerate(free_ports(self.clients))}
        throwaway(folder / "identities", addresses, "test")
        for name, config in configs.items():
            named = config.model_copy(update={"peer": config.peer.model_copy(update={"run": name})})
            (folder / f"{name}.yaml").write_text(named.to_yaml())

    def start(self, client, **options):
        words = (self.names, client, str(self.folder))
        self.running[client] = _CONTEXT.Process(target=train, args=words, kwargs=options)
        self.running[client].start()

    def run(self, name, client):
        return self.folder / name / f"trainer-{client}" / "peer"

    def wait(self, *clients, seconds=400):
        for client in clients or self.running:
            self.running[client].join(seconds)
        return {client: self.running[client].exitcode for client in clients or self.running}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.running.values():
            process.kill()
            process.join()
            process.close()
