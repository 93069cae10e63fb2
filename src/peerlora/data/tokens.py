"""Texts -> token ids, kept in a cache of one file per (texts, tokenizer, length), because the same texts come again."""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peerlora.errors import ModelError
from peerlora.files import settle

_FORMAT = 1  # of the cached files; raise it whenever the same texts would give other tokens
_SAMPLE = (
    "The Café's 1,234 naïve  users\tsaid: don’t — 東京 ÄÖÜ straße #1!\n"  # what tokenizers split in ways of their own
)
CHUNK = 2000  # rows at a time: enough for the tokenizer's threads, little enough to keep its Python lists small


class Tokens(NamedTuple):
    """Rows of token ids, one after another."""

    ids: np.ndarray
    """int32 [token]"""
    starts: np.ndarray
    """int64 [row + 1]; row i owns ids[starts[i]:starts[i + 1]]"""
    types: np.ndarray | None
    """uint8 [token], or None where the tokenizer gives no token types"""


def tokenise(texts: Sequence[list[str]], tokenizer: Any, max_length: int, causal: bool, cache: Path | None) -> Tokens:
    """Tokenise one column of texts, or two whose rows are pairs, each row to at most ``max_length`` tokens.

    ``causal`` puts the tokenizer's end-of-text token behind every text that leaves room for it. ``cache`` is the
    folder where tokens are kept; one that cannot be written to, or holds a damaged file, costs time and nothing else.
    """
    name = _name(texts, tokenizer, max_length, causal) if cache else None
    file = cache / name if cache and name else None
    kept = _load(file, len(texts[0])) if file else None
    if kept is not None:
        return kept
    tokens = _tokenise(texts, tokenizer, max_length, causal)
    if file:
        _save(tokens, file)
    return tokens


def require_places(tokenizer: Any, kind: str) -> None:
    """Raise ModelError for a tokenizer that does not tell which tokens stand for which part of a text."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"task.kind={kind} needs a tokenizer that tells where its tokens lie (a fast one, with tokenizer.json), "
            f"and {type(tokenizer).__name__} does not; convert it by "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def sample_tokens(tokenizer: Any, max_length: int, causal: bool) -> Tokens:
    """Tokenise three rows of the tokenizer's own words: for those who look at a model and have no data."""
    special = set(tokenizer.all_special_ids)
    known = (number for number in sorted(tokenizer.get_vocab().values()) if number not in special)
    words = list(islice((word for each in known if (word := tokenizer.decode([each]).strip()).isalnum()), 6))
    rows = [words[:3], words, words[3:]]
    return _tokenise([[" ".join(row) for row in rows]], tokenizer, max_length, causal)


def default_cache() -> Path:
    """The folder for tokens: peerlora/tokenised in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "peerlora" / "tokenised"


def _tokenise(texts: Sequence[list[str]], tokenizer: Any, max_length: int, causal: bool) -> Tokens:
    ids, types, lengths = [], [], []
    for start in range(0, len(texts[0]), CHUNK):
        chunk = [column[start : start + CHUNK] for column in texts]
        found = tokenizer(
            *chunk, truncation="longest_first", max_length=max_length, padding=False, return_attention_mask=False
        )
        rows = found["input_ids"]
        if causal and tokenizer.eos_token_id is not None:
            rows = [_ended(row, tokenizer.eos_token_id, max_length) for row in rows]
        elif not causal and "token_type_ids" in found:
            types.append(_flat(found["token_type_ids"], np.uint8))
        ids.append(_flat(rows, np.int32))
        lengths.extend(map(len, rows))
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Tokens(np.concatenate(ids), starts, np.concatenate(types) if types else None)


def _ended(row: list[int], end: int, max_length: int) -> list[int]:
    return row if len(row) >= max_length or row[-1:] == [end] else [*row, end]


def _flat(rows: list[list[int]], dtype: Any) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype)


def tokenizer_digest(tokenizer: Any, chat: bool) -> str:
    """Return the SHA-256 of what turns texts into ids, hexadecimal: two with the same agree on every text.

    ``chat``: with the template that puts turns together.  Of a tokenizer that cannot be described, words and a sample.
    """
    rules = _rules(tokenizer) or [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer(_SAMPLE)["input_ids"]]
    template = getattr(tokenizer, "chat_template", None) if chat else None
    facts = [rules, tokenizer.pad_token_id, tokenizer.eos_token_id, template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _rules(tokenizer: Any) -> list[Any] | None:
    """Everything that tokens depend on beside the text; None for a tokenizer that cannot be described."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    # What the last call asked for, not a property of the tokenizer.
    rules["truncation"] = rules["padding"] = None
    return [rules, [getattr(tokenizer, "truncation_side", None), tokenizer.model_input_names, tokenizer.eos_token_id]]


def _name(texts: Sequence[list[str]], tokenizer: Any, max_length: int, causal: bool) -> str | None:
    """A file name that changes with anything the tokens depend on; None for a tokenizer that cannot be described."""
    rules = _rules(tokenizer)
    if rules is None:
        return None
    key = hashlib.blake2b(json.dumps([_FORMAT, *rules, max_length, causal]).encode(), digest_size=16)
    for column in texts:
        key.update(np.array([len(text) for text in column], dtype=np.int64).tobytes())
        key.update("".join(column).encode())
    return f"{key.hexdigest()}.safetensors"


def _load(file: Path, rows: int) -> Tokens | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        kept = load(file.read_bytes())
        tokens = Tokens(kept["ids"], kept["starts"], kept.get("types"))
        sound = len(tokens.starts) == rows + 1 and int(kept["check"][0]) == _check(tokens)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError):
        return None
    return tokens if sound else None


def _save(tokens: Tokens, file: Path) -> None:
    """Write beside the file and rename, so that nobody ever reads half a file."""
    from safetensors.numpy import save

    arrays = {name: array for name, array in tokens._asdict().items() if array is not None}
    arrays["check"] = np.array([_check(tokens)], dtype=np.int64)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.parent.chmod(0o700)  # token ids are as private as the rows
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as part:
            part.write(save(arrays))
        settle(Path(name), file)
    except OSError:
        Path(name).unlink(missing_ok=True)


def _check(tokens: Tokens) -> int:
    """A checksum of all arrays."""
    total = 0
    for array in tokens:
        total = zlib.crc32(b"" if array is None else array.tobytes(), total)
    return total
