"""gRPC's own log lines stay off the terminal of the commands and of the Python functions that use it."""

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


OWN_LOOP = """
import os, sys
from pathlib import Path

from peerlora.config.loading import load_config
from peerlora.errors import IdentityError
from peerlora.runtime.peer.join import grpc_run

assert "grpc" not in sys.modules and "GRPC_VERBOSITY" not in os.environ
try:
    grpc_run("nobody", "none.json", None, False, None, [])(load_config({"clients": 2}), loop=None)
except IdentityError:
    print("grpc" in sys.modules, os.environ["GRPC_VERBOSITY"])
"""


@pytest.mark.slow
def test_a_loop_of_ones_own_quiets_grpc_before_it_is_imported(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    environment["PYTHONPATH"] = str(Path(peerlora.__file__).parents[1])
    command = [sys.executable, "-c", OWN_LOOP]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "True ERROR\n"), ended.stderr


@pytest.mark.parametrize("asked", ["DEBUG", None])
def test_a_verbosity_that_was_asked_for_stays(monkeypatch, asked):
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    if asked:
        monkeypatch.setenv("GRPC_VERBOSITY", asked)
    quiet_grpc()
    assert os.environ["GRPC_VERBOSITY"] == (asked or "ERROR")
