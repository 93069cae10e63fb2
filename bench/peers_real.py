"""Real peers as processes of this machine: what the exchange costs, whether memory stays, whether kills are survived.

    python bench/peers_real.py overhead     # MiniLM, rank 8, 8 peers: a round with exchange against one without
    python bench/peers_real.py endurance    # 1,000 rounds of a small adapter: memory at the end and the start
    python bench/peers_real.py kills        # 8 peers, 4 killed at random and restarted, against undisturbed runs

``--tiny`` runs the same in a minute, to see that it works; its numbers mean nothing.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

from peerlora.config.loading import load_config
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.launch.faults import Fault
from peerlora.runtime.launch.processes import launch

SMALL_DATA = ["data.max_length=32", "data.train_per_class=60", "data.eval_per_class=20", "eval.every=100000"]
FEW_EVALUATED = ["eval.rows=32", "checkpoint.every=20"]
RING = ["topology=ring", "partition=iid"]


def run(words, faults=(), listener=lambda peers: None):
    """(summary, [peer] rounds) of one launched federation."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, [*SMALL_DATA, *FEW_EVALUATED, *RING, *words])
        summary = launch(config, Path(folder) / "run", faults, listener=listener)
        rounds = [select_events(read_events(peer["run"]), RoundDone) for peer in summary["peers"]]
    return summary, rounds


def overhead(tiny: bool) -> dict:
    """Interleaved: local training alone, then the same with gossip, and again."""
    clients, rounds, repeats = (3, 3, 1) if tiny else (8, 15, 3)
    words = [f"clients={clients}", f"train.rounds={rounds}", "train.local_steps=10", "train.batch=16", "adapter.rank=8"]
    seconds = defaultdict(list)
    for _ in range(repeats):
        for method in ("local", "dec-lora"):
            _, peers = run([*words, f"algorithm.name={method}"])
            warm = [done for own in peers for done in own[1:]]
            seconds[method].append(median(done.seconds_train + done.seconds_mix for done in warm))
            if method == "dec-lora":
                seconds["mix"].append(median(done.seconds_mix for done in warm))
                sent = median(done.bytes_per_edge for done in warm)
    ratios = [gossip / alone for alone, gossip in zip(seconds["local"], seconds["dec-lora"], strict=True)]
    return {"clients": clients, "rounds": rounds, "seconds": dict(seconds), "bytes_per_edge": sent, "ratios": ratios,
            "ratio": median(ratios)}  # fmt: skip


class Memory:
    """Largest resident memory of every process by its round."""

    def __init__(self):
        self.peaks = defaultdict(lambda: defaultdict(int))

    def __call__(self, peers):
        """Look at all of them."""
        for peer in peers:
            if peer.process is not None and peer.process.poll() is None and peer.round:
                self.peaks[peer.client][peer.round] = max(self.peaks[peer.client][peer.round], resident(peer.process))

    def within(self, client, first, last):
        """The peak of one over some rounds."""
        found = [peak for t, peak in self.peaks[client].items() if first < t <= last]
        return max(found, default=0)


def resident(process) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def endurance(tiny: bool) -> dict:
    """Many rounds of a small adapter; memory at the end against memory at the start."""
    clients, rounds, window = (2, 30, 10) if tiny else (3, 1000, 100)
    memory = Memory()
    words = [f"clients={clients}", f"train.rounds={rounds}", "train.local_steps=1", "train.batch=2", "adapter.rank=2"]
    words += ["algorithm.name=dec-lora", "adapter.head=frozen", "checkpoint.every=100"]
    words += ["topology=path"] if clients == 2 else []
    summary, _ = run(words, listener=memory)
    rows = []
    for client in range(clients):
        # Who has finished the last round evaluates and draws a report, which is not what is asked here; memory is read
        # a few rounds after an event, so the window ends before.
        end = rounds - rounds // 20
        first, last = memory.within(client, 0, window), memory.within(client, end - window, end)
        rows.append({"client": client, "first": first, "last": last, "ratio": last / first if first else None})
    return {"clients": clients, "rounds": rounds, "window": window, "ok": summary["ok"], "peers": rows}


def kills(tiny: bool) -> dict:
    """Half of the peers die at random moments and come back; undisturbed runs of three seeds give the spread."""
    clients, rounds, seeds = (3, 6, 1) if tiny else (8, 40, 3)
    words = [f"clients={clients}", f"train.rounds={rounds}", "train.local_steps=10", "train.batch=8", "train.lr=0.005"]
    words += ["algorithm.name=dec-lora", "checkpoint.every=2", "peer.deadline=30"]
    undisturbed = [run([*words, f"seed={seed}"])[0] for seed in range(seeds)]
    draw = random.Random(0)
    length = undisturbed[0]["seconds"]
    victims = draw.sample(range(clients), clients // 2)
    # Within the first 60 % of the run: a process takes as long to start as several rounds.
    planned = [Fault("kill", victim, draw.uniform(0.05, 0.6) * length, 1.0) for victim in victims]
    disturbed, peers = run(words, planned)
    reached = [each["own_mean"] for each in undisturbed]
    spread = max(reached) - min(reached)
    return {
        "clients": clients,
        "rounds": rounds,
        "killed": sorted(victims),
        "all_finished": all(peer["ended"] == "finished" for peer in disturbed["peers"]),
        "restarts": sum(peer["starts"] - 1 for peer in disturbed["peers"]),
        "rounds_left_out": sum(peer["skipped"] for peer in disturbed["peers"]),
        "last_round": [own[-1].round + 1 for own in peers],
        "undisturbed": reached,
        "disturbed": disturbed["own_mean"],
        "difference": disturbed["own_mean"] - mean(reached),
        "within_spread": abs(disturbed["own_mean"] - mean(reached)) <= spread,
    }


PARTS = {"overhead": overhead, "endurance": endurance, "kills": kills}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="default: all")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench/results/peers_real.json"))
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for part in options.parts or PARTS:
        found[part] = {"command": " ".join(sys.argv), "tiny": options.tiny, **PARTS[part](options.tiny)}
        print(part, json.dumps(found[part]))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
