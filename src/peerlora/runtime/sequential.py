"""Many simulated clients whose local steps Trainers take, one client after another: slow, and for any loss."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from peerlora.config.run import RunConfig
from peerlora.errors import ModelError
from peerlora.lora.peft_model import PeftAdapter
from peerlora.randomness import torch_generator
from peerlora.runtime.compose import Federation
from peerlora.runtime.loop import assemble_loops, check_settings, loop_config, require_rank, start_of
from peerlora.runtime.plan import plan
from peerlora.train.handover import Handover, LoopFailed
from peerlora.train.loop_driver import LoopDriver, plain_optimizer
from peerlora.train.loop_learner import SECONDS, LoopLearner, LoopTask


class SequentialLearner:
    """The learner of ``simulate(config, learner=...)`` whose clients are Trainers, trained one after another.

    ``make_trainer(client)`` returns the ``transformers.Trainer`` (or TRL's) of a client, with its rows and a PEFT
    model: one model for all is enough, since adapters are swapped.  Every Trainer keeps an optimiser, rows and random
    state of its own, and evaluates by its own evaluation rows.  How long it trains and that it saves nothing is decided
    here.  ``metric``: the number of its evaluations by which they are told, without ``eval_``.
    """

    def __init__(self, make_trainer: Callable[[int], Any], metric: str = "loss", higher_is_better: bool | None = None):
        self.make_trainer = make_trainer
        higher = metric != "loss" if higher_is_better is None else higher_is_better
        self.task = LoopTask(metric, higher)
        self._loops: list[_TrainerLoop] = []

    def federation(self, config: RunConfig) -> Federation:
        """Make the Trainers, and the Federation of their clients.

        Raises ModelError, ConfigError or CompositionError for what cannot be mixed; for settings before any is made.
        """
        check_settings(config.model_copy(update={"threads": None}))  # those of this process, which simulate has set
        plan(config)
        trainers = [self.make_trainer(client) for client in range(config.clients)]
        largest = max(config.ranks) if isinstance(config.adapter.rank, list) else None
        private = config.adapter.head == "private"
        adapters = [PeftAdapter(trainer.model, private, largest) for trainer in trainers]
        if any(each.spec != adapters[0].spec for each in adapters):
            raise ModelError("the Trainers' PEFT models adapt different layers; make_trainer has to give one layout")
        for client, trainer in enumerate(trainers):
            adapters[client].draw_start(torch_generator(config.seed, "adapter"))
            trainer.args.max_steps = config.train.training_rounds * config.train.local_steps
            trainer.args.save_strategy = "no"
            trainer.create_optimizer()
        config = loop_config(config, adapters[0], plain_optimizer(trainers[0].optimizer))
        for client, adapter in enumerate(adapters):
            require_rank(config, adapter, client)
        self._loops = [_TrainerLoop(trainer, adapter) for trainer, adapter in zip(trainers, adapters, strict=True)]
        learner = LoopLearner(config.train, self.task, [loop.handover for loop in self._loops], asked=True)
        note = (
            f"learner: {type(trainers[0]).__name__} of every client, one after another: a round takes as long as the "
            f"local steps of all {config.clients} clients together; the measure {SECONDS} is a client's mean"
        )
        return assemble_loops(plan(config), adapters[0], start_of(adapters), learner, range(config.clients), note)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block the Trainers take the local steps that are asked of them."""
        started: list[_TrainerLoop] = []
        try:
            for loop in self._loops:
                started.append(loop)
                loop.start()
            yield
        finally:
            for loop in started:
                loop.stop()


@dataclass(frozen=True)
class _GlobalDraws:
    """The state of all generators that a loop may draw from without naming one."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> Self:
        """The state as it is."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def put(self) -> None:
        """Let the next draws be those of this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class _Turn:
    """Random state of one Trainer, which it finds again when its turn comes."""

    def __init__(self):
        self.own = self.outside = _GlobalDraws.now()

    def begin(self) -> None:
        self.outside = _GlobalDraws.now()
        self.own.put()

    def end(self) -> None:
        self.own = _GlobalDraws.now()
        self.outside.put()


class _TurnHandover(Handover):
    """A hand-over whose loop works on random state of its own."""

    def __init__(self):
        super().__init__()
        self.turn, self.waits = _Turn(), threading.Event()

    def take(self) -> Any:
        self.turn.end()
        self.waits.set()
        try:
            return super().take()
        finally:
            self.turn.begin()


class _TrainerLoop:
    """One client's Trainer, on a thread of its own."""

    def __init__(self, trainer: Any, adapter: PeftAdapter):
        self.trainer, self.adapter = trainer, adapter
        self.handover = _TurnHandover()
        self._thread = threading.Thread(target=self._train, name="peerlora trainer", daemon=True)

    def start(self) -> None:
        """Start the thread, and return when it waits for the first job: no two Trainers work at a time."""
        self._thread.start()
        self.handover.waits.wait()

    def stop(self) -> None:
        """End the training, and wait for that."""
        self.handover.finish()
        self._thread.join()

    def evaluate(self) -> Mapping[str, float]:
        """The numbers of an evaluation of the model as it is now."""
        if self.trainer.eval_dataset is None:
            return {}
        before = self.trainer.model.training
        try:
            return self.trainer.evaluate()
        finally:
            self.trainer.model.train(before)

    def _train(self) -> None:
        from transformers import TrainerCallback

        loop = self

        class Turns(TrainerCallback):
            """Takes jobs when training begins and when the steps of one are done."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any):
                options = {"counts_steps": False, "evaluate": loop.evaluate}
                self.driver = LoopDriver(loop.adapter, kwargs["optimizer"], loop.handover, **options)
                self.driver.start()
                control.should_training_stop = self.driver.over

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
                self.driver.count()
                self.driver.advance()
                control.should_training_stop = control.should_training_stop or self.driver.over

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any):
                self.driver.log({name: value for name, value in (logs or {}).items() if not name.startswith("eval_")})

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
                self.driver.end()

        self.handover.turn.begin()
        try:
            self.trainer.add_callback(Turns())
            self.trainer.train()
        except BaseException as error:
            if not isinstance(error, LoopFailed):
                self.handover.abort(error)
        finally:
            self.handover.turn.end()
            self.handover.waits.set()
