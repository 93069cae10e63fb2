"""What a run of a user's own loop leaves can be drawn and shown, with evaluations and without any."""

import json
from html import unescape

import numpy as np
import pytest
from in_memory import network
from loop_rigs import batches, joined, optimizer_of, peft_model, take_steps
from test_plain_loops import TRAIN
from test_sequential import sequential, without_rows
from typer.testing import CliRunner

from peerlora.cli import app
from peerlora.runs.report import write_report
from peerlora.runtime.compose import compose

pytestmark = pytest.mark.usefixtures("drawn")  # reports are the subject
ALONE = ["clients=1", "topology.kind=complete", "peer.join=1"]


def shown(run):
    """The text of `peerlora show`, and its JSON."""
    answers = [CliRunner().invoke(app, ["show", str(run), *words]) for words in ([], ["--json"])]
    assert [each.exception for each in answers] == [None, None]
    return answers[0].output, json.loads(answers[1].output.splitlines()[-1])


def require_told(run, evaluates):
    """The report is drawn, and tells a mean score where there is one."""
    page = unescape(write_report(run).read_text(encoding="utf-8"))
    assert "<svg" in page and "the user's own" in page
    text, facts = shown(run)
    assert "finished, 4 of 4 rounds" in text and facts["finished"] and facts["rounds"] == 4
    score = facts["scores"]["own_mean"]
    assert np.isfinite(score) if evaluates else score is None
    assert np.isfinite(facts["seconds"]["total"])
    return page


@pytest.mark.parametrize("evaluates", [True, False])
def test_trainers_one_after_another_are_drawn_and_shown(config, tmp_path, evaluates):
    chosen = config("bert", "algorithm.name=dec-lora", *TRAIN)
    adjust = {} if evaluates else {"adjust": without_rows}
    found = sequential(chosen, tmp_path, report=False, **adjust)
    page = require_told(found.run, evaluates)
    assert "of all 3 clients together" in page and "loop_seconds" in page


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_plain_loop_is_drawn_and_shown(config, tmp_path, evaluates):
    chosen = config("bert", "algorithm.name=dec-lora", *TRAIN, *ALONE)
    federation = compose(chosen)
    model = peft_model(chosen, federation)
    optimizer = optimizer_of(chosen, model)
    with network(1) as (net, thread), joined(chosen, tmp_path, 0, net, thread, model, optimizer) as peer:
        if evaluates:
            peer.log({"eval_loss": 0.625}, rows=7)
        take_steps(peer, model, optimizer, chosen, federation, batches(chosen, federation, 0))
    require_told(peer.result.run, evaluates)
