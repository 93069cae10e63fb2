"""Sites whose weights are the same and whose tokenizer, config.json or start is not: told apart before round 0."""

import json
import shutil

import pytest
from in_memory import names, network, one_at_a_time, together
from safetensors.torch import load_file, save_file

from peerlora.errors import DataError, RunError, Stopped
from peerlora.lora import base_models
from peerlora.runtime import resources
from peerlora.runtime.cluster.run import compose_driver
from peerlora.runtime.compose import compose
from peerlora.runtime.inputs import describe_inputs, require_same_inputs
from peerlora.runtime.peer.site import Site, settings_of
from peerlora.runtime.peer.train import train_peer
from peerlora.runtime.simulate import resume, simulate

QUICK = ["train.rounds=1", "train.local_steps=1", "train.batch=2", "topology=complete", "clients=2"]


def edit(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def swap_words(tokenizer):
    words = tokenizer["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    return tokenizer


def lower_case(tokenizer):
    return tokenizer | {"normalizer": {"type": "Lowercase"}}


OF_TOKENIZER = {"permuted words": swap_words, "lower case": lower_case}
OF_CONFIG = {
    "fewer heads": {"num_attention_heads": 1},
    "another activation": {"hidden_act": "relu"},
    "another epsilon": {"layer_norm_eps": 1e-3},
}
NOT_COUNTED = {
    "_name_or_path": "/elsewhere",
    "architectures": ["BertForMaskedLM"],
    "transformers_version": "4.0.0",
    "hidden_dropout_prob": 0.3,
    "id2label": {"0": "no", "1": "yes"},
    "label2id": {"no": 0, "yes": 1},
    "torch_dtype": "float32",
}


@pytest.fixture
def copied(models, tmp_path):
    """A function that copies a tiny model into a folder of its own, with changes."""

    def copy(kind="bert", tokenizer=None, config=None):
        folder = tmp_path / f"base{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models(kind), folder)
        if tokenizer:
            edit(folder / "tokenizer.json", tokenizer)
        edit(folder / "config.json", lambda values: values | (config or {}))
        return folder

    return copy


@pytest.fixture
def told(config):
    """A function that gives the settings in a site's greeting."""
    return lambda folder, *words: settings_of(compose(config("bert", f"model.source={folder}", *words), clients=[0]))


def differing(one, other):
    return {name for name in one | other if one.get(name) != other.get(name)}


def test_another_tokenizer_is_told_by_name(told, copied):
    own = told(copied())
    for name, change in OF_TOKENIZER.items():
        assert differing(own, told(copied(tokenizer=change))) == {"tokenizer"}, name


def test_another_config_of_the_same_weights_is_told_by_name(told, copied):
    own = told(copied())
    for name, change in OF_CONFIG.items():
        assert differing(own, told(copied(config=change))) == {"model-config"}, name


def test_sites_with_equal_models_in_unlike_folders_agree(told, copied):
    assert told(copied()) == told(copied(config=NOT_COUNTED))


def test_a_chat_template_counts_where_rows_are_chats(config, copied, chats):
    def settings(template, *words):
        folder = copied("llama")
        (folder / "chat_template.jinja").write_text(template)
        return settings_of(compose(config("llama", f"model.source={folder}", *words), clients=[0]))

    template = (copied("llama") / "chat_template.jinja").read_text()
    of_chats = ["task.kind=chat", f"data.train=jsonl:{chats}", "data.label=null", "data.max_length=32"]
    other = template.replace("w39", "w37")
    assert other != template
    assert differing(settings(template, *of_chats), settings(other, *of_chats)) == {"tokenizer"}
    assert settings(template) == settings(other)


def test_such_sites_refuse_each_other_before_round_0(config, copied, tmp_path, no_reports):
    one, other = copied(), copied(tokenizer=swap_words, config=OF_CONFIG["fewer heads"])
    configs = [config("bert", f"model.source={folder}", *QUICK) for folder in (one, other)]
    with one_at_a_time(), network(2) as (net, thread):

        def run(client):
            site = Site(client, names(2), "run")
            with pytest.raises(RunError, match="wrong-config.*other model-config, tokenizer"):
                train_peer(configs[client], site, net.transport(site.names[client]), thread, tmp_path / f"run-{client}")
            return not (tmp_path / f"run-{client}").exists()  # nothing that would block the next try

        assert together([lambda: run(0), lambda: run(1)]) == [True, True]


def test_the_start_counts_by_its_values(told, config, models, tmp_path):
    run = simulate(config("bert", *QUICK), tmp_path / "start", report=False).run
    own, other = tmp_path / "own", tmp_path / "other"
    for place in (own, other):
        shutil.copytree(run / "adapters" / "client-01", place)

    def settings(place):
        return told(models("bert"), f"adapter.start={place}")

    first = settings(own)
    weights = load_file(other / "adapter_model.safetensors")
    save_file(weights, other / "adapter_model.safetensors", metadata={"format": "pt", "saved by": "another"})
    assert settings(other) == first  # the bytes of the file are others
    some = next(name for name in weights if "lora_B" in name)
    layer = some.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    alpha = json.loads((other / "adapter_config.json").read_text())["lora_alpha"]
    edit(other / "adapter_config.json", lambda values: values | {"alpha_pattern": {layer: 2 * alpha}})
    assert differing(settings(other), first) == {"adapter.start"}  # the tensors are the same


def test_workers_of_a_cluster_are_compared_likewise(config, copied):
    words = [*QUICK, "train.block=1", "cluster.workers=2"]
    own, *others = (
        compose_driver(config("bert", f"model.source={folder}", *words))
        for folder in (copied(), copied(tokenizer=swap_words), copied(config=OF_CONFIG["fewer heads"]))
    )
    own._compare([describe_inputs(own.federation)])
    for other, name in zip(
        others, (r"tokenizer of .* changed since .rules", r"base\d* changed since .config.json"), strict=True
    ):
        with pytest.raises(DataError, match=f"worker 0 reads other files than the driver: (?s:.*){name}"):
            own._compare([describe_inputs(other.federation)])


@pytest.mark.parametrize("where", ["tokenizer", "config"])
def test_a_resumed_run_names_what_changed(config, copied, monkeypatch, tmp_path, where):
    folder = copied()
    with pytest.raises(Stopped):
        chosen = config("bert", f"model.source={folder}", *QUICK, "train.rounds=2", "eval.every=2")
        simulate(chosen, tmp_path / "run", stop=lambda: True, report=False)
    kept = {name: (folder / name).read_text() for name in ("tokenizer.json", "config.json")}
    if where == "tokenizer":
        edit(folder / "tokenizer.json", swap_words)
    else:
        edit(folder / "config.json", lambda values: values | OF_CONFIG["another activation"])
    monkeypatch.setattr(resources, "load_base", base_models.load_base)  # the tests' own keeps what it loaded
    expected = (
        r"^the tokenizer of .*changed since \(rules\)" if where == "tokenizer" else r"changed since \(config.json"
    )
    with pytest.raises(RunError, match=expected) as error:
        resume(tmp_path / "run", report=False)
    assert "train.jsonl" not in str(error.value)
    for name, text in kept.items():
        (folder / name).write_text(text)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())  # as older versions wrote it
    del facts["inputs"]["tokenizer"], facts["inputs"]["base"]["config.json"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    assert resume(tmp_path / "run", report=False).summary["rounds"] == 2


def test_descriptions_of_older_versions_are_compared_by_what_they_have(config):
    federated = compose(config("bert", *QUICK))
    now = describe_inputs(federated)
    was = json.loads(json.dumps(now))
    del was["tokenizer"], was["base"]["config.json"]
    require_same_inputs(was, now, federated.config, None)
    was["base"]["weights"] = "other"
    with pytest.raises(RunError, match="base|model.source"):
        require_same_inputs(was, now, federated.config, None)
