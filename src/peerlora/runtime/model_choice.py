"""Which of a run's models is exported, merged or served."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from peerlora.config.exchange import ExportedModel
from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.errors import RunError
from peerlora.runs.store import clients_of, resume_command
from peerlora.runtime.relayed_export import deployed


@dataclass(frozen=True)
class ModelChoice:
    """One model of a finished run, as an adapter.

    export_from_run(run, to, ModelChoice(client=1, model="best"))
    """

    client: int | None
    """None: the average of all clients."""
    model: ExportedModel | None = None
    """own, relayed, averaged or best; None: the one that the run deploys."""
    rank: int | None = None
    """Cut to the best approximation of at most this rank, since merges make a rank grow; None: no cut."""
    exact: bool = False
    """A relayed average with no cut, whose rank is the sum of the ranks of all that is averaged."""

    @classmethod
    def of(cls, choice: ModelChoice | int | None) -> ModelChoice:
        """Return a choice as it is, or that of a client's number or, with None, of the average."""
        return choice if isinstance(choice, ModelChoice) else cls(choice)

    @property
    def whose(self) -> str:
        """Whose model it is, for people."""
        return "the average of all clients" if self.client is None else f"client {self.client}"

    def checked(self, run: Path) -> ModelChoice:
        """Return the choice with its model named.

        Raises RunError when ``run`` is no run or unfinished, or has no such model.
        """
        if not (run / "run.json").is_file():
            raise RunError(f"{run} is not a run folder (no run.json); give the --out of an earlier run")
        if not (run / "summary.json").is_file():
            raise RunError(f"{run} is not finished; finish it first: {resume_command(run)}")
        config = load_config(run / "config.yaml")
        self._check_client(run, config)
        if self.rank is not None and self.rank < 1:
            raise RunError(f"--rank {self.rank} given; expected at least 1")
        found = replace(self, model=self.model or ("averaged" if self.client is None else deployed(config)))
        found._check_model(run, config)
        return found

    def _check_client(self, run: Path, config: RunConfig) -> None:
        if self.client is not None and not 0 <= self.client < config.clients:
            raise RunError(f"--client {self.client} given; {run} has clients 0 to {config.clients - 1}")
        if self.client is None and len(set(config.ranks)) > 1:
            raise RunError(f"{run} has clients of different ranks, whose factors have no average; give --client")
        here = clients_of(run)
        if here is not None and self.client not in here:
            raise RunError(f"{run} is the run of a peer and has client {here[0]} only; give --client {here[0]}")

    def _check_model(self, run: Path, config: RunConfig) -> None:
        if (self.model == "averaged") != (self.client is None):
            needed = "leave out --client" if self.client is not None else "give --client"
            raise RunError(f"--model {self.model} given; {needed}, since the averaged model is that of all clients")
        if self.model == "relayed" and config.exchange.relay is None:
            none = "no relayed models (exchange.relay is null)"
            raise RunError(f"--model relayed given; {run} has {none}; use --model own")
        if self.model == "best" and config.eval.select is None:
            raise RunError(
                f"--model best given; {run} has kept no best adapters (eval.select is null); use --model own"
            )
        if self.exact and self.model != "relayed":
            raise RunError("--exact is for relayed models, which are cut to a client's rank; leave it out")
        if self.exact and self.rank is not None:
            asked = f"--exact and --rank {self.rank} given"
            raise RunError(f"{asked}; one asks for no cut, the other for one: drop one of them")
