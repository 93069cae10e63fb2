"""Trainers of transformers and of TRL in a federation: a callback for real peers, a learner for simulations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peerlora.config.run import RunConfig
from peerlora.environment import need_extra
from peerlora.errors import ConfigError, RunError
from peerlora.runs.checkpoints import Checkpoints
from peerlora.runtime.loop import OwnLoop, check_settings
from peerlora.runtime.peer.join import JoinedPeer, PeerRun, as_config, grpc_run
from peerlora.runtime.sequential import SequentialLearner as SequentialLearner
from peerlora.runtime.trainer import Result, Sink
from peerlora.train.loop_driver import EVALUATION
from peerlora.train.loop_learner import LOSS, LoopTask


class PeerCallback(TrainerCallback):
    """Makes a Trainer a peer: after every ``train.local_steps`` of its steps, adapters are exchanged with neighbours.

        trainer = Trainer(model=peft_model, ..., callbacks=[PeerCallback("peer.yaml", "identity", "members.json")])
        trainer.train()

    ``identity`` and ``members``: as of `peerlora peer`.  ``out``: the run folder, by default ``peer`` in the Trainer's
    output folder; a run in it goes on.  The run writes a checkpoint whenever the Trainer does, so both go on from one
    moment: ``trainer.train(resume_from_checkpoint=True)``.  When all rounds are done the Trainer stops.  Its logs and
    evaluations stand in the run's events; those of ``metric_for_best_model`` are its metric.
    Raises ExtraMissing without the extra `peer`, ConfigError or CompositionError for settings of which a Trainer
    decides, or that leave it no steps; when training begins, ModelError, ConfigError or CompositionError for what
    cannot be mixed.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | Path | str,
        identity: Path | str | None = None,
        members: Path | str | None = None,
        *,
        out: Path | str | None = None,
        listen: str | None = None,
        sinks: Sequence[Sink] = (),
    ):
        need_extra("peer")
        self.config, self.identity, self.members = as_config(config), identity, members
        check_settings(self.config)
        self.out, self.listen, self.sinks = out, listen, sinks
        self.peer: JoinedPeer | None = None
        self._folder: Path | None = None

    @property
    def result(self) -> Result | None:
        """Of the run, once training is over."""
        return self.peer.result if self.peer is not None else None

    def connect(self, out: Path) -> PeerRun:
        """Make what takes part in the run, with its folder ``out``: over gRPC, as the site whose identity this is."""
        if self.identity is None or self.members is None:
            raise ConfigError("PeerCallback without identity and members; give both, see docs/deploy.md")
        return grpc_run(self.identity, self.members, out, True, self.listen, self.sinks)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Join; the first round's adapters are in the model when this returns."""
        self.leave()
        out = Path(self.out) if self.out is not None else Path(str(args.output_dir)) / "peer"
        self._folder = out
        self.peer = JoinedPeer(
            kwargs["model"],
            kwargs["optimizer"],
            self.config,
            self.connect(out) if state.global_step else new_run(self.connect(out), out),
            steps=state.global_step,
            counts_steps=False,
            task=task_of(args),
            follows_saves=True,
        )
        self.peer.__enter__()
        if self.peer.over:
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Count the step, and exchange at the end of a round."""
        peer = self.peer
        assert peer is not None, "training has begun"
        peer.driver.count()
        peer.save_now = saves_soon(args, state, control, peer.config.train.local_steps)
        try:
            peer.step()
        except BaseException as error:
            peer.__exit__(type(error), error, error.__traceback__)
            raise
        if peer.over:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Keep the run's newest checkpoint until the Trainer writes another: the two are of one moment."""
        if self.peer is not None and self.peer.driver.group.speaks and self._folder is not None:
            Checkpoints(self._folder).keep_newest()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ):
        """Tell the run what the Trainer logs."""
        if self.peer is not None and logs:
            self.peer.log(logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """End the run, and write its results."""
        if self.peer is not None:
            self.peer.close()

    def leave(self) -> None:
        """End the part in a run whose training was broken off by an error, where the program goes on after it.

        A program that ends leaves by itself.  The run can go on from its last checkpoint.
        """
        if self.peer is not None and self.peer.result is None:
            error = RunError("training was broken off and has begun again")
            self.peer.__exit__(RunError, error, None)


def new_run(run: PeerRun, out: Path) -> PeerRun:
    """Refuse, where ``run`` would begin, a folder whose run is over: only the first process of a client looks there."""

    def begin(config: RunConfig, *, loop: OwnLoop) -> Result:
        if (out / "summary.json").is_file():
            raise RunError(f"{out} holds a run that is over; give PeerCallback another out, and peer.run another name")
        return run(config, loop=loop)

    return begin


def saves_soon(args: TrainingArguments, state: TrainerState, control: TrainerControl, steps: int) -> bool:
    """Whether the Trainer writes a checkpoint now, or within the round of so many steps that begins here.

    Then the run writes one of this moment, from which the Trainer's can be gone on from within the round.
    """
    if control.should_save:
        return True
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    if strategy != "steps":
        return strategy != "no"
    every = state.save_steps or int(args.save_steps)
    return (state.global_step // every + 1) * every < state.global_step + steps


def task_of(args: TrainingArguments) -> LoopTask:
    """The metric by which a Trainer's evaluations are told: the one of its best model, by default the loss."""
    name = (args.metric_for_best_model or LOSS).removeprefix(EVALUATION)
    if name == LOSS:
        return LoopTask()
    return LoopTask(name, args.greater_is_better is not False)
