"""One NVFlare site: local steps, then an exchange with the neighbours, in a process of its own."""

# pyright: reportMissingImports=false
# NVFlare is installed in an environment of its own.

import json
import time
from pathlib import Path

import torch
from local import Work, mean_of
from nvflare.app_opt.p2p.executors.sync_executor import SyncAlgorithmExecutor
from safetensors.torch import save_file


class Site(SyncAlgorithmExecutor):
    """Runs all rounds of one node and leaves its adapter and its times in ``answers``.

    Arguments are kept under their own names, since the job's exporter reads them there.
    """

    def __init__(self, folder: str, answers: str, sync_timeout: int = 300):
        super().__init__(sync_timeout=sync_timeout)
        self.folder, self.answers = folder, answers

    def _pre_algorithm_run(self, fl_ctx, shareable, abort_signal) -> None:
        self.work = Work(Path(self.folder))

    def run_algorithm(self, fl_ctx, shareable, abort_signal) -> None:
        """All rounds of this node."""
        state, node = self.work.start(), self.id - 1
        weights = [self._weight, *(neighbor.weight for neighbor in self.neighbors)]
        began = time.time()
        for t in range(self.work.job["rounds"]):
            own = self.work.train(state, node, t)
            self._exchange_values(fl_ctx, value=[value.numpy() for value in own.values()], iteration=t)
            if abort_signal.triggered:
                raise RuntimeError(f"the job was stopped in round {t}")
            theirs = self.neighbors_values.pop(t)
            states = [dict(zip(own, map(torch.from_numpy, theirs[n.id]), strict=True)) for n in self.neighbors]
            state = mean_of([own, *states], weights)
        times = {"began": began, "ended": time.time()}
        save_file(state, f"{self.answers}/{node}.safetensors")
        Path(self.answers, f"{node}.json").write_text(json.dumps(times))
