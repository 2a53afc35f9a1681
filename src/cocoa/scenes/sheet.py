"""One example of every data set of the world on one sheet, for the documents."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from cocoa.catalogue import datasets
from cocoa.scenes.tasks import TASKS, Item
from cocoa.scenes.world import crop, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("query", "target", "hard candidate", "hard candidate")


def draw_sheet(path: Path, seed: int = 3) -> None:
    """Write the sheet as one image (SVG, PNG, ... by the path's ending)."""
    from matplotlib.figure import Figure  # it takes a second to import

    figure = Figure(figsize=(10, 1.55 * len(TASKS)), layout="constrained")
    axes = figure.subplots(len(TASKS), len(COLUMNS), gridspec_kw={"width_ratios": [1.3, 1, 1, 1]})
    for row, (name, task) in enumerate(TASKS.items()):
        entry = datasets("scenes")[name]
        example = task(random.Random(f"{seed}/{row}"), "test")
        shown = [example.query, example.target, *example.hard[:2]]
        for column, cell in enumerate(axes[row]):
            cell.axis("off")
            if row == 0:
                cell.set_title(COLUMNS[column], fontsize=10, color="#555", pad=16, loc="left")
            if column < len(shown):
                _draw_item(cell, shown[column])
        kind = f"{entry.meta_task}, {'out of' if entry.ood else 'in'} distribution"
        title = axes[row][0].text(0, 1.03, name, fontsize=9, weight="bold")
        axes[row][0].annotate(f"  {kind}", (1, 0), xycoords=title, va="bottom", fontsize=8, color="#777")
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_item(axes: Axes, item: Item) -> None:
    """A picture or crop on the left, the text beside it."""
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    left = 0.02
    if item.scene is not None:
        image = picture(item.scene) if item.thing is None else crop(item.scene, item.thing)
        inset = axes.inset_axes((0.0, 0.02, 0.42, 0.94))
        inset.imshow(image, interpolation="nearest")
        inset.set_anchor("W")
        inset.set_xticks([])
        inset.set_yticks([])
        left = 0.46
    if item.text:
        width = 26 if item.scene is None else 24
        axes.text(left, 0.5, textwrap.fill(item.text, width), va="center", fontsize=8, family="serif")
