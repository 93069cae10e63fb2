"""YAML and words of the command line: nothing is dropped, repeated or guessed in silence."""

import pytest

from peerlora.config.loading import in_order, load_config
from peerlora.errors import ConfigError, RunError
from peerlora.runs.resume import stored_config
from peerlora.runs.store import RunStore


@pytest.fixture
def refused(tmp_path):
    """Load a text as a config; returns the message that refuses it."""

    def load(text, words=(), encoding="utf-8"):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding=encoding)
        with pytest.raises(ConfigError) as error:
            load_config(path, words)
        return str(error.value)

    return load


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lr: 1}\nclients: 3\n# ...\ntrain: {rounds: 3}\n", "key 'train' is given twice, in lines 1 and 4"),
        ("train:\n  lr: 1\n  rounds: 2\n  lr: 2\n", "key 'train.lr' is given twice, in lines 2 and 4"),
        ("train: {lr: 1, 'lr': 2}\n", "key 'train.lr' is given twice, in line 1"),
        ("clock: {away: [{client: 1, client: 2}]}\n", "key 'clock.away.client' is given twice"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_its_lines(refused, text, words):
    assert words in refused(text)


def test_anchors_and_merges_may_be_overridden(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: &all {lr: 0.5, rounds: 7}\neval: {rows: 3}\n")
    assert load_config(path).train.lr == 0.5
    path.write_text("train:\n  <<: {lr: 0.5, rounds: 7}\n  lr: 0.25\n")
    assert (load_config(path).train.lr, load_config(path).train.rounds) == (0.25, 7)


def bomb(levels=9, width=9):
    lines = ["a: &a0 [x]"] + [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels + 1)]
    return "\n".join([*lines, f"clients: *a{levels}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(), "stands for more than 100,000 values; use fewer aliases"),
        ("clients: &a [*a]\n", "stands for something that it is part of"),
        ("clients: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
        ("seed: " + "9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("data: {label: 2024-13-45}\n", "is not valid YAML: month must be in 1..12; write text in quotation marks"),
        ("task: {labels: [yes, no]}\n", "task.labels.0: True given; input should be a valid string, in quot"),
        ("task: {labels: [01, 010]}\n", "task.labels.0: 1 given; input should be a valid string, in quotation marks"),
        (
            "adapter: {rank: 1000000000}\n",
            "adapter.rank: 1000000000 given; input should be less than or equal to 16384",
        ),
        ("train: {batch: [8, 1000000000]}\n", "train.batch.1: 1000000000 given; input should be less than or equal to"),
        ("clients: [" + "x, " * 5000 + "]", "clients: ['x', 'x'"),
    ],
)
def test_yaml_that_means_something_else_or_too_much_is_refused_in_short(refused, text, words):
    said = refused(text)
    assert words in said and len(said) < 500


def test_another_encoding_is_named(refused):
    assert "is not encoded as UTF-8" in refused("data: {label: größe}\n", encoding="cp1252")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train={lr: 1, lr: 2}"], "key 'lr' is given twice, in line 1"),
        (["seed=" + "9" * 5000], "Exceeds the limit"),
        (["data.label=2024-13-45"], "'data.label=2024-13-45' is not valid YAML"),
        (["clients=[1,"], "'clients=[1,' is not valid YAML"),
    ],
)
def test_words_that_contradict_or_mean_nothing_are_refused(refused, words, said):
    message = refused("", words)
    assert said in message and len(message) < 500


def test_a_word_that_is_given_twice_is_refused():
    with pytest.raises(ConfigError, match="train.lr is given twice, as '1' and '2'; keep one"):
        in_order(["train.lr=1", "train.rounds=3", "train.lr=2"])
    assert in_order(["seed=1", "seed=1"]) == ["seed=1", "seed=1"]


def test_no_word_of_a_command_undoes_another():
    words = ["topology.p=0.25", "topology.kind=random", "train.rounds=7", "train={lr: 0.5}", "train.rounds=7"]
    for order in (words, words[::-1]):
        config = load_config({"topology": "ring"}, in_order(order))
        assert (config.topology.p, config.train.rounds, config.train.lr) == (0.25, 7, 0.5)


@pytest.mark.parametrize("damage", [b"train: [1,", b"\xff", b"just words", b"nothing: known", b"seed: 1\nseed: 2"])
def test_a_damaged_config_of_a_run_is_one_message(tmp_path, damage):
    RunStore.create(tmp_path / "run", load_config({}).to_yaml(), {}).close()
    (tmp_path / "run" / "config.yaml").write_bytes(damage)
    with pytest.raises(RunError, match="config.yaml"), RunStore.open(tmp_path / "run") as store:
        stored_config(store)


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ([], 6 * 5 * 8 * 4),  # rounds x steps x rows x clients
        (["train.accumulate=3"], 6 * 5 * 3 * 8 * 4),
        (["train.quiet=0.5"], 3 * 5 * 8 * 4),
        (["train.batch=[1,2,3,4]", "train.accumulate=2"], 6 * 5 * 2 * 10),
    ],
)
def test_a_run_counts_its_training_samples(words, rows):
    tree = {"clients": 4, "topology": "ring", "train": {"rounds": 6, "local_steps": 5, "batch": 8}}
    assert load_config(tree, words).training_samples == rows


def test_a_list_of_no_class_names_is_refused():
    with pytest.raises(ConfigError, match=r"task.labels: \[\] given"):
        load_config({}, ["task.labels=[]"])


@pytest.mark.parametrize(
    "words",
    [
        ["task.kind=regression"],
        ["task.kind=causal-lm", "data.label=null"],
        ["task.kind=chat", "data.label=null"],
        ["task.kind=sequence-to-sequence", "data.label=null"],
        ["task.kind=flow-policy", "task.env=point-mass", "model.source=scripted"],
    ],
)
def test_names_of_classes_are_refused_where_there_are_none(words):
    kind = words[0].partition("=")[2]
    with pytest.raises(ConfigError, match=rf"task.labels names classes, which task.kind={kind} has none of; drop it"):
        load_config({}, [*words, "task.labels=[a, b]"])
    load_config({}, words)


@pytest.mark.parametrize("kind", ["classification", "multi-label", "token-classification", "image-classification"])
def test_names_of_classes_are_taken_where_there_are_some(kind):
    assert load_config({}, [f"task.kind={kind}", "task.labels=[a, b]"]).task.labels == ["a", "b"]
