import os

import pytest
import torch
from safetensors.torch import save_file

from peerlora.files import atomic_file, sync_tree, write_atomically


@pytest.mark.parametrize("data", ["ä\n", b"\x00\xff"])
def test_a_file_is_written_and_nothing_stays_beside_it(tmp_path, data):
    write_atomically(tmp_path / "a", "old")
    write_atomically(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert os.listdir(tmp_path) == ["a"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_writer_that_makes_its_own_private_file_leaves_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_file(tmp_path / "a") as temporary:
        save_file({"x": torch.zeros(2)}, temporary)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_and_its_name_are_synced_and_so_is_a_tree(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    write_atomically(tmp_path / "a", "new")
    assert synced == [str(tmp_path / "a.tmp"), str(tmp_path)]
    (tmp_path / "tree" / "below").mkdir(parents=True)
    (tmp_path / "tree" / "below" / "b").touch()
    synced.clear()
    sync_tree(tmp_path / "tree")
    assert synced == [str(tmp_path / place) for place in ("tree/below/b", "tree/below", "tree", "")]
