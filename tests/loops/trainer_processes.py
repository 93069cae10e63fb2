"""Trainers with PeerCallback as processes of this machine over gRPC, for tests."""

import multiprocessing
from pathlib import Path

from processes import PRELOAD, Processes

from peerlora.config.loading import load_config

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


class Trainers(Processes):
    """The Trainers of a federation, each in a process of its own."""

    def start(self, client, **options):
        words = (list(self.configs), client, str(self.folder))
        self.running[client] = _CONTEXT.Process(target=train, args=words, kwargs=options)
        self.running[client].start()

    def run(self, name, client):
        return self.folder / name / f"trainer-{client}" / "peer"
