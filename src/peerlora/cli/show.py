"""``peerlora show``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from peerlora.cli.options import AsJson, print_json

FILES = ("report.html", "metrics.parquet", "events.jsonl", "config.yaml", "summary.json", "adapters", "checkpoints")


def command(
    run: Annotated[
        Path, typer.Argument(help="a run's folder, or one that holds several: a demo's, launched peers, a comparison")
    ],
    json: AsJson = False,
) -> None:
    """Show how a run stands: its progress, its results, its files."""
    if _holds_run(run) or not _runs_in(run):
        summary = _describe(run)
        print_json(summary) if json else _print([summary], [""])
        return
    several = [_describe(each) for each in _runs_in(run)]
    if json:
        report = run / "report.html"
        print_json({"runs": several, "report": str(report) if report.is_file() else None})
    else:
        _print(several, [each.name for each in _runs_in(run)])


def _holds_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _runs_in(folder: Path) -> list[Path]:
    """The runs right below a folder; of a comparison, its trials."""
    return sorted(each.parent for each in [*folder.glob("*/run.json"), *folder.glob("cells/*/run.json")])


def _describe(run: Path) -> dict[str, Any]:
    """The summary of a run, what is left to do, and the files it holds."""
    from peerlora.config.loading import load_config
    from peerlora.runs.events import RunStarted, Warned
    from peerlora.runs.metrics import select_events, summarise
    from peerlora.runs.store import read_events, resume_command

    events = read_events(run)
    summary = summarise(events)
    started = [*select_events(events, RunStarted), None][0]
    finished = (run / "summary.json").is_file()
    return summary | {
        "run": str(run),
        "finished": finished,
        "paths": started.paths if started else {},
        "rounds_planned": load_config(run / "config.yaml").train.rounds,
        "warnings": [event.message for event in select_events(events, Warned)],
        "resume": None if finished else resume_command(run),
        "files": [name for name in FILES if (run / name).exists()],
    }


def _print(summaries: list[dict[str, Any]], names: list[str]) -> None:
    from peerlora.cli.progress import print_summary
    from peerlora.runs.report import describe_speed_paths

    begun = [(name or each["method"], each) for name, each in zip(names, summaries, strict=True) if each["method"]]
    if begun:
        print_summary(begun)
    for each in summaries:
        state = "finished" if each["finished"] else "not finished"
        print(f"{each['run']}: {state}, {each['rounds']} of {each['rounds_planned']} rounds")
        print(f"  holds {', '.join(each['files'])}")
        for warning in each["warnings"]:
            print(f"  warning: {warning}")
        for path in describe_speed_paths(each["paths"]):
            print(f"  {path}")
        if each["resume"]:
            print(f"  go on with: {each['resume']}")
