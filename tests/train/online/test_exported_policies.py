"""Exported policies, played in plain gymnasium as docs/flow-policies.md says."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from flow_runs import tiny
from peerlora.runtime.compose import compose
from peerlora.runtime.export import export_from_run
from peerlora.runtime.simulate import simulate
from peerlora.train.online.base_policy import read_policy
from peerlora.train.online.flow import FlowShape
from peerlora.train.online.rollout import episode_noise

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(find_spec("gymnasium") is None, reason="gymnasium (extra rl) is not installed"),
]


@pytest.mark.parametrize("env", ["Pendulum-v1", "MountainCarContinuous-v0"])
def test_an_exported_policy_reaches_its_return_in_plain_gymnasium(env, tmp_path, no_reports):
    import gymnasium
    from peft import PeftModel

    from peerlora.train.online.gymnasium_environment import BoxScale

    config = tiny(f"task.env={env}", "partition.values={}", "train.rounds=2", "adapter.head=mixed")
    result, federation = simulate(config, tmp_path / "run"), compose(config)
    folder = export_from_run(result.run, tmp_path / "out", 1)
    environment = gymnasium.make(env)
    sizes = (environment.observation_space.shape[0], environment.action_space.shape[0])
    base = read_policy(Path(federation.export.location), env, FlowShape(*sizes, 2, 8)).policy.double()
    policy = PeftModel.from_pretrained(base, str(folder))
    of_observation, of_action = BoxScale(environment.observation_space), BoxScale(environment.action_space)
    noise, totals = episode_noise(federation.eval_data, sizes[1], result.adapters.flat), []
    for seed, drawn in zip(federation.eval_data.seeds, noise, strict=True):
        (seen, _), total = environment.reset(seed=seed % 2**31), 0.0
        for step in range(federation.eval_data.horizon):
            state = torch.from_numpy(of_observation.scaled(seen))[None]
            with torch.no_grad():
                action = policy(state, drawn[None, step])[0]
            seen, reward, terminal, *_ = environment.step(of_action.unscaled(action.numpy()))
            total += float(reward)
            assert not terminal
        totals.append(total)
    expected = federation.learner.evaluate(result.adapters.rows([1]), federation.eval_data, 4).metric[0]
    assert np.mean(totals) == pytest.approx(expected, rel=1e-6)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| environment | {env} |" in card and "gymnasium_environment.BoxScale(space).unscaled" in card


def test_numbers_of_a_box_are_scaled_where_they_have_bounds():
    from gymnasium.spaces import Box

    from peerlora.train.online.gymnasium_environment import BoxScale

    low, high = np.array([[-8.0, 0.0], [-np.inf, 2.0]]), np.array([[8.0, 4.0], [np.inf, 2.0]])
    scale, seen = BoxScale(Box(low, high, dtype=np.float64)), np.array([[4.0, 4.0], [7.0, 2.0]])
    assert scale.scaled(seen).tolist() == [0.5, 1.0, 7.0, 0.0]
    assert scale.scaled(np.stack([seen, seen])).shape == (2, 4)
    assert np.array_equal(scale.unscaled(scale.scaled(seen)), seen)
    assert scale.unscaled(np.zeros((3, 4))).shape == (3, 2, 2)
