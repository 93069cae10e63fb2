import os

import pytest

from peerlora.files import atomic_file, write_atomically


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
    assert (tmp_path / "a").read_text() == "old"
