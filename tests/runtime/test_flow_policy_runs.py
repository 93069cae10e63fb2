"""Runs of flow policies: from nothing, resumed to the bit, exported to PEFT, reported, and refused."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import others_slow
from flow_runs import TINY, tiny
from peerlora.config.loading import load_config
from peerlora.errors import CompositionError, ConfigError, DivergenceError, ModelError, RunError, Stopped
from peerlora.runs.events import Evaluated, PolicyShown, RoundDone
from peerlora.runs.report import write_report
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose, opening_state
from peerlora.runtime.export import export_from_run, exporter_of, read_adapters
from peerlora.runtime.hub import plan_upload
from peerlora.runtime.plan import plan
from peerlora.runtime.serving import load_served
from peerlora.runtime.simulate import build_rounds, resume, simulate
from peerlora.runtime.whole_model import export_with_base, merge_from_run
from peerlora.train.online.base_policy import read_policy
from peerlora.train.online.flow import FlowShape, twin_values

pytestmark = pytest.mark.usefixtures("cache")
OTHERS = ["dec-lora", "adf-lora", "local", "fedprox", "dfedsam", "qg-adam", "cached-dfl"]


def stop_after(rounds):
    left = iter([False] * (rounds - 1))
    return lambda: next(left, True)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("policies")))
        yield simulate(tiny("eval.metrics=[share-of-optimum]"), tmp_path_factory.mktemp("runs") / "run", report=False)


def test_a_run_tells_returns_shares_drifts_and_what_its_policy_does(done):
    events = read_events(done.run)
    last = [event for event in events if isinstance(event, Evaluated)][-1]
    assert last.final and last.rows == 6 and len(last.own) == len(last.personal) == 3
    assert np.mean(last.personal) == pytest.approx(np.mean(last.own)) or len(set(last.own)) > 1
    share = last.metrics["own"]["share-of-optimum"]
    assert all(0 < each < 1 for each in share)
    rounds = [event for event in events if isinstance(event, RoundDone)]
    assert [rounds[t].measures[f"drift_{1 - t % 2}"] for t in range(4)] == [0.0] * 4
    assert all(rounds[t].measures[f"drift_{t % 2}"] > 0 for t in range(4))
    assert all(math.isfinite(each.measures["log_spread"]) for each in rounds)
    (shown,) = (event for event in events if isinstance(event, PolicyShown))
    assert shown.model == "averaged" and np.shape(shown.fields) == (2, 81, 4)
    assert done.summary["metric"] == "return" and done.summary["scores"]["personal_mean"] == pytest.approx(
        np.mean(last.personal)
    )


def test_the_share_of_the_optimum_is_that_of_the_returns(done):
    federation = compose(tiny())
    found = federation.learner.evaluate(federation.start, federation.eval_data, 4, ["share-of-optimum"])
    optimum = federation.eval_data.optimal_returns().mean()
    assert found.metrics["share-of-optimum"][0] == pytest.approx(optimum / found.metric[0])


def test_a_client_is_scored_on_the_common_episodes_and_on_those_of_its_own_environment():
    federation = compose(tiny())
    x = federation.start
    x.flat.normal_(generator=torch.Generator().manual_seed(1))
    common = federation.learner.evaluate(x, federation.eval_data, 64).metric
    own = [federation.learner.evaluate(x, federation.eval_data.take(rows), 1).metric for rows in federation.own_rows]
    assert common == pytest.approx(np.mean(own, axis=0), rel=1e-12)
    assert [len(rows) for rows in federation.own_rows] == [2, 2, 2]


@pytest.mark.parametrize(
    "words",
    [
        ["adapter.head=mixed", "online.replay=15"],
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["train.optimizer_state=phase"], marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, words, no_reports):
    whole = simulate(tiny(*words), tmp_path / "whole")
    with pytest.raises(Stopped):
        simulate(tiny(*words), tmp_path / "run", stop=stop_after(2))
    again = resume(tmp_path / "run")
    assert torch.equal(again.adapters.flat, whole.adapters.flat)
    kept = [event for event in read_events(tmp_path / "run") if isinstance(event, Evaluated)]
    assert kept[-1].own == [event for event in read_events(tmp_path / "whole") if isinstance(event, Evaluated)][-1].own


@pytest.mark.parametrize("head", ["private", "mixed"])
def test_the_critic_is_exchanged_only_where_it_is_mixed(tmp_path, head, no_reports):
    result = simulate(tiny(f"adapter.head={head}", "train.rounds=1", "topology=complete"), tmp_path / "run")
    x = result.adapters
    factors, critic = x.flat[:, : x.spec.columns("head").start], x.flat[:, x.spec.columns("head")]
    assert torch.allclose(factors[0], factors[1], atol=1e-12)
    assert torch.allclose(critic[0], critic[1], atol=1e-12) == (head == "mixed")


def test_a_peft_folder_gives_the_policy_on_the_base_policy(done, tmp_path):
    """What PEFT makes of an exported adapter and the base folder acts as the client did."""
    from peft import PeftModel

    folder = export_from_run(done.run, tmp_path / "out", 1)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    to = exporter_of(done.run)
    x = read_adapters(done.run, to)
    policy = read_policy_at(base).double()
    model = PeftModel.from_pretrained(policy, str(folder))
    state, noise = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    to.model.bind_adapters(x.rows([1]))
    assert torch.allclose(model(state, noise), to.model.base(state, noise), atol=1e-12)
    values = twin_values({name: each[1:2] for name, each in x.head.items()}, state[None], noise[None])
    assert torch.allclose(model.base_model.model.critic(state, noise), values[:, 0], atol=1e-12)
    assert not torch.allclose(read_policy_at(base).double()(state, noise), to.model.base(state, noise), atol=1e-6)
    assert not (folder / "peerlora.json").exists(), "it tells how rows are read"


def test_a_run_may_begin_where_another_one_on_the_same_base_ended(tmp_path, no_reports):
    """The adapter names the folder of the base policy, which is where ``scripted`` lies: no warning of another base."""
    first = simulate(tiny("train.rounds=1"), tmp_path / "first")
    begun = compose(tiny(f"adapter.start={first.run / 'adapters' / 'client-02'}"))
    assert not any("adapter.start" in each for each in begun.warnings)
    body = begun.start.spec.shared.stop
    assert torch.equal(begun.start.flat[0, :body].float(), first.adapters.flat[2, :body].float())


def test_programs_for_rows_refuse_a_flow_policy(done, tmp_path):
    with pytest.raises(RunError, match="no other program loads.*peerlora export"):
        merge_from_run(done.run, tmp_path / "whole", 0)
    with pytest.raises(RunError, match="no other program loads"):
        export_with_base(done.run, tmp_path / "whole", 0)
    with pytest.raises(ModelError, match="adapter of a flow policy, which acts"):
        load_served(done.run / "adapters" / "client-00")
    with pytest.raises(ModelError, match="cannot load; give --base OWNER/NAME$"):  # and no word of merging
        plan_upload(done.run / "adapters" / "client-00", "me/policy", True)
    with pytest.raises(CompositionError, match="a partitioner divides rows"):
        compose(tiny(), partitioner=object())


@pytest.mark.parametrize("name", ["BertModel", ""])
def test_a_whole_model_of_no_task_is_not_taken_for_a_policy(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
    with pytest.raises(ModelError, match=r"architectures=.*rows can be answered by SEQ_CLS, CAUSAL_LM"):
        load_served(tmp_path, ("text",))


def test_the_configs_of_the_guide_can_be_planned():
    place = Path(__file__).parents[2] / "configs"
    config = load_config(place / "swfp.yaml")
    assert plan(config).algorithm.turn == 1 and config.clients == 8
    config = load_config(place / "swfp-pendulum.yaml")
    assert (config.online.beta, config.train.lr, config.train.batch) == (40, 0.001, 64)
    if find_spec("gymnasium"):
        assert plan(config).algorithm.turn == 1


def read_policy_at(folder):
    return read_policy(Path(folder), "point-mass", FlowShape(4, 2, 2, 8)).policy


def test_a_report_draws_the_moves_of_each_block(done, drawn):
    page = write_report(done.run).read_text(encoding="utf-8")
    assert "How each block moves actions of the averaged policy" in page
    assert "point-mass, by client: goal_x 0.2, 0.5, 0.8" in page


def test_a_base_policy_is_read_from_a_folder_and_pre_trained_only_once(tmp_path, monkeypatch):
    from peerlora.runtime import policy as policies

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compose(tiny())
    monkeypatch.setattr("peerlora.train.online.base_policy.pretrain", lambda *_: pytest.fail("trained again"))
    again = compose(tiny(f"model.source={first.export.location}"))
    assert again.base_digest == first.base_digest == compose(tiny()).base_digest
    assert compose(tiny("seed=1")).base_digest != first.base_digest, "the critic is drawn from the seed"
    assert str(policies.policy_cache()) in first.export.location


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flow.json", "{}", r"flow\.json has format=None, the run 1"),
        ("flow.json", "[", r"cannot be read"),
        ("flow.json", '{"format": 1, "env": "Pendulum-v1"}', r"has env='Pendulum-v1', the run 'point-mass'"),
        ("model.safetensors", "damaged", r"model\.safetensors cannot be read"),
    ],
)
def test_a_damaged_base_policy_is_refused(tmp_path, monkeypatch, name, content, message):
    import shutil

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(compose(tiny()).export.location, tmp_path / "mine")
    (tmp_path / "mine" / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        compose(tiny(f"model.source={tmp_path / 'mine'}"))
    with pytest.raises(ModelError, match="no flow.json there"):
        compose(tiny(f"model.source={tmp_path / 'nowhere'}"))


@pytest.mark.parametrize("name", ["flow.json", "model.safetensors"])
@pytest.mark.parametrize("left", [None, 0, 20])
def test_a_damaged_policy_of_the_cache_is_pre_trained_again(tmp_path, monkeypatch, name, left):
    """``left``: its first bytes that are left; None: the file is gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compose(tiny())
    path = Path(first.export.location) / name
    whole = path.read_bytes()
    path.unlink() if left is None else path.write_bytes(whole[:left])
    assert compose(tiny()).base_digest == first.base_digest and path.read_bytes() == whole
    monkeypatch.setattr("peerlora.train.online.base_policy.pretrain", lambda *_: pytest.fail("trained again"))
    compose(tiny())


def test_a_critic_that_diverges_stops_the_run_with_its_last_good_checkpoint(tmp_path, no_reports):
    """A rate at which values run away: the client and the round are told, and from where to go on."""
    config = tiny("train.rounds=40", "train.lr=3", "train.optimizer=sgd", "online.discount=0.5")
    with pytest.raises(DivergenceError, match=r"client \d.*in\s+round \d+") as told:
        simulate(config, tmp_path / "run")
    assert "lower train.lr" in str(told.value)


def test_values_beyond_what_rewards_allow_are_divergence(tmp_path):
    federation = compose(tiny())
    x = federation.start
    for name, value in x.head.items():
        if name.endswith(".2.bias"):
            value[1].fill_(1e6)  # finite, and senseless
    with (
        federation.learner.round(5),
        pytest.raises(DivergenceError, match=r"critic of client 1 .*round 6; the largest"),
    ):
        federation.learner.fit(x, "AB")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["task.env=null"], ConfigError, r"needs task\.env"),
        (["partition=iid"], ConfigError, r"partition\.kind=iid divides rows"),
        (["partition.values.goal_x=[1, 2]"], ConfigError, r"values\.goal_x lists 2 values for 3 clients"),
        (["partition.vary.mass=[2, 1]"], ConfigError, r"expected the lowest value first"),
        (["partition.vary.goal_x=[0, 1]"], ConfigError, r"goal_x stands in vary and in values"),
        (["adapter.head=frozen"], ConfigError, r"leaves the critic untrained"),
        (["train.dtype=bf16"], ConfigError, r"takes fp32 or fp64"),
        (["data.train=a.csv"], ConfigError, r"data names rows"),
        (["adapter.dropout=0.1"], ConfigError, r"adapter\.dropout given"),
        (["train.batch=[1, 2, 3]"], ConfigError, r"give one number"),
        (["online.critic_rounds=4"], ConfigError, r"leaves the policy none of the 4 rounds"),
        (["online.noise_end=0.5"], ConfigError, r"is above online\.noise"),
        (["privacy.epsilon=8"], ConfigError, r"privacy clips the gradients of rows.*drop the section"),
        (["data.columns={prompt: a}"], ConfigError, r"data names rows"),
        (["eval.generate={}"], ConfigError, r"flow-policy writes no answers"),
        (["eval.metrics=[accuracy]"], ConfigError, r"'accuracy' does not fit.*share-of-optimum"),
        (["train.label_prior=uniform"], ConfigError, r"adjusts class logits"),
        (["algorithm.name=flood"], CompositionError, r"flood cannot fine-tune flow policies"),
        (["algorithm.name=swfp", "algorithm.turn=0"], ConfigError, r"algorithm\.turn: 0 given"),
        (["online.replay=10000000", "clients=1000", "partition.values={}"], CompositionError, r"keep fewer"),
        (["partition.values={}", "partition.vary={weight: [1, 2]}"], ConfigError, r"no attribute 'weight'"),
        (["partition.each=2"], ConfigError, r"lists 3 values for 3 clients with 2 environments each; give 6"),
        (["online.policy=steered"], CompositionError, r"swfp fine-tunes the flow's blocks.*=steered keeps them frozen"),
        (
            ["online.policy=steered", "online.beta=2"],
            ConfigError,
            r"online\.beta is not read",
        ),
        (["online.policy=one-step", "online.entropy=1"], ConfigError, r"online\.entropy is not read"),
        (["online.policy=cloned", "online.normalize=false"], ConfigError, r"online\.normalize is not read"),
    ],
)
def test_what_does_not_fit_a_flow_policy_is_refused_before_anything_is_loaded(words, error, message):
    with pytest.raises(error, match=message):
        plan(tiny(*words))


def test_only_buffers_that_are_held_here_count_and_by_the_size_of_their_numbers(done, monkeypatch):
    """A peer holds its own, an export none; a transition on the point mass has 12 numbers."""
    config, has = tiny("train.dtype=fp32"), "peerlora.runtime.policy_checks.main_memory"
    one = config.online.replay * 12 * 4
    monkeypatch.setattr(has, lambda: one)
    plan(config, [1])
    with pytest.raises(CompositionError, match=r"online\.replay=40 of 3 clients needs 5\.76e-06 GB, this machine"):
        plan(config)
    with pytest.raises(CompositionError, match=r"online\.replay=40 of 1 clients"):
        plan(tiny("train.dtype=fp64"), [1])
    monkeypatch.setattr(has, lambda: 3 * one)
    plan(config)
    monkeypatch.setattr(has, lambda: 0)
    assert read_adapters(done.run, exporter_of(done.run)).clients == 3


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"online": {"beta": 2}}, r"online is a section of task\.kind=flow-policy"),
        ({"task": {"blocks": 2}}, r"task\.blocks is a setting of task\.kind=flow-policy"),
        ({"partition": {"kind": "environment"}}, r"partition=environment is for task\.kind=flow-policy"),
    ],
)
def test_settings_of_policies_are_refused_where_a_task_has_rows(tree, message):
    with pytest.raises(ConfigError, match=message):
        load_config(tree)


def test_a_budget_in_epochs_is_refused_where_there_are_no_rows():
    with pytest.raises(ConfigError, match=r"train\.epochs counts passes over rows.*use train\.rounds"):
        load_config({"task": TINY["task"], "train": {"epochs": 2}})


@pytest.mark.parametrize(("turn", "interval"), [(1, 1), (2, 1), (1, 2)])
def test_every_block_trains_both_factors_in_a_period(turn, interval):
    blocks = 4
    federation = compose(tiny(f"task.blocks={blocks}", f"algorithm.turn={turn}", f"algorithm.interval={interval}"))
    rounds = build_rounds(federation)
    state, moved = opening_state(federation), []
    for t in range(2 * interval * turn * blocks):
        before, (state, _) = state.flat, rounds.advance(t, state)
        spec = state.spec
        changed = {spec.slots[i].name.split(".")[1] + spec.slots[i].block for i in moving(spec, before, state.flat)}
        moved.append(changed)
    sweeps = [set().union(*moved[at : at + turn * blocks]) for at in range(0, len(moved), turn * blocks)]
    assert all(len(each) == 1 for each in moved), "a round moves one factor of one block"
    assert sweeps == [{f"{k}{'BA'[sweep // interval]}" for k in range(blocks)} for sweep in range(2 * interval)]


def moving(spec, before, after):
    """The places of A and B that training has moved: on a ring of three all agree, and mixing moves rounding alone."""
    moved = (before - after).abs().amax(0) > 1e-12
    return [i for i, at in enumerate(spec.slots) if at.block != "head" and moved[at.start : at.stop].any()]


def test_an_interval_of_swfp_is_compared_with_a_run_in_sweeps():
    warnings = plan(tiny("algorithm.interval=2", "train.rounds=4")).warnings
    assert any(
        "interval=2 (4 rounds, since it counts sweeps over all blocks) is not shorter" in each for each in warnings
    )
    assert not any("interval" in each for each in plan(tiny("algorithm.interval=2", "train.rounds=5")).warnings)


def test_swfp_is_refused_where_a_task_has_rows():
    with pytest.raises(CompositionError, match=r"swfp fine-tunes the blocks of flow policies.*adf-lora"):
        plan(load_config({"algorithm": "swfp"}))


def test_defaults_that_a_policy_needs_give_way_to_what_is_given():
    config = load_config({"task": TINY["task"], "adapter": {"head": "mixed"}})
    assert (config.model.source, config.adapter.head, config.eval.own) == ("scripted", "mixed", True)
    assert config.partition.kind == "environment"
    assert load_config({"task": TINY["task"], "algorithm": "swfp"}).train.optimizer_state == "keep"
    assert load_config(config.model_dump(mode="json")) == config


def test_cloning_alone_takes_one_round_whatever_the_rounds_of_a_critic():
    tree = {**TINY, "algorithm": {"name": "local"}, "online": {}}
    words = ("online.policy=cloned", "algorithm=local", "train.rounds=1")
    assert load_config(tree, words).online.critic_rounds == 5
    with pytest.raises(ConfigError, match="critic_rounds=5 leaves the policy none of the 1 rounds"):
        load_config(tree, ("algorithm=local", "train.rounds=1"))


@pytest.mark.parametrize("method", others_slow(OTHERS, ["dec-lora"]))
def test_other_methods_fine_tune_the_whole_flow_at_once(tmp_path, method, no_reports):
    result = simulate(tiny(f"algorithm.name={method}", "train.rounds=2"), tmp_path / "run")
    drifts = [event.measures for event in read_events(result.run) if isinstance(event, RoundDone)]
    assert all(each["drift_0"] > 0 and each["drift_1"] > 0 for each in drifts)
