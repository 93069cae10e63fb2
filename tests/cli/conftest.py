import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"


@dataclass
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def commands():
    """The commands as typer builds them, which it would do again at every call."""
    from typer.main import get_command

    from peerlora.cli import app

    return get_command(app)


@pytest.fixture
def cli(capsys, monkeypatch, cache, commands):
    """Run the command line in this process: exit code, stdout, stderr."""
    from peerlora.cli import main

    monkeypatch.setattr("peerlora.cli.app", commands)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["peerlora", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture
def yaml_file(config, tmp_path):
    """Write the config of a tiny run; dotted overrides as on the command line."""

    def write(*words, kind="bert"):
        path = tmp_path / "config.yaml"
        path.write_text(config(kind, *words).to_yaml())
        return path

    return write


@pytest.fixture
def process(cache):
    """Start a real process of the command line."""
    started = []

    def start(*words, **options):
        environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "peerlora", *map(str, words)]
        started.append(subprocess.Popen(command, env=environment, **(pipes | options)))
        return started[-1]

    yield start
    for each in started:
        if each.poll() is None:
            each.kill()
            each.communicate()
