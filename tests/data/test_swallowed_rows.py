"""Rows that a quotation mark swallowed are found; texts over several lines are none."""

import csv
import io
import logging
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerlora.data.columns import Columns
from peerlora.data.files import read_table
from peerlora.errors import DataError

NEEDED = Columns(("text",), "label")
TOLD = "seems to take in rows"


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    return str(path)


REFUSED = {
    "a comma in the opening line": (
        *("text,label", '"A good, but long film,good', "bad film,bad", "fine film,good", 'a disk of 12",bad'),
        "nice,good",
    ),
    "a blank line among the rows": ("text,label", '"A film,good', "bad film,bad", "", 'a disk of 12",bad', "nice,good"),
    "label first, a comma in the closing line": (
        *("label,text", 'good,"A film', "bad,a bad film", 'good,a disk, of 12"', "bad,nice"),
    ),
    "some labels are nowhere else": (
        *("text,label", '"A good, long film,ugly', "bad film,bad", "fine film,odd", 'a disk of 12",bad', "nice,good"),
    ),
    "numbers": ("text,label", '"A good, but long film,4', "bad film,1", 'a disk of 12",2', "nice,3"),
    "an id in front": (
        "id,text,label",
        '1,"A good, long film,good',
        "2,bad film,bad",
        '3,a disk of 12",bad',
        "4,c,good",
    ),
    "one line that is no row": (
        *("text,label", '"A film,good', "bad film,bad", "fine film,good", "half", 'a disk of 12",bad', "nice,good"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_were_taken_in_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=f"a.csv: a cell that a quotation mark opens in line 2 runs .* and {TOLD}"):
        read_table(write(tmp_path / "a.csv", *REFUSED[name]), columns=NEEDED)


WARNED = {
    "no label is known": ("text,label", '"A film,ugly', "bad film,odd", 'a disk of 12",bad', "nice,good"),
    "nothing between, a comma": ("text,label", '"A good, but long film,good', 'a disk of 12",bad', "nice,good"),
    "numbers, nothing between": ("text,label", '"A film,4', 'a disk of 12",2', "nice,3"),
    "one column": ("text", '"A film', "bad film", 'a disk of 12"', "nice", "fine", "worse"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_may_be_rows_is_a_warning(tmp_path, caplog, name):
    columns = None if name == "one column" else NEEDED
    read_table(write(tmp_path / "a.csv", *WARNED[name]), columns=columns)
    assert caplog.text.count(TOLD) == 1 and "opens in line 2" in caplog.text


TEXTS = {
    "a letter": ("text,label", '"Dear Sir,', "thank you, friend,", "", 'yours, me",good', "nice,bad"),
    "a poem": ("text,label", '"Tyger, tyger', "burning bright", 'in the forests, of the night",good', "nice,bad"),
    "a table in a text": ("text,label", '"The figures:', "1,2", "3,4", 'and so on",5', "nice,1"),
    "label first": ("label,text", 'good,"the room', 'and, the hall"', "bad,b"),
    "label first, a list": ("label,text", 'good,"the room', "a, b", 'c, d"', "bad,b"),
    "one column": ("text", '"the room', 'and the hall"', '"the garden', 'too"'),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_over_several_lines_are_read_without_a_word(tmp_path, caplog, name):
    columns = Columns(("text",), None) if name == "one column" else NEEDED
    assert read_table(write(tmp_path / "a.csv", *TEXTS[name]), columns=columns).num_rows == 2
    assert caplog.text == ""


def test_a_tsv_with_a_tab_in_the_opening_line_is_refused(tmp_path):
    lines = "text\tlabel", '"A good\tbut long film\tgood', "bad film\tbad", 'a disk of 12"\tbad', "nice\tgood"
    with pytest.raises(DataError, match=f"opens in line 2 runs to line 4 and {TOLD}"):
        read_table(write(tmp_path / "a.tsv", *lines), columns=NEEDED)


HEAD = "text\tlabel", "string\td", "meta\tclass"


def test_oranges_files_are_looked_at_likewise(tmp_path):
    path = write(
        tmp_path / "a.tab", *HEAD, "a\tgood", '"A film\tgood', "bad film\tbad", 'a disk of 12"\tbad', "b\tgood"
    )
    with pytest.raises(DataError, match=f"opens in line 5 runs to line 7 and {TOLD}"):
        read_table(path, columns=NEEDED)
    whole = write(tmp_path / "b.tab", *HEAD, '"one', 'two"\tgood', "c\tbad")
    assert read_table(whole, columns=NEEDED).column("text").to_pylist() == ["one\ntwo", "c"]


def test_oranges_three_header_lines_count(tmp_path):
    with pytest.raises(DataError, match="line 5 has 1 cells"):
        read_table(write(tmp_path / "a.tab", *HEAD, "a\tgood", "b"), columns=NEEDED)
    with pytest.raises(DataError, match="opens a cell in line 5 is not closed"):
        read_table(write(tmp_path / "b.tab", *HEAD, "a\tgood", '"b\tgood'), columns=NEEDED)


# --- any file

LABELS = ("good", "bad", "0")
words = st.text("abcxyz", min_size=1, max_size=4)
lines_of_text = st.lists(st.one_of(words, st.sampled_from([",", ", ", '"', ";", "\t"])), max_size=6).map("".join)
texts = st.lists(lines_of_text, min_size=1, max_size=5).map("\n".join).map(lambda text: f"t{text}")
sides = st.booleans()
tables = st.lists(st.tuples(texts, st.sampled_from(LABELS)), min_size=1, max_size=8)


@contextmanager
def warnings_told():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("peerlora.data.delimited")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def as_rows(table, label_first):
    return [("label", "text") if label_first else ("text", "label")] + [
        (label, text) if label_first else (text, label) for text, label in table
    ]


@given(tables, sides, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_no_well_formed_file_is_refused(tmp_path_factory, table, label_first, quoting):
    out = io.StringIO()
    csv.writer(out, quoting=quoting, lineterminator="\n").writerows(as_rows(table, label_first))
    path = tmp_path_factory.mktemp("any") / "a.csv"
    path.write_text(out.getvalue(), newline="")
    found = read_table(str(path), columns=NEEDED).to_pydict()
    assert found == {"text": [text for text, _ in table], "label": [label for _, label in table]}


plain = st.lists(words, min_size=1, max_size=4).map(" ".join)
with_comma = st.tuples(plain, plain).map(", ".join)
rows = st.lists(st.tuples(st.one_of(plain, with_comma), st.sampled_from(("good", "bad"))), min_size=1, max_size=6)


@given(rows, rows, rows, with_comma, sides)
def test_a_mark_without_its_end_is_told(tmp_path_factory, before, inside, behind, opened, label_first):
    """Whatever comes next: another mark, one that ends a cell as in 12", or nothing."""
    table = [*before, (opened, "good"), *inside, ('a disk of 12"', "bad"), *behind]
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_MINIMAL, lineterminator="\n").writerows(as_rows(table, label_first))
    whole = out.getvalue().replace('"a disk of 12"""', 'a disk of 12"').splitlines()
    line = 1 + len(before)
    end = f'{opened}"'
    assert whole[line].count(end) == 1
    whole[line] = whole[line].replace(end, opened)
    path = write(tmp_path_factory.mktemp("any") / "a.csv", *whole)
    with warnings_told() as told:
        try:
            read_table(path, columns=NEEDED)
        except DataError as error:
            assert f"line {line + 1} " in str(error)
        else:
            assert any(f"line {line + 1} " in record.getMessage() for record in told)
