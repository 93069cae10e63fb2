"""Join: a training loop of the user's own becomes a peer."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.environment import need_extra
from peerlora.errors import RunError
from peerlora.files import atomic_file
from peerlora.lora.peft_model import PeftAdapter
from peerlora.randomness import torch_generator
from peerlora.runs.store import START_FILE
from peerlora.runtime.compose import Federation
from peerlora.runtime.loop import OwnLoop, assemble_loops, check_settings, loop_config, require_rank, start_of
from peerlora.runtime.plan import Plan
from peerlora.runtime.trainer import CheckpointRule, Result, Sink
from peerlora.train.handover import Handover, LoopFailed
from peerlora.train.loop_driver import LoopDriver, plain_optimizer
from peerlora.train.loop_learner import LoopLearner, LoopTask


class PeerRun(Protocol):
    """Takes part in a run with a loop's local steps, and returns when the run is over."""

    def __call__(self, config: RunConfig, *, loop: OwnLoop) -> Result:
        """Run; Result as of ``train_peer``."""
        ...


class JoinedPeer:
    """A loop that takes part in a federation; a context manager around its steps.

    ``run`` takes part, on a thread of its own, while the loop waits in ``step``.  ``steps``: optimiser steps that the
    loop has behind it, where it goes on from a checkpoint of its own.  ``counts_steps``: the optimiser's steps are
    counted by its hooks; else ``count`` is called after each.  Of several processes that train one client, only the
    first one takes part; all of them must call the same.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        config: RunConfig | Mapping[str, Any] | Path | str,
        run: PeerRun,
        *,
        steps: int | None = None,
        counts_steps: bool = True,
        task: LoopTask = LoopTask(),  # noqa: B008 (frozen)
        follows_saves: bool = False,
    ):
        given = as_config(config)
        check_settings(given)
        private = given.adapter.head == "private"
        largest = max(given.ranks) if isinstance(given.adapter.rank, list) else None
        self.adapter = PeftAdapter(model, private, largest)
        self.config = loop_config(given, self.adapter, plain_optimizer(optimizer))
        self.task, self.steps = task, steps
        self.result: Result | None = None
        """Of the run, once it is over."""
        self.save_now = False
        """With ``follows_saves``: whether the run writes a checkpoint after this round."""
        self.checkpoints: CheckpointRule | None = self._checkpoint_rule(follows_saves)
        self._run, self._handover = run, Handover()
        self._thread: threading.Thread | None = None
        self._started = False
        self._start: dict[str, Tensor] = {}
        self.adapter.draw_start(torch_generator(self.config.seed, "adapter"))
        self.driver = LoopDriver(self.adapter, optimizer, self._handover, counts_steps=counts_steps, steps=steps)

    def __enter__(self) -> Self:
        """Start the run; return when the first round's adapters are in the model."""
        if self.driver.group.speaks:
            self._thread = threading.Thread(target=self._work, name="peerlora run", daemon=True)
            self._thread.start()
        try:
            self.driver.start()
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self._leave(error)

    def _leave(self, error: BaseException) -> None:
        """End the part in the run because of an error of the loop, and wait for that."""
        self._handover.abort(error)
        self.driver.release()
        self._join()

    @property
    def left(self) -> bool:
        """See ``OwnLoop``."""
        return self._handover.aborted

    @property
    def over(self) -> bool:
        """Whether all rounds are done; the loop may go on alone, or end."""
        return self.driver.over

    def step(self) -> bool:
        """Exchange, if the optimiser's steps of a round are done; call it after every step of the optimiser.

        Returns whether a round has ended.  Raises the run's error, where it has one.
        """
        return self.driver.advance()

    def log(self, values: Mapping[str, Any], rows: int = 0) -> None:
        """Tell numbers of the loop for events and report, such as ``{"loss": 0.3}``.

        Names that begin with ``eval_`` are an evaluation of the model as it is now, on so many rows.
        """
        self.driver.log(values, rows)

    def close(self) -> None:
        """The loop is over: end the run, write its results, and wait for that.

        Raises the run's error, if any; QuorumMissed where it had contact in too few rounds, whose results are written.
        """
        self.driver.end()
        self._join()
        self._handover.check()
        if self.result is not None:
            from peerlora.runtime.peer.participation import check_quorum  # which needs the extra peer

            check_quorum(self.result.summary, self.config)

    def assemble(self, planned: Plan, client: int, begun: Path | None) -> Federation:
        """See ``OwnLoop``."""
        require_rank(planned.config, self.adapter, client)
        start = start_of([self.adapter])
        if begun is not None:
            start = self._restored(begun, start)
        self._start = {"flat": start.flat}
        learner = LoopLearner(planned.config.train, self.task, [self._handover])
        return assemble_loops(planned, self.adapter, start, learner, [client])

    def keep_start(self, folder: Path) -> None:
        """See ``OwnLoop``: a resumed loop's model has left its start."""
        with atomic_file(folder / START_FILE) as temporary:
            save_file(self._start, temporary)

    def _restored(self, begun: Path, start: Any) -> Any:
        place = begun / START_FILE
        flat = load_file(place)["flat"] if place.is_file() else None
        if flat is None or flat.shape != start.flat.shape:
            raise RunError(
                f"{begun} does not hold the start of this adapter ({START_FILE}); was it begun with another PEFT "
                "model? Give another out"
            )
        return replace(start, flat=flat.to(start.flat))

    def _work(self) -> None:
        try:
            self.result = self._run(self.config, loop=self)
            self._handover.finish()
        except LoopFailed as failed:
            self._handover.finish() if failed.__cause__ is not None else self._handover.fail(failed)
        except BaseException as error:
            self._handover.fail(error)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _checkpoint_rule(self, follows_saves: bool) -> CheckpointRule:
        every = self.config.checkpoint.every

        def due(done: int) -> bool:
            return self.save_now if follows_saves else done % every == 0

        return CheckpointRule(due, self._unfit, or_newest=bool(self.steps))

    def _unfit(self, tensors: Mapping[str, Tensor]) -> str:
        """Why a checkpoint does not fit the step that the loop goes on from."""
        if self.steps is None or "learner.steps" not in tensors:
            return ""
        then = int(tensors["learner.steps"][0])
        return f"it is of step {then}, the loop goes on from step {self.steps}" if then > self.steps else ""


def join(
    model: Any,
    optimizer: Any,
    config: RunConfig | Mapping[str, Any] | Path | str,
    *,
    identity: Path | str,
    members: Path | str,
    out: Path | str | None = None,
    resume: bool = False,
    step: int | None = None,
    listen: str | None = None,
    metric: str = "loss",
    higher_is_better: bool = False,
    sinks: Sequence[Sink] = (),
) -> JoinedPeer:
    """Make a training loop a peer: ``with peerlora.join(...) as peer``, and ``peer.step()`` after every optimiser step.

        with peerlora.join(peft_model, optimizer, "peer.yaml", identity="identity", members="members.json") as peer:
            for batch in loader:
                peft_model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                peer.step()

    After ``train.local_steps`` steps the adapters are exchanged with the neighbours, and the loop goes on with the
    mixed ones.  ``identity``, ``members``, ``out``, ``resume`` and ``listen``: as of `peerlora peer`.  ``step``:
    optimiser steps that a resumed loop has behind it, as its own checkpoint says.  ``metric``: the number of
    ``peer.log`` by which evaluations are told, without ``eval_``.
    Raises ModelError, ConfigError or CompositionError for what cannot be mixed, before anything is written.
    """
    run = grpc_run(identity, members, out, resume, listen, sinks)
    return JoinedPeer(model, optimizer, config, run, steps=step, task=LoopTask(metric, higher_is_better))


def grpc_run(
    identity: Path | str,
    members: Path | str,
    out: Path | str | None,
    resume: bool,
    listen: str | None,
    sinks: Sequence[Sink],
) -> PeerRun:
    """Take part over gRPC, as the site whose identity this is.  Raises ExtraMissing without the extra `peer`."""
    need_extra("peer")

    def run(config: RunConfig, *, loop: OwnLoop) -> Result:
        from peerlora.runtime.peer.run import run_peer

        place = Path(identity), Path(members), out
        return run_peer(config, *place, resume=resume, listen=listen, sinks=sinks, loop=loop)

    return run


def as_config(config: RunConfig | Mapping[str, Any] | Path | str) -> RunConfig:
    """A config from a file, a mapping or as it is."""
    if isinstance(config, RunConfig):
        return config
    return load_config(dict(config) if isinstance(config, Mapping) else Path(config))
