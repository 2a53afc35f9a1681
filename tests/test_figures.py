"""The drawn attention maps are the layouts' own masks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from cocoa import figures
from cocoa.attention import bidirectional, causal, compressed, eos_bridged

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PANELS = {panel.title: panel for panel in figures.layout_panels() + figures.compression_panels()}


def drawn(panel: figures.Panel) -> list[str]:
    """The cells of a drawn panel, row by row: `#` filled, `/` hatched, `.` empty."""
    axes = Figure().subplots()
    figures.draw_panel(axes, panel)
    size = len(panel.tokens)
    filled = [patch for patch in axes.patches if patch.get_fill()]  # not the frame
    assert len(filled) == size * size
    cells = [["?"] * size for _ in range(size)]
    for patch in filled:
        row, column = round(patch.get_y() + 0.5), round(patch.get_x() + 0.5)
        block = to_rgba(figures.COLOURS[panel.tokens[column][1]])
        empty = patch.get_facecolor() == to_rgba(figures.COLOURS["not seen"])
        cells[row][column] = "/" if patch.get_hatch() else "." if empty else "#"
        assert empty or patch.get_facecolor()[:3] == block[:3]
    return ["".join(row) for row in cells]


@pytest.mark.parametrize(
    ("title", "mask"),
    [
        ("Causal", causal(torch.ones(1, 11))),
        ("Bidirectional", bidirectional(torch.ones(1, 11))),
        ("EOS-bridged, published", eos_bridged(torch.tensor([7]), torch.ones(1, 11), "published")),
        ("EOS-bridged, strict", eos_bridged(torch.tensor([7]), torch.ones(1, 11), "strict")),
    ],
)
def test_cells_are_the_mask_of_the_layout(title, mask):
    panel = PANELS[title]
    assert [label for label, _ in panel.tokens].index("EOS") == (7 if "bridged" in title else 10)
    assert drawn(panel) == ["".join(".#"[int(cell)] for cell in row) for row in mask[0, 0]]


def test_the_dialogue_s_cells_stop_at_the_compression_tokens():
    expected = compressed(torch.tensor([7]), 2, torch.ones(1, 13))[0, 0]
    assert drawn(PANELS["Compression"]) == ["".join(".#"[int(cell)] for cell in row) for row in expected]
    assert drawn(PANELS["Compression"])[-1] == ".......######"


def test_two_layers_of_the_published_bridge_leak_b_into_a():
    panel = PANELS["EOS-bridged, published"]._replace(layers=2)
    assert drawn(panel) == ["########///"] * 7 + ["###########"] + ["///////####"] * 3


def test_two_layers_of_the_strict_bridge_do_not():
    panel = PANELS["EOS-bridged, strict"]._replace(layers=2)
    assert drawn(panel) == ["########..."] * 8 + ["///////####"] * 3


def test_axes_carry_the_tokens_in_order():
    axes = Figure().subplots()
    figures.draw_panel(axes, PANELS["EOS-bridged, strict"])
    tokens = ["img 1", "img 2", "img 3", "img 4", "find", "a", "caption", "EOS", "a", "red", "bus"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == tokens
    assert [tick.get_text() for tick in axes.get_yticklabels()] == tokens


@pytest.mark.slow
def test_committed_images_are_drawn_again_by_the_command(tmp_path):
    subprocess.run([sys.executable, "-m", "cocoa.figures", str(tmp_path)], check=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"attention_layouts.svg", "bridge_paths.svg", "compression_layouts.svg", "scenes.png"}
    for name in names:
        assert (IMAGES / name).is_file()
        if name.endswith(".svg"):
            assert (tmp_path / name).read_text(encoding="utf-8").rstrip().endswith("</svg>")
    with Image.open(tmp_path / "scenes.png") as drawn:
        assert drawn.width > 800


def test_an_image_is_the_same_bytes_every_time(tmp_path):
    for name in ("first.svg", "second.svg"):
        figures.draw_layouts(tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
