"""gRPC's own log lines stay off the terminal of the commands that use it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peerlora
from peerlora.network.transport import quiet_grpc

RUN = """
import json, os, sys
from pathlib import Path

from typer.testing import CliRunner

from peerlora.cli import app
from peerlora.network import transport

def noted(quiet=transport.quiet_grpc):
    found.append("grpc" in sys.modules)
    quiet()
    found.append(os.environ["GRPC_VERBOSITY"])

transport.quiet_grpc = noted
files = ["config.yaml", "--identity", "nobody", "--members", "none.json"]
for command in ("doctor", "peer"):
    found = []
    CliRunner().invoke(app, [command, *files])
    print(json.dumps([command, *found, "grpc" in sys.modules]))
"""


@pytest.mark.slow
def test_commands_quiet_grpc_before_they_import_it(tmp_path):
    """Of both commands the first imports gRPC; each of them has quieted it by then."""
    (tmp_path / "config.yaml").write_text("clients: 2\n")
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    environment["PYTHONPATH"] = str(Path(peerlora.__file__).parents[1])
    ended = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    doctor, peer = map(json.loads, ended.stdout.splitlines())
    assert doctor == ["doctor", False, "ERROR", True]
    assert peer == ["peer", True, "ERROR", True]


@pytest.mark.parametrize("asked", ["DEBUG", None])
def test_a_verbosity_that_was_asked_for_stays(monkeypatch, asked):
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    if asked:
        monkeypatch.setenv("GRPC_VERBOSITY", asked)
    quiet_grpc()
    assert os.environ["GRPC_VERBOSITY"] == (asked or "ERROR")
