"""What docs/performance.md says of watching a run: the live page in a browser, and what a run pays for it."""

from typing import Any

_NAMES = {
    "first_paint": "first paint",
    "curves": "all curves drawn",
    "update": "an update after a round, on the page's thread",
    "delay": "from the line in the log to the page",
}


def live_page(found: dict[str, Any]) -> str:
    """The measured page; a line that says how to get it where there are no numbers."""
    if not found:
        return "Not measured on this machine: run `python bench/live_page.py`."
    lines = ["| | median, ms | largest, ms | target of the median, ms |", "| --- | --- | --- | --- |"]
    for key, name in _NAMES.items():
        each, target = found["milliseconds"][key], found["targets"].get(key)
        shown = "" if target is None else f"{target:.0f}, {'reached' if each['median'] <= target else 'not reached'}"
        lines.append(f"| {name} | {each['median']:.0f} | {each['most']:.0f} | {shown} |")
    machine = found["machine"]
    busy = f", beside other work (load {machine['load']:.1f})" if machine["load"] > 1.5 else ""
    text = (
        f"`peerlora watch` on a run of {found['clients']:,} clients and {found['rounds']} rounds, in headless Chromium "
        f"on the same {machine['cores']} cores{busy}: the page opened {found['repeats']} times, then "
        f"{found['updates']} rounds appended to its log one by one.  The server looks at the log, and the page "
        "hears of it, every quarter of a second, which the last line has in it."
    )
    return text + "\n\n" + "\n".join(lines)


def watching_cost(found: dict[str, Any]) -> str:
    """What a run pays for the page and for trackers; nothing where it was not measured."""
    if not found:
        return ""
    lines = [
        "| | once, s | in rounds, s | of the run's processor time | processes of its own, s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, each in found.items():
        share = f"{each['rounds'] / each['run']:.2%}"
        beside = f"{each['processes']:.1f}" if each.get("processes") else ""
        lines.append(f"| {case} | {each['once']:.1f} | {each['rounds']:.2f} | {share} | {beside} |")
    return "What a run pays for being watched, from `bench/watching_cost.py`:\n\n" + "\n".join(lines)
