"""A rate of the head's own."""

import pytest
import torch

from flow_runs import tiny
from peerlora.errors import CompositionError, ConfigError
from peerlora.runtime.compose import compose

SGD = ["train.optimizer=sgd", "train.lr=0.5", "train.local_steps=1", "algorithm.name=local"]


def moved(config, *words):
    """How far each block of the first client goes in one step."""
    federation = compose(config("bert", *SGD, *words))
    after = federation.learner.fit(federation.start, "AB")
    return {block: (after.flat - federation.start.flat)[0, after.spec.columns(block)] for block in ("B", "head")}


@pytest.mark.parametrize("head", ["mixed", "private"])
def test_the_head_goes_a_quarter_as_far_and_the_factors_as_far_as_before(config, head):
    plain, slow = moved(config, f"adapter.head={head}"), moved(config, f"adapter.head={head}", "train.head_rate=0.25")
    assert plain["head"].abs().max() > 0
    torch.testing.assert_close(slow["head"], plain["head"] / 4)
    assert torch.equal(slow["B"], plain["B"])


def test_modules_that_train_in_full_have_the_heads_rate(config):
    words = ["task.kind=causal-lm", "data.label=null", "adapter.modules_to_save=[lm_head]", "train.head_rate=0.5"]
    assert compose(config("llama", *words)).start.spec.head


@pytest.mark.parametrize(
    ("kind", "words", "told"),
    [
        ("bert", ["adapter.head=frozen"], "adapter.head=frozen keeps it as it is; drop it, or use adapter.head=mixed"),
        ("llama", ["task.kind=causal-lm", "data.label=null"], "causal-lm has none; drop it, or use adapter.modules_to"),
    ],
)
def test_a_rate_of_no_head_is_refused(config, kind, words, told):
    with pytest.raises(CompositionError, match=told):
        compose(config(kind, *words, "train.head_rate=0.25"))
    compose(config(kind, *words, "train.head_rate=1"))


def test_of_a_policy_the_critic_has_its_own_setting(cache):
    assert compose(tiny("online.critic_rate=0.5")).learner.settings.head_rate == 0.5
    with pytest.raises(ConfigError, match="the rate of a critic is online.critic_rate"):
        tiny("train.head_rate=0.5")
