"""PEFT folders of relayed models: what is loaded gives the logits of what was evaluated."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from peerlora.data.batches import collate
from peerlora.errors import RunError
from peerlora.exchange.relay import RelayCaches
from peerlora.exchange.relayed_average import uncut_model
from peerlora.runtime.compose import compose
from peerlora.runtime.export import export_from_run
from peerlora.runtime.model_choice import ModelChoice
from peerlora.runtime.simulate import simulate

QUICK = ["train.rounds=4", "train.local_steps=1", "eval.every=4", "clients=3", "topology=path"]
RELAY = "exchange.relay={}"


def logits_with_peft(folder, source, federation, batch=6):
    """Of the first evaluation rows: a fresh base from the same source, then PEFT, as a user would."""
    import transformers
    from peft import PeftModel

    base = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3, dtype=torch.float64)
    base.config.pad_token_id = 0
    inputs = collate(federation.eval_data, [np.arange(batch)], 0, torch.float64).inputs
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder).eval()(**inputs).logits.numpy()


def rank_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["r"]


def card(folder):
    return (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["algorithm.interval=1"],
        ["algorithm.name=decaf", "adapter.rank=[1,2,3]", "adapter.head=private"],
        ["algorithm.name=ffa-lora", "exchange.relay.average=factors"],
    ],
    ids=["adf-lora", "unequal ranks", "factors"],
)
def test_what_is_deployed_is_what_was_evaluated(config, tmp_path, words):
    chosen = config("bert", *QUICK, RELAY, *words)
    result = simulate(chosen, tmp_path / "run", report=False)
    federation = compose(chosen)
    ours = federation.learner.logits(result.relayed, federation.eval_data, 64)
    own = federation.learner.logits(result.adapters, federation.eval_data, 64)
    for client in (0, 2):
        folder = result.run / "adapters" / f"client-{client:02d}"
        theirs = logits_with_peft(folder, chosen.model.source, federation)
        assert np.abs(theirs - ours[client, :6]).max() < 1e-9
        assert np.abs(theirs - own[client, :6]).max() > 1e-5, "the own model would do"
        assert rank_of(folder) == int(result.adapters.ranks[client])
        assert "the relayed average" in card(folder) and "| accuracy, worst relayed model |" in card(folder)
        assert ("left out" in card(folder)) == ("factors" not in str(words))


def test_the_exact_average_has_the_sum_of_all_ranks_and_the_logits_of_the_sum(config, tmp_path):
    chosen = config("bert", *QUICK, RELAY, "algorithm.name=decaf", "adapter.rank=[1,2,3]")
    result = simulate(chosen, tmp_path / "run", report=False)
    exact = export_from_run(result.run, tmp_path / "exact", ModelChoice(2, model="relayed", exact=True))
    assert rank_of(exact) == 6 and "no cut" in card(exact) and "left out" not in card(exact)
    federation = compose(chosen)
    caches = RelayCaches(chosen.exchange.relay, federation.start.spec, dict.fromkeys(range(3), 1), 3)
    caches.load_state_dict(load_file(result.run / "adapters" / "entries.safetensors"))
    whole = uncut_model(caches, result.adapters.rows([2]), 2)
    ours = federation.learner.logits(whole, federation.eval_data, 64)[0, :6]
    theirs = logits_with_peft(exact, chosen.model.source, federation)
    assert np.abs(theirs - ours).max() < 1e-9
    cut = logits_with_peft(result.run / "adapters" / "client-02", chosen.model.source, federation)
    assert np.abs(theirs - cut).max() > 1e-6

    tensors = load_file(exact / "adapter_model.safetensors")
    layer = federation.start.spec.layers[0].name
    B, A = (tensors[f"base_model.model.{layer}.lora_{each}.weight"].double() for each in "BA")
    entries, W = caches.pool, caches.weights([2])
    dense = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for weight, place in zip(W[0], entries.used, strict=True):
        entry = entries.entry(place)
        x = federation.start.rows([0])
        x.flat[0, x.spec.columns_of(caches.layout)] = entry.values
        dense += weight * 6 / entry.rank * x.B[layer][0].double() @ x.A[layer][0].double()
    torch.testing.assert_close(B @ A, dense, rtol=0, atol=1e-9)


def test_a_rank_above_a_layers_width_is_factored_without_loss(config, tmp_path):
    chosen = config("bert", *QUICK, RELAY, "adapter.rank=7", "algorithm.interval=1")
    result = simulate(chosen, tmp_path / "run", report=False)
    exact = export_from_run(result.run, tmp_path / "exact", ModelChoice(0, model="relayed", exact=True))
    assert rank_of(exact) == 16, "the layers are 16 wide; three ranks of 7 would be 21"
    federation = compose(chosen)
    caches = RelayCaches(chosen.exchange.relay, federation.start.spec, dict.fromkeys(range(3), 1), 3)
    caches.load_state_dict(load_file(result.run / "adapters" / "entries.safetensors"))
    whole = uncut_model(caches, result.adapters.rows([0]), 0)
    ours = federation.learner.logits(whole, federation.eval_data, 64)[0, :6]
    theirs = logits_with_peft(exact, chosen.model.source, federation)
    assert np.abs(theirs - ours).max() < 1e-9


def test_models_by_name_and_what_a_run_deploys(config, tmp_path):
    both = {}
    for deploy in ("own", "relayed"):
        words = [f"exchange.relay={{deploy: {deploy}}}", "algorithm.interval=1"]
        run = simulate(config("bert", *QUICK, *words), tmp_path / deploy, report=False).run
        both[deploy] = run
        for model in ("own", "relayed"):
            export_from_run(run, tmp_path / f"{deploy}-{model}", ModelChoice(1, model=model))
        export_from_run(run, tmp_path / f"{deploy}-default", 1)
        export_from_run(run, tmp_path / f"{deploy}-cut", ModelChoice(1, rank=1, model="relayed"))
        export_from_run(run, tmp_path / f"{deploy}-averaged", ModelChoice(None, model="averaged"))
        written = load_file(run / "adapters" / "client-01" / "adapter_model.safetensors")
        found = load_file(tmp_path / f"{deploy}-default" / "adapter_model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in written.items())
    for model in ("own", "relayed", "averaged", "cut"):
        one, other = (load_file(tmp_path / f"{deploy}-{model}" / "adapter_model.safetensors") for deploy in both)
        assert all(torch.equal(one[name], other[name]) for name in one), model
    assert rank_of(tmp_path / "own-cut") == 1 and "left out" in card(tmp_path / "own-cut")
    own, relayed = (load_file(tmp_path / f"own-{model}" / "adapter_model.safetensors") for model in ("own", "relayed"))
    assert not all(torch.equal(own[name], relayed[name]) for name in own)


def test_choices_that_cannot_be(config, tmp_path):
    plain = simulate(config("bert", *QUICK), tmp_path / "plain", report=False).run
    factors = simulate(
        config("bert", *QUICK, "exchange.relay={average: factors}"), tmp_path / "factors", report=False
    ).run
    for run, choice, words in (
        (plain, {"client": 0, "model": "relayed"}, "no relayed models"),
        (plain, {"client": 0, "exact": True}, "--exact is for relayed models"),
        (plain, {"client": None, "model": "own"}, "give --client"),
        (factors, {"client": 0, "model": "averaged"}, "leave out --client"),
        (factors, {"client": 0, "exact": True}, "averages factors"),
        (factors, {"client": 0, "exact": True, "rank": 2}, "drop one"),
    ):
        with pytest.raises(RunError, match=words):
            export_from_run(run, tmp_path / "to", ModelChoice(**choice))
        assert not (tmp_path / "to").exists()
    (factors / "adapters" / "relayed.safetensors").unlink()
    with pytest.raises(RunError, match="lost its relayed models"):
        export_from_run(factors, tmp_path / "to", ModelChoice(0, rank=1))
