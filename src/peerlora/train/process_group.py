"""The processes that train one client together: the first speaks for all, the others get what it hears."""

from __future__ import annotations

import torch
from torch import Tensor

from peerlora.errors import PeerloraError
from peerlora.lora.adapters import BLOCKS, Block
from peerlora.train.handover import EvaluateJob, Job, LastJob, LoopFailed, TrainJob

_NONE, _TRAIN, _LAST, _FAILED = range(4)


class ProcessGroup:
    """The default group of ``torch.distributed``, or this process alone."""

    def __init__(self):
        distributed = torch.distributed
        there = distributed.is_available() and distributed.is_initialized()
        self.size = distributed.get_world_size() if there else 1
        self.rank = distributed.get_rank() if there else 0
        self._device = "cuda" if there and "nccl" in str(distributed.get_backend()) else "cpu"

    @property
    def speaks(self) -> bool:
        """Whether this process has the connection to other clients."""
        return self.rank == 0

    def broadcast(self, values: Tensor) -> Tensor:
        """The first process's values, in every process; all must give a tensor of its shape and dtype."""
        if self.size == 1:
            return values
        shared = values.detach().to(self._device).clone()
        torch.distributed.broadcast(shared, 0)
        return shared.to(values.device)

    def share_job(self, job: Job | None, like: Tensor) -> Job | None:
        """The first process's job, in every process; ``like``: a tensor of the form of adapters.

        A rule of it stays in the first process, which corrects the gradients of all: the others get ``Remote``.
        Raises LoopFailed in those where the first one has failed.
        """
        if self.size == 1:
            return job
        assert not isinstance(job, EvaluateJob), "evaluations are asked of loops of one process"
        code = self.broadcast(_encode(job)).tolist()
        if code[0] == _FAILED:
            raise LoopFailed("the process that speaks for this client has failed; see its error")
        if code[0] == _NONE:
            return None
        flat = self.broadcast(like if job is None else job.flat.to(like))
        if code[0] == _LAST:
            return LastJob(flat)
        if self.speaks:
            return job
        blocks: tuple[Block, ...] = tuple(block for block, trains in zip(BLOCKS, code[4:], strict=True) if trains)
        return TrainJob(flat, blocks, code[1], bool(code[2]), Remote() if code[3] else None)

    def share_failure(self) -> None:
        """Let the others know that no job will come, since the first process has failed."""
        if self.size > 1:
            code = _encode(None)
            code[0] = _FAILED
            self.broadcast(code)


class Remote:
    """A rule that another process applies."""

    def gradient(self, step: object) -> dict[str, Tensor]:
        """Never asked: the first process's result arrives by ``broadcast``."""
        raise PeerloraError("a rule of another process was asked here; call it in the first one")


def _encode(job: Job | None) -> Tensor:
    """Kind, steps, fresh, has a rule, and per block whether it trains."""
    code = torch.zeros(4 + len(BLOCKS), dtype=torch.int64)
    if isinstance(job, LastJob):
        code[0] = _LAST
    elif isinstance(job, TrainJob):
        trains = [int(block in job.blocks) for block in BLOCKS]
        code[:] = torch.tensor([_TRAIN, job.steps, int(job.fresh), int(job.rule is not None), *trains])
    return code
