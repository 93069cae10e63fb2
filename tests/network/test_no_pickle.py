"""Nothing that came over the network is ever unpickled: shown on the source, and on a run without any unpickler."""

import ast
import asyncio
import pickle
from importlib.util import find_spec
from pathlib import Path

import torch
from rigs import GrpcRig

import peerlora

SOURCE = Path(peerlora.__file__).parent
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "multiprocessing"}
CALLS = {
    "torch.load",
    "torch.hub",
    "torch.jit",
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.unsafe_load",
    "torch.package",
}
BARE = {"eval", "exec", "compile", "__import__"}
RUN = ["run", "synchronous", "asynchronous", "site", "label_counts"]
ROOTS = [f"peerlora.runtime.peer.{name}" for name in RUN]
NETWORK = [path.relative_to(SOURCE).with_suffix("") for path in (SOURCE / "network").rglob("*.py")]
ROOTS += [".".join(["peerlora", *path.parts]) for path in NETWORK]
"""Every module that sees a header or a body."""


def file_of(module):
    parts = module.split(".")[1:]
    for path in (SOURCE.joinpath(*parts).with_suffix(".py"), SOURCE.joinpath(*parts, "__init__.py")):
        if path.is_file():
            return path
    return None


def imported(tree):
    """Every module that a file names in an import, wherever it stands, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this project"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reachable():
    """Files of peerlora by module, from the network path down."""
    waiting = list(ROOTS)
    found = {}
    while waiting:
        module = waiting.pop()
        path = file_of(module) if module.split(".")[0] == "peerlora" else None
        if path is None or module in found:
            continue
        found[module] = ast.parse(path.read_text(encoding="utf-8"))
        parents = [module.rsplit(".", level)[0] for level in range(1, module.count(".") + 1)]
        waiting += [*parents, *imported(found[module])]
    return found


def dangers(tree):
    """What a file uses that could run code out of data."""
    for name in imported(tree):
        if name.split(".")[0] in UNPICKLERS or name in CALLS:
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            whole = f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else ""
            if whole in CALLS or node.attr in ("Unpickler", "allow_pickle", "weights_only"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BARE:
            yield node.func.id


def test_no_unpickler_can_be_reached_from_the_network_path():
    modules = reachable()
    needed = {
        "peerlora.network.transport.grpc",
        "peerlora.network.transport.memory",
        "peerlora.network.base",
        "peerlora.network.protocol.wire",
    }
    assert needed <= modules.keys() and len(modules) > 12
    assert {name: list(dangers(tree)) for name, tree in modules.items() if list(dangers(tree))} == {}


def test_the_walk_finds_what_it_looks_for():
    for text in (
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load(x)",
        "from torch import load",
        "import numpy as np\nnp.load(x)",
        "eval(x)",
        "from multiprocessing.connection import Client",
    ):
        assert list(dangers(ast.parse(text))), text
    assert not list(dangers(ast.parse("import json\njson.loads(x)\nmodel.eval()")))
    assert find_spec("pickle")


def test_messages_pass_where_nothing_can_be_unpickled(federation, monkeypatch):
    from peerlora.network.protocol.wire import Header, largest_body, pack, read_body, read_header

    def never(*args, **kwargs):
        raise AssertionError("something was unpickled")

    vectors = {"A": torch.arange(6.0).view(2, 3), "B": torch.ones(3, 2)}
    schema = {name: (tuple(vector.shape), vector.dtype) for name, vector in vectors.items()}
    got = []

    async def scenario(rig):
        await rig.all_up("a", "b")
        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            monkeypatch.setattr(module, name, never)
        box = rig.boxes["b"]
        box.admit = lambda peer, header: read_header(header, largest_body(schema)).length

        async def deliver(peer, header, body):
            got.append(await asyncio.to_thread(read_body, read_header(header), body, schema))

        box.deliver = deliver
        await rig.transports["a"].send("b", *pack(Header(run="r", kind="mix", sender="a"), vectors), deadline=10)

    GrpcRig(federation).run(scenario)
    assert all(torch.equal(got[0][name], vector) for name, vector in vectors.items())
