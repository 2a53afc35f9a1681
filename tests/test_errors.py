"""A message is one line that can be printed, whatever input it quotes."""

import pytest
from torch.utils.data import DataLoader, Dataset

from cocoa.errors import LONGEST_MESSAGE, CocoaError, one_line


def test_a_message_is_one_line_without_control_characters():
    assert str(CocoaError("a\nb\x1b[2J\0\ud800 é")) == "a b\ufffd[2J\ufffd\ufffd é"


def test_the_middle_of_a_long_message_is_left_out():
    long = f"data.jsonl: {'x' * 10_000}; put it in double quotes"
    assert len(one_line(long)) == LONGEST_MESSAGE
    assert one_line(long).startswith("data.jsonl: x") and one_line(long).endswith("put it in double quotes")


class Broken(Dataset):
    """Has one row, which is bad."""

    def __len__(self):
        return 1

    def __getitem__(self, key):
        raise CocoaError("row toy/0: a.png: no such image file")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_raises_is_told_as_it_was_said(workers):
    with pytest.raises(CocoaError) as caught:
        next(iter(DataLoader(Broken(), num_workers=workers)))
    assert str(caught.value) == "row toy/0: a.png: no such image file"
