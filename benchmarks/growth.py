"""How time and memory of a step grow with the number of samples and with their length: a plot, and its numbers.

    python benchmarks/growth.py [--shape mini]

Writes docs/images/performance/growth.svg and prints the table; ours beside the reference path.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure
from rich.progress import track

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "images" / "performance" / "growth.svg"
SERIES = {
    "reconstruction, samples of up to 300 tokens": (
        "reconstruction",
        "--samples",
        (2, 4, 8, 16),
        ("--longest", "300"),
    ),
    "reconstruction, tokens of the longest of 4": (
        "reconstruction",
        "--longest",
        (100, 200, 400, 800),
        ("--samples", "4"),
    ),
    "contrastive, pairs of up to 100 tokens": ("contrastive", "--pairs", (8, 16, 32, 64), ("--longest", "100")),
}
COLOURS = {"ours": "#1f77b4", "reference": "#999999"}


def measure(script: str, path: str, *options: str) -> dict[str, float]:
    """One step, in a process of its own."""
    command = [sys.executable, str(HERE / f"{script}.py"), "--path", path, *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mini")
    shape = ("--shape", parser.parse_args().shape)
    figure = Figure(figsize=(11, 6), layout="constrained")
    plots = figure.subplots(2, len(SERIES))
    runs = [
        (column, path, value) for column, each in enumerate(SERIES.values()) for path in COLOURS for value in each[2]
    ]
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for column, path, value in track(runs, "measuring"):
        script, option, _, others = list(SERIES.values())[column]
        step = measure(script, path, option, str(value), *others, *shape)
        found.setdefault((column, path), []).append(step)
        print(f"{list(SERIES)[column]}: {value}, {path}: {step['seconds']:.2f} s, {step['memory']:.0f} MiB")
    for column, (name, (_, _, values, _)) in enumerate(SERIES.items()):
        for row, (key, unit) in enumerate((("seconds", "seconds a step"), ("memory", "MiB above the weights"))):
            axes = plots[row][column]
            for path, colour in COLOURS.items():
                axes.plot(values, [step[key] for step in found[column, path]], "o-", color=colour, label=path)
            axes.set(xlabel=name, ylabel=unit, xlim=(0, None), ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
    plots[0][0].legend(frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
