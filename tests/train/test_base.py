import doctest

import pytest
import torch

from peerlora.runtime.compose import compose
from peerlora.train import base
from peerlora.train.base import LocalPlan


def test_the_example_of_a_learner_runs():
    result = doctest.testmod(base)
    assert result.attempted > 5 and result.failed == 0


@pytest.mark.parametrize(("word", "blocks"), [("AB", ("A", "B")), ("A", ("A",)), ("B", ("B",))])
def test_a_word_is_short_for_its_blocks(config, word, blocks):
    federation = compose(config("bert"))
    x, learner = federation.start, federation.learner
    assert LocalPlan.of(word).trained(x.spec) == LocalPlan(blocks).trained(x.spec) == (*blocks, "head")
    found = [learner.fit(x, plan).flat for plan in (word, LocalPlan(word), LocalPlan(blocks))]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_other_words_are_refused(config):
    with pytest.raises(ValueError, match="'BA' given; expected A, B or AB"):
        LocalPlan("BA").trained(compose(config("bert")).start.spec)


def test_a_round_ends_with_its_block(config):
    learner = compose(config("bert")).learner
    with pytest.raises(KeyError), learner.round(3, step_seconds=torch.ones(4)) as trained:
        assert learner.step_seconds is not None and trained.losses.isnan().all()
        raise KeyError
    assert learner.step_seconds is None
