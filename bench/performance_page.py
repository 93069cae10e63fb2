"""Write docs/performance.md, whole, from what the harnesses left in bench/results; no number is typed by hand.

python bench/performance_page.py
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from real_peers_page import real_peers
from watching_page import live_page, watching_cost

Cells = Iterable[Sequence[str]]
MISSING = "Not measured on this machine: run `make {}`."
HEAD = """# Performance

Written by `bench/performance_page.py` from the files in `bench/results`; nothing here is typed by hand.  Repeat it
with `make bench`, `bench-peers`, `bench-transport`, `bench-real` and `bench-gpu` on an otherwise idle machine: every
figure belongs to the machine it was measured on.

The reference is the usual way of training many adapters in one program: one PEFT model; for every client its adapter
is loaded, a fresh AdamW takes the local steps, the adapter is read back; then the dictionaries are averaged with the
weights of the graph.  `bench/naive.py` is this loop.  It starts from the same adapters as ours and sees the same rows
in the same order, and before anything is timed the adapters after one round are compared."""


def page(results: Path) -> str:
    """The whole page; a file that is missing leaves a line that says how to get it."""
    speed, memory, peers, gpu = (_read(results / f"{name}.json") for name in ("speed", "memory", "peers", "gpu"))
    parts = speed.get("parts", {})
    sections = [
        HEAD,
        _facts(speed),
        "## Against the usual way\n\n" + shapes(parts.get("shapes")),
        "## A whole round\n\n" + whole_round(parts.get("round")),
        "## Evaluation\n\n" + evaluation(parts.get("evaluation")),
        "## Schedules and metrics\n\n" + extras(_read(results / "extras.json")),
        "## Start-up\n\n" + startup(parts.get("startup")),
        "## Chat models\n\n" + chat_models(_read(results / "chat.json")),
        "## Many clients\n\n" + many(memory.get("rows")),
        "## Other frameworks\n\n" + frameworks(peers),
        "## Real peers\n\n" + real_peers(*(_read(results / f"{name}.json") for name in ("transport", "peers_real"))),
        "## Watching a run\n\n" + live_page(_read(results / "live_page.json")),
        watching_cost(_read(results / "watching_cost.json")),
        "## On a GPU\n\n" + on_gpu(gpu),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _facts(found: dict[str, Any]) -> str:
    if not found:
        return ""
    machine, versions = found["machine"], found["versions"]
    known = (
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['flags']) or 'no wide vector units'})"
    )
    return f"Machine: {known}.  Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}."


def table(head: Sequence[str], rows: Cells) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def shapes(part: dict[str, Any] | None) -> str:
    """Ratios to the naive loop, the processor's own limits, and what became of the targets."""
    if part is None:
        return MISSING.format("bench")
    single = [row for row in part["rows"] if row["threads"] == 1]
    double = [row for row in part["rows"] if row["threads"] > 1]
    adapter, train = part["setup"]["adapter"], part["setup"]["train"]
    text = (
        f"Rank {adapter['rank']}, alpha {adapter['alpha']} on {' and '.join(adapter['targets'])}, head "
        f"{adapter['head']}; {train['optimizer']}, rate {train['lr']}, weight decay {train['weight_decay']}; a ring; "
        f"{single[0]['shape']['steps']} local steps a round.  N is the number of clients, b the rows of a step, s the "
        "tokens that a row has at most; rows are ragged.  Ratios are to the naive loop that pads every row to s; the "
        'column "longest" is against one that pads to the batch\'s longest row.  All ways took turns in one process, '
        f"and a ratio is the median of {part['repetitions']} turns' ratios; least and most in brackets.  "
        f"Load when it began: {part['load_before']:.1f}."
    )
    blocks = [text, "### One thread, processor time", *(_shape(row, "cpu") for row in single), verdicts(part, single)]
    if double:
        blocks += [f"### {double[0]['threads']} threads, wall time", *(_shape(row, "wall") for row in double)]
    return "\n\n".join(blocks)


def _shape(found: dict[str, Any], clock: str) -> str:
    other = "wall" if clock == "cpu" else "cpu"
    aim = clock == "cpu"  # the targets are for one thread
    head = ["way", *(["target"] if aim else []), "ratio", "longest", f"ratio, {_clock(other)}", "samples/s", "GFLOP/s"]
    head += ["of the peak", "differs by"]
    rows = [
        [
            row["variant"],
            *([_times(row["target"])] if aim else []),
            _spread(row[clock]),
            _times(row["to_longest"][clock]["median"]),
            _times(row[other]["median"]),
            f"{row['samples_per_second']:.0f}",
            f"{row['flops_per_second'] / 1e9:.0f}",
            f"{row['share_of_peak']:.0%} of {row['peak']}",
            "" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in found["rows"]
    ]
    peaks = "; ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in found["peaks"].items())
    return f"**{found['name']}**.  Peaks measured in turn with the rest, GFLOP/s: {peaks}.\n\n{table(head, rows)}"


def verdicts(part: dict[str, Any], single: list[dict[str, Any]]) -> str:
    """One line for each target, and why it may be out of reach: what the products themselves gain here."""
    lines = []
    for found in single:
        for row in found["rows"]:
            if row["target"] is not None:
                reached = row["cpu"]["median"]
                word = "target reached" if reached >= row["target"] else "target not reached"
                lines.append(
                    f"- {found['name']}, {row['variant']}: {word}, {_times(reached)} of {_times(row['target'])}."
                )
    head = ["product", "there", *(found["name"] for found in single)]
    gains = [
        [kind, _times(there), *(_times(found["peaks"][kind] / found["peaks"]["fp32"]) for found in single)]
        for kind, there in part["target_peaks"].items()
        if all(kind in found["peaks"] for found in single)
    ]
    text = (
        "The targets come from a prototype on another processor.  How much faster than an ordinary fp32 product a "
        "packed one and a bf16 one are on one core, there and in the runs here:"
    )
    share = (
        "GFLOP/s count what the model needs when every row is padded to s: skipping padding can pass the peak.  "
        f"In fp32, adapters must agree with the naive loop's to {part['tolerance']:.0e} after one round, or nothing is "
        "measured; bf16 rounds more, and its difference is shown.  The two naive loops differ by rounding alone."
    )
    return "\n\n".join(["\n".join(lines), text, table(head, gains), share])


def whole_round(part: dict[str, Any] | None) -> str:
    if part is None:
        return MISSING.format("bench")
    shape, seconds = part["shape"], part["seconds"]
    total = sum(seconds.values())
    rest = (seconds["mix"] + seconds["bookkeeping"]) / total
    rows = [[name, f"{value:.3f}", f"{value / total:.2%}"] for name, value in seconds.items()]
    word = "target reached" if rest <= part["target"] else "target not reached"
    return (
        f"{shape['clients']} clients, batch {shape['batch']}, up to {shape['tokens']} tokens, {shape['steps']} local "
        f"steps, {part['threads']} threads; the second round of a run, wall time.  Bookkeeping is everything but "
        "learning and mixing: diagnostics, and the event that is written.\n\n"
        + table(["part", "seconds", "share"], rows)
        + f"\n\nMixing and bookkeeping take {rest:.2%} of the round; the aim is at most {part['target']:.0%}: {word}."
    )


def evaluation(part: dict[str, Any] | None) -> str:
    if part is None:
        return MISSING.format("bench")
    rows = [
        [
            row["variant"],
            f"{row['seconds']:.1f}",
            _times(row["cpu"]["median"]),
            _times(row["to_longest"]["median"]),
            f"{row['difference']:.0e}",
        ]
        for row in part["rows"]
    ]
    head = ["way", "seconds", "ratio", "longest", "mean loss differs by"]
    return (
        f"{part['clients']} clients, each with its own adapter, on the same {part['evaluated']} rows, "
        f"{part['batch']} at a time; one thread, processor time.\n\n" + table(head, rows)
    )


def extras(found: dict[str, Any]) -> str:
    """What a schedule, further metrics and best rounds take of a run."""
    if not found:
        return MISSING.format("bench")
    run, shape, target = found["run"], found["shape"], found["target"]
    rows = [
        [name, str(each["calls"]), f"{1e3 * each['seconds']:.1f}", f"{each['seconds'] / run:.3%}"]
        for name, each in found["extras"].items()
    ]
    share = sum(each["seconds"] for each in found["extras"].values()) / run
    word = "reached" if share <= target else "not reached"
    return (
        f"{shape['clients']} clients of MiniLM on one thread, {shape['local_steps']} steps of {shape['batch']} rows a "
        f"round, and after each of {found['rounds']} rounds an evaluation of all models on {shape['rows']} rows with "
        f"{found['metrics']} metrics and `eval.select`: {run:.1f} seconds of processor time in all, of which schedule, "
        f"metrics and best rounds take {share:.2%}; the aim is at most {target:.0%}: target {word}.  They are computed "
        "from what the evaluation finds anyway.\n\n" + table(["what", "calls", "ms", "of the run"], rows)
    )


def startup(part: dict[str, Any] | None) -> str:
    if part is None:
        return MISSING.format("bench")
    seconds, target = part["seconds"], part["target"]
    word = "target reached" if seconds["first step"] <= target else "target not reached"
    imports = [[name, f"{value:.2f}"] for name, value in part["imports"].items()]
    return (
        f"From the command `peerlora train` to the first local step: {seconds['first step']:.1f} seconds (median of "
        f"{part['repetitions']}, files in the page cache); the aim is at most {target:g}: {word}.  After "
        f"{seconds['loaded']:.1f} seconds data and model were loaded and checked; the rest is the evaluation before "
        f"training.  Python's own import timer, which slows imports down, counts {part['all_imports']:.1f} seconds of "
        "imports; by package, its own modules only:\n\n" + table(["package", "seconds"], imports)
    )


def chat_models(found: dict[str, Any]) -> str:
    """Tokens per second and memory against the same loop, and what became of the targets."""
    if not found:
        return MISSING.format("bench-chat")
    memory, first = found["memory"], found["rates"][0]
    return (
        f"`{found['model']}`, rank 8 on q and v, answers of chats of 24 to 96 tokens, {first['clients']} clients, "
        f"{first['dtype']} against fp32, threads={first['threads']}, on {found['machine']['processor']}.  "
        f"{'  '.join(_chat_rate(rate) for rate in found['rates'])}  Peak memory of a process with "
        f"{memory['clients']} clients is **{memory['ratio']:.2f}** times that of one plain PEFT model in training "
        f"({memory['bytes']['ours'] / 1e9:.2f} and {memory['bytes']['plain'] / 1e9:.2f} GB), "
        f"{_verdict(memory['ratio'] <= memory['target'], memory['target'], 'at most')}."
    )


def _chat_rate(rate: dict[str, Any]) -> str:
    """Tokens per second at one number of rows."""
    clock = "cpu" if rate["threads"] == 1 else "wall"
    gain, tokens = rate[clock], rate["tokens_per_second"]
    return (
        f"With {rate['batch']} rows a step {tokens['ours']:.0f} tokens a second, the usual way {tokens['plain']:.0f}: "
        f"**{gain['median']:.2f}** times as fast by {_clock(clock)} ({gain['least']:.2f} to {gain['most']:.2f}), "
        f"{_verdict(gain['median'] >= rate['target'], rate['target'], 'at least')}."
    )


def _verdict(reached: bool, target: float, bound: str) -> str:
    return f"target of {bound} {target} {'reached' if reached else 'not reached'}"


def many(rows: list[dict[str, Any]] | None) -> str:
    """Memory and time by the number of clients, with the growth from each size to the next."""
    if not rows:
        return MISSING.format("bench")
    cells, before = [], None
    for row in rows:
        clients, peak, seconds = row["clients"], row["peak_bytes"], sum(row["seconds_per_round"].values())
        growth = [f"{new / old:.2f}" for new, old in zip((clients, peak, seconds), before or (), strict=False)]
        cells.append([str(clients), f"{peak / 1e9:.2f} GB", f"{seconds:.1f}", *(growth or ["", "", ""])])
        before = clients, peak, seconds
    head = ["clients", "peak memory", "seconds a round", "clients grow by", "memory by", "seconds by"]
    text = (
        "From `bench/memory.py`: the whole process, one local step of two rows a client, a ring.  Growth is against "
        "the line above; memory and time are linear or better where they grow by no more than the clients do.\n\n"
    )
    return text + table(head, cells)


MEASURES = ("startup_seconds", "round_seconds", "wall_seconds", "cpu_seconds")


def frameworks(found: dict[str, Any]) -> str:
    """Every runner's figures, and how many times ours they are."""
    if not found:
        return MISSING.format("bench-peers")
    rows = found["rows"]
    head = ["runner", "graph", "start-up, s", "rounds, s", "wall, s", "CPU, s", "peak memory", "sent"]
    head += ["mean accuracy", "worst", "rounds to ours", "wall to ours", "note"]
    blocks = [f"Measured by `{found['command']}`; the same work for every runner.  Ratios above 1: ours takes less."]
    for job in dict.fromkeys(row["job"] for row in rows):
        own = [row for row in rows if row["job"] == job]
        settings = found["job"].get(job)
        blocks.append(f"### Job: {job}" + (f" ({_settings(settings)})" if isinstance(settings, dict) else ""))
        blocks.append(table(head, [_runner(row, _ours(row, own)) for row in own]))
        blocks.append(_verdicts(own, settings if isinstance(settings, dict) else {}))
    if found["unavailable"]:
        reasons = [
            [each["runner"], each["reason"].replace("\n", " ").replace("|", "/")] for each in found["unavailable"]
        ]
        blocks.append("Could not be run here:\n\n" + table(["runner", "reason"], reasons))
    return "\n\n".join(block for block in blocks if block)


FRAMEWORKS = ("flower", "nvflare", "p2pfl")
MANY_ROUNDS, ROUNDS_TARGET, SHORT_TARGET = 100, 10.0, 3.0


def _verdicts(rows: list[dict[str, Any]], job: dict[str, Any]) -> str:
    """What became of the targets: time in the rounds of a long job, time after the start-up of a short one."""
    ours = [row for row in rows if row["runner"].startswith("peerlora")]
    if not ours or "rounds" not in job:
        return ""
    many = job["rounds"] >= MANY_ROUNDS
    target, what = (ROUNDS_TARGET, "in the rounds") if many else (SHORT_TARGET, "after the start-up")
    seconds = {row["runner"]: row["round_seconds"] if many else _after_startup(row) for row in rows}
    best = min(ours, key=lambda row: seconds[row["runner"]])["runner"]
    lines = []
    for framework in FRAMEWORKS:
        known = {name: each for name, each in seconds.items() if name.startswith(framework)}
        if known:
            name = min(known, key=lambda each: known[each])
            gain = known[name] / seconds[best]
            word = "reached" if gain >= target else "not reached"
            lines.append(f"- {best} against {name}, {what}: {gain:.1f} times less time; target of {target:g} {word}.")
    plain = next((row for row in rows if row["runner"] == "plain loop"), None)
    if plain is not None:
        wall = min(row["wall_seconds"] for row in ours)
        word = "not slower" if wall <= plain["wall_seconds"] else "slower"
        lines.append(f"- Whole program against the plain loop: {plain['wall_seconds'] / wall:.2f} times; {word}.")
    return "\n".join(lines)


def _after_startup(row: dict[str, Any]) -> float:
    return row["wall_seconds"] - row["startup_seconds"]


def _ours(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Our own row of the same job: on the same graph if there is one."""
    own = [each for each in rows if each["runner"] == "peerlora"]
    return next((each for each in own if each["graph"] == row["graph"]), own[0] if own else None)


def _runner(row: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    ratios = [_over(row[name], ours[name] if ours else None) for name in ("round_seconds", "wall_seconds")]
    return [
        row["runner"],
        row["graph"],
        *(_number(row[name], ".1f") for name in MEASURES),
        _scaled(row["peak_bytes"], 1e9, "GB"),
        _scaled(row["bytes"], 1e6, "MB"),
        _number(row["accuracy_mean"], ".3f"),
        _number(row["accuracy_worst"], ".3f"),
        *ratios,
        _one_cell(row.get("note") or ""),
    ]


def on_gpu(found: dict[str, Any]) -> str:
    """Every shape's ways, and what became of the targets."""
    if not found:
        return MISSING.format("bench-gpu")
    machine, model, shapes = (
        found["machine"],
        found["model"],
        list(dict.fromkeys(row["shape"] for row in found["rows"])),
    )
    known = ", ".join(
        f"{name.replace('_', ' ')} {_plain(value)}" for name, value in machine.items() if value is not None
    )
    text = (
        f"Measured by `{found['command']}` on: {known}; torch {found['versions']['torch']}, transformers "
        f"{found['versions']['transformers']}.  A RoBERTa of random weights, {model['layers']} blocks of width "
        f"{model['width']}; rank, rates and reference as above, all in turn, wall time of a round.  Ratios are to the "
        "naive loop whose base is in bf16; differences are those of the adapters to the naive fp32 loop's after one "
        "round.  Rows are all of length s, but for the shape that says ragged; operations are counted as if they were."
    )
    blocks = [text, *(_gpu_shape(found, shape) for shape in shapes), _gpu_verdicts(found, shapes)]
    if found["failed"]:
        failed = [[each["shape"], each["variant"], _one_cell(each["reason"])] for each in found["failed"]]
        blocks.append("What could not be measured:\n\n" + table(["shape", "way", "reason"], failed))
    return "\n\n".join(block for block in blocks if block)


def _gpu_shape(found: dict[str, Any], shape: str) -> str:
    head = ["way", "target", "ratio", "ms a round", "samples/s", "of the peak", "memory", "differs by"]
    rows = [
        [
            row["variant"],
            _times(row["target"]),
            "" if row["ratio"] is None else f"**{row['ratio']:.2f}** ({'-'.join(map(_times, row['ratio_range']))})",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['samples_per_second']:.0f}",
            f"{row['share_of_peak']:.0%} of {row['peak']}",
            _scaled(row["peak_memory_bytes"], 1e9, "GB"),
            "" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in found["rows"]
        if row["shape"] == shape
    ]
    peaks = "; ".join(f"{kind} {rate / 1e12:.3g}" for kind, rate in found["peaks"][shape].items())
    return f"**{shape}**.  Peaks measured in turn with the rest, TFLOP/s: {peaks}.\n\n{table(head, rows)}"


def _gpu_verdicts(found: dict[str, Any], shapes: list[str]) -> str:
    """One line for each shape that has a target, about its fastest way."""
    lines, aim = [], found["targets"]["share_of_peak"]
    for shape in shapes:
        rows = [row for row in found["rows"] if row["shape"] == shape and row["target"] and row["ratio"] is not None]
        if rows:
            best = max(rows, key=lambda row: row["ratio"])
            words = ["reached" if good else "not reached" for good in _reached(best, aim)]
            gain = f"{_times(best['ratio'])} of {_times(best['target'])}"
            lines.append(
                f"- {shape}, {best['variant']}: target {words[0]}, {gain}; "
                f"share of the bf16 peak {best['share_of_peak']:.0%}, target of {aim:.0%} {words[1]}."
            )
    return "\n".join(lines)


def _reached(row: dict[str, Any], share: float) -> tuple[bool, bool]:
    return row["ratio"] >= row["target"], row["share_of_peak"] >= share


def _clock(name: str) -> str:
    return {"cpu": "processor time", "wall": "wall"}[name]


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _spread(found: dict[str, float]) -> str:
    return f"**{found['median']:.2f}** ({found['least']:.2f}-{found['most']:.2f})"


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _scaled(value: float | None, unit: float, name: str) -> str:
    return "" if value is None else f"{value / unit:.2f} {name}"


def _over(value: float | None, ours: float | None) -> str:
    return f"{value / ours:.1f}" if value is not None and ours else ""


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _one_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    options.out.write_text(page(options.results), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
