"""Grids on tiny models: what is checked, what is searched, what is kept, and what a kill costs."""

import csv
import json
import multiprocessing
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import peerlora.experiments.runner as runner_module
import peerlora.runtime.resources as resources_module
from peerlora.errors import CompositionError, ConfigError, PeerloraError, RunError, Stopped
from peerlora.experiments.grid import load_grid
from peerlora.experiments.rate_search import choose_rates, gather_searches
from peerlora.experiments.resource_cache import ResourceCache
from peerlora.experiments.runner import Callbacks, resume_grid, start_grid
from peerlora.experiments.statistics import Outcome
from peerlora.experiments.trials import expand_settings, plan_search, plan_trials
from peerlora.runtime.compose import compose
from peerlora.runtime.export import export_from_run
from peerlora.runtime.resources import BaseModelCache, load_resources
from peerlora.runtime.simulate import simulate
from peerlora.train.kernels import prefix_cache
from peerlora.train.kernels.prefix_cache import PrefixCache
from waiting import until

METHODS = [{"algorithm": {"name": "adf-lora", "interval": 1}}, "dec-lora"]


@contextmanager
def unwatched(status):
    yield lambda event: None


QUIET = Callbacks(unwatched)


def tree_of(model, texts, **changes):
    """Two methods and two seeds, with evaluation rows of their own."""
    base = {
        "model": {"source": model},
        "adapter": {"rank": 3, "alpha": 6},
        "data": {
            "train": f"jsonl:{texts}",
            "eval": f"jsonl:{texts}",
            "text": ["text"],
            "label": "label",
            "max_length": 12,
        },
        "clients": 4,
        "partition": "iid",
        "topology": "ring",
        "train": {"rounds": 2, "local_steps": 2, "batch": 4, "lr": 0.01, "dtype": "fp64"},
        "eval": {"every": 2},
        "checkpoint": {"every": 1},
        "threads": 1,
    }
    return {"base": base, "axes": {"method": METHODS}, "seeds": [0, 1], "baseline": {"method": "dec-lora"}} | changes


@pytest.fixture
def tree(models, texts, cache):
    return lambda **changes: tree_of(models("bert"), texts, **changes)


@pytest.fixture(scope="module")
def whole(models, texts, tmp_path_factory):
    """The grid above, run once; tests look only."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return start_grid(load_grid(tree_of(models("bert"), texts)), folder / "out", QUIET)


def files(folder):
    """What must not change when nothing is computed anew."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/*") if path.name != "adapters"}


def numbers(folder):
    """The long table without clocks."""
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    return [{**row, "value": None} if "seconds" in row["metric"] else row for row in rows]


def test_a_grid_is_run_and_written_down(whole, tree):
    out = whole.folder
    trials = sorted(path.name for path in (out / "cells").iterdir())
    assert trials == [f"{method}__seed-{seed}" for method in ("adf-lora-interval=1", "dec-lora") for seed in (0, 1)]
    assert all((out / "cells" / name / "summary.json").is_file() for name in trials)
    assert [line.setting for line in whole.lines] == [setting.name for setting in expand_settings(load_grid(tree()))]
    assert {path.name for path in out.iterdir()} == {
        *("cells", "figures", "grid.yaml", "results.parquet", "table.csv", "table.md", "table.tex", "report.html"),
    }
    table = pq.read_table(out / "results.parquet")
    assert table.column_names[:4] == ["method", "purpose", "seed", "learning rate"]
    summary = json.loads((out / "cells" / trials[0] / "summary.json").read_text())
    own = [
        row["value"]
        for row in table.to_pylist()
        if row["metric"] == "own" and row["round"] == 2 and row["seed"] == 0 and row["method"] == "adf-lora interval=1"
    ]
    assert sum(own) / len(own) == pytest.approx(summary["accuracy"]["own_mean"])


def test_finished_cells_are_never_computed_again(whole):
    before, table = files(whole.folder), numbers(whole.folder)
    resume_grid(whole.folder, lambda stored: stored, QUIET)
    assert before and files(whole.folder) == before and numbers(whole.folder) == table


def test_a_cell_of_a_grid_is_the_run_alone(whole, tree, tmp_path):
    """Sharing rows between cells changes nothing, to the bit; and `peerlora export` finds what it needs."""
    trial = plan_trials(load_grid(tree())).trials[-1]
    alone = simulate(trial.config, tmp_path / "alone").run
    here, there = (run / "adapters" / "all.safetensors" for run in (whole.folder / trial.folder, alone))
    assert here.read_bytes() == there.read_bytes(), trial.name
    made = export_from_run(whole.folder / trial.folder, tmp_path / "adapter", 2)
    written = alone / "adapters" / "client-02" / "adapter_model.safetensors"
    assert (made / "adapter_model.safetensors").read_bytes() == written.read_bytes()


def test_a_stopped_grid_names_the_command_and_goes_on(whole, tree, tmp_path):
    out = tmp_path / "out"
    asked = iter([False] * 3)  # before the first cell, after its first round, before the second cell
    with pytest.raises(Stopped) as told:
        start_grid(load_grid(tree()), out, Callbacks(unwatched, lambda: next(asked, True)))
    assert "stopped after 1 of 4 cells" in str(told.value) and f"peerlora compare --resume {out}" in str(told.value)
    assert (out / "table.md").is_file()  # of what there is
    resume_grid(out, lambda stored: stored, QUIET)
    assert numbers(out) == numbers(whole.folder)


class Kept(dict):
    """Outcomes as lines, by the name of the trial."""

    def find(self, trial):
        return Outcome.from_json(self[trial.name]) if trial.name in self else None

    def keep(self, trial, outcome):
        self[trial.name] = outcome.to_json()


def test_outcomes_kept_in_place_of_run_folders_give_the_same_comparison_elsewhere(whole, tree, tmp_path):
    """What is kept is never run again."""
    kept, asked = Kept(), iter([False] * 3)
    with pytest.raises(Stopped):
        start_grid(load_grid(tree()), tmp_path / "one", Callbacks(unwatched, lambda: next(asked, True), kept))
    assert len(kept) == 1 and not [*(tmp_path / "one" / "cells").glob("*/summary.json")]
    first = set(kept)

    @contextmanager
    def watched(status):
        assert status.trial not in first
        yield lambda event: None

    found = start_grid(load_grid(tree()), tmp_path / "other", Callbacks(watched, outcomes=kept))
    assert len(kept) == 4 and not [*(tmp_path / "other" / "cells").glob("*")]
    for line, expected in zip(found.lines, whole.lines, strict=True):
        assert line.labels == expected.labels
        for name in ("mean client", "worst client", "averaged model", "bytes sent", "training rows"):
            assert line.estimates[name] == expected.estimates[name]


def test_a_changed_grid_is_refused_with_the_differences(whole):
    before = files(whole.folder)
    words = ["seeds=[0,1,2]", "train.lr=0.5"]
    with pytest.raises(RunError) as told:
        resume_grid(whole.folder, lambda stored: load_grid(stored.model_dump(), words), QUIET)
    for part in ("seeds: [0, 1] then, [0, 1, 2] now", "base.train.lr: 0.01 then, 0.5 now", "--out"):
        assert part in str(told.value)
    assert files(whole.folder) == before


def test_a_grid_whose_rows_changed_is_refused(tree, texts, tmp_path):
    own = tmp_path / "rows.jsonl"
    shutil.copy(texts, own)
    asked = iter([False] * 3)
    changed = tree()
    changed["base"]["data"] |= {"train": f"jsonl:{own}", "eval": f"jsonl:{own}"}
    with pytest.raises(Stopped):
        start_grid(load_grid(changed), tmp_path / "out", Callbacks(unwatched, lambda: next(asked, True)))
    rows = own.read_text().splitlines()
    own.write_text("\n".join([*rows[1:], rows[0]]) + "\n")
    with pytest.raises(RunError, match="rows.jsonl changed since"):
        resume_grid(tmp_path / "out", lambda stored: stored, QUIET)


def test_every_refused_cell_is_listed_with_its_reason_and_nothing_written(tree, tmp_path):
    graphs = [{"kind": "edges", "edges": [[0, 1], [2, 3]]}, "ring"]
    axes = {"method": ["dec-lora", "adf-lra"], "topology": graphs, "clients": [4, 2]}
    grid = load_grid(tree(axes=axes))
    with pytest.raises(CompositionError) as told:
        start_grid(grid, tmp_path / "out", QUIET)
    message = str(told.value)
    assert "of 16 cells cannot run" in message.splitlines()[0]
    assert message.count("did you mean 'adf-lora'") == 1  # cells of one reason stand together
    for part in ("dec-lora, ring, 2, seed 0; dec-lora, ring, 2, seed 1", "ring of 2 clients", "disconnected"):
        assert part in message, message
    assert not (tmp_path / "out").exists()


def test_the_same_run_twice_is_refused(tree, tmp_path):
    grid = load_grid(tree(axes={"topology": {"one": "ring", "other": {"kind": "ring"}}}, baseline={}))
    with pytest.raises(CompositionError, match="other, seed 0.*is the same run as one, seed 0"):
        start_grid(grid, tmp_path / "out", QUIET)


def test_rates_are_searched_per_method_on_rows_set_aside_from_the_training_rows(tree):
    grid = tree(search={"rates": [0.001, 0.05], "seeds": [7]}, axes={"method": METHODS, "topology": ["random", "ring"]})
    del grid["base"]["train"]["lr"]
    searched = plan_search(load_grid(grid)).trials
    assert [trial.setting for trial in searched] == [*["adf-lora interval=1, random"] * 2, *["dec-lora, random"] * 2]
    assert [trial.config.train.lr for trial in searched] == [0.001, 0.05] * 2
    for trial in searched:
        assert trial.config.data.eval is None and trial.config.data.holdout == 0.01 and trial.config.seed == 7
        assert trial.config.train.rounds == 2


def test_the_rate_that_was_found_is_used_wherever_the_settings_agree(tree, tmp_path):
    grid = tree(search={"rates": [0.001, 0.05], "seeds": [7], "holdout": 0.3}, axes={"topology": ["random", "ring"]})
    grid |= {"seeds": [0], "baseline": {}}
    del grid["base"]["train"]["lr"]
    result = start_grid(load_grid(grid), tmp_path, QUIET)
    summaries = {path.name: json.loads((path / "summary.json").read_text()) for path in tmp_path.glob("search/*")}
    assert sorted(summaries) == ["random__lr-0.001__seed-7", "random__lr-0.05__seed-7"]
    reached = {rate: summaries[f"random__lr-{rate:g}__seed-7"]["accuracy"]["own_mean"] for rate in (0.001, 0.05)}
    best = max((0.001, 0.05), key=lambda rate: reached[rate])
    assert [line.rate for line in result.lines] == [best, best]
    assert [line.rate_from for line in result.lines] == ["", "random"]
    for name in ("table.md", "report.html"):
        assert (tmp_path / name).read_text().count(f"{best:g} (of random; at the edge)") == 1
    assert [row["rate of"] for row in csv.DictReader((tmp_path / "table.csv").read_text().splitlines())][-1] == "random"
    assert set(pq.read_table(tmp_path / "results.parquet")["purpose"].to_pylist()) == {"search", "report"}


def test_a_rate_that_diverges_is_not_taken_and_a_run_that_does_is_reported(tree, tmp_path):
    grid = tree(axes={}, baseline={}, seeds=[0], search={"rates": [1e30, 0.01], "holdout": 0.3})
    grid["base"]["train"] |= {"dtype": "fp32"}
    del grid["base"]["train"]["lr"]
    result = start_grid(load_grid(grid), tmp_path / "out", QUIET)
    assert result.lines[0].rate == 0.01
    assert "diverged" in (tmp_path / "out" / "report.html").read_text()
    grid["base"]["train"]["lr"] = 1e30
    alone = start_grid(load_grid(grid | {"search": {}}), tmp_path / "alone", QUIET)
    assert alone.lines[0].diverged == 1 and not alone.lines[0].estimates
    grid["base"]["train"].pop("lr")
    with pytest.raises(ConfigError, match="every rate"):
        start_grid(load_grid(grid | {"search": {"rates": [1e30], "holdout": 0.3}}), tmp_path / "none", QUIET)


def test_the_lowest_of_equal_rates_is_taken(tree):
    grid = tree(axes={}, baseline={}, search={"rates": [0.1, 0.01]})
    del grid["base"]["train"]["lr"]
    outcomes = [Outcome("base", {}, 0, rate, "", {"mean client": 0.5}) for rate in (0.1, 0.01)]
    grid = load_grid(grid)
    assert choose_rates(grid, gather_searches(grid, outcomes)) == {"base": 0.01}


@pytest.fixture
def growing(tree):
    """One method whose score rises with the rate, whatever it learns, until it falls."""
    grid = tree(axes={}, baseline={}, seeds=[0], search={"rates": [0.01, 0.02], "seeds": [7], "holdout": 0.3})
    del grid["base"]["train"]["lr"]
    grid["search"] |= {"grow": True}
    return grid


@pytest.fixture
def scored(monkeypatch):
    """Replace the scores of searched runs by what a test says of their rates."""

    def by(score):
        def read(trial, folder):
            found = read_outcome(trial, folder)
            return replace(found, measures={**found.measures, "mean client": score(trial.config.train.lr)})

        read_outcome = runner_module._read_outcome
        monkeypatch.setattr(runner_module, "_read_outcome", read)

    return by


def test_rates_grow_until_the_best_lies_inside(growing, scored, tmp_path):
    scored(lambda rate: -abs(rate - 0.08))
    result = start_grid(load_grid(growing), tmp_path, QUIET)
    (search,) = result.searches
    assert [each.rate for each in search.rates] == [0.01, 0.02, 0.04, 0.08, 0.16] and search.edge == 0
    assert len(list(tmp_path.glob("search/*/summary.json"))) == 5 and result.lines[0].rate == 0.08
    assert "at the edge" not in (tmp_path / "table.md").read_text()
    found = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {row["learning rate"] for row in found if row["purpose"] == "search"} == {0.01, 0.02, 0.04, 0.08, 0.16}


def test_rates_stop_growing_at_the_most_with_a_warning(growing, scored, tmp_path):
    scored(lambda rate: -rate)
    growing["search"]["most"] = 3
    result = start_grid(load_grid(growing), tmp_path, QUIET)
    (search,) = result.searches
    assert [each.rate for each in search.rates] == [0.005, 0.01, 0.02] and search.edge == -1
    for name in ("table.md", "report.html"):
        assert "0.005 (at the edge)" in (tmp_path / name).read_text()
    assert result.as_json()["search"][0]["at_edge"] is True


@pytest.mark.slow
def test_a_grid_whose_rates_grow_is_resumed_to_the_same(growing, scored, tmp_path):
    scored(lambda rate: -abs(rate - 0.04))
    whole = start_grid(load_grid(growing), tmp_path / "whole", QUIET)
    asked = iter([False] * 7)  # before a cell and after each round: the third, of the grown rate, is cut off
    with pytest.raises(Stopped, match="stopped after 2 of 4 cells"):
        start_grid(load_grid(growing), tmp_path / "out", Callbacks(unwatched, lambda: next(asked, True)))
    resumed = resume_grid(tmp_path / "out", lambda stored: stored, QUIET)
    assert resumed.searches == whole.searches and numbers(tmp_path / "out") == numbers(tmp_path / "whole")


def test_a_folder_of_a_version_without_new_settings_of_the_search_is_resumed(tree, tmp_path):
    grid = tree(axes={}, baseline={}, seeds=[0], search={"rates": [0.001, 0.05], "seeds": [7], "holdout": 0.3})
    del grid["base"]["train"]["lr"]
    first = start_grid(load_grid(grid), tmp_path, QUIET)
    stored = yaml.safe_load((tmp_path / "grid.yaml").read_text())
    for name in ("grow", "most", "ties"):
        del stored["search"][name]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    before = files(tmp_path)
    again = resume_grid(tmp_path, lambda stored: stored, QUIET)
    assert files(tmp_path) == before and again.searches == first.searches and again.lines == first.lines


def run_alone(tree, folder):
    """What the process that is killed does."""
    start_grid(load_grid(tree), folder, QUIET)


@pytest.mark.slow
def test_killed_and_resumed(whole, tree, tmp_path):
    """SIGKILL in the middle of the second cell; the result is that of an undisturbed grid."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft", "transformers.models.bert.modeling_bert", "peerlora.experiments.runner"])
    out = tmp_path / "out"
    process = context.Process(target=run_alone, args=(tree(), out))
    process.start()
    until(lambda: len(list(out.glob("cells/*/run.json"))) >= 2, process.is_alive, every=0.002)
    process.kill()
    process.join()
    finished = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/summary.json")}
    assert process.exitcode == -signal.SIGKILL and 1 <= len(finished) < 4, (process.exitcode, finished)
    resume_grid(out, lambda stored: stored, QUIET)
    again = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/summary.json")}
    assert len(again) == 4 and finished.items() <= again.items()
    assert numbers(out) == numbers(whole.folder)


@pytest.fixture
def loads(monkeypatch):
    """The seeds that a base model was loaded for."""
    found = []
    load = resources_module.load_base
    monkeypatch.setattr(
        resources_module, "load_base", lambda *arguments: found.append(arguments[3]) or load(*arguments)
    )
    return found


@pytest.mark.parametrize("kind", ["bert", "roberta"])  # heads of one module and of two
@pytest.mark.parametrize("words", [["adapter.head=frozen"], ["train.dtype=bf16"], ["train.fast=false"]])
def test_a_base_is_loaded_once_and_its_head_drawn_for_every_seed(kind, words, config, loads):
    shared = ResourceCache()
    first = config(kind, *words)
    resources = shared.resources(first)
    for seed in (0, 1, 2, 0):
        again = config(kind, *words, f"seed={seed}")
        here = {
            name: value.clone() for name, value in compose(again, resources=resources).model.base.state_dict().items()
        }
        assert len(loads) == 1
        alone = compose(again, resources=replace(resources, bases=None)).model.base.state_dict()
        assert here.keys() == alone.keys() and all(torch.equal(here[name], alone[name]) for name in alone), seed
        loads.pop()


def test_a_base_whose_weights_lack_more_than_the_head_is_loaded_for_every_seed(config, models, tmp_path, loads):
    folder = shutil.copytree(models("bert"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "pooler" not in name}, folder / "model.safetensors")
    trials = [config("bert", f"model.source={folder}", f"seed={seed}") for seed in (0, 1)]
    shared = ResourceCache()
    bases = [compose(trial, resources=shared.resources(trial)).model.detach().state_dict() for trial in trials]
    assert loads == [0, 1]
    assert not torch.equal(bases[0]["bert.pooler.dense.weight"], bases[1]["bert.pooler.dense.weight"])


def test_a_head_that_is_not_what_its_seed_draws_is_loaded_anew(config, loads):
    shared = ResourceCache()
    first = config("bert")
    compose(first, resources=shared.resources(first)).model.detach().classifier.weight.data.add_(1)
    other = config("bert", "seed=1")
    compose(other, resources=shared.resources(other))
    assert loads == [0, 1]


def test_a_whole_grid_loads_its_base_once(tree, tmp_path, whole, loads):
    """Check, search and cells of all seeds; with the result of the grid above."""
    start_grid(load_grid(tree()), tmp_path, QUIET)
    assert loads == [0]
    assert numbers(tmp_path) == numbers(whole.folder)


def test_what_frozen_blocks_give_is_computed_once_for_all_cells(tree, tmp_path, monkeypatch):
    computed, compute = [], PrefixCache._compute
    monkeypatch.setattr(PrefixCache, "_compute", lambda *own: computed.append(1) or compute(*own))
    base = tree()["base"] | {"adapter": {"rank": 2, "targets": ".*layer.1.attention.self.(query|value)"}}
    base["train"] = base["train"] | {"rounds": 1, "local_steps": 1}
    found, counts = [], []
    for share in (False, True):
        grid = load_grid(tree(base=base, seeds=[0], share_prefix=share))
        found.append(start_grid(grid, tmp_path / str(share), QUIET))
        counts.append(len(computed))
    chunks = 2 * -(-len(load_resources(plan_trials(grid).trials[0].config).train_data) // prefix_cache._CHUNK)
    assert counts[1] - counts[0] <= chunks
    for plain, shared in zip(*(each.lines for each in found), strict=True):
        assert shared.estimates["mean client"] == plain.estimates["mean client"]
        assert shared.estimates["consensus of B·A"].mean == pytest.approx(
            plain.estimates["consensus of B·A"].mean, rel=1e-9
        )


def test_one_base_serves_cells_one_after_another_to_the_bit(config, tmp_path):
    """Also behind a run with other dropout, head or seed, and behind one that could not be composed."""
    resources = replace(load_resources(config("bert")), bases=BaseModelCache())
    variants = (["adapter.dropout=0.2", "model.dropout=0.1"], ["adapter.head=frozen"], ["seed=1"], ["train.dtype=fp32"])
    alone = simulate(config("bert"), tmp_path / "alone").run / "adapters" / "all.safetensors"
    for number, words in enumerate(variants):
        compose(config("bert", *words), resources=resources)
        with pytest.raises(PeerloraError):
            compose(config("bert", "adapter.rank=[1,2,3,4]"), resources=resources)
        run = simulate(config("bert"), tmp_path / str(number), resources=resources).run
        assert (run / "adapters" / "all.safetensors").read_bytes() == alone.read_bytes(), words
