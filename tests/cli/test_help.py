"""``--help``: every command has examples that can be typed; shells complete its words."""

import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.main import get_command

from command_pages import command_page, commands
from peerlora.cli import app
from peerlora.cli.examples import EXAMPLES

README = Path(__file__).parents[2] / "README.md"
NAMES = [" ".join(words) for words, _ in commands()]


def test_every_command_has_an_example_and_no_other_word_has():
    assert set(EXAMPLES) == set(NAMES)


def test_the_readme_names_the_commands_without_json():
    (sentence,) = re.findall(r"^All but (.*) take `--json`", README.read_text(encoding="utf-8"), re.MULTILINE)
    without = {
        " ".join(words) for words, command in commands() if not any("--json" in each.opts for each in command.params)
    }
    assert set(re.findall(r"`(\w+)`", sentence)) == without


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_accepted_as_they_are_typed_and_stand_in_the_help(name, cli):
    shown = " ".join(cli(*name.split(), "--help").out.split())
    for line in EXAMPLES[name]:
        assert line.startswith(f"peerlora {name}") and " ".join(line.split()) in shown
        words = shlex.split(line.partition(" > ")[0])[1:]
        command, depth = get_command(app), len(name.split())
        for word in words[:depth]:
            command = command.commands[word]
        command.make_context(name, words[depth:])  # raises for a word that is none


def test_the_page_of_commands_has_every_option():
    page = command_page()
    for words, command in commands():
        part = page.split(f"\n## {' '.join(['peerlora', *words])}\n")[1].split("\n## ")[0]
        assert command.help.split("\n")[0] in part
        options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
        options = [each for each in options if not each.hidden]  # what only our own processes give
        assert all(f"`{each.opts[0]}" in part for each in options), words
        assert all(line in part for line in EXAMPLES[" ".join(words)])


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("peerlora tr", "train"), ("peerlora members uns", ""), ("peerlora export --wi", "--with-base")],
)
def test_a_shell_completes_words(typed, expected):
    asked = {"_PEERLORA_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    code = "import sys; sys.argv = ['peerlora']; from peerlora.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == expected.split()


def test_the_version_is_that_of_the_package(cli):
    answer = cli("--version")
    assert answer.code == 0 and answer.out.strip() == metadata.version("peerlora")
    assert cli("--help").code == 0 and "train" in cli("--help").out
