"""A file is there once it is whole."""

import pytest

from cocoa.files import whole, write_text


def test_nothing_is_left_of_a_file_that_never_was_whole(tmp_path):
    write_text(tmp_path / "kept", "before")
    with pytest.raises(OSError, match="full"), whole(tmp_path / "kept") as unfinished:
        unfinished.write_text("half")
        raise OSError("the disk is full")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept", "before")]
