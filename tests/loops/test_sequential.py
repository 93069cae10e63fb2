"""Simulated clients whose local steps Trainers take, one after another, end as those of our own learner."""

import pytest
from loop_rigs import own_settings, peft_model, require_equal, trainer_of
from test_plain_loops import PINNED, TRAIN

from cases import others_slow
from peerlora.config.loading import load_config
from peerlora.errors import RunError
from peerlora.hf import SequentialLearner
from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import resume, simulate

pytestmark = pytest.mark.usefixtures("no_reports")


def sequential(chosen, folder):
    federation = compose(chosen)
    model = peft_model(chosen, federation)

    def make_trainer(client):
        return trainer_of(chosen, federation, client, folder / f"trainer-{client}", model)

    settings = load_config(own_settings(chosen) | {"eval": {"every": 2}})
    return simulate(settings, folder / "sequential", learner=SequentialLearner(make_trainer))


@pytest.mark.parametrize("method", others_slow(PINNED, [1]))
def test_trainers_one_after_another_give_the_simulation_s_adapters(config, tmp_path, method):
    name, *words = method
    chosen = config("bert", f"algorithm.name={name}", *TRAIN, *words)
    whole, found = simulate(chosen, tmp_path / "whole"), sequential(chosen, tmp_path)
    x = found.adapters
    require_equal(whole.adapters, [x.rows([client]) for client in range(chosen.clients)])
    events = read_events(found.run)
    told = select_events(read_events(whole.run), RoundDone)
    for done, expected in zip(select_events(events, RoundDone), told, strict=True):
        assert done.bytes_sent == expected.bytes_sent
    scores = select_events(events, Evaluated)
    assert [each.round for each in scores] == [0, 2, 4] and all(len(each.own) == 3 for each in scores)
    assert "one after another" in " ".join(select_events(events, RunStarted)[0].notes)
    with pytest.raises(RunError, match="loops of your own"):
        resume(found.run)
