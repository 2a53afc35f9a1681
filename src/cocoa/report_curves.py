"""Loss curves of finished runs: read from the stages' training logs, laid out as lines of a drawing.

A drawing is `WIDTH` by `HEIGHT` units, its origin at the top left, as SVG has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from cocoa.checkpoint import LOG_NAME, RECORD_NAME, read_record
from cocoa.errors import CocoaError

WIDTH, HEIGHT = 300.0, 120.0
LOG_SCALE_FROM = 6
"""A loss that falls by more than this factor is drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of the log: what it is called on the page, and what to multiply it with."""

    label: str
    scale: float = 1.0


MEASURES = {
    "token_loss": Measure("predicted text tokens: loss (nats)"),
    "patch_loss": Measure("hidden patches: loss (squared error)"),
    "first_loss": Measure("first token of B, from EOS: loss (nats)"),
    "token_accuracy": Measure("predicted text tokens: right (%)", 100),
    "loss": Measure("InfoNCE loss (nats)"),
    "eval_validation_hit@1": Measure("validation: hit@1 (%)", 100),
}
"""What is drawn, in this order. `loss` is left out where its terms stand apart."""


@dataclass(frozen=True, slots=True)
class Line:
    """One run's values.

    Attributes:
        run: its name.
        number: of the run among all, 1 the first: gives the colour.
        points: (x, y) in the drawing.
        last: the last value.
    """

    run: str
    number: int
    points: tuple[tuple[float, float], ...]
    last: float

    def path(self) -> str:
        """The points as SVG writes them."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True, slots=True)
class Chart:
    """One measure of one stage, over all runs that have it.

    Attributes:
        label: what is measured.
        lines: one a run.
        ticks: (y in the drawing, value) of the axis.
        steps: the last step.
    """

    label: str
    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...]
    steps: int


def stage_charts(runs: dict[str, Sequence[Path]]) -> dict[str, list[Chart]]:
    """The charts of every stage, in the order of the runs' stages.

    Args:
        runs: by name, the checkpoint folders of its stages in order.

    Returns:
        Stage name -> charts; a stage that a run has twice is numbered there (`contrastive (2)`).

    Raises:
        CocoaError: a folder has no record or log of a stage.
    """
    logs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    places: dict[str, int] = {}
    for run, folders in runs.items():
        for place, folder in enumerate(folders):
            stage, log = read_stage(Path(folder))
            name = numbered(stage, [known for known, of_runs in logs.items() if run in of_runs])
            logs.setdefault(name, {})[run] = log
            places[name] = max(place, places.get(name, 0))
    numbers = {run: number for number, run in enumerate(runs, 1)}
    charts = {}
    for name in sorted(logs, key=places.__getitem__):
        drawn = [_chart(key, logs[name], numbers) for key in MEASURES]
        charts[name] = [chart for chart in drawn if chart is not None]
    return charts


def numbered(name: str, taken: Container[str]) -> str:
    """The name, or where it is taken `name (2)`, `name (3)` and so on."""
    tried = (name if number == 1 else f"{name} ({number})" for number in count(1))
    return next(each for each in tried if each not in taken)


def read_stage(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """A stage's name and the trainer's log, from its checkpoint folder.

    Raises:
        CocoaError: the folder has no record or no log.
    """
    record, path = read_record(folder), folder / LOG_NAME
    if "stage" not in record or not path.is_file():
        missing = LOG_NAME if "stage" in record else RECORD_NAME
        raise CocoaError(f"{folder}: no {missing}; name the checkpoint folder that `cocoa train` wrote for a stage")
    return record["stage"], json.loads(path.read_text(encoding="utf-8"))


def _chart(key: str, logs: dict[str, list[dict[str, Any]]], numbers: dict[str, int]) -> Chart | None:
    """One measure over the runs, None where no run has logged it."""
    measure = MEASURES[key]
    values = {run: _values(key, log) for run, log in logs.items()}
    values = {run: found for run, found in values.items() if found}
    if not values:
        return None
    every = [value * measure.scale for found in values.values() for _, value in found]
    steps = max(1, *(step for found in values.values() for step, _ in found))
    logarithmic = key.endswith("loss") and 0 < min(every) * LOG_SCALE_FROM < max(every)
    ticks = log_ticks(min(every), max(every)) if logarithmic else axis_ticks(min(every), max(every))

    def height(value: float) -> float:
        low, high, at = (math.log(v) if logarithmic else v for v in (ticks[0], ticks[-1], value))
        return HEIGHT * (1 - (at - low) / (high - low))

    lines = []
    for run, found in values.items():
        points = tuple((WIDTH * step / steps, height(value * measure.scale)) for step, value in found)
        lines.append(Line(run, numbers[run], points, found[-1][1] * measure.scale))
    label = f"{measure.label}, log scale" if logarithmic else measure.label
    return Chart(label, tuple(lines), tuple((height(tick), f"{tick:g}") for tick in ticks), steps)


def _values(key: str, log: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, value) wherever the log has a finite value of a measure; a sum whose terms are logged is none."""
    return [
        (entry["step"], entry[key])
        for entry in log
        if key in entry and math.isfinite(entry[key]) and not (key == "loss" and "token_loss" in entry)
    ]


def axis_ticks(low: float, high: float) -> list[float]:
    """Round numbers that span the values, none below zero where no value is."""
    from matplotlib.ticker import MaxNLocator

    if low == high:
        low, high = (0.0, high) if high > 0 else (low, low + 1)
    ticks = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [round(float(tick), 10) for tick in ticks if tick >= 0 or low < 0]


def log_ticks(low: float, high: float) -> list[float]:
    """Those of 1, 2, 5, 10, 20, ... (and 0.5, 0.2, ...) that span two positive values, low < high."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    return [
        max(s for s in steps if s <= low),
        *(s for s in steps if low < s < high),
        min(s for s in steps if s >= high),
    ]
