"""The studies of docs/results: grids of `peerlora compare` whose rows share loss, schedule, memory and work.

    python bench/studies.py methods --data FOLDER
    python bench/studies.py --list [--write]

FOLDER holds glue/sst2, glue/qnli, glue/qqp and extra/ag_news, each with train.parquet and validation.parquet; studies
of flow policies read nothing of it, so any folder will do.  Every finished run is a line in bench/results/outcomes, by
which a study that was stopped goes on, here or in another checkout.  At the end the table goes to bench/results and
between the study's markers of its page in docs/results.  A study runs in one process of a checkout at a time, or with
``--workers N`` N cells at once, to the same results; several studies may run at once.  With ``--dtype bf16`` the base
model of all rows is in bf16, which is faster where the processor has it; a study goes on in the precision of its
finished runs.  ``--list`` prints what each study takes (runs, training rows, core-hours), how many runs have finished,
and what the seeds can show; with ``--write`` it goes to docs/results/studies.md.  ``paper-budget`` and
``paper-budget-sparse`` search no rates: give each as ``--rate 'ROW=RATE'``, or run alternating-96-cosine before.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import study_grids
import study_policies
import study_privacy
import study_systems
import study_tasks
from markers import insert
from outcomes import OutcomeLines, without_folder
from peerlora.config.cluster import ClusterConfig
from peerlora.config.loading import load_config
from peerlora.errors import Stopped
from peerlora.experiments.comparison import Comparison
from peerlora.experiments.grid import load_grid
from peerlora.experiments.markdown import markdown
from peerlora.experiments.rate_search import RateSearch, choose_rates
from peerlora.experiments.resource_cache import ResourceCache
from peerlora.experiments.runner import Callbacks, search_rates, start_grid
from peerlora.experiments.statistics import Outcome, compare, find_metrics
from peerlora.experiments.trial_pool import TrialPool, trial_pools
from peerlora.experiments.trials import plan_trials, search_labels
from peerlora.files import write_atomically
from peerlora.runs.resume import run_facts
from study_base import PAGES, PLACE, RESULTS, Study, Tree, in_dtype, split_labels
from study_costs import Look, cost_table
from study_effort import count_effort, list_studies, seeds_table
from study_notes import dtype_note, further_table, machine_note, missing_note, tuning_table
from study_tuning import Tried, tuned_grids

PAPER = {"paper-budget": 0.1, "paper-budget-sparse": 0.02}
STUDIES: dict[str, Study] = {
    **study_grids.STUDIES,
    **{name: study_grids.paper_budget(p, {}) for name, p in PAPER.items()},
    **study_systems.STUDIES,
    **study_tasks.STUDIES,
    **study_privacy.STUDIES,
    **study_policies.STUDIES,
}


@dataclass(frozen=True)
class Finished:
    """A study's runs, all parts together."""

    result: Comparison
    grids: list[Tree]
    tried: Tried
    further: Comparison | None
    """The same runs, against the study's further baseline."""
    looks: dict[str, dict[int, list[Look]]]
    """Row -> seed -> evaluations; empty of a run that diverged."""
    runs: list[dict[str, Any]]
    """Row, seed, rate, purpose and machine of every run, those of the search included."""
    missing: list[str]
    """Rows of grids whose runs have not all finished."""


Pool = Callable[[ResourceCache], TrialPool] | None
"""What gives a grid workers that run several cells at once; None: one after another in this process."""


def conduct(name: str, study: Study, data: Path, pool: Pool = None, only_finished: bool = False) -> Finished:
    """Run what is missing of a study, and compare its rows.

    ``only_finished``: run nothing, and leave out grids whose runs have not all finished.
    """
    study.prepare(data)
    kept, tried = OutcomeLines(name, data, study.judged), {}
    make = partial(run, study=name, outcomes=kept, pool=pool, only_finished=only_finished)
    grids = study.parts(data)
    if study.tuned:
        grids, tried = tuned_grids(grids, study.tuned, partial(make, search_rates))
    outcomes: list[Outcome] = []
    searches, looks, missing = [], {}, []
    for tree in grids:
        part = load_grid(tree)
        try:
            own = make(start_grid, tree)
        except Stopped:
            if not only_finished:
                raise
            missing += list(tree["axes"]["system"])
            continue
        searches += [replace(each, labels=split_labels(study, each.labels)) for each in own.searches]
        searched_on = search_labels(part)
        for trial in plan_trials(part, choose_rates(part, own.searches)).trials:
            if (outcome := kept.find(trial)) is not None:
                on = searched_on.get(trial.setting)
                on = None if on is None else split_labels(study, on)
                outcomes.append(replace(outcome, labels=split_labels(study, outcome.labels), searched_on=on))
                looks.setdefault(trial.setting, {})[trial.config.seed] = kept.looks(trial)
    if missing and not any(study.baseline.items() <= each.labels.items() for each in outcomes):
        raise SystemExit(f"{name}: the runs of its baseline have not finished, so there is nothing to compare with")
    result = compared(name, study, outcomes, searches)
    further = compared(name, replace(study, baseline=study.further), outcomes) if study.further else None
    return Finished(result, grids, tried, further, looks, kept.used, missing)


def compared(name: str, study: Study, outcomes: Sequence[Outcome], searches: Sequence[RateSearch] = ()) -> Comparison:
    """Compare the rows of a study; SystemExit where not one run ended."""
    metrics = find_metrics(outcomes)
    if not metrics:
        raise SystemExit(f"{name}: every reported run diverged, so there is nothing to compare")
    lines = compare(outcomes, study.baseline)
    return Comparison(PLACE / name, lines, metrics, study.baseline, searches, details=str(result_file(name)))


def result_file(name: str) -> Path:
    """The file with all numbers of a study's table."""
    return RESULTS / f"study-{name}.json"


def run(
    start: Callable[..., Any], tree: Tree, study: str, outcomes: OutcomeLines, pool: Pool, only_finished: bool
) -> Any:
    """Run the cells of a grid that have no outcome yet; ``start``: ``start_grid``, or ``search_rates``.

    Raises Stopped where there are such cells and ``only_finished`` is given.
    """
    folder = PLACE / study

    @contextmanager
    def watch(status):
        print(f"{study}: cell {status.number} of {status.trials}, {status.trial}", flush=True)
        yield lambda event: None

    shutil.rmtree(folder, ignore_errors=True)
    return start(load_grid(tree), folder, Callbacks(watch, lambda: only_finished, outcomes, pool))


@contextmanager
def only_process(study: str) -> Iterator[None]:
    """Hold a study for this process; SystemExit where another one in this checkout does."""
    PLACE.mkdir(parents=True, exist_ok=True)
    with (PLACE / f"{study}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it does
        except BlockingIOError:
            raise SystemExit(
                f"the study {study} is being run by another process in this checkout; wait for it, or run another "
                "study meanwhile"
            ) from None
        yield


def write(name: str, study: Study, found: Finished, data: Path) -> None:
    """Put the table into bench/results and the study's page."""
    told = found.result.as_json()
    written = {"date": str(date.today()), "facts": run_facts(load_config(found.grids[0]["base"]))}
    written |= {"grids": without_folder(without_folder(found.grids, data), Path.cwd())}
    tried = {row: {value: each.as_json() for value, each in own.items()} for row, own in found.tried.items()}
    written |= {"tuned": tried, "rows": told["rows"], "search": told["search"], "runs": found.runs}
    if found.further:
        written["further"] = {"baseline": dict(found.further.baseline), "rows": found.further.as_json()["rows"]}
    written["looks"] = {
        row: {seed: [vars(look) for look in own] for seed, own in seeds.items()} for row, seeds in found.looks.items()
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(result_file(name), json.dumps(written, indent=1) + "\n")
    notes = (dtype_note(found.grids), machine_note(found.runs), missing_note(found.missing))
    text = markdown(found.result) + tuning_table(found.tried) + "".join(notes)
    if found.further:
        text += "\n" + further_table(found.further)
    if study.costs:
        text += "\n" + cost_table(found.looks, study.baseline["system"])
    insert(PAGES / study.page, f"study-{name}", text)


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
    parser.add_argument("--workers", type=int, default=1, help="cells at once, each on a core of this machine's own")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the base model; else as in finished runs")
    parser.add_argument("--finished", action="store_true", help="run nothing: write the table of what has finished")
    parser.add_argument("--list", action="store_true", help="print what each study takes")
    parser.add_argument("--write", action="store_true", help="with --list: into docs/results/studies.md, too")
    options = parser.parse_args()
    if not options.list and (options.study is None or options.data is None):
        parser.error("name a study and --data FOLDER, or give --list")
    if options.write and not options.list:
        parser.error("--write belongs to --list; a study's table is written in any case")
    if options.rate and options.study not in PAPER:
        parser.error(f"--rate is for {' and '.join(PAPER)}; other studies search their rates")
    if options.finished and options.workers > 1:
        parser.error("--finished runs nothing; drop --workers")
    if options.dtype and options.study == "dtype":
        parser.error("--dtype: the rows of this study are about it; drop it")
    if options.workers < 1:
        parser.error(f"--workers {options.workers} given; expected 1 or more")
    return options


def write_list(options: Any) -> None:
    """Print what each study takes and what seeds can show; with ``--write`` into docs/results/studies.md, too."""
    any_rate, data = dict.fromkeys(study_grids.PAPER, 1e-3), options.data or Path("data")
    papers = {name: study_grids.paper_budget(p, any_rate) for name, p in PAPER.items()}
    studies = {**STUDIES, **papers}
    efforts = {name: count_effort(study, data) for name, study in studies.items()}
    tables = {"study-list": list_studies(studies, efforts, data), "study-seeds": seeds_table(efforts.values())}
    for name, table in tables.items():
        print(table)
        if options.write:
            insert(PAGES / "studies.md", name, table)


def command(options: Any) -> str:
    """The command by which a study that was stopped goes on."""
    rates = [word for rate in options.rate for word in ("--rate", rate)]
    further = ["--workers", str(options.workers)] if options.workers > 1 else []
    further += ["--dtype", options.dtype] if options.dtype else []
    return shlex.join(["python", "bench/studies.py", options.study, "--data", str(options.data), *rates, *further])


def workers(number: int) -> AbstractContextManager[Pool]:
    """Start so many workers on this machine, one thread each; none for one, which is this process."""
    return nullcontext() if number == 1 else trial_pools(ClusterConfig(workers=number), warn)


def warn(text: str) -> None:
    """Say what workers met with."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run a study, or list all."""
    options = read_options()
    if options.list:
        return write_list(options)
    name, study = options.study, STUDIES[options.study]
    if name in PAPER:
        study = study_grids.paper_budget(PAPER[name], given_rates(options.rate))
    study = in_dtype(study, options.dtype or OutcomeLines(name, options.data).dtype)
    try:
        with only_process(name), workers(options.workers) as pool:
            write(name, study, conduct(name, study, options.data, pool, options.finished), options.data)
    except (Stopped, KeyboardInterrupt):
        finished = len(OutcomeLines(name, options.data))
        print(f"stopped; {finished:,} runs of {name} are kept; go on with: {command(options)}", file=sys.stderr)
        raise SystemExit(Stopped.exit_code) from None


if __name__ == "__main__":
    main()
