"""The GPU harness runs at toy size on a CPU, and a run keeps to one device, which a pretended device proves."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

BENCH = Path(__file__).parents[2] / "bench"
DATA: Any = torch.Tensor.data
MOVES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/, which is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.mark.slow
def test_harness_at_toy_size(bench, cache, tmp_path, monkeypatch):
    gpu, page, out = bench("gpu"), bench("performance_page"), tmp_path / "gpu.json"
    ways = {name: way for name, way in gpu.WAYS.items() if not way.compiled}  # compiling takes a minute
    broken = {"broken": gpu.Way(("train.dtype=bf16", "train.block=0"))}
    monkeypatch.setattr(gpu, "WAYS", ways | broken)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--repetitions", "1", "--out", str(out)])
    gpu.main()
    found = json.loads(out.read_text())
    shapes = list(gpu.TINY_CASES)
    assert [(row["shape"], row["variant"]) for row in found["rows"]] == [
        (shape, way) for shape in shapes for way in (*gpu.NAIVE, *ways)
    ]
    assert [(each["shape"], each["variant"]) for each in found["failed"]] == [(shape, "broken") for shape in shapes]
    assert "train.block" in found["failed"][0]["reason"]
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["ratio"] > 0 and row["share_of_peak"] > 0
        row |= {"ratio": 1.0, "share_of_peak": 0.1}  # what the page says of it must not depend on the machine
        assert (row["difference"] is None) == (row["variant"] == gpu.PLAIN)
        assert row["variant"] != gpu.EXACT or row["difference"] < 1e-4
    out.write_text(json.dumps(found))
    text = page.page(tmp_path)
    assert "| stacked, one graph | 1.00 | **" in text
    assert f"- {shapes[0]}, stacked" in text and "target of 50% not reached" in text
    assert f"| {shapes[0]} | broken |" in text


def test_unequal_adapters_are_a_failure_not_a_figure(bench, monkeypatch):
    gpu = bench("gpu")
    found = gpu.Measurement("cpu", gpu.TINY, "", 1, 1.0)
    first = gpu.Runner(lambda t: None, lambda: pytest.fail("not asked"), torch.zeros(2, 3))

    other = gpu.Runner(lambda t: None, lambda: SimpleNamespace(flat=torch.ones(2, 3)))

    def warmed():
        return found._warmed(gpu.EXACT, lambda: other, {gpu.PLAIN: first})

    assert found._attempt("shape", gpu.EXACT, warmed) is None
    assert "adapters differ by 1.0e+00" in found.failed[0]["reason"]


def test_reasons_name_no_folder(bench):
    assert bench("gpu").reason(OSError(f"no {Path.home()}/a-b/c.so\n  here")) == "OSError: no c.so here"


RUNS = [
    (("train.dtype=fp32", "train.clip=1.0", "adapter.dropout=0.1", "train.optimizer_state=keep"), 1e-5),
    (("train.dtype=bf16", "adapter.head=private"), 0.05),  # other attention on a CPU, so rounding differs
    (("train.dtype=fp32", "algorithm.name=hetlora", "adapter.rank=[1,2,3,3]"), 1e-5),
]


@pytest.mark.slow
def test_a_run_keeps_to_its_device(config, tmp_path):
    places = [tmp_path / str(place) for place in range(len(RUNS))]
    for place, (words, _) in zip(places, RUNS, strict=True):
        place.mkdir()
        (place / "config.yaml").write_text(config("bert", *words).to_yaml())
    done = subprocess.run([sys.executable, __file__, *map(str, places)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(differences) == len(RUNS)
    for difference, (words, most) in zip(differences, RUNS, strict=True):
        assert difference < most, words


# --- a device that computes on the CPU and refuses what a GPU refuses; in a process of its own, as torch keeps it


class There(torch.Tensor):
    """A tensor on the pretended device; its numbers lie in ``held``."""

    held: torch.Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        place = {"device": torch.device("pretend:0"), "dtype": held.dtype}
        steps: Any = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **place, **steps)
        made.held = held
        return made

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, _context, _size, _stride):
        return There(inner["held"])

    @property
    def data(self):
        return DATA.__get__(self)

    @data.setter
    def data(self, value):
        DATA.__set__(self, value)
        self.held = value.held

    @classmethod
    def __torch_dispatch__(cls, operation, _types, arguments=(), named=None):
        return on_its_device(operation, arguments, named or {})


class Pretending(TorchDispatchMode):
    """Lets tensors be made on the pretended device."""

    def __torch_dispatch__(self, operation, _types, arguments=(), named=None):
        return on_its_device(operation, arguments, named or {})


def on_its_device(operation, arguments, named):
    """Run an operation on the numbers, where all its tensors lie on one device or CUDA would not mind."""
    tensors = [each for each in tree_leaves((arguments, named)) if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, There)]
    kind, asked = operation.overloadpacket, named.get("device")
    if there and kind not in MOVES:
        own = arguments[0] if kind in INDEXING else None  # CUDA takes indices from the CPU
        foreign = [t for t in tensors if not isinstance(t, There) and t.dim() and (own is None or t is own)]
        if foreign:
            raise RuntimeError(f"{operation}: {[(tuple(each.shape), str(each.device)) for each in tensors]}")
    goes_there = isinstance(arguments[0], There) if kind in MOVES else bool(there)
    if asked is not None:
        goes_there = torch.device(asked).type == "pretend"
        named = named | {"device": "cpu" if goes_there else asked}
    bare = tree_map(lambda each: each.held if isinstance(each, There) else each, (arguments, named))
    result = operation(*bare[0], **bare[1])
    if not goes_there:
        return result
    known = {id(each.held): each for each in there}  # an operation in place gives its own tensor back

    def taken_there(each):
        if not isinstance(each, torch.Tensor):
            return each
        return known[id(each)] if id(each) in known else There(each)

    return tree_map(taken_there, result)


def register():
    """Make the device known to torch, and what its C++ asks of it."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return There(torch.empty(size, dtype=dtype))

    def strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return There(torch.empty_strided(size, stride, dtype=dtype))

    def copy(source, target, non_blocking=False):
        held = [each.held if isinstance(each, There) else each for each in (source, target)]
        held[1].copy_(held[0])
        return target

    _setup_privateuseone_for_python_backend("pretend")
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", strided, "PrivateUse1")
    library.impl("_copy_from", copy, "PrivateUse1")
    return library


def main(places):
    from peerlora.config.loading import load_config
    from peerlora.runtime.simulate import simulate

    library = register()
    for place in places:
        config = load_config(place / "config.yaml")
        here = simulate(config, place / "here").adapters.flat
        with Pretending():
            there = simulate(config.model_copy(update={"device": "pretend"}), place / "there").adapters.flat
        print("largest difference", float((here - there).abs().max()))
    library._destroy()


if __name__ == "__main__":
    main(list(map(Path, sys.argv[1:])))
