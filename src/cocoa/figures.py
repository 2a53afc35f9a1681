"""Attention maps for the documents, drawn by calling the layout functions themselves, and a sheet of scenes.

`python -m cocoa.figures docs/images` draws all of them again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cocoa.attention import bidirectional, causal, compressed, eos_bridged
from cocoa.scenes.sheet import draw_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "image": "#3b78b5",
    "text": "#2f9e77",
    "EOS": "#e07b00",
    "C1, C2": "#e07b00",
    "block B": "#a4509b",
    "dialogue": "#a4509b",
    "not seen": "#eee",
}
IMAGE, EOS = [(f"img {i}", "image") for i in (1, 2, 3, 4)], ("EOS", "EOS")
ONE_BLOCK = [*IMAGE, *((word, "text") for word in ("a", "red", "bus", "in", "the", "rain")), EOS]
BLOCK_A = [*IMAGE, *((word, "text") for word in ("find", "a", "caption"))]
TWO_BLOCKS = [*BLOCK_A, EOS, *((word, "block B") for word in ("a", "red", "bus"))]
COMPRESSED = [*IMAGE, *((word, "text") for word in ("sum", "it", "up")), *((c, "C1, C2") for c in ("C1", "C2"))]
DIALOGUE = [*COMPRESSED, *((word, "dialogue") for word in ("Q1", "A1", "Q2", "A2"))]


class Panel(NamedTuple):
    """One map over T tokens, each a label and a block: (T, T) boolean, does the row attend to the column?"""

    title: str
    note: str
    tokens: list[tuple[str, str]]
    attends: Tensor
    layers: int = 1  # hatch what reaches the row through EOS in so many layers


def layout_panels() -> list[Panel]:
    """The four layouts."""
    one, two = torch.ones(1, len(ONE_BLOCK)), torch.ones(1, len(TWO_BLOCKS))
    eos = torch.tensor([len(BLOCK_A)])
    published, strict = eos_bridged(eos, two, "published")[0, 0], eos_bridged(eos, two, "strict")[0, 0]
    return [
        Panel("Causal", "the backbone as it comes", ONE_BLOCK, causal(one)[0, 0]),
        Panel("Bidirectional", "stage 1, stage 3, and when embedding", ONE_BLOCK, bidirectional(one)[0, 0]),
        Panel("EOS-bridged, published", "stage 2: EOS sees A and B", TWO_BLOCKS, published),
        Panel("EOS-bridged, strict", "stage 2, our variant: EOS sees A only", TWO_BLOCKS, strict),
    ]


def compression_panels() -> list[Panel]:
    """CoMa's two stages."""
    start, length = torch.tensor([len(COMPRESSED) - 2]), torch.ones(1, len(DIALOGUE))
    embedded = [*IMAGE, *((word, "text") for word in ("a", "red", "bus")), *COMPRESSED[-2:]]
    return [
        Panel("Compression", "CoMa's pre-training, K = 2", DIALOGUE, compressed(start, 2, length)[0, 0]),
        Panel("Matching", "CoMa's contrastive stage: causal", embedded, causal(torch.ones(1, len(embedded)))[0, 0]),
    ]


def draw_compression(path: Path) -> None:
    """Write CoMa's layouts as one image."""
    _draw(compression_panels(), path)


def draw_layouts(path: Path) -> None:
    """Write the four layouts as one image (SVG, PNG, ... by the path's ending)."""
    _draw(layout_panels(), path)


def draw_bridge_paths(path: Path) -> None:
    """Write what passes through EOS in two layers of either bridged layout, as one image."""
    published, strict = (panel._replace(layers=2) for panel in layout_panels()[2:])
    published = published._replace(note="two layers: B reaches EOS, and by EOS also A")
    _draw([published, strict._replace(note="two layers: nothing of B reaches EOS or A")], path)


def _draw(panels: list[Panel], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9.2, 0.4 + 2.35 * len(panels)), facecolor="white", layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels) // 2, 2).flat, panels, strict=True):
        draw_panel(axes, panel)
    shown = {"not seen", *(block for panel in panels for _, block in panel.tokens)}
    legend = [Patch(color=colour, label=block) for block, colour in COLOURS.items() if block in shown]
    if panels[0].layers > 1:
        legend.append(Patch(facecolor="#cccccc", edgecolor="white", hatch="////", label="only by way of EOS"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    with rc_context({"svg.hashsalt": "cocoa"}):  # the same bytes every time
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw one map: a cell that the row attends to has the colour of the column's block."""
    from matplotlib.patches import Rectangle

    size = len(panel.tokens)
    reached = torch.linalg.matrix_power(panel.attends.float(), panel.layers) > 0
    for row, column in torch.cartesian_prod(torch.arange(size), torch.arange(size)).tolist():
        block = panel.tokens[column][1]
        style: dict[str, Any] = {"facecolor": COLOURS[block if panel.attends[row, column] else "not seen"]}
        if reached[row, column] and not panel.attends[row, column]:
            style = {"facecolor": COLOURS[block] + "59", "hatch": "////"}
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, edgecolor="white", linewidth=1.5, **style))
    if panel.tokens is TWO_BLOCKS:
        a, grey = len(BLOCK_A), "#555555"
        axes.text(size - 0.3, (a - 1) / 2, "block A", rotation=270, va="center", color=grey)
        axes.text(size - 0.3, (a + size) / 2, "block B", rotation=270, va="center", color=grey)
        difference = Rectangle((a + 0.5, a - 0.5), size - a - 1, 1, fill=False, linewidth=1.8, clip_on=False)
        axes.add_patch(difference)  # frames where the two layouts differ
    labels = [label for label, _ in panel.tokens]
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(size), labels, rotation=60, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(size), labels)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        for tick, (_, block) in zip(ticks, panel.tokens, strict=True):
            tick.set_color(COLOURS[block])
    axes.spines[:].set_visible(False)
    axes.set_ylabel("each row attends to its filled columns", fontsize=9, color="#555555")
    axes.set_xlabel(panel.note, labelpad=6)
    axes.set_title(panel.title, fontweight="bold")


if __name__ == "__main__":
    draw_layouts(Path(sys.argv[1]) / "attention_layouts.svg")
    draw_bridge_paths(Path(sys.argv[1]) / "bridge_paths.svg")
    draw_compression(Path(sys.argv[1]) / "compression_layouts.svg")
    draw_sheet(Path(sys.argv[1]) / "scenes.png")
