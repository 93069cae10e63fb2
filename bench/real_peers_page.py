"""The section about real peers of docs/performance.md, from what bench/transport.py and bench/peers_real.py left."""

from statistics import median
from typing import Any

RATIO_TARGETS = {"4": 0.45, "32": 0.9}
NOTICED, RECEIVES, MEMORY = 0.2, 1.0, 1.05  # seconds, seconds, last rounds over first


def real_peers(transport: dict[str, Any], real: dict[str, Any]) -> str:
    """Every figure with its aim; a part that was not measured says how to get it."""
    blocks = [_transport(transport) if transport else "Transport not measured on this machine: `make bench-transport`."]
    parts = {"overhead": _overhead, "endurance": _endurance, "kills": _kills}
    for name, render in parts.items():
        known = real.get(name)
        if known and not known["tiny"]:
            blocks.append(render(known))
        else:
            blocks.append(f"The part {name} was not measured on this machine: `make bench-real ARGS={name}`.")
    return "\n\n".join(blocks)


def _verdict(good: bool) -> str:
    return "reached" if good else "not reached"


def _transport(found: dict[str, Any]) -> str:
    lines = []
    for size, target in RATIO_TARGETS.items():
        rows = [row for row in found["throughput"] if f"{row['mb']:g}" == size]
        if rows:
            ratio = found["ratio"][size]
            rates = [median(row[way] for row in rows) for way in ("grpc", "tcp")]
            both = " and ".join(f"{rate:.0f}" for rate in rates)
            lines.append(
                f"- Messages of {size} MB, {found['peers']} processes, 2 neighbours each: {ratio:.2f} of raw asyncio "
                f"TCP, which neither encrypts nor checks ({both} MB/s together); aim {target:g}, "
                f"{_verdict(ratio >= target)}."
            )
    kills = found["kills_median"]
    if kills:
        noticed, again = kills["noticed"], kills["receives_after_start"]
        lines.append(
            f"- A peer killed while {found['peers']} processes send as fast as they can: its neighbours know after "
            f"{noticed:.3f} s (median; aim {NOTICED:g}, {_verdict(noticed <= NOTICED)}); started again, it receives "
            f"from each neighbour after {again:.2f} s (median, from its transport's start; aim {RECEIVES:g}, "
            f"{_verdict(again <= RECEIVES)}; largest {max(found['kills']['receives_after_start']):.2f} s)."
        )
    return f"Measured by `python {found['command']}`.\n\n" + "\n".join(lines)


def _overhead(found: dict[str, Any]) -> str:
    mix = median(found["seconds"]["mix"])
    return (
        f"- {found['clients']} processes with MiniLM, rank 8, 10 steps of 16 rows a round, all on this machine: a "
        f"round with exchange takes {found['ratio']:.3f} times one without (median of {len(found['ratios'])} turns, "
        f"{min(found['ratios']):.3f} to {max(found['ratios']):.3f}); {found['bytes_per_edge'] / 1e6:.2f} MB an edge, "
        f"of the round {mix:.2f} s are the exchange, waiting for the slowest neighbour included."
    )


def _endurance(found: dict[str, Any]) -> str:
    worst = max(peer["ratio"] for peer in found["peers"])
    return (
        f"- {found['rounds']} rounds of a small adapter, {found['clients']} processes: the peak memory of "
        f"{found['window']} rounds near the end is at most {worst:.3f} times that of the first {found['window']}; "
        f"aim {MEMORY:g}, {_verdict(worst <= MEMORY)}."
    )


def _kills(found: dict[str, Any]) -> str:
    spread = ", ".join(f"{each:.3f}" for each in found["undisturbed"])
    return (
        f"- {found['clients']} processes of which {len(found['killed'])} are killed at random moments and restarted "
        f"({found['restarts']} restarts): {'all' if found['all_finished'] else 'not all'} finish, "
        f"{found['rounds_left_out']} rounds left out in all; mean client {found['disturbed']:.3f}, undisturbed runs of "
        f"{len(found['undisturbed'])} seeds {spread}; within the spread of seeds: "
        f"{_verdict(found['within_spread'] and found['all_finished'])}."
    )
