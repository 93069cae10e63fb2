"""The page of the command line, from the commands themselves."""

from collections.abc import Iterator

from typer.main import get_command

from peerlora.cli import app

HEAD = """\
# Command line

Written by `make docs` from the commands; `peerlora COMMAND --help` prints the same. A mistake in a setting, a file or a
label gives one message and exit code 2; [runs](runs.md#errors-and-exit-codes) has the other codes.

`key=value` changes a setting of the config by its name in [configuration](configuration.md).

`peerlora --install-completion` makes bash, zsh or fish complete commands and options with the tab key, from the next
shell on; `peerlora --show-completion` prints what it would add to the shell's start-up files.
"""


def commands(group=None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield (words, command) of every command that does something, in the order of ``--help``."""
    group = get_command(app) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def cell(text: str) -> str:
    """Return a text as it may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def placeholder(parameter) -> str:
    """Return what stands for a parameter's value."""
    if parameter.metavar:
        return parameter.metavar
    kind = parameter.type_descriptor.annotation
    return {"Path": "PATH", "int": "N", "float": "X"}.get(getattr(kind, "__name__", ""), "NAME")


def rows(command) -> Iterator[str]:
    """Yield the table's row of every argument and option."""
    for each in command.params:
        if each.hidden or each.name == "help":
            continue
        if each.param_type_name == "argument":
            name = each.metavar or each.name.upper()
        else:
            name = ", ".join([*each.opts, *each.secondary_opts]) + ("" if each.is_flag else f" {placeholder(each)}")
        notes = [each.help or ""]
        if isinstance(each.default, (int, float, str)) and not isinstance(each.default, bool):
            notes.append(f"default {each.default}")
        if each.required:
            notes.append("required")
        yield f"| `{cell(name)}` | {cell('; '.join(filter(None, notes)))} |"


def section(words: tuple[str, ...], command) -> str:
    """Return one command's part of the page."""
    name = " ".join(["peerlora", *words])
    parts = [f"## {name}", command.help or ""]
    table = list(rows(command))
    if table:
        parts.append("\n".join(["| argument or option | meaning |", "| --- | --- |", *table]))
    if command.epilog:
        examples = [line for line in command.epilog.split("\n") if line.startswith("peerlora ")]
        parts.append("\n".join(["```bash", *examples, "```"]))
    return "\n\n".join(parts)


def command_page() -> str:
    """Return the page of all commands."""
    return "\n\n".join([HEAD.strip(), *(section(words, command) for words, command in commands())]) + "\n"
