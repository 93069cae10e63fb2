"""The processes that train one client together: the first speaks for all, the others get what it hears."""

from __future__ import annotations

import torch
from torch import Tensor

from peerlora.errors import PeerloraError
from peerlora.lora.adapters import BLOCKS, Block
from peerlora.train.handover import EvaluateJob, Job, LastJob, LoopFailed, TrainJob

_NONE, _TRAIN, _LAST, _FAILED = range(4)
_UNKNOWN = -1  # of a number of steps


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
        code = self.broadcast(encode(job))
        if code[0] == _FAILED:
            raise LoopFailed("the process that speaks for this client has failed; see its error")
        if code[0] == _NONE:
            return None
        flat = self.broadcast(like if job is None else job.flat.to(like))
        return job if self.speaks else decode(code, flat)

    def share_steps(self, steps: int | None) -> int | None:
        """The steps that the first process's loop has behind it, in every process; None: not known."""
        shared = int(self.broadcast(torch.tensor(_UNKNOWN if steps is None else steps)))
        return None if shared == _UNKNOWN else shared

    def share_failure(self) -> None:
        """Let the others know that no job will come, since the first process has failed."""
        if self.size > 1:
            code = encode(None)
            code[0] = _FAILED
            self.broadcast(code)


class Remote:
    """A rule that another process applies."""

    def gradient(self, step: object) -> dict[str, Tensor]:
        """Never asked: the first process's result arrives by ``broadcast``."""
        raise PeerloraError("a rule of another process was asked here; call it in the first one")


def encode(job: Job | None) -> Tensor:
    """All of a job but its adapters: kind, steps, fresh, has a rule, steps before, and per block whether it trains."""
    code = torch.zeros(5 + len(BLOCKS), dtype=torch.int64)
    if isinstance(job, LastJob):
        code[0] = _LAST
    elif isinstance(job, TrainJob):
        trains = [int(block in job.blocks) for block in BLOCKS]
        at = _UNKNOWN if job.at is None else job.at
        code[:] = torch.tensor([_TRAIN, job.steps, int(job.fresh), int(job.rule is not None), at, *trains])
    return code


def decode(code: Tensor, flat: Tensor) -> Job:
    """The job of ``encode``'s numbers with these adapters; a rule is ``Remote``."""
    kind, steps, fresh, ruled, at, *trains = code.tolist()
    if kind == _LAST:
        return LastJob(flat)
    blocks: tuple[Block, ...] = tuple(block for block, each in zip(BLOCKS, trains, strict=True) if each)
    return TrainJob(flat, blocks, steps, bool(fresh), Remote() if ruled else None, None if at == _UNKNOWN else at)
