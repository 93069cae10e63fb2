"""Joined loops: held factors, optimiser memory, local rules, errors, resumes, and what is refused."""

import threading

import pytest
import torch
from in_memory import network, together
from loop_rigs import (
    TOLERANCE,
    alone,
    batches,
    joined,
    optimizer_of,
    own_settings,
    peft_model,
    plain_loops,
    read,
    require_equal,
    take_steps,
)
from plain import loss_of
from test_plain_loops import TRAIN

from cases import ROW_METHODS, others_slow
from peerlora.algorithms import REGISTRY
from peerlora.algorithms.base import is_asynchronous
from peerlora.config.loading import load_config
from peerlora.errors import (
    CompositionError,
    ConfigError,
    DivergenceError,
    ModelError,
    PeerloraError,
    QuorumMissed,
    RunError,
)
from peerlora.lora.peft_model import PeftAdapter
from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.loop import check_settings
from peerlora.runtime.simulate import simulate
from peerlora.train.loop_driver import LoopDriver
from peerlora.train.loop_learner import LoopLearner

pytestmark = pytest.mark.usefixtures("no_reports")
ONE = [*TRAIN, "clients=1", "topology.kind=complete", "peer.join=1"]


@pytest.fixture
def lone(config, tmp_path):
    """A config of one client, with its model, optimiser and federation for the rows."""

    def make(*words, seed=0):
        chosen = config("bert", "algorithm.name=dec-lora", *ONE, *words)
        federation = compose(chosen)
        model = peft_model(chosen, federation)
        return chosen, federation, model, optimizer_of(chosen, model)

    return make


def factor(model, block):
    return [value for name, value in model.named_parameters() if f"lora_{block}" in name]


def step_on(peer, lone):
    """One optimiser step on the first rows."""
    chosen, federation, model, optimizer = lone
    loss_of(model, federation.train_data, batches(chosen, federation, 0)[0], "classification").backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # a held factor must not move by a gradient of zero either
    return peer.step()


def test_a_held_factor_is_neither_decayed_nor_moved_by_old_moments(lone, tmp_path):
    made = lone(
        "algorithm.name=adf-lora", "algorithm.interval=1", "train.optimizer_state=keep", "train.weight_decay=0.5"
    )
    _, _, model, optimizer = made
    with alone(made[0], tmp_path, model, optimizer) as peer:
        trained = ["B", "A", "B", "A"]
        for block in trained:
            held = factor(model, "A" if block == "B" else "B")
            before = [value.detach().clone() for value in held]
            memory = [dict(optimizer.state.get(value, {})) for value in held]
            memory = [{name: each.clone() for name, each in own.items()} for own in memory]
            assert [step_on(peer, made), peer.over] == [False, False]
            for value, was, own in zip(held, before, memory, strict=True):
                assert torch.equal(value, was)
                assert all(torch.equal(optimizer.state[value][name], each) for name, each in own.items())
            assert step_on(peer, made)
        assert peer.over and memory[0], "B had moments when it was held last"
    assert all(value.requires_grad for value in (*factor(model, "A"), *factor(model, "B")))


def test_a_held_factor_stays_held_where_peft_lets_it_train_again(lone, tmp_path):
    made = lone("algorithm.name=ffa-lora", "train.weight_decay=0.5", "train.rounds=1")
    _, _, model, optimizer = made
    with alone(made[0], tmp_path, model, optimizer) as peer:
        before = [value.detach().clone() for value in factor(model, "A")]
        with model.disable_adapter():
            pass
        assert all(value.requires_grad for value in factor(model, "A")), "PEFT's own doing"
        while not peer.over:
            step_on(peer, made)
    assert all(torch.equal(value, was) for value, was in zip(factor(model, "A"), before, strict=True))


@pytest.mark.parametrize(("state", "expected"), [("round", [0, 0, 0]), ("phase", [2, 0, 2]), ("keep", [2, 4, 6])])
def test_the_optimiser_s_memory_begins_anew_as_the_settings_say(lone, tmp_path, state, expected):
    method = ["algorithm.name=adf-lora", "algorithm.interval=2"] if state == "phase" else []
    made = lone(*method, f"train.optimizer_state={state}")
    _, _, model, optimizer = made
    seen = []
    with alone(made[0], tmp_path, model, optimizer) as peer:
        while not peer.over:
            if step_on(peer, made) and not peer.over:
                steps = [int(own["step"]) for own in optimizer.state.values() if "step" in own]
                seen.append(max(steps, default=0))
    assert seen == expected


def test_steps_are_those_of_the_optimiser_not_batches(lone, tmp_path):
    made = lone("train.rounds=2")
    chosen, federation, model, optimizer = made
    ended = []
    with alone(chosen, tmp_path, model, optimizer) as peer:
        for number, rows in enumerate(batches(chosen, federation, 0) * 3, start=1):
            (loss_of(model, federation.train_data, rows, "classification") / 3).backward()
            if number % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
            ended.append(peer.step())
    assert [number for number, end in enumerate(ended, start=1) if end] == [6, 12]


def test_logs_and_evaluations_of_the_loop_are_events(lone, tmp_path):
    made = lone("train.rounds=3")
    with alone(made[0], tmp_path, *made[2:]) as peer:
        peer.log({"eval_loss": 3.0, "eval_f1": 0.1}, rows=7)
        while not peer.over:
            peer.log({"loss": 2.0, "reward": torch.tensor(1.5), "text": "no number"})
            step_on(peer, made)
        peer.log({"eval_loss": 1.0, "eval_f1": 0.4})
    events = read_events(peer.result.run)
    rounds, scores = select_events(events, RoundDone), select_events(events, Evaluated)
    assert [done.loss for done in rounds] == [[2.0]] * 3 and rounds[0].measures["reward"] == 1.5
    assert [(each.round, each.own, each.rows, each.final) for each in scores] == [
        (0, [3.0], 7, False),
        (3, [1.0], 0, True),
    ]
    assert scores[1].metrics == {"own": {"f1": [0.4]}}
    assert (peer.result.run / "adapters" / "client-00" / "adapter_model.safetensors").is_file()
    found = peer.result.adapters
    assert torch.equal(found.flat[0], read(made[2]))


@pytest.mark.parametrize(("quorum", "missed"), [(0.5, True), (0, False)])
def test_a_loop_without_its_neighbours_misses_the_quorum_when_it_is_closed(config, tmp_path, quorum, missed):
    words = [*TRAIN, "clients=2", "topology.kind=complete", "peer.join=0.2", f"peer.quorum={quorum}", "train.rounds=2"]
    chosen = config("bert", "algorithm.name=dec-lora", *words)
    federation = compose(chosen)
    model = peft_model(chosen, federation)
    optimizer = optimizer_of(chosen, model)
    with network(2) as (net, thread):
        peer = joined(chosen, tmp_path, 0, net, thread, model, optimizer)
        peer.__enter__()
        take_steps(peer, model, optimizer, chosen, federation, batches(chosen, federation, 0))
        if missed:
            with pytest.raises(QuorumMissed, match="contact in 0% of the rounds, peer.quorum=0.5"):
                peer.close()
        else:
            peer.close()
    assert peer.result.summary["contact"]["share"] == 0 and (tmp_path / "peer-0" / "summary.json").is_file()


def test_a_loop_that_raises_ends_its_run_and_gets_its_own_error(lone, tmp_path):
    made = lone()
    with pytest.raises(ZeroDivisionError):
        with alone(made[0], tmp_path, *made[2:]) as peer:
            step_on(peer, made)
            1 / 0  # noqa: B018
    assert peer.result is None and not (tmp_path / "peer-0" / "summary.json").exists()


def test_an_error_of_the_run_is_raised_in_the_loop(lone, tmp_path):
    made = lone()
    with pytest.raises(DivergenceError, match="not finite") as caught:
        with alone(made[0], tmp_path, *made[2:]) as peer:
            with torch.no_grad():
                factor(made[2], "B")[0].fill_(float("nan"))
            while True:
                step_on(peer, made)
    assert "_work" in [entry.name for entry in caught.traceback], "the traceback of the run"


def test_steps_that_were_not_told_are_refused(lone, tmp_path):
    made = lone()
    with pytest.raises(RunError, match=r"3 optimiser steps since the last exchange, train.local_steps=2"):
        with alone(made[0], tmp_path, *made[2:]) as peer:
            for _ in range(3):
                made[3].step()
            peer.step()


def test_a_loop_goes_on_from_its_run_s_checkpoint(config, tmp_path):
    chosen = config("bert", "algorithm.name=dec-lora", *ONE)
    whole, _ = plain_loops(chosen, tmp_path / "whole")
    federation = compose(chosen)
    rows = batches(chosen, federation, 0)

    def part(rows, **options):
        model = peft_model(chosen, federation)
        optimizer = optimizer_of(chosen, model)
        with network(1) as (net, thread):
            with joined(chosen, tmp_path, 0, net, thread, model, optimizer, options) as peer:
                take_steps(peer, model, optimizer, chosen, federation, rows)
                if not options:
                    raise KeyboardInterrupt
        return peer.result

    with pytest.raises(KeyboardInterrupt):
        part(rows[:5])
    found = part(rows[4:], resume=True)
    assert torch.allclose(found.adapters.flat, whole[0].adapters.flat, rtol=0, atol=TOLERANCE)


def test_a_run_goes_on_with_another_number_of_threads(lone, tmp_path):
    """It is of the loop's process, and no setting of the run."""
    made = lone("train.rounds=2")
    threads = torch.get_num_threads()
    try:
        with pytest.raises(KeyboardInterrupt):
            with alone(made[0], tmp_path, *made[2:]) as peer:
                while not step_on(peer, made):
                    pass
                raise KeyboardInterrupt
        torch.set_num_threads(threads + 1)
        with alone(made[0], tmp_path, *made[2:], options={"resume": True}) as peer:
            while not peer.over:
                step_on(peer, made)
    finally:
        torch.set_num_threads(threads)
    started = select_events(read_events(peer.result.run), RunStarted)
    assert peer.result.summary["rounds"] == 2 and [each.threads for each in started] == [threads]


RULES = ["dfedadmm", "k-gt", "cached-dfl", "fedspeed", "qg-dsgdm", "dfedavgm"]


@pytest.mark.parametrize("words", [["exchange.relay.weights=rows"], ["algorithm={name: cached-dfl, weights: rows}"]])
def test_weights_by_rows_that_a_loop_does_not_tell_are_refused(words):
    with pytest.raises(
        ConfigError, match=r"weights=rows given; only a training loop of your own knows.*weights=uniform"
    ):
        check_settings(load_config({"algorithm": "dec-lora"}, words))
    check_settings(load_config({"algorithm": "dec-lora"}, [word.replace("rows", "uniform") for word in words]))


def test_a_method_gets_the_mean_rate_of_a_rounds_steps(lone, tmp_path, monkeypatch):
    """And not that of a schedule which has moved on; a round at rate 0 leaves what it remembers as it was."""
    made = lone("algorithm.name=qg-dsgdm", "train.optimizer=sgd", "train.rounds=3")
    optimizer, rates, found = made[3], [0.125, 0.375, 0.0, 0.0, 0.25, 0.25], []
    reported = LoopLearner._reported

    def report(learner, row, each):
        flat = reported(learner, row, each)
        found.append(learner.settings.lr)
        return flat

    monkeypatch.setattr(LoopLearner, "_reported", report)
    with alone(made[0], tmp_path, *made[2:]) as peer:
        for rate, behind in zip(rates, [*rates[1:], 0.0], strict=True):
            optimizer.param_groups[0]["lr"] = rate
            federation, model = made[1], made[2]
            loss_of(model, federation.train_data, batches(made[0], federation, 0)[0], "classification").backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = behind  # as a scheduler does before the round's end is seen
            peer.step()
    assert found[:3] == [0.25, 0.0, 0.25]
    assert peer.result.adapters.flat.isfinite().all()


def test_a_program_that_stops_waiting_for_neighbours_leaves_the_run(config, tmp_path, monkeypatch):
    words = [*TRAIN, "clients=2", "topology.kind=complete", "peer.join=600"]
    chosen = config("bert", "algorithm.name=dec-lora", *words)
    federation = compose(chosen)
    model = peft_model(chosen, federation)
    optimizer = optimizer_of(chosen, model)

    def interrupted(driver):
        raise KeyboardInterrupt

    with network(2) as (net, thread), monkeypatch.context() as patched:
        peer = joined(chosen, tmp_path, 0, net, thread, model, optimizer)
        patched.setattr(LoopDriver, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            peer.__enter__()
    assert not any(each.name == "peerlora run" for each in threading.enumerate())
    assert peer.result is None and not (tmp_path / "peer-0" / "summary.json").exists()


def test_numbers_of_whole_trainings_are_no_measures_and_others_are(lone, tmp_path):
    made = lone("train.rounds=1")
    own = {"loss": 1.0, "step_time": 0.5, "epoch_reward": 2.0, "train_accuracy": 0.75, "grad_norm": 3.0}
    with alone(made[0], tmp_path, *made[2:]) as peer:
        peer.log(own | {"epoch": 0.1, "total_flos": 9.0, "train_runtime": 3.0, "train_loss": 1.0})
        while not peer.over:
            step_on(peer, made)
    (done,) = select_events(read_events(peer.result.run), RoundDone)
    assert {name for name in done.measures if not name.startswith(("consensus", "cross"))} >= own.keys() - {"loss"}
    assert not done.measures.keys() & {"epoch", "total_flos", "train_runtime", "train_loss"}


@pytest.mark.parametrize("method", others_slow(["dfedadmm", "k-gt", "qg-dsgdm"], [1]))
def test_local_rules_change_the_gradients_of_a_loop(config, tmp_path, method):
    words = ["train.optimizer=sgd", "train.lr=0.05"]
    chosen = config("bert", f"algorithm.name={method}", *TRAIN, *words)
    whole = simulate(chosen, tmp_path / "whole")
    results, _ = plain_loops(chosen, tmp_path)
    require_equal(whole.adapters, [each.adapters for each in results])


METHODS = [*ROW_METHODS]
REFUSED = {
    "salf",
    "flood",
    "hetlora",
    "flora",
    "fedex-lora",
    "rac-lora",
    "fedhl",
    "dfedadmm-sam",
    "dfedsam",
    "fedspeed",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_whether_a_loop_can_take_its_local_steps(method):
    reason = REGISTRY[method].traits.own_loop_refusal()
    if is_asynchronous(REGISTRY[method]):
        assert "no common rounds" in reason
    else:
        assert (reason is not None) == (method in REFUSED), reason


def test_a_loop_is_no_flow_policy(lone):
    """Neither the task nor its method can be asked of a loop, which learns from rows."""
    from peerlora.runtime.peer.join import JoinedPeer

    chosen, _, model, optimizer = lone()
    settings = own_settings(chosen) | {
        "task": {"kind": "flow-policy", "env": "point-mass"},
        "online": {"critic_rounds": 0},
    }
    with pytest.raises(ConfigError, match="flow-policy given, whose clients act in environments"):
        JoinedPeer(model, optimizer, settings, lambda config, *, loop: pytest.fail("it began"))
    assert "trains all of its model" in REGISTRY["swfp"].traits.own_loop_refusal()
    assert all("no rows" in REGISTRY["swfp"].traits.privacy_refusal(unit) for unit in ("row", "client"))


def words_of(method):
    sgd = REGISTRY[method].traits.train_defaults.get("optimizer") == "sgd"
    steps = "1" if REGISTRY[method].traits.one_step else "2"
    rate = 1 if sgd else 0.01  # by which B moves by more than 1e-4
    return [f"train.optimizer={'sgd' if sgd else 'adamw'}", f"train.local_steps={steps}", f"train.lr={rate}"]


RUNNING = [name for name in METHODS if name not in REFUSED and not is_asynchronous(REGISTRY[name])]


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNNING)
def test_every_method_that_is_not_refused_runs_and_mixes(config, tmp_path, method):
    chosen = config("bert", f"algorithm.name={method}", *TRAIN, *words_of(method), "train.rounds=3")
    results, _ = plain_loops(chosen, tmp_path)
    whole = simulate(chosen, tmp_path / "whole")
    require_equal(whole.adapters, [each.adapters for each in results])


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_refused_methods_are_refused_before_anything_is_written(lone, tmp_path, method):
    chosen, _, model, optimizer = lone()
    settings = own_settings(chosen) | {"algorithm": {"name": method}, "clients": 1, "topology": "complete"}
    if REGISTRY[method].traits.sgd_only:
        optimizer = torch.optim.SGD([v for v in model.parameters() if v.requires_grad], lr=0.1)
    with pytest.raises(CompositionError, match="training loop of your own: "):
        with network(1) as (net, thread):
            from loop_rigs import memory_run

            from peerlora.runtime.peer.join import JoinedPeer

            with JoinedPeer(model, optimizer, settings, memory_run(net, thread, 0, 1, tmp_path / "run")):
                pass
    assert not (tmp_path / "run").exists()


SETTINGS = [
    ({"train": {"lr": 0.1}}, "train.lr=0.1 given"),
    ({"data": {"train": "x.csv"}}, "data.train='x.csv' given"),
    ({"task": {"kind": "regression"}}, "task.kind='regression' given"),
    ({"threads": 2}, "threads=2 given"),
    ({"model": {"quantize": "nf4"}}, "model.quantize='nf4' given"),
    ({"eval": {"select": {"metric": "loss"}}}, "eval.select"),
    ({"adapter": {"rank": 4}}, "adapter.rank=4 given, the PEFT model has 3"),
    ({"adapter": {"alpha": 5}}, "adapter.alpha=5.0 given, the PEFT model has 6.0"),
    ({"adapter": {"head": "frozen"}}, "adapter.head=frozen given, the PEFT model trains classifier"),
]


@pytest.mark.parametrize(("change", "reason"), SETTINGS)
def test_settings_of_the_loop_s_own_are_refused(lone, tmp_path, change, reason):
    chosen, _, model, optimizer = lone()
    tree = {name: section for name, section in own_settings(chosen).items() if name != "adapter"}
    merged = {name: {**tree.get(name, {}), **values} for name, values in change.items() if isinstance(values, dict)}
    tree |= change | merged
    with pytest.raises(ConfigError, match=reason.replace("[", r"\[")):
        with alone(load_config(tree), tmp_path, model, optimizer, settings=tree):
            pass
    assert not (tmp_path / "peer-0").exists()


class FullyShardedDataParallel(torch.nn.Module):
    """Torch's wrapper, by the name that tells it from others; a real one needs a process group."""


class DeepSpeedEngine(torch.nn.Module):
    pass


@pytest.mark.parametrize("kind", [FullyShardedDataParallel, DeepSpeedEngine])
def test_wrappers_that_shard_a_model_are_refused(lone, tmp_path, kind):
    chosen, _, model, optimizer = lone()
    wrapped = kind()
    wrapped.module = model
    with pytest.raises(ModelError, match=rf"{kind.__name__}, of which each process holds a part only .*use DDP"):
        with alone(chosen, tmp_path, wrapped, optimizer):
            pass
    assert not (tmp_path / "peer-0").exists()


def test_parameters_that_zero_3_has_sharded_are_refused(lone, tmp_path):
    chosen, _, model, optimizer = lone()
    factor(model, "A")[0].ds_id = 0  # how ZeRO-3 marks them, without its engine around the model
    with pytest.raises(ModelError, match="lora_A.weight is one shard of a parameter.*ZeRO"):
        with alone(chosen, tmp_path, model, optimizer):
            pass
    assert not (tmp_path / "peer-0").exists()


def test_optimisers_of_deepspeed_are_refused(lone, tmp_path):
    chosen, _, model, optimizer = lone()
    kind = type("DeepSpeedZeroOptimizer", (torch.optim.SGD,), {"__module__": "deepspeed.runtime.zero.stage3"})
    with pytest.raises(ModelError, match="DeepSpeed keeps copies"):
        with alone(chosen, tmp_path, model, kind(optimizer.param_groups, lr=0.1)):
            pass


def test_an_optimiser_without_the_adapter_is_refused(lone, tmp_path):
    chosen, _, model, _ = lone()
    with pytest.raises(ModelError, match="does not train base_model.model"):
        with alone(chosen, tmp_path, model, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)):
            pass
    with pytest.raises(ModelError, match="expected a torch.optim.Optimizer"):
        with alone(chosen, tmp_path, model, object()):
            pass


def changed_base(model):
    with torch.no_grad():
        model.base_model.model.bert.embeddings.word_embeddings.weight[0, 0] += 0.1


def changed_start(model):
    with torch.no_grad():
        factor(model, "B")[0].fill_(0.1)


@pytest.mark.parametrize(("change", "reason"), [(changed_base, "wrong-base"), (changed_start, "adapter.start")])
def test_another_base_or_start_than_the_neighbours_is_refused(config, tmp_path, change, reason):
    chosen = config("bert", "algorithm.name=dec-lora", *TRAIN, "clients=2", "topology.kind=complete", "peer.join=20")
    federation = compose(chosen)
    models = [peft_model(chosen, federation) for _ in range(2)]
    change(models[1])
    with network(2) as (net, thread):

        def one(client):
            with joined(chosen, tmp_path, client, net, thread, models[client], optimizer_of(chosen, models[client])):
                return None

        def told(client):
            try:
                one(client)
            except PeerloraError as error:
                return str(error)

        assert any(reason in str(each) for each in together([lambda i=i: told(i) for i in range(2)]))


def test_the_adapter_s_layout_is_the_one_of_the_simulation(lone):
    chosen, federation, model, _ = lone()
    assert PeftAdapter(model).spec == federation.start.spec
