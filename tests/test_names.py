"""Identifiers of the package are the field's standard terms: what must not come back, and what stands in its place."""

import ast
import re
from pathlib import Path

import pytest

import peerlora

FOLDER = Path(peerlora.__file__).parent
INSTEAD = {
    "agenda": "event_queue",
    "apart": "isolated, asynchronous, or the measure, such as disagreement",
    "everybody": "all_adapters, clients, or stack_with_own",
    "greet": "handshake",
    "greeted": "handshake",
    "happening": "event",
    "hood": "control",
    "knock": "probe",
    "letterbox": "push_service",
    "mail": "mailbox",
    "meeting": "exchange",
    "mishap": "fault",
    "outbox": "send_queue",
    "rendezvous": "round_protocol",
    "scene": "context",
    "told": "describe_..., as_..., reported, sent, announced, or what it is",
    "untold": "not_sent_to",
}


def identifiers(source):
    """(name, line) of everything that a module defines, takes as an argument, or refers to."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield name, line


def words(name):
    """The words of snake_case and CamelCase, and of dotted module names, in small letters."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("_told_rows", {"told", "rows"}),
        ("WasTold", {"was", "told"}),
        ("_TOLD", {"told"}),
        ("peerlora.mail", {"peerlora", "mail"}),
        ("mailbox", {"mailbox"}),
    ],
)
def test_a_name_is_split_into_its_words(name, found):
    assert words(name) == found


def test_every_kind_of_identifier_is_seen():
    source = "import a as b\ndef c(d, *e, **f):\n    g.h = i(j=1)\nclass k:\n    l: int = 1"
    assert {name for name, _ in identifiers(source)} >= set("abcdefghijkl")


def test_the_words_of_the_workshop_stay_out_of_identifiers():
    found = []
    for path in sorted(FOLDER.rglob("*.py")):
        for name, line in identifiers(path.read_text(encoding="utf-8")):
            for word in words(name) & set(INSTEAD):
                found.append(f"{path.relative_to(FOLDER)}:{line}: {name}; use {INSTEAD[word]}")
    assert not found, "\n".join(found)
