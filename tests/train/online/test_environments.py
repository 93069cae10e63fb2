"""Environments: the point mass against its closed form, gymnasium's where it is installed, and what is refused."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from flow_runs import tiny
from peerlora.errors import ConfigError, DivergenceError, ExtraMissing, PeerloraError, RunError
from peerlora.runs.events import PolicyShown
from peerlora.runs.policy_pictures import policy_pictures
from peerlora.runtime.compose import compose
from peerlora.runtime.plan import plan
from peerlora.train.online.demonstrations import demonstrate, scripted_controller
from peerlora.train.online.effects import check_effects
from peerlora.train.online.environment_names import build_environment, facts_of
from peerlora.train.online.episodes import ClientEnvironments, Episodes
from peerlora.train.online.illustrations import illustrate
from peerlora.train.online.point_mass import HORIZON, PointMass
from peerlora.train.online.rollout import Explorer, record, returns

needs_gymnasium = pytest.mark.skipif(find_spec("gymnasium") is None, reason="gymnasium (extra rl) is not installed")
GYM = ["task.env=Pendulum-v1", "partition.values={}"]


def test_the_riccati_gains_reach_the_optimal_return_where_actions_stay_in_bounds():
    """Starts near the goal, where no action of the optimum is clipped: nobody else comes closer."""
    goals = {"goal_x": np.array([0.2, -0.3]), "mass": np.array([1.0, 1.5])}
    mass, seeds = PointMass(2, goals), [3, 4]
    optimum = mass.optimal_returns(seeds, HORIZON)
    gains, _ = mass.gains(HORIZON)
    for factor, best in ((1.0, True), (0.9, False), (1.1, False)):
        observed, total = mass.reset(seeds), np.zeros(2)
        for t in range(HORIZON):
            errors = np.stack([observed[:, :2] - mass.goal, observed[:, 2:]], axis=2)
            found = mass.step(-factor * np.einsum("eax,ex->ea", errors, gains[t]))
            observed, total = found.observation, total + found.reward
        assert (total == pytest.approx(optimum, rel=1e-9)) == best
        assert (total <= optimum + 1e-12).all()


def test_the_scripted_controller_of_the_point_mass_reaches_most_of_the_optimum():
    mass, controller = PointMass(8, {}), scripted_controller("point-mass")
    seeds = list(range(8))
    optimum = mass.optimal_returns(seeds, HORIZON).sum()
    observed, total = mass.reset(seeds), 0.0
    for _ in range(HORIZON):
        found = mass.step(controller(observed))
        observed, total = found.observation, total + found.reward.sum()
    assert 0.9 < optimum / total <= 1


def test_demonstrations_are_the_same_every_time_and_within_bounds():
    one, other = (demonstrate("point-mass", 5, 3) for _ in range(2))
    assert np.array_equal(one.action, other.action) and np.array_equal(one.observation, other.observation)
    assert one.action.shape == (15, 2) and np.abs(one.action).max() <= 1


def test_an_attribute_that_an_environment_lacks_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"point-mass has no attribute 'goal_z'.*did you mean 'goal_y'.*damping"):
        facts_of("point-mass", ["goal_z"])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"mass": [1, 0, 1]}, "client 1 has mass=0, damping=0.5, force=2; expected mass and force above 0"),
        ({"mass": [1, 1, -2]}, "client 2 has mass=-2"),
        ({"damping": [-0.1, 1, 1]}, "client 0 has mass=1, damping=-0.1"),
        ({"damping": [1, 1, 11]}, "client 2 has mass=1, damping=11, .*damping from 0 to 10 times the mass"),
        ({"force": [1, 1, 0]}, "client 2 has mass=1, damping=0.5, force=0"),
    ],
)
def test_a_point_mass_that_moves_as_none_does_is_refused(values, told):
    """A mass below zero would be learned from without a word, one of zero ends as a loss that is no number."""
    with pytest.raises(ConfigError, match=told):
        plan(tiny(f"partition={{kind: environment, values: {values}}}"))
    allowed = {"mass": [0.1, 2, 9], "damping": [1, 0, 3], "force": [0.1, 1, 5]}
    plan(tiny(f"partition={{kind: environment, values: {allowed}}}"))
    several = "partition={kind: environment, each: 3, values: {mass: [1, 1, 1, 1, 0, 1]}}"
    with pytest.raises(ConfigError, match="of client 1, environment 4, has mass=0"):
        plan(tiny(several, "clients=2", "topology=complete"))
    with pytest.raises(ConfigError, match="of client . has mass=-"):
        plan(tiny("partition={kind: environment, vary: {mass: [-2, -1]}}"))


def test_an_environment_that_gives_no_finite_numbers_is_named(monkeypatch):
    step, federation = PointMass.step, compose(tiny())
    monkeypatch.setattr(PointMass, "step", lambda *words: replace(step(*words), reward=np.full(len(words[1]), np.inf)))
    with pytest.raises(DivergenceError, match="point-mass gives rewards or observations that are not finite; choose"):
        returns(lambda states, noise: noise.clamp(-1, 1), 2, federation.eval_data, federation.start.flat)


def test_a_gymnasium_environment_without_gymnasium_says_what_to_install(monkeypatch):
    monkeypatch.setattr("peerlora.environment.find_spec", lambda name: None)
    with pytest.raises(ExtraMissing, match=r"gymnasium.*pip install '\.\[rl\]'"):
        plan(tiny(*GYM))


@needs_gymnasium
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.env=Pendulumm-v1"], r"task\.env='Pendulumm-v1' is unknown.*did you mean 'Pendulum-v1'"),
        (["task.env=CartPole-v1"], r"its actions are Discrete\(2\); a flow policy needs a Box"),
        (["partition.vary={gg: [8, 12]}"], r"Pendulum-v1 has no attribute 'gg'.*expected one of.*\bg\b.*\bl\b"),
        (["eval.metrics=[share-of-optimum]"], r"optimal return, which is known of point-mass"),
    ],
)
def test_what_gymnasium_cannot_serve_is_refused_before_anything_is_loaded(words, message):
    with pytest.raises(PeerloraError, match=message):
        plan(tiny(*GYM, *words))


@needs_gymnasium
@pytest.mark.parametrize(
    ("env", "partition", "told"),
    [
        (
            "Pendulum-v1",
            "vary: {max_torque: [2.5, 3]}",
            r"max_torque=2\.5, 3 changes nothing in .*nominal: 2",
        ),
        ("Pendulum-v1", "values: {screen_dim: [500, 400, 300]}", "screen_dim=300, 400 changes nothing"),
    ],
)
def test_attributes_without_effect_are_refused(env, partition, told):
    """The torque limit of a pendulum above its nominal one: its Box of actions stays what it was."""
    with pytest.raises(ConfigError, match=told):
        plan(tiny(f"task.env={env}", f"partition={{kind: environment, {partition}}}"))


@needs_gymnasium
def test_values_without_effect_are_warned_of_where_others_have_one():
    words = ["task.env=Pendulum-v1", "partition={kind: environment, vary: {g: [8, 12], max_torque: [1, 3]}}"]
    assert any("max_torque=3 changes nothing" in each for each in plan(tiny(*words)).warnings)


@needs_gymnasium
@pytest.mark.parametrize(
    ("env", "attribute", "value"),
    [
        ("Pendulum-v1", "max_speed", 4.0),
        *(("MountainCarContinuous-v0", "goal_position", goal) for goal in (0.4, 0.44, 0.46, 0.5)),
    ],
)
def test_values_whose_effect_needs_a_good_policy_are_found(env, attribute, value):
    assert check_effects(facts_of(env), {attribute: [value]}) == ()


@needs_gymnasium
def test_an_environment_of_a_package_is_imported_as_gymnasium_does(tmp_path, monkeypatch):
    (tmp_path / "own_pendulums.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('OwnPendulum-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert facts_of("own_pendulums:OwnPendulum-v0", ["g"]).horizon == 7
    values = {"g": np.array([8.0, 12.0])}
    after = [build_environment(name, 2, values) for name in ("own_pendulums:OwnPendulum-v0", "Pendulum-v1")]
    first, second = ([each.reset([5, 6]), each.step(np.zeros((2, 1))).reached] for each in after)
    assert np.array_equal(first, second)
    with pytest.raises(ConfigError, match=r"the package 'no_such_package' .* cannot be imported"):
        facts_of("no_such_package:OwnPendulum-v0")
    with pytest.raises(ConfigError, match=r"'own_pendulums:Pendulumm-v9' is unknown"):
        facts_of("own_pendulums:Pendulumm-v9")


@needs_gymnasium
def test_clients_have_their_own_gravity_and_length():
    values = {"g": np.array([8.0, 12.0]), "l": np.array([1.0, 1.0])}
    environment = build_environment("Pendulum-v1", 2, values)
    one = environment.reset([5, 5])
    assert np.array_equal(one[0], one[1]) and np.abs(one).max() <= 1
    after = environment.step(np.zeros((2, 1)))
    assert after.reward[0] == after.reward[1] and not np.array_equal(after.reached[0], after.reached[1])
    speed = 8 * (after.reached[:, 2] - one[:, 2])  # without torque the change of speed is 1.5 g / l sin(angle) dt
    assert speed[1] / speed[0] == pytest.approx(1.5, rel=1e-5)


@needs_gymnasium
def test_an_environment_that_fails_is_named():
    environment = build_environment("Pendulum-v1", 2, {"l": np.array([1.0, 0.0])})
    environment.reset([5, 5])
    with pytest.raises(RunError, match=r"Pendulum-v1 fails in an episode \(ZeroDivisionError: .*; choose other values"):
        environment.step(np.zeros((2, 1)))


@needs_gymnasium
def test_actions_are_scaled_to_the_box():
    environment = build_environment("Pendulum-v1", 2, {})
    observed = environment.reset([1, 1])
    angle = np.arctan2(observed[0, 1], observed[0, 0])
    reward = environment.step(np.array([[1.0], [0.0]])).reward
    assert reward[1] == pytest.approx(-(angle**2 + 0.1 * (8 * observed[0, 2]) ** 2), rel=1e-4)
    assert reward[0] == pytest.approx(reward[1] - 0.001 * 2.0**2, rel=1e-6)


@needs_gymnasium
@pytest.mark.parametrize(("env", "least"), [("Pendulum-v1", -500), ("MountainCarContinuous-v0", 0)])
def test_scripted_controllers_of_gymnasium_solve_their_task(env, least):
    environment, controller = build_environment(env, 3, {}), scripted_controller(env)
    observed, total, going = environment.reset([1, 2, 3]), np.zeros(3), np.ones(3, dtype=bool)
    for _ in range(environment.facts.horizon):
        found = environment.step(controller(observed))
        total += np.where(going, found.reward, 0)
        going &= ~found.terminal
        observed = found.observation
    assert (total > least).all(), total


@needs_gymnasium
def test_an_episode_that_ends_for_good_begins_anew_and_nothing_follows_it():
    environment, controller = (
        build_environment("MountainCarContinuous-v0", 1, {}),
        scripted_controller("MountainCarContinuous-v0"),
    )
    observed = environment.reset([1])
    for _ in range(200):
        found = environment.step(controller(observed))
        observed = found.observation
        if found.terminal[0]:
            break
    assert found.terminal[0] and found.reward[0] > 90
    assert not np.array_equal(found.reached, found.observation)


@needs_gymnasium
def test_an_episode_that_its_environment_cuts_short_is_not_stepped_on(tmp_path, monkeypatch):
    """Its last observation has something after it for the critic, and its return ends there."""
    (tmp_path / "short_episodes.py").write_text(
        "import gymnasium\n"
        "import numpy as np\n"
        "class Short(gymnasium.Env):\n"
        "    action_space = gymnasium.spaces.Box(-1, 1, (1,))\n"
        "    observation_space = gymnasium.spaces.Box(-8, 8, (1,))\n"
        "    def __init__(self):\n"
        "        self.pay, self.steps = 1.0, 3\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        self.steps = 0\n"
        "        return np.zeros(1, np.float32), {}\n"
        "    def step(self, action):\n"
        "        assert self.steps < 3, 'stepped past its end'\n"
        "        self.steps += 1\n"
        "        return np.full(1, self.steps, np.float32), self.pay, False, self.steps == 3, {}\n"
        "gymnasium.register('Short-v0', Short, max_episode_steps=8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    environment = build_environment("short_episodes:Short-v0", 2, {})
    environment.reset([1, 2])
    for step in range(1, 8):
        found = environment.step(np.zeros((2, 1)))
        assert (8 * found.reached == (step - 1) % 3 + 1).all() and not found.terminal.any()
        assert (found.truncated == (step % 3 == 0)).all() and (8 * found.observation == step % 3).all()
    episodes = Episodes("short_episodes:Short-v0", 8, [1, 2], {})
    assert (returns(lambda states, noise: noise.clamp(-1, 1), 2, episodes, torch.zeros(1)) == 3.0).all()
    environments = ClientEnvironments("short_episodes:Short-v0", {"pay": np.array([1.0, 2.0])}, 2)
    noise = torch.zeros(2, 1, 7, 1)
    kept = Explorer(environments, 7, 1).explore(lambda states, drawn: drawn, [0, 1], [3, 4], noise, noise)
    assert not kept.terminal.any(), "the critic goes on from what was reached"
    assert torch.equal(8 * kept.reached[0, :, 0], torch.tensor([1.0, 2, 3, 1, 2, 3, 1]))


@needs_gymnasium
def test_a_policy_learns_on_a_pendulum_of_each_client(cache):
    config = tiny(*GYM, "partition.vary={g: [8, 12], l: [0.8, 1.2]}", "train.rounds=1")
    federation = compose(config)
    values = federation.partition.values
    assert (values["g"] >= 8).all() and (values["g"] <= 12).all() and len(set(values["g"])) == 3
    with federation.learner.round(0) as stats:
        federation.learner.fit(federation.start, "AB")
    assert stats.losses.isfinite().all()
    assert federation.learner.evaluate(federation.start, federation.eval_data, 4).metric.max() < 0


@needs_gymnasium
@pytest.mark.parametrize(
    ("env", "vary", "shown"),
    [
        ("Pendulum-v1", "{g: [5, 20]}", "angle in radians, 0 is upright"),
        ("MountainCarContinuous-v0", "{power: [0.001, 0.01]}", "first number of the observation"),
    ],
)
def test_what_a_policy_does_is_traced_in_every_clients_environment(env, vary, shown, cache):
    federation = compose(tiny(f"task.env={env}", f"partition={{kind: environment, vary: {vary}, each: 2}}"))
    learner, x = federation.learner, federation.start.rows([0])
    episodes = learner.environments.episodes(1, learner.horizon, learner.seed)
    found = illustrate(learner, x, episodes)
    assert (found.fields, found.shown) == ([], shown) and list(found.traces) == ["0", "1", "2"]
    learner.model.bind_adapters(x)
    seen = record(learner.act, episodes.take(np.array([0, 2, 4])), x.flat)  # the first environment of each
    if env == "Pendulum-v1":
        sines, cosines = (np.array([turn(own) for own in found.traces.values()]) for turn in (np.sin, np.cos))
        assert np.allclose(cosines, seen[:, :, 0], atol=1e-6) and np.allclose(sines, seen[:, :, 1], atol=1e-6)
    else:
        assert np.array_equal(list(found.traces.values()), seen[:, :, 0])
    assert len({tuple(own) for own in found.traces.values()}) == 3


def test_traces_are_drawn_one_line_per_client(drawn):
    traces = {"0": [3.0, 2.0, 1.0], "1": [-3.0, -2.0, 0.5], "2": [0.0, 0.1, 0.2]}
    first = PolicyShown(0, "own", [], "angle in radians", {"0": [1.0]})
    (picture,) = policy_pictures([first, PolicyShown(4, "averaged", [], "angle in radians", traces)])
    assert picture.title == "An episode of the averaged policy in the clients' environments"
    assert [key.label for key in picture.legend] == ["client 0", "client 1", "client 2"]
    assert len({key.colour for key in picture.legend}) == 3
    assert all(picture.svg.count(key.colour) >= 1 for key in picture.legend) and "angle in radians" in picture.svg
    assert policy_pictures([PolicyShown(4, "own", [], "", {})]) == []
