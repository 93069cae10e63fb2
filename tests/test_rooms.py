"""The house of peerlora: which room stands on which floor, and that no import runs up or in a circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import peerlora

HOUSE = Path(peerlora.__file__).parent
FLOORS = (
    ("errors", "randomness", "tree", "files", "display"),
    ("environment", "plugins"),
    ("config",),
    ("lora", "data", "topology", "runs"),
    ("train", "exchange"),
    ("algorithms", "network"),
    ("runtime",),
    ("experiments",),
    ("cli",),
    ("", "__main__", "models", "hf", "flower"),
)
"""The rooms and modules of ``peerlora``, from the ground up; one imports from floors below its own, and from itself.
The empty name is the package's own ``__init__``, ``models`` a former place of what scripts import."""
INNER_FLOORS = {
    "network": (("base",), ("identity",), ("transport",), ("protocol",)),
    "runtime": ((), ("peer", "cluster"), ("launch",)),
}
"""Sub-rooms of a room, from the ground up.  The modules of a room without a sub-room stand on its ground floor."""
ONLY = {("network.protocol", "network.transport"): "heartbeat"}
"""(room, room below) -> the one module that is imported from there."""
MOST_ROOMS = 12


class Import(NamedTuple):
    """One import of a module of the same package; names without the package's own."""

    source: str
    target: str
    kind: str
    """top, late (inside a function), or types (under TYPE_CHECKING)"""


def imports(package: Path) -> Iterator[Import]:
    """Every import between modules of ``package``, wherever in the file it stands."""
    modules = {_name(path, package): path for path in package.rglob("*.py")}
    for source, path in modules.items():
        for node, kind in _import_nodes(ast.parse(path.read_bytes())):
            for target in _targets(node, f"{package.name}.{source}", path.name == "__init__.py"):
                inside = target.removeprefix(package.name).removeprefix(".")
                if target.split(".")[0] == package.name:
                    while inside not in modules:  # the name of something in a module
                        inside = inside.rpartition(".")[0]
                    yield Import(source, inside, kind)


def _name(path: Path, package: Path) -> str:
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def _import_nodes(tree: ast.AST, kind: str = "top") -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, kind
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for each in node.body:
                yield from _import_nodes(ast.Module([each], []), "types")
        else:
            late = kind == "top" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _import_nodes(node, "late" if late else kind)


def _targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parts = module.rstrip(".").split(".")
    above = parts[: len(parts) - node.level + is_package] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def upward(found: list[Import]) -> list[str]:
    """The imports that run up, sideways to another room of the same floor, or past ``ONLY``."""
    return [f"{each.source} -> {each.target} ({each.kind})" for each in found if not _allowed(each)]


def _allowed(each: Import) -> bool:
    source, target = each.source.partition(".")[0], each.target.partition(".")[0]
    if source != target:
        return _floor(FLOORS, target) < _floor(FLOORS, source)
    if source not in INNER_FLOORS or "." not in each.source:
        return True
    one, other = _inner_room(each.source), _inner_room(each.target)
    if one != other and _floor(INNER_FLOORS[source], other) >= _floor(INNER_FLOORS[source], one):
        return False
    only = ONLY.get((f"{source}.{one}", f"{target}.{other}"))
    return only is None or each.target == f"{target}.{other}.{only}"


def _inner_room(module: str) -> str:
    room, _, below = module.partition(".")
    inner = below.partition(".")[0]
    return inner if any(inner in floor for floor in INNER_FLOORS[room]) else ""


def _floor(floors: tuple[tuple[str, ...], ...], room: str) -> int:
    if not room and not any("" in floor for floor in floors):
        return 0
    return next(number for number, floor in enumerate(floors) if room in floor)


def circle(found: list[Import], kinds: tuple[str, ...]) -> list[str]:
    """The modules of one circle of imports; empty where there is none."""
    arrows: dict[str, set[str]] = {}
    for each in found:
        if each.kind in kinds and each.source != each.target:
            arrows.setdefault(each.source, set()).add(each.target)
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def found():
    return list(imports(HOUSE))


def test_every_module_stands_on_a_floor(found):
    rooms = {path.name.removesuffix(".py") for path in HOUSE.iterdir() if path.suffix == ".py" or _is_room(path)}
    listed = [name or "__init__" for floor in FLOORS for name in floor]
    assert sorted(listed) == sorted(rooms)


def test_no_import_runs_up(found):
    assert upward(found) == []


def test_no_imports_form_a_circle(found):
    assert circle(found, ("top", "late")) == []


def test_there_are_few_rooms_and_each_says_in_one_line_what_it_is():
    rooms = [path for path in HOUSE.iterdir() if _is_room(path)]
    assert len(rooms) <= MOST_ROOMS
    for room in [*rooms, *(HOUSE / name / inner for name in INNER_FLOORS for inner in _inner_rooms(name))]:
        text = ast.get_docstring(ast.parse((room / "__init__.py").read_bytes())) or ""
        assert text.endswith(".") and "\n" not in text, f"{room.name}/__init__.py says: {text!r}"


def _is_room(path: Path) -> bool:
    return (path / "__init__.py").is_file()


def _inner_rooms(room: str) -> list[str]:
    return [path.name for path in (HOUSE / room).iterdir() if _is_room(path)]


def _write(package: Path, **files: str) -> list[Import]:
    for name, text in files.items():
        path = package.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(imports(package))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"lora__a": "from p.train.b import x", "train__b": ""}, "lora.a -> train.b (top)"),
        ({"lora__a": "def f():\n    from p.train import b", "train__b": ""}, "lora.a -> train.b (late)"),
        (
            {"lora__a": "if TYPE_CHECKING:\n    import p.train.b", "train__b": ""},
            "lora.a -> train.b (types)",
        ),
        ({"lora__a": "from ..data import b", "data__b": ""}, "lora.a -> data.b (top)"),
        (
            {"network__identity__a": "import p.network.transport.b", "network__transport__b": ""},
            "network.identity.a -> network.transport.b (top)",
        ),
        (
            {"network__protocol__a": "import p.network.transport.b", "network__transport__b": ""},
            "network.protocol.a -> network.transport.b (top)",
        ),
        (
            {"runtime__a": "from p.runtime.peer.b import x", "runtime__peer__b": ""},
            "runtime.a -> runtime.peer.b (top)",
        ),
    ],
)
def test_an_import_that_runs_up_is_seen(tmp_path, files, expected):
    assert upward(_write(tmp_path / "p", **files)) == [expected]


@pytest.mark.parametrize(
    "files",
    [
        {"train__b": "from p.lora import a\nfrom p.train.c import y", "train__c": "", "lora__a": ""},
        {"network__protocol__a": "import p.network.transport.heartbeat", "network__transport__heartbeat": ""},
        {"network__identity__a": "from p.network.base import x", "network__base": ""},
    ],
)
def test_an_import_that_runs_down_is_allowed(tmp_path, files):
    assert upward(_write(tmp_path / "p", **files)) == []


def test_a_circle_is_seen_also_where_half_of_it_is_late(tmp_path):
    found = _write(tmp_path / "p", lora__a="import p.lora.b", lora__b="def f():\n    from p.lora.a import x")
    assert set(circle(found, ("top", "late"))) == {"lora.a", "lora.b"}
    assert circle(found, ("top",)) == []
