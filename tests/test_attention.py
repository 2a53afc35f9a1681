"""Truth tables of every layout, written out by hand: row = query, column = key, 1 = attends."""

from itertools import product

import pytest
import torch

from cocoa.attention import BRIDGE_LAYOUTS, bidirectional, causal, compressed, eos_bridged


def grids(mask):
    """A (B, 1, T, T) mask as one list of strings a sequence."""
    return [["".join(str(int(cell)) for cell in row) for row in sequence[0]] for sequence in mask]


def padding(*rows):
    """Strings of 0 and 1 as a (B, T) attention mask."""
    return torch.tensor([[int(cell) for cell in row] for row in rows])


def test_bridge_layouts_are_the_two_of_the_facts_and_the_control():
    assert BRIDGE_LAYOUTS == ("published", "strict", "full")


def test_causal():
    assert grids(causal(padding("1111", "0011", "1100"))) == [
        [
            "1000",
            "1100",
            "1110",
            "1111",
        ],
        [  # padded left: a padded row sees itself alone
            "1000",
            "0100",
            "0010",
            "0011",
        ],
        [  # padded right
            "1000",
            "1100",
            "0010",
            "0001",
        ],
    ]


def test_bidirectional():
    assert grids(bidirectional(padding("1111", "0011", "1110"))) == [
        [
            "1111",
            "1111",
            "1111",
            "1111",
        ],
        [
            "1000",
            "0100",
            "0011",
            "0011",
        ],
        [
            "1110",
            "1110",
            "1110",
            "0001",
        ],
    ]


def test_compressed():
    # I I C C Q A unpadded; one I, two C, Q A with a pad on the left; I I I C C with a pad on the right
    mask = compressed(torch.tensor([2, 2, 3]), 2, padding("111111", "011111", "111110"))
    assert grids(mask) == [
        [
            "100000",
            "110000",
            "111000",
            "111100",
            "001110",
            "001111",
        ],
        [
            "100000",
            "010000",
            "011000",
            "011100",
            "001110",
            "001111",
        ],
        [
            "100000",
            "110000",
            "111000",
            "111100",
            "111110",
            "000001",
        ],
    ]


# One batch: A A E B B B unpadded; A A A E B with one pad on the left; A E B B with two pads on the right.
BRIDGED = padding("111111", "011111", "111100")
EOS_POSITION = torch.tensor([2, 4, 1])


def test_bridged_published():
    assert grids(eos_bridged(EOS_POSITION, BRIDGED)) == [
        [
            "111000",
            "111000",
            "111111",  # EOS sees A and B
            "001111",
            "001111",
            "001111",
        ],
        [
            "100000",  # pad
            "011110",
            "011110",
            "011110",
            "011111",  # EOS
            "000011",
        ],
        [
            "110000",
            "111100",  # EOS
            "011100",
            "011100",
            "000010",  # pad
            "000001",  # pad
        ],
    ]


def test_bridged_strict():
    assert grids(eos_bridged(EOS_POSITION, BRIDGED, "strict")) == [
        [
            "111000",
            "111000",
            "111000",  # EOS sees A alone
            "001111",
            "001111",
            "001111",
        ],
        [
            "100000",
            "011110",
            "011110",
            "011110",
            "011110",  # EOS
            "000011",
        ],
        [
            "110000",
            "110000",  # EOS
            "011100",
            "011100",
            "000010",
            "000001",
        ],
    ]


def test_bridged_full_cuts_nothing_but_padding():
    assert grids(eos_bridged(torch.tensor([2, 1]), padding("11111", "01110"), "full")) == [
        ["11111", "11111", "11111", "11111", "11111"],
        ["10000", "01110", "01110", "01110", "00001"],
    ]


def test_bridge_without_b_is_bidirectional_over_a_and_eos():
    """What the model sees at inference is block A and EOS: no layout may differ there."""
    for layout in BRIDGE_LAYOUTS:
        mask = eos_bridged(torch.tensor([3]), padding("0111"), layout)
        assert grids(mask) == [["1000", "0111", "0111", "0111"]]


def test_what_reaches_whom_over_any_depth():
    """Layer by layer: strict never lets B reach A or EOS; published lets it, from the second layer on."""

    def reaches(layout, layers):
        step = eos_bridged(torch.tensor([2]), padding("11111"), layout)[0, 0].float()  # A A E B B
        return torch.linalg.matrix_power(step, layers) > 0

    assert grids(reaches("strict", 8)[None, None]) == [["11100", "11100", "11100", "11111", "11111"]]
    assert grids(reaches("published", 1)[None, None]) == [["11100", "11100", "11111", "00111", "00111"]]
    assert grids(reaches("published", 2)[None, None]) == [["11111", "11111", "11111", "11111", "11111"]]


LAYOUTS = {
    "causal": causal,
    "bidirectional": bidirectional,
    "published": lambda mask: eos_bridged(torch.tensor([2, 1, 0]), mask, "published"),
    "strict": lambda mask: eos_bridged(torch.tensor([2, 1, 0]), mask, "strict"),
}


@pytest.mark.parametrize(("name", "dtype"), product(LAYOUTS, (torch.int64, torch.bool, torch.float32)))
def test_shape_and_dtype(name, dtype):
    mask = LAYOUTS[name](padding("11111", "01111", "11100").to(dtype))
    assert mask.shape == (3, 1, 5, 5)
    assert mask.dtype == torch.bool


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_row_is_empty_and_no_one_sees_padding(name):
    real = padding("11111", "00011", "00000")  # the last is padding all through
    mask = LAYOUTS[name](real)[:, 0]
    assert mask.any(-1).all(), "an empty row is NaN in the softmax"
    others = mask & ~torch.eye(5, dtype=torch.bool)
    assert not others[real == 0].any(), "padding sees nobody else"
    assert not others.transpose(1, 2)[real == 0].any(), "nobody else sees padding"
