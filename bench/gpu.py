"""How far one GPU is from the usual way of training many adapters, and from its own peak.

    python bench/gpu.py                                    # RoBERTa-large's sizes
    python bench/gpu.py --device cpu --tiny --out FILE     # the same code at toy size, as the tests run it

Weights and rows are random: speed does not depend on them.  bench/performance_page.py shows the results.
"""

import argparse
import gc
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import speed
from naive import NaiveLoop
from peerlora.config.loading import load_config
from peerlora.data.dataset import Dataset
from peerlora.lora.adapters import Adapters
from peerlora.runs.resume import run_facts
from peerlora.runtime.compose import Federation
from speed import Shape, Stacked

RESULTS = Path("bench/results/gpu.json")
SHARE_TARGET = 0.5  # of the bf16 peak measured in the same run
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # in RoBERTa's order: padding is number 1
PRODUCTS = 10  # in a row, so that waiting for the device is small beside them

PLAIN, REFERENCE = "naive, fp32", "naive, bf16"  # differences are to the first, ratios to the second
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAIVE = {PLAIN: torch.float32, REFERENCE: torch.bfloat16}


@dataclass(frozen=True)
class Way:
    """One of our own ways: its settings, what is compiled, and the kind of product that bounds it."""

    words: tuple[str, ...]
    compiled: str = ""
    peak: str = "bf16"


EXACT = "stacked, fp32"
WAYS = {
    EXACT: Way(("train.dtype=fp32",), peak="fp32"),
    "stacked, plain torch": Way(("train.dtype=bf16", "train.fast=false")),
    "stacked": Way(("train.dtype=bf16",)),
    "stacked, one graph": Way(("train.dtype=bf16", "train.block=CLIENTS")),
    "stacked, blocks compiled": Way(("train.dtype=bf16", "train.fast=false"), compiled="blocks"),
    "stacked, model compiled": Way(("train.dtype=bf16", "train.fast=false"), compiled="model"),
}


@dataclass(frozen=True)
class Case:
    """A shape, whether its rows differ in length, and the ratio to the naive loop that is hoped for."""

    shape: Shape
    target: float | None = None
    ragged: bool = False


CASES = {
    "N10 b8 s64": Case(Shape(10, 8, 64), 9.0),
    "N10 b16 s128": Case(Shape(10, 16, 128), 2.5),
    "N10 b16 s128, ragged": Case(Shape(10, 16, 128), ragged=True),
}
TINY_CASES = {"N3 b2 s16": Case(Shape(3, 2, 16), 1.0), "N3 b2 s16, ragged": Case(Shape(3, 2, 16), ragged=True)}


@dataclass(frozen=True)
class Size:
    """The sizes of the model, the width of the product that gives the peak, and the shapes."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    vocabulary: int = 50265
    product: int = 8192
    cases: dict[str, Case] = field(default_factory=lambda: CASES)


TINY = Size(layers=2, width=64, heads=4, vocabulary=300, product=256, cases=TINY_CASES)


def save_model(folder: Path, size: Size) -> str:
    """A RoBERTa of random weights, and a tokenizer of numbered words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), size.vocabulary))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>").save_pretrained(str(folder))
    config = RobertaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def full_rows(rows: int, tokens: int, seed: int, words: tuple[int, int]) -> Dataset:
    """Random rows of ``tokens`` tokens each, so that nobody gains by padding less."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(*words, rows * tokens, dtype=np.int32)
    starts = np.arange(rows + 1, dtype=np.int64) * tokens
    labels = (ids[starts[:-1] + 1] % 2).astype(np.int64)
    return Dataset(ids=ids, starts=starts, types=None, labels=labels, names=("even", "odd"))


class Device:
    """The CPU or a GPU: waiting for it, its memory, its name."""

    def __init__(self, name: str):
        self.name, self.cuda = name, name == "cuda"

    def waited(self, work: Callable[[int], Any], number: int) -> None:
        """Work that has really ended."""
        work(number)
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def held(self) -> int:
        """Bytes of all tensors on a GPU."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def extra(self, work: Callable[[int], Any], number: int) -> int | None:
        """The most bytes that work held beyond what was there; None on a CPU."""
        before = self.held()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.waited(work, number)
        return torch.cuda.max_memory_allocated() - before if self.cuda else None

    def machine(self) -> dict[str, Any]:
        """What the figures belong to."""
        if not self.cuda:
            return speed.machine()
        found = torch.cuda.get_device_properties(0)
        return {
            "gpu": found.name,
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "fp32_products": torch.get_float32_matmul_precision(),
        }


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


@dataclass
class Runner:
    """A way of doing rounds, and what was seen of it before it was timed."""

    round: Callable[[int], Any]
    adapters: Callable[[], Adapters]
    first: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Every client's adapter after the first round."""
    difference: float | None = None
    peak_bytes: int | None = None


class Measurement:
    """All cases on one device; what fails is noted, and the others go on."""

    def __init__(self, device: str, size: Size, source: str, repetitions: int, minutes: float):
        self.device, self.size, self.source, self.repetitions = Device(device), size, source, repetitions
        self.minutes, self.began = minutes, time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.peaks: dict[str, dict[str, float]] = {}

    def run(self, save: Callable[[], None]) -> None:
        """Every case; ``save`` is called after each, so that a crash costs one."""
        for name, case in self.size.cases.items():
            self._attempt(name, "whole shape", partial(self._case, name, case))
            torch.compiler.reset()
            save()

    def _attempt(self, case: str, variant: str, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; None where it fails."""
        self.device.free()  # a failed way must not take memory from the next one
        minutes = (time.perf_counter() - self.began) / 60
        print(f"{minutes:.1f} min: {case}, {variant}", flush=True)
        try:
            if minutes > self.minutes:
                raise TimeoutError(f"left out: {self.minutes:g} minutes were over")
            return work()
        except Exception as error:  # whatever a driver or a compiler raises
            self.failed.append({"shape": case, "variant": variant, "reason": reason(error)})
            print(f"  failed: {self.failed[-1]['reason']}", flush=True)
            return None

    def _case(self, name: str, case: Case) -> None:
        parts = self._federation(case, WAYS[EXACT])
        start = speed.scattered(parts.start)
        makers = {variant: partial(_naive, parts, start, case, dtype) for variant, dtype in NAIVE.items()}
        makers |= {variant: partial(self._stacked, case, way) for variant, way in WAYS.items()}
        runners: dict[str, Runner] = {}
        for variant, make in makers.items():
            runner = self._attempt(name, variant, partial(self._warmed, variant, make, runners))
            if runner is not None:
                runners[variant] = runner
        self._time(name, case, runners, speed.flops(parts, case.shape))

    def _federation(self, case: Case, way: Way) -> Federation:
        words = [word.replace("CLIENTS", str(case.shape.clients)) for word in way.words]
        rows = speed.synthetic if case.ragged else full_rows
        numbers = len(SPECIAL), self.size.vocabulary
        return speed.federation(case.shape, [f"device={self.device.name}", *words], self.source, numbers, rows)

    def _stacked(self, case: Case, way: Way) -> Runner:
        if way.compiled and case.ragged:
            raise ValueError("not tried: nearly every step has another length and would be compiled anew")
        parts = self._federation(case, way)
        if way.compiled:
            compile_base(parts, way.compiled)
        ours = Stacked(parts)
        return Runner(ours.round, lambda: ours.x)

    def _warmed(self, variant: str, make: Callable[[], Runner], others: dict[str, Runner]) -> Runner:
        """A runner after two rounds: the first is compared with the naive loop's, in the second memory is watched."""
        before = self.device.held()
        runner = make()
        runner.round(0)
        runner.first = runner.adapters().flat.cpu()
        if PLAIN in others:
            runner.difference = float((runner.first - others[PLAIN].first).abs().max())
        if variant == EXACT and not (runner.difference or 0.0) <= speed.TOLERANCE:
            raise ArithmeticError(f"adapters differ by {runner.difference:.1e} from the naive loop's after one round")
        self.device.free()
        own = self.device.held() - before
        extra = self.device.extra(runner.round, 1)
        runner.peak_bytes = None if extra is None else own + extra
        return runner

    def _time(self, name: str, case: Case, runners: dict[str, Runner], flops: float) -> None:
        products = self._products()
        works = {key: runner.round for key, runner in runners.items()} | products
        taken = speed.interleaved(
            {key: partial(self.device.waited, work) for key, work in works.items()}, self.repetitions
        )
        seconds = {key: median(each.wall for each in all_turns) for key, all_turns in taken.items()}
        self.peaks[name] = {kind: PRODUCTS * 2 * self.size.product**3 / seconds[kind] for kind in products}
        for variant, runner in runners.items():
            peak = WAYS[variant].peak if variant in WAYS else variant.removeprefix("naive, ")
            ratios = speed.ratio(taken[REFERENCE], taken[variant], "wall") if REFERENCE in taken else {}
            self.rows.append(
                {
                    "shape": name,
                    "variant": variant,
                    "seconds": seconds[variant],
                    "ratio": ratios.get("median"),
                    "ratio_range": [ratios["least"], ratios["most"]] if ratios else None,
                    "samples_per_second": case.shape.clients * case.shape.batch * case.shape.steps / seconds[variant],
                    "peak": peak,
                    "share_of_peak": flops / seconds[variant] / self.peaks[name][peak],
                    "peak_memory_bytes": runner.peak_bytes,
                    "difference": runner.difference,
                    "target": case.target if variant in WAYS and peak == "bf16" else None,
                }
            )

    def _products(self) -> dict[str, Callable[[int], None]]:
        """A large square product, by kind of arithmetic."""
        shape = self.size.product, self.size.product
        factors = {kind: torch.randn(shape, dtype=dtype, device=self.device.name) for kind, dtype in KINDS.items()}
        return {kind: partial(_multiply, factor) for kind, factor in factors.items()}


def _multiply(factor: torch.Tensor, _: int) -> None:
    for _ in range(PRODUCTS):
        torch.mm(factor, factor)


def _naive(parts: Federation, start: Adapters, case: Case, dtype: torch.dtype) -> Runner:
    loop = NaiveLoop(parts, start, case.shape.tokens, dtype)
    return Runner(loop.round, partial(loop.adapters, start))


def compile_base(parts: Federation, what: str) -> None:
    """Let torch compile the base model, as a whole or block by block: all blocks share one piece of code."""
    base: Any = parts.model.base
    blocks = getattr(base, base.base_model_prefix).encoder.layer
    for module in [base] if what == "model" else blocks:
        module.compile(dynamic=False)


def reason(error: Exception) -> str:
    """The beginning of an error's text, without the folders of this machine."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"(/[\w.@+-]+)+/", "", text)[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the harness itself")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=6.0, help="nothing new is begun after so many")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.tiny and options.out is None:
        parser.error("--tiny needs --out: its figures are no results")
    size, out = TINY if options.tiny else Size(), options.out or RESULTS
    with tempfile.TemporaryDirectory() as folder:
        source = save_model(Path(folder), size)
        found = Measurement(options.device, size, source, options.repetitions, options.minutes)
        here = {
            "machine": found.device.machine(),
            "versions": run_facts(load_config())["versions"],
            "command": f"python bench/gpu.py --device {options.device}{' --tiny' * options.tiny} "
            f"--repetitions {options.repetitions} --minutes {options.minutes:g}",
            "model": asdict(size) | {"cases": {name: asdict(case) for name, case in size.cases.items()}},
            "targets": {"share_of_peak": SHARE_TARGET},
        }

        def save() -> None:
            out.parent.mkdir(parents=True, exist_ok=True)
            measured = {"peaks": found.peaks, "rows": found.rows, "failed": found.failed}
            out.write_text(json.dumps(here | measured, indent=1) + "\n", encoding="utf-8")

        found.run(save)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
