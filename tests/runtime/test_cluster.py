"""Runs whose clients are held by workers, here threads: the bits of one process, and what becomes of lost workers."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cases import others_slow
from cluster_runs import assert_same_events, both, on_workers, same_bits, threads
from flow_runs import tiny
from peerlora.algorithms import build_algorithm
from peerlora.config.cluster import ClusterConfig
from peerlora.config.loading import load_config
from peerlora.errors import ClusterError, CompositionError, RunError, Stopped, WorkersLost
from peerlora.runs.events import Resumed, RoundDone, RunFinished, RunStarted, Warned
from peerlora.runs.resume import check_same
from peerlora.runs.store import read_events
from peerlora.runtime.cluster.checks import refuse_config
from peerlora.runtime.cluster.group import ThreadEngine, ThreadGroup
from peerlora.runtime.cluster.run import compose_driver, resume, simulate
from peerlora.runtime.simulate import resume as resume_here
from peerlora.runtime.simulate import simulate as simulate_here

SGD = "train.optimizer=sgd"
CLOCK = ["clock.speed=[1,0.2,1,0.5,1,0.3]", "clock.deadline=3", "clock.bandwidth=20000"]
CASES = {
    "ring": ["topology=ring"],
    "three workers": ["topology=ring", "workers=3"],
    "six workers": ["topology=path", "workers=6", "train.dtype=fp32"],
    "drawn graphs": ["topology.kind=random", "topology.p=0.4"],
    "dense": ["topology=complete", "train.dtype=fp32"],
    "optimiser kept": ["train.optimizer_state=keep"],
    "drop-outs": ["topology.drop_clients=0.3"],
    "clock": [*CLOCK],
    "clock, SALF": ["algorithm={name: salf, depth: deadline, deadline: 1.5}", *CLOCK],
    "away": ["clock.away=[{client: 1, leave: 1, back: 3}]"],
    "unequal ranks": ["algorithm.name=decaf", "adapter.rank=[1,2,3,1,2,3]"],
    "hetlora": ["algorithm.name=hetlora", "adapter.rank=[1,2,3,1,2,3]", "topology=complete"],
    "codec": ["exchange.codec={kind: top-k, share: 0.3}"],
    "quantised": ["exchange.codec=qsgd"],
    "robust": ["topology=complete", "exchange.robust=trimmed-mean"],
    "clipped": ["topology=complete", "exchange.robust=clipped-gossip", "workers=3"],
    "flipped labels": ["topology=complete", "adversary={attack: label-flip, clients: [5]}", "exchange.robust=median"],
    "private head": ["adapter.head=private"],
    "label prior": ["train.label_prior=pooled"],
    "pooled class weights": ["train.class_weights=pooled"],
    "own rows": ["eval.own=true"],
    "patience": ["eval.select={}", "eval.patience=1", "eval.every=1", "algorithm.name=dec-lora"],
    "batches": ["train.batch=[1,2,3,4,2,1]"],
    "push-sum": ["algorithm.name=sgp", SGD, "topology={kind: exponential, weights: push-sum}"],
    "target": ["algorithm.name=flood", "topology=ring"],
    "cached": ["algorithm.name=cached-dfl", "topology=ring"],
    "merging": ["algorithm.name=rac-lora", "topology=complete"],
    "flora": ["algorithm.name=flora", "topology=complete"],
    "fedex": ["algorithm.name=fedex-lora", "topology=complete"],
    "hetlora on a ring": ["algorithm.name=hetlora", "adapter.rank=[1,2,3,1,2,3]", "topology=ring", "workers=3"],
    "rotation on a ring": ["algorithm.name=fedrot-lora", "topology=ring", "workers=3"],
    "svd": ["algorithm.name=flexlora", "topology=complete"],
    "rotation": ["algorithm.name=fedrot-lora", "topology=complete", "workers=3"],
    "fair": ["algorithm.name=lora-fair", "topology=complete"],
    "merging where degrees differ": ["algorithm.name=flora", "topology=star", "workers=3"],
    "flora on drawn graphs": ["algorithm.name=flora", "topology.kind=random", "topology.p=0.4"],
    "fedex on a star": ["algorithm.name=fedex-lora", "topology=star"],
    "fedex on drawn graphs": ["algorithm.name=fedex-lora", "topology.kind=random", "topology.p=0.4", "workers=3"],
    "labels": ["task.kind=multi-label", "data.label=several", "eval.metrics=[micro-f1]"],
}


@pytest.mark.parametrize("words", others_slow([(words,) for words in CASES.values()], (0, 7, 12, 14)), ids=list(CASES))
def test_workers_get_the_bits_of_one_process(config, tmp_path, words):
    workers = next((int(word.split("=")[1]) for word in words if word.startswith("workers=")), 2)
    chosen = [word for word in words if not word.startswith("workers=")]
    base = ["clients=6", "train.rounds=4", "train.block=1" if workers > 3 else "train.block=2"]
    there, here = both(config("bert", *base, *chosen), tmp_path, workers)
    assert same_bits(here.adapters, there.adapters)
    assert_same_events(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "task"), [("bert", "token-classification"), ("llama", "chat"), ("t5", "sequence-to-sequence")]
)
def test_workers_get_the_bits_of_one_process_of_words_chats_and_pairs(
    config, tagged, chats, pairs, tmp_path, model, task
):
    rows = {"token-classification": tagged, "chat": chats, "sequence-to-sequence": pairs}[task]
    words = [f"task.kind={task}", f"data.train=jsonl:{rows}", "data.label=null", "data.max_length=32"]
    there, here = both(config(model, *words, "algorithm.name=dec-lora", "train.block=2"), tmp_path)
    assert same_bits(here.adapters, there.adapters)
    assert_same_events(tmp_path)


class Dying(ThreadEngine):
    """Workers of which one is lost in a call of some number."""

    def __init__(self, calls):
        self.calls, self.started = list(calls), 0

    def start(self, workers, settings):
        self.started += 1
        group = ThreadGroup(workers)
        left = self.calls.pop(0) if self.calls else None
        if left is not None:
            call, count = group.call_each, iter(range(left, -1, -1))

            def dying(method, arguments):
                if next(count, 0) == 0:
                    raise WorkersLost(f"worker 1 was lost to {method}")
                return call(method, arguments)

            group.call_each = dying
        return group


@pytest.mark.parametrize("calls", others_slow([([9],), ([2],), ([14, 8],), ([5, 5, 5],)], (0,)))
def test_lost_workers_cost_no_bit(config, tmp_path, calls):
    chosen = config("bert", "clients=4", "train.rounds=4", "train.block=2", "train.optimizer_state=keep")
    expected = simulate_here(chosen, tmp_path / "here", report=False)
    engine = Dying(calls)
    found = on_workers(chosen, tmp_path / "there", engine=lambda *settings: engine)
    assert engine.started == len(calls) + 1
    assert same_bits(found.adapters, expected.adapters)
    lost = [each for each in read_events(tmp_path / "there") if isinstance(each, Warned) and "was lost" in each.message]
    assert lost and "go on from the last checkpoint" in lost[0].message


def test_workers_that_are_lost_too_often_end_the_run_which_can_be_resumed_in_one_process(config, tmp_path):
    chosen = config("bert", "clients=4", "train.rounds=4", "train.block=2")
    expected = simulate_here(chosen, tmp_path / "here", report=False)
    engine = Dying([14, 6])
    with pytest.raises(RunError, match="go on with: peerlora train --resume"):
        on_workers(chosen, tmp_path / "there", engine=lambda *settings: engine, retries=1)
    found = resume_here(tmp_path / "there", report=False)
    assert any(isinstance(each, Resumed) for each in read_events(tmp_path / "there"))
    assert same_bits(found.adapters, expected.adapters)


@pytest.mark.parametrize("call", [0, 2])
def test_workers_that_are_lost_before_anything_is_kept_say_to_start_again(config, tmp_path, call):
    """As they build their blocks, and in round 0."""
    with pytest.raises(RunError, match="worker 1 was lost to .*; start again$") as told:
        on_workers(config("bert"), tmp_path / "run", engine=lambda *settings: Dying([call]), retries=0)
    assert told.value.exit_code == 2 and not (tmp_path / "run").exists()

    class Gone(Dying):
        def await_machines(self, settings, tell):
            raise ClusterError("too few cores; add machines")

    with pytest.raises(RunError, match="^too few cores; add machines, and start again$") as told:
        on_workers(config("bert"), tmp_path / "run", engine=lambda *settings: Gone([call]))
    assert told.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_workers_that_are_lost_as_they_start_are_replaced_as_often_as_the_settings_say(config, tmp_path):
    chosen, told = config("bert", "train.rounds=2", "train.block=2"), []
    expected = simulate_here(chosen, tmp_path / "here", report=False)
    engine = Dying([0, 0, 5])
    found = on_workers(chosen, tmp_path / "there", engine=lambda *settings: engine, sinks=[told.append])
    assert engine.started == 4 and same_bits(found.adapters, expected.adapters)
    warned = [each.message for each in told if isinstance(each, Warned)]
    assert warned.count("worker 1 was lost to build; new workers start") == 2
    with pytest.raises(RunError, match="; start again$"):  # those of the start count, too
        on_workers(chosen, tmp_path / "again", engine=lambda *settings: Dying([0, 2]), retries=1)


def test_workers_that_are_lost_as_a_resumed_run_starts_are_replaced(config, tmp_path):
    chosen, asked = config("bert", "train.rounds=4", "train.block=2"), iter([False, True])
    expected = simulate_here(chosen, tmp_path / "here", report=False)
    with pytest.raises(Stopped):
        on_workers(chosen, tmp_path / "there", stop=lambda: next(asked), retries=1)
    with pytest.raises(RunError, match="go on with: peerlora train --resume") as told:
        resume(tmp_path / "there", engine=lambda *settings: Dying([0, 0]), report=False)
    assert told.value.exit_code == 2
    found = resume(tmp_path / "there", engine=lambda *settings: Dying([0]), report=False)
    assert same_bits(found.adapters, expected.adapters)


def test_what_workers_wait_for_is_told_as_a_run_starts_and_as_it_is_resumed(config, tmp_path):
    class Waiting(ThreadEngine):
        def start(self, workers, settings):
            self.tell("workers wait for cores and GPUs that others use")
            return super().start(workers, settings)

    first, later, engine = [], [], lambda *settings: Waiting()
    with pytest.raises(Stopped):
        on_workers(config("bert"), tmp_path / "run", engine=engine, sinks=[first.append], stop=lambda: True)
    resume(tmp_path / "run", engine=engine, sinks=[later.append], report=False)
    for told in (first, later):
        assert "others use" in " ".join(each.message for each in told if isinstance(each, Warned))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stopped_run_goes_on_with_another_number_of_workers(config, tmp_path, workers):
    chosen = config("bert", "clients=6", "train.rounds=4", "train.block=2", "exchange.codec={kind: top-k, share: 0.3}")
    expected = simulate_here(chosen, tmp_path / "here", report=False)
    asked = iter([False, True])
    with pytest.raises(Stopped):
        on_workers(chosen, tmp_path / "there", stop=lambda: next(asked))
    settings = ClusterConfig(workers=workers, timeout=60)
    found = resume(tmp_path / "there", where=lambda stored: settings, engine=threads, report=False)
    assert same_bits(found.adapters, expected.adapters)


def test_the_section_that_a_resumption_asks_for_takes_the_place_of_the_stored_one(config, tmp_path):
    words = ["clients=6", "train.rounds=9", "train.block=2", "threads=1"]
    with pytest.raises(Stopped):
        on_workers(config("bert", *words), tmp_path / "run", stop=lambda: True)
    asked = []

    def resumed(expected):
        with pytest.raises(Stopped):
            resume(tmp_path / "run", expected=expected, engine=started, stop=lambda: True, report=False)
        return asked.pop() if asked else None

    def started(settings, exchanged_bytes):
        asked.append(settings.workers)
        return ThreadEngine()

    def with_word(word):
        return lambda stored: load_config(stored.model_dump(mode="json"), [word])

    assert resumed(with_word("cluster.workers=3")) == 3
    whole = config("bert", *words, "cluster={workers: 1}")
    assert resumed(lambda stored: whole) == 1
    silent = whole.model_dump(mode="json", exclude={"cluster"})
    assert resumed(lambda stored: load_config(silent)) == 2
    assert resumed(with_word("cluster=null")) is None


@pytest.mark.parametrize("workers", [2, None])
def test_a_run_is_resumed_with_the_threads_of_its_config_for_which_those_of_workers_stood_in(config, tmp_path, workers):
    chosen = config("bert", "train.rounds=4", "train.block=2", "threads=4")
    with pytest.raises(Stopped):
        on_workers(chosen, tmp_path / "run", stop=lambda: True)
    assert load_config(tmp_path / "run" / "config.yaml").threads == 1

    def resumed(expected):
        section = workers and ClusterConfig(workers=workers, timeout=60)
        return resume(
            tmp_path / "run",
            where=lambda stored: section,
            expected=lambda stored: expected,
            engine=threads,
            report=False,
        )

    with pytest.raises(RunError, match="threads: 1 then, 3 now"):
        resumed(chosen.model_copy(update={"threads": 3}))
    assert resumed(chosen).summary["rounds"] == 4


def test_the_threads_of_runs_without_a_cluster_and_of_older_ones_on_it(config):
    chosen = config("bert", "threads=4")
    older = SimpleNamespace(facts={}, folder="run")
    check_same(chosen.model_copy(update={"cluster": ClusterConfig(), "threads": 1}), chosen, older, None)
    for facts in ({}, {"asked_threads": 4}):
        here = SimpleNamespace(facts=facts, folder="run")
        with pytest.raises(RunError, match="threads: 1 then, 4 now"):
            check_same(chosen.model_copy(update={"threads": 1}), chosen, here, None)


def test_a_run_begun_in_one_process_is_not_divided(config, tmp_path):
    asked = iter([True])
    with pytest.raises(Stopped):
        simulate_here(config("bert"), tmp_path / "run", stop=lambda: next(asked), report=False)
    with pytest.raises(RunError, match="train.block"):
        resume(tmp_path / "run", where=lambda stored: ClusterConfig(), engine=threads)
    assert resume(tmp_path / "run", report=False).summary["rounds"] == 3


class GpuDouble(ThreadEngine):
    """Workers that compute on the processor what their config says is for a GPU; those of a worker choose bf16."""

    def __init__(self, half=()):
        self.half, self.asked = half, []

    def start(self, workers, settings):
        group = ThreadGroup(workers)
        call = group.call_each

        def here(method, arguments):
            if method != "build":
                return call(method, arguments)
            ((task, *_), *_) = arguments
            self.asked.append(task.speed)
            local = replace(task, config=task.config.model_copy(update={"device": "cpu"}))
            found = call(method, [(local,)] * workers)
            for worker in self.half if task.speed is None else ():
                found[worker] |= {"speed": {"dtype": "bf16", "packed": True}}
            return found

        group.call_each = here
        return group


def test_a_driver_without_a_gpu_resumes_a_run_of_workers_that_have_one(config, tmp_path):
    words = ["clients=4", "train.rounds=4", "train.block=2", "train.optimizer_state=keep", "train.dtype=fp32"]
    expected = simulate_here(config("bert", *words), tmp_path / "here", report=False)
    settings, asked = ClusterConfig(workers=2, timeout=60, gpus_per_worker=1), iter([False, True])
    with pytest.raises(Stopped):
        simulate(
            config("bert", *words, "device=cuda", "eval.select={}"),
            tmp_path / "there",
            cluster=settings,
            engine=lambda *_: GpuDouble(),
            stop=lambda: next(asked),
            report=False,
        )
    found = resume(tmp_path / "there", engine=lambda *_: GpuDouble(), report=False)
    assert same_bits(found.adapters, expected.adapters)
    assert load_config(tmp_path / "there" / "config.yaml").device == "cuda"


def test_all_workers_take_the_speed_of_the_first(config):
    machines, settings = GpuDouble(half=[1]), ClusterConfig(workers=2, timeout=60, gpus_per_worker=1)
    chosen = config("bert", "clients=4", "train.rounds=1", "train.block=2", "device=cuda")
    driver = compose_driver(chosen.model_copy(update={"cluster": settings}))
    group, speed = driver.start(machines)
    group.close()
    assert machines.asked == [None, speed] and speed.dtype == "fp64"


@pytest.mark.parametrize(
    ("device", "gpus", "reason"),
    [
        ("cpu", 1, "1 GPUs per worker asked for, and device=cpu"),
        ("cuda", 0, "device=cuda given, and workers get no GPU"),
    ],
)
def test_gpus_that_nobody_uses_or_gets_are_refused(config, tmp_path, device, gpus, reason):
    settings = ClusterConfig(gpus_per_worker=gpus)
    with pytest.raises(CompositionError, match=reason):
        simulate(config("bert", f"device={device}"), tmp_path / "run", cluster=settings, engine=threads)
    assert not (tmp_path / "run").exists()


REFUSED = {
    "asynchronous": (["algorithm.name=ad-psgd", "train.local_steps=1", SGD], "no common round"),
    "relayed": (["exchange.relay={}", "algorithm.name=dec-lora"], "exchange.relay cannot run on a cluster"),
    "ranks of merges": (
        ["algorithm.name=flora", "topology=complete", "adapter.rank=[1,2,3,3]"],
        "unequal ranks",
    ),
    "attackers": (["adversary={attack: sign-flip, clients: [1]}"], "needs all clients in one process"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_cluster_cannot_do_is_refused_before_anything_is_written(config, tmp_path, name):
    words, reason = REFUSED[name]
    with pytest.raises(CompositionError, match=reason):
        on_workers(config("bert", *words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_policies_and_generated_answers_are_refused(config, chats, tmp_path):
    with pytest.raises(CompositionError, match="task.kind=flow-policy cannot run on a cluster"):
        on_workers(tiny(), tmp_path / "run")
    chosen = ["task.kind=chat", f"data.train=jsonl:{chats}", "data.label=null", "eval.generate={}"]
    with pytest.raises(CompositionError, match="eval.generate cannot run on a cluster"):
        on_workers(config("llama", *chosen), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_privacy_is_refused(config):
    chosen = config("bert", "algorithm.name=dec-lora", "privacy={epsilon: 8}")
    with pytest.raises(CompositionError, match="privacy cannot run on a cluster"):
        refuse_config(chosen, build_algorithm("dec-lora", {}))


@pytest.mark.parametrize("given", ["partitioner", "resources", "learner"])
def test_objects_of_this_process_are_refused(config, tmp_path, given):
    with pytest.raises(CompositionError, match=f"{given}.* given; workers of a cluster"):
        on_workers(config("bert"), tmp_path / "run", **{given: object()})


def test_a_budget_in_epochs_is_the_one_of_a_single_process(config, tmp_path):
    tree = config("bert", "train.block=2").model_dump(mode="json")
    del tree["train"]["rounds"]
    chosen = load_config(tree, ["train.epochs=2"])
    with pytest.raises(Stopped):
        on_workers(chosen, tmp_path / "there", stop=lambda: True)
    found = resume(tmp_path / "there", engine=threads, expected=lambda stored: chosen, report=False)
    expected = simulate_here(chosen, tmp_path / "here", report=False)
    assert found.summary["rounds"] == expected.summary["rounds"] > 0
    assert same_bits(found.adapters, expected.adapters)


def test_trackers_get_the_run_from_the_driver_anew_when_workers_are_lost(config, tmp_path, monkeypatch):
    engine, opened, told = Dying([9]), [], []

    @contextmanager
    def tracked(chosen, store, sinks):
        opened.append((chosen.track.to, store.folder, len(told)))
        yield (*sinks, told.append)

    monkeypatch.setattr("peerlora.runtime.cluster.run.tracked_sinks", tracked)
    monkeypatch.setattr("peerlora.runtime.cluster.run.check_trackers", lambda chosen: None)
    chosen = config("bert", "train.rounds=2", "track=tensorboard")
    on_workers(chosen, tmp_path / "run", engine=lambda *settings: engine)
    (*_, first), (*where, second) = opened
    assert where == [["tensorboard"], tmp_path / "run"] and first == 0
    assert isinstance(told[0], RunStarted) and isinstance(told[second], Resumed) and isinstance(told[-1], RunFinished)
    assert {each.round for each in told if isinstance(each, RoundDone)} == {0, 1}


def test_the_config_of_a_run_has_the_graphs_and_the_threads_that_decide_its_bits(config, tmp_path):
    on_workers(config("bert", "clients=8", "threads=null", "train.rounds=1"), tmp_path / "run")
    stored = load_config(tmp_path / "run" / "config.yaml")
    assert (stored.train.block, stored.threads, stored.cluster.workers) == (4, 1, 2)
    notes = read_events(tmp_path / "run")[0].notes
    assert "2 workers hold [4, 4] clients" in notes, notes
    assert json.loads((tmp_path / "run" / "run.json").read_text())["speed"]["dtype"] == "fp64"
