"""The loop's side of a hand-over: adapters into the PEFT model and back, held factors, steps counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peerlora.errors import CompositionError, ModelError, RunError
from peerlora.lora.adapters import BLOCKS, Block
from peerlora.lora.peft_model import PeftAdapter
from peerlora.lora.step_buffers import StepBuffers
from peerlora.train.handover import EvaluateJob, Handover, LastJob, LoggedScores, LoopReport, TrainJob
from peerlora.train.local_rules import Gradients, LocalStep, gathers_steps
from peerlora.train.process_group import ProcessGroup

EVALUATION = "eval_"
"""What the names of an evaluation's numbers begin with."""
_COUNTERS = {"epoch", "step", "total_flos", "num_input_tokens_seen"}
_WHOLE_TRAINING = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
_NO_MEASURES = _COUNTERS | _WHOLE_TRAINING  # numbers of a Trainer's logs that are of no round
_NO_SCORES = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")


class LoopDriver:
    """Turns jobs into local steps of a loop that is driven by others.

    ``counts_steps``: every step of the optimiser counts; else every call of ``count``.  ``steps``: those that the loop
    has behind it, where it knows.  ``evaluate``: gives the numbers of an evaluation of the model as it is now.
    Raises ModelError for an optimiser that cannot train the adapter.
    """

    def __init__(
        self,
        adapter: PeftAdapter,
        optimizer: Any,
        handover: Handover,
        *,
        counts_steps: bool = True,
        steps: int | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
    ):
        self.adapter, self.handover, self._evaluate = adapter, handover, evaluate
        self.optimizer = plain_optimizer(optimizer)
        check_optimizer(adapter, self.optimizer)
        self.group = ProcessGroup()
        steps = self.group.share_steps(steps)
        self.total, self._total_known = steps or 0, steps is not None
        """Steps that the loop has taken in all."""
        self.over = False
        """Whether no job follows: the loop may go on alone, or end."""
        self._job: TrainJob | None = None
        self._taken = 0
        self._held: list[nn.Parameter] = []
        self._hooks: list[Any] = [self.optimizer.register_step_pre_hook(self._before_step)]
        if counts_steps:
            self._hooks.append(self.optimizer.register_step_post_hook(self._after_step))
        self._zeroes: list[Any] = []
        self._rates: list[float] = []
        """Of the steps since the last report."""
        self._logged: dict[str, list[float]] = {}
        self._scores: LoggedScores | None = None
        self._notes: list[str] = []

    def start(self) -> None:
        """Take the first job, and put its adapters into the model."""
        self._next()

    def count(self) -> None:
        """One optimiser step is done."""
        self.total += 1
        self._taken += 1

    @property
    def due(self) -> bool:
        """Whether the job's steps are done, so that ``advance`` exchanges."""
        return self._job is not None and self._taken >= self._job.steps

    def advance(self) -> bool:
        """Hand the adapters back and take the next job, if the steps of this one are done; return whether they were.

        Raises RunError where the loop has taken more.
        """
        job = self._job
        if job is None or self._taken < job.steps:
            return False
        if self._taken > job.steps:
            raise RunError(
                f"{self._taken} optimiser steps since the last exchange, train.local_steps={job.steps}; call "
                "peer.step() after every step of the optimiser"
            )
        report = self._report(self.adapter.read())
        if self.group.speaks:
            self.handover.give(report)
        self._next()
        return True

    def log(self, values: Mapping[str, Any], rows: int = 0) -> None:
        """Keep numbers for the round's event; names that begin with ``eval_`` are an evaluation, on so many rows."""
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        scores = {
            name.removeprefix(EVALUATION): value for name, value in numbers.items() if name.startswith(EVALUATION)
        }
        for name, value in numbers.items():
            if not name.startswith(EVALUATION) and name not in _NO_MEASURES:
                self._logged.setdefault(name, []).append(value)
        if scores:
            known = rows or round(scores.get("runtime", 0.0) * scores.get("samples_per_second", 0.0))
            self._scores = LoggedScores({name: each for name, each in scores.items() if name not in _NO_SCORES}, known)

    def end(self) -> None:
        """The loop is over: report what was logged last, or end the round under way; give back all that was changed."""
        report = self._report(None)
        if self.group.speaks:
            self.handover.end(self._taken, report)
        self.release()

    def release(self) -> None:
        """Take the hooks off the optimiser, and let all of the adapter train again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._job = [], None
        self._hold(BLOCKS)

    def _report(self, flat: Tensor | None) -> LoopReport:
        logs = {name: math.fsum(values) / len(values) for name, values in self._logged.items()}
        rate = math.fsum(self._rates) / len(self._rates) if self._rates else None
        report = LoopReport(flat, self.total, rate, logs, self._scores, tuple(self._notes))
        self._logged, self._scores, self._notes, self._rates = {}, None, [], []
        return report

    def _next(self) -> None:
        self._unhook()  # another client's loop may use the model until the next job
        while isinstance(job := self._shared_job(), EvaluateJob):
            self.adapter.write(job.flat)
            evaluate = self._evaluate
            assert evaluate is not None, "an evaluation is asked of a loop that has one"
            self.log({f"{EVALUATION}{name.removeprefix(EVALUATION)}": value for name, value in evaluate().items()})
            self.handover.give(self._report(None))
        self._taken, self._job = 0, None
        if isinstance(job, TrainJob):
            self._begin(job)
            return
        self.over = True
        self._hold(BLOCKS)
        if isinstance(job, LastJob):
            self.adapter.write(job.flat)

    def _shared_job(self) -> Any:
        try:
            job = self.handover.take() if self.group.speaks else None
        except BaseException:
            self.group.share_failure()
            raise
        return self.group.share_job(job, torch.zeros(self.adapter.spec.parameters, dtype=self.adapter.dtype))

    def _begin(self, job: TrainJob) -> None:
        ahead = self._ahead(job)
        if ahead and gathers_steps(job.rule):
            self._notes.append(
                f"the loop goes on {ahead} steps into a round of {job.steps}, and what the method gathers from a "
                "round's steps is of the others alone: in this round it differs from a run that was not stopped"
            )
        self._hold(job.blocks)
        if ahead:  # the model is already so many steps into this round
            self.adapter.write(job.flat, [block for block in BLOCKS if block not in job.blocks])
        else:
            self.adapter.write(job.flat)
            if job.fresh:
                for value in self.adapter.parameters.values():
                    self.optimizer.state.pop(value, None)
        self._job, self._taken = job, ahead

    def _ahead(self, job: TrainJob) -> int:
        """Steps of this job that the loop has already taken, as its own checkpoint has it; 0 where that cannot be."""
        if job.at is None:
            return 0
        if not self._total_known:
            self.total, self._total_known = job.at, True
        ahead = self.total - job.at
        if not 0 <= ahead < job.steps:
            self._notes.append(
                f"the loop goes on from its step {self.total}, the adapters from the end of a round at step {job.at}: "
                "optimiser and rows are those of the former; to have one moment, resume the loop from a checkpoint of "
                f"step {job.at} to {job.at + job.steps - 1}"
            )
            return 0
        return int(ahead)

    def _hold(self, trained: tuple[Block, ...]) -> None:
        """Let these blocks train, and no others."""
        self._unhook()
        self._held = self.adapter.of_blocks([block for block in BLOCKS if block not in trained])
        for value in self.adapter.parameters.values():
            value.requires_grad_(True)
        self._zeroes = [value.register_hook(torch.zeros_like) for value in self._held]
        for value in self._held:  # PEFT's disable_adapter sets it again, hence the hooks
            value.requires_grad_(self._keeps_gradients())
            value.grad = None

    def _unhook(self) -> None:
        """Take the hooks off the held factors."""
        for zero in self._zeroes:
            zero.remove()
        self._zeroes = []

    def _keeps_gradients(self) -> bool:
        """Whether held factors must go on asking for gradients, which are zeroed.

        DDP waits for all that it knows; a checkpointed forward pass must save the same tensors when computed anew.
        """
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.adapter.model.modules())
        return self.group.size > 1 or checkpointed

    def _before_step(self, *_: Any) -> None:
        """Take away gradients of what is held, and let the method's rule change the others."""
        for value in self._held:
            value.grad = None
        self._rates.append(float(self.optimizer.param_groups[0]["lr"]))
        job = self._job
        if job is not None and job.rule is not None and self._taken < job.steps:
            self._correct(job)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        """Count the step, unless a fused optimiser has left it out, since its scaled gradients were not finite."""
        left_out = getattr(optimizer, "found_inf", None)
        if left_out is None or not bool(left_out):
            self.count()

    def _correct(self, job: TrainJob) -> None:
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise CompositionError(
                "the method changes gradients, and a fused optimiser under a gradient scaler shows them scaled; use "
                "fused=False, bf16, or algorithm.name=dec-lora"
            )
        flat = self._buffers.gradients(job.blocks)
        if self.group.speaks:
            found = self._ruled(job, flat)
            for block in job.blocks:
                if block in found:
                    flat[self.adapter.spec.columns(block)] = found[block][0]
        self._buffers.put_gradients(self.group.broadcast(flat), job.blocks)

    @cached_property
    def _buffers(self) -> StepBuffers:
        return StepBuffers(self.adapter)

    def _ruled(self, job: TrainJob, flat: Float[Tensor, " parameter"]) -> Gradients:
        """The rule's gradients, of the minibatch whose gradients these are."""
        assert job.rule is not None
        spec = self.adapter.spec
        active: dict[str, slice] = {block: spec.columns(block) for block in job.blocks if block in spec.blocks}
        asked = []

        def closure() -> Gradients:
            if asked:
                raise CompositionError(
                    "the method looks at each minibatch at two places, and the training loop shows it at one; use "
                    "another, such as algorithm.name=dec-lora"
                )
            asked.append(True)
            return {block: flat[None, own].clone() for block, own in active.items()}

        step = LocalStep(self._buffers.values()[None], job.flat[None].to(flat), active, [0], closure)
        return job.rule.gradient(step)


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside wrappers such as Accelerate's.  Raises ModelError for one without hooks."""
    outermost = optimizer
    while not _is_of_deepspeed(optimizer):
        inside = getattr(optimizer, "optimizer", None)
        wraps = isinstance(inside, torch.optim.Optimizer) or _is_of_deepspeed(inside)  # Accelerate's is one itself
        if inside is None or (isinstance(optimizer, torch.optim.Optimizer) and not wraps):
            break
        optimizer = inside
    if _is_of_deepspeed(optimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(outermost)
        raise ModelError(
            f"optimizer is a {kind.__module__}.{kind.__name__}; expected a torch.optim.Optimizer, which steps on the "
            "model's own parameters: DeepSpeed keeps copies of them; use DDP, or one process"
        )
    return optimizer


def _is_of_deepspeed(optimizer: Any) -> bool:
    """Whether DeepSpeed, or Accelerate for it, has made an optimiser or a wrapper of one."""
    return "deepspeed" in type(optimizer).__module__.split(".")


def check_optimizer(adapter: PeftAdapter, optimizer: torch.optim.Optimizer) -> None:
    """Raise ModelError where the optimiser lacks a parameter of the adapter."""
    known = {id(value) for group in optimizer.param_groups for value in group["params"]}
    missing = [name for name, value in adapter.parameters.items() if id(value) not in known]
    if missing:
        raise ModelError(
            f"the optimiser does not train {missing[0]} of the adapter ({len(missing)} parameters in all); build it "
            "from all parameters of the PEFT model that ask for gradients"
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | str):
        return False
    return isinstance(value, int | float) or getattr(value, "ndim", None) == 0
