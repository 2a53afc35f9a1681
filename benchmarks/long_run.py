"""Memory and open files of a long run, second by second: a plot, and their growth in the middle of each stage.

    python benchmarks/long_run.py [--steps 2000]

All stages of `mini-qwen2-vl` on scenes, so many steps each, with a worker that loads data, a checkpoint every 100 steps
and validation, as a user starts it. Writes docs/images/reliability/long_run.svg.
"""

from __future__ import annotations

import argparse
import re
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil
from kills import start, write_recipe, write_scenes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "reliability" / "long_run.svg"
Sample = tuple[float, float, int, str]
"""Seconds, MiB and open files of a run and its workers, and its stage."""


def sample(process: psutil.Process, began: float, log: Path) -> Sample | None:
    """What the run holds now; None where it has just ended."""
    try:
        family = [process, *process.children(recursive=True)]
        size = sum(each.memory_info().rss for each in family) / 2**20
        files = sum(each.num_fds() for each in family)
    except psutil.NoSuchProcess:
        return None
    stages = re.findall(r"(\w+) \d+/\d+: loss", log.read_text(encoding="utf-8"))
    return time.monotonic() - began, size, files, stages[-1] if stages else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    samples: list[Sample] = []
    with TemporaryDirectory() as temporary, Console(stderr=True).status("training"):
        folder = Path(temporary)
        changes = {"max_steps": steps, "save_steps": 100, "logging_steps": 10, "dataloader_num_workers": 1}
        recipe = write_recipe(folder / "run", write_scenes(folder), "dora", **changes)
        run, began = start(recipe), time.monotonic()
        while run.poll() is None:
            if found := sample(psutil.Process(run.pid), began, recipe.with_suffix(".log")):
                samples.append(found)
            time.sleep(1)
        if run.returncode:
            raise SystemExit(recipe.with_suffix(".log").read_text()[-3000:])
    table = Table("stage", "seconds", "MiB", "growth, MiB", "open files", "growth")
    for stage in dict.fromkeys(each[3] for each in samples if each[3]):
        own = [each for each in samples if each[3] == stage]
        quarter = len(own) // 4
        second, third = own[quarter : 2 * quarter], own[2 * quarter : 3 * quarter]
        sizes, files = ([median(each[column] for each in part) for part in (second, third)] for column in (1, 2))
        growth = [f"{after - before:+.0f}" for before, after in (sizes, files)]
        table.add_row(stage, f"{len(own)}", f"{sizes[1]:.0f}", growth[0], f"{files[1]:.0f}", growth[1])
    Console(width=120).print(table)
    draw(samples, steps)


def draw(samples: list[Sample], steps: int) -> None:
    """Memory above open files, over time."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    seconds = [each[0] for each in samples]
    for axis, column, label in ((above, 1, "MiB"), (below, 2, "open files")):
        axis.plot(seconds, [each[column] for each in samples], lw=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        for before, after in pairwise(samples):
            if before[3] != after[3]:
                axis.axvline(after[0], color="0.7", lw=1)
    for before, after in pairwise([(0.0, 0.0, 0, ""), *samples]):
        if before[3] != after[3]:
            above.text(after[0], above.get_ylim()[1], f" {after[3]}", va="top", fontsize=8)
    below.set_xlabel(f"seconds; {steps} steps a stage")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
