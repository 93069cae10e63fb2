"""The studies of docs/results: grids of `peerlora compare` whose rows share loss, schedule, memory and work.

    python bench/studies.py methods --data FOLDER
    python bench/studies.py --list [--write]

FOLDER holds glue/sst2, glue/qnli, glue/qqp and extra/ag_news, each with train.parquet and validation.parquet.  Every
finished run is a line in bench/results/outcomes, by which a study that was stopped goes on, here or in another
checkout.  At the end the table goes to bench/results and between the study's markers of its page in docs/results.
``--list`` prints how many runs and training rows each study takes and how many runs have finished; with ``--write`` it
goes to docs/results/studies.md.  ``paper-budget`` and ``paper-budget-sparse`` search no rates: give each as
``--rate 'ROW=RATE'``, or run alternating-96-cosine before.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import study_grids
import study_privacy
import study_systems
import study_tasks
from markers import insert
from outcomes import OutcomeLines, without_folder
from peerlora.config.loading import load_config
from peerlora.experiments.comparison import Comparison
from peerlora.experiments.grid import load_grid
from peerlora.experiments.markdown import markdown
from peerlora.experiments.rate_search import choose_rates
from peerlora.experiments.runner import Callbacks, start_grid
from peerlora.experiments.statistics import Outcome, compare
from peerlora.experiments.trials import plan_search, plan_trials, search_labels
from peerlora.runs.resume import run_facts
from study_base import PAGES, PLACE, RESULTS, Study, Tree, training_rows
from study_costs import Look, cost_table
from study_tuning import tuned_grids, tuning_grid

PAPER = {"paper-budget": 0.1, "paper-budget-sparse": 0.02}
STUDIES: dict[str, Study] = {
    **study_grids.STUDIES,
    **{name: study_grids.paper_budget(p, {}) for name, p in PAPER.items()},
    **study_systems.STUDIES,
    **study_tasks.STUDIES,
    **study_privacy.STUDIES,
}


@dataclass(frozen=True)
class Finished:
    """A study's runs, all parts together."""

    result: Comparison
    grids: list[Tree]
    tried: dict[str, dict[float, float]]
    """Row -> value of its tuned setting -> the best mean client that it reached on rows set aside."""
    looks: dict[str, dict[int, list[Look]]]
    """Row -> seed -> evaluations, of the runs that ended."""


def conduct(name: str, study: Study, data: Path) -> Finished:
    """Run what is missing of a study, and compare its rows."""
    study.prepare(data)
    kept, tried = OutcomeLines(name, data, study.judged), {}
    grids = study.parts(data)
    if study.tuned:
        grids, tried = tuned_grids(grids, study.tuned, lambda tree: run(name, tree, kept))
    outcomes: list[Outcome] = []
    searches, looks = [], {}
    for tree in grids:
        own, part = run(name, tree, kept), load_grid(tree)
        searches += [replace(each, labels=split_labels(study, each.labels)) for each in own.searches]
        searched_on = search_labels(part)
        for trial in plan_trials(part, choose_rates(part, own.searches)).trials:
            if (outcome := kept.find(trial)) is not None:
                on = searched_on.get(trial.setting)
                on = None if on is None else split_labels(study, on)
                outcomes.append(replace(outcome, labels=split_labels(study, outcome.labels), searched_on=on))
                if found := kept.looks(trial):
                    looks.setdefault(trial.setting, {})[trial.config.seed] = found
    known = next(each for each in outcomes if each.metric)
    lines = compare(outcomes, study.baseline)
    result = Comparison(PLACE / name, lines, known.metric, known.higher_is_better, study.baseline, searches)
    return Finished(result, grids, tried, looks)


def split_labels(study: Study, labels: Mapping[str, str]) -> dict[str, str]:
    """A row's labels by axis, where its one label stands for two."""
    if study.split is None:
        return dict(labels)
    return dict(zip(study.split, labels["system"].split(": "), strict=True))


def run(study: str, tree: Tree, outcomes: OutcomeLines) -> Comparison:
    """Run the cells of a grid that have no outcome yet."""
    folder = PLACE / study

    @contextmanager
    def watch(status):
        print(f"{study}: cell {status.number} of {status.trials}, {status.trial}", flush=True)
        yield lambda event: None

    shutil.rmtree(folder, ignore_errors=True)
    return start_grid(load_grid(tree), folder, Callbacks(watch, outcomes=outcomes))


def write(name: str, study: Study, found: Finished, data: Path) -> None:
    """Put the table into bench/results and the study's page."""
    told = found.result.as_json()
    written = {"date": str(date.today()), "facts": run_facts(load_config(found.grids[0]["base"]))}
    written |= {"grids": without_folder(without_folder(found.grids, data), Path.cwd()), "tuned": found.tried}
    written |= {"rows": told["rows"], "search": told["search"]}
    written["looks"] = {
        row: {seed: [vars(look) for look in own] for seed, own in seeds.items()} for row, seeds in found.looks.items()
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"study-{name}.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    text = markdown(found.result) + tuning_note(found.tried)
    if study.costs:
        text += "\n" + cost_table(found.looks, study.baseline["system"])
    insert(PAGES / study.page, f"study-{name}", text)


def tuning_note(tried: Mapping[str, Mapping[float, float]]) -> str:
    """Every value of every tuned setting, with what it reached."""
    rows = [
        f"{row}: " + ", ".join(f"{value:g} ({score:.3f})" for value, score in sorted(scores.items()))
        for row, scores in tried.items()
    ]
    return f"\nTuned on rows set aside, value (best mean client of any rate): {'; '.join(rows)}.\n" if rows else ""


@dataclass(frozen=True)
class Effort:
    """What a study takes, at least: rates that grow come on top."""

    runs: int
    rows: int
    """For training."""


def count_effort(study: Study, data: Path) -> Effort:
    """Count the runs of a study, and the rows that they train on."""
    configs = []
    for tree in study.parts(data):
        systems = tree["axes"].get("system", {})
        chosen = [(row, each) for row, each in (study.tuned or {}).items() if row in systems]
        tuning = [tuning_grid(tree, row, each.setting, each.values) for row, each in chosen]
        for part in map(load_grid, [tree, *tuning]):
            planned = [plan_trials(part), plan_search(part)]
            configs += [trial.config for each in planned for trial in each.trials]
    return Effort(len(configs), sum(map(training_rows, configs)))


def list_studies(studies: Mapping[str, Study], data: Path) -> str:
    """Write one line per study, as a table."""
    lines = ["| study | page | runs, at least | training rows, at least | finished runs |", "| --- " * 5 + "|"]
    for name, study in studies.items():
        effort, finished = count_effort(study, data), len(OutcomeLines(name, data))
        page = f"[{study.page}]({study.page})"
        lines.append(f"| {name} | {page} | {effort.runs:,} | {effort.rows:,} | {finished:,} |")
    return "\n".join(lines) + "\n"


def given_rates(words: Sequence[str]) -> dict[str, float]:
    """Row -> rate, of words such as ``adf-lora, T = 1=0.004``; SystemExit for others."""
    found = {}
    for word in words:
        row, equals, rate = word.rpartition("=")
        try:
            found[row] = float(rate)
        except ValueError:
            equals = ""
        if not equals or row not in study_grids.PAPER or not 0 < found[row] < float("inf"):
            known = ", ".join(study_grids.PAPER)
            raise SystemExit(f"--rate {word!r} given; expected ROW=RATE, a rate above 0 and a row of: {known}")
    return found


def read_options() -> Any:
    """Read the command line; SystemExit with what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rate", action="append", default=[], help="of paper-budget: ROW=RATE, once per row")
    parser.add_argument("--list", action="store_true", help="print what each study takes")
    parser.add_argument("--write", action="store_true", help="with --list: into docs/results/studies.md, too")
    options = parser.parse_args()
    if not options.list and (options.study is None or options.data is None):
        parser.error("name a study and --data FOLDER, or give --list")
    if options.write and not options.list:
        parser.error("--write belongs to --list; a study's table is written in any case")
    if options.rate and options.study not in PAPER:
        parser.error(f"--rate is for {' and '.join(PAPER)}; other studies search their rates")
    return options


def main() -> None:
    """Run a study, or list all."""
    options = read_options()
    if options.list:
        any_rate = dict.fromkeys(study_grids.PAPER, 1e-3)
        papers = {name: study_grids.paper_budget(p, any_rate) for name, p in PAPER.items()}
        table = list_studies({**STUDIES, **papers}, options.data or Path("data"))
        print(table)
        if options.write:
            insert(PAGES / "studies.md", "study-list", table)
        return
    name, study = options.study, STUDIES[options.study]
    if name in PAPER:
        study = study_grids.paper_budget(PAPER[name], given_rates(options.rate))
    write(name, study, conduct(name, study, options.data), options.data)


if __name__ == "__main__":
    main()
