"""Label counts of the network that neighbours tell: impossible ones are never kept, and none decides alone."""

import json
from types import SimpleNamespace

import pytest
import torch

from peerlora.errors import NotNow, RunError
from peerlora.runtime.peer import label_counts
from peerlora.runtime.peer.label_counts import COUNTS, StartupSum, checked_total, load_total

OWN = torch.tensor([[3.0, 4.0]], dtype=torch.float64)


def counts(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


class Store:
    """A run folder's small files."""

    def __init__(self, **files):
        self.files = files

    def read(self, name):
        return self.files.get(name.partition(".")[0])

    def write(self, name, tree):
        self.files[name.partition(".")[0]] = tree


IMPOSSIBLE = [(1e308, 1e308), (float("inf"), 4.0), (3.0, float("nan")), (3.5, 4.0), (3.0, 2.0**31), (2.0, 4.0)]


@pytest.mark.parametrize("numbers", IMPOSSIBLE)
def test_counts_that_cannot_be_are_refused(numbers):
    with pytest.raises(RunError, match="site-1 says that the network's label counts are"):
        checked_total(counts(*numbers), OWN, "site-1")


@pytest.mark.parametrize("text", ["[1e308, 1e308]", "[Infinity, 4]", "[-3, 4]", '["x", 4]', "null", "[[3, 4]]", "3"])
def test_kept_counts_that_cannot_be_are_asked_for_again(text):
    """They were kept for ever, so that every restart diverged."""
    assert load_total(Store(label_counts={"total": json.loads(text)})) is None
    assert load_total(Store(label_counts={})) is None


def asked(monkeypatch, **told):
    """What a site makes of what its neighbours tell, all of which have begun their rounds."""
    monkeypatch.setattr(label_counts, "require_all", lambda *_: sorted(told))
    store = Store()

    def request(peer, schema):
        return None if told[peer] is None else {COUNTS: counts(*told[peer])}

    found = StartupSum(store, *[SimpleNamespace()] * 3, 1.0, request)(OWN)
    return found[0].tolist(), store.files["label_counts"]["total"]


def test_counts_on_which_neighbours_agree_are_kept(monkeypatch):
    assert asked(monkeypatch, a=None, b=(9, 9), c=(9, 9)) == ([9, 9], [9, 9])


def test_one_neighbour_alone_does_not_make_counts_up(monkeypatch):
    with pytest.raises(RunError, match="a and b tell different label counts"):
        asked(monkeypatch, a=(9, 9), b=(900, 9))


def test_nobody_tells(monkeypatch):
    with pytest.raises(NotNow, match="does not tell the network's label counts"):
        asked(monkeypatch, a=None)
