"""The table of `cocoa compare`: on the terminal, as markdown, and its numbers as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cocoa.account import totals
from cocoa.bootstrap import LEVEL
from cocoa.compare import Comparison, Run
from cocoa.preview_html import write_page

Rows = dict[str, list[str]]
"""A cell for each run, by what stands in front of the row."""


def sections(found: Comparison, datasets: bool) -> list[Rows]:
    """The rows of the table: averages, data sets if they are wanted, what training took."""
    scores = [found.averages, found.datasets] if datasets else [found.averages]
    rows = [{name: [str(score) for score in row] for name, row in part.items()} for part in scores]
    return [*rows, _account(found.runs)]


def _account(runs: list[Run]) -> Rows:
    sums = [totals(run.stages) for run in runs]
    return {
        "training: seconds": [_number(each["seconds"], ",.0f") for each in sums],
        "tokens": [_number(each["tokens"], ",d") for each in sums],
        "peak memory (GB)": [_number(each["peak_memory_gb"], ".1f") for each in sums],
        "device": [each["device"] or "-" for each in sums],
        "stages (steps)": [
            ", ".join(f"{stage['stage']} ({stage['steps']})" for stage in run.stages) or "-" for run in runs
        ],
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def remarks(found: Comparison) -> list[str]:
    """What stands under the table."""
    lines = list(found.notes)
    if any(score.low is not None for row in found.averages.values() for score in row):
        lines.insert(
            0,
            f"hit@1 (%); difference to {found.runs[0].name} in points [{LEVEL:.0%} interval, paired bootstrap over "
            f"queries, {found.resamples:,} resamples, seed {found.seed}]; * the interval excludes 0",
        )
    return lines


def show(console: Console, found: Comparison, datasets: bool) -> None:
    """Print the table."""
    table = Table("", title="hit@1 (%) and training" if found.averages else "training")
    for run in found.runs:
        table.add_column(escape(run.name), justify="right")
    for rows in sections(found, datasets):
        for name, cells in rows.items():
            table.add_row(escape(name), *(escape(cell) for cell in cells))
        table.add_section()
    console.print(table)
    for line in remarks(found):
        console.print(escape(line), soft_wrap=True)


def write(found: Comparison, datasets: bool, table: Path | None, json_file: Path | None) -> None:
    """Write the table and the numbers to the files that are named.

    Raises:
        CocoaError: a file cannot be written.
    """
    if table is not None:
        write_page(markdown(found, datasets), table)
    if json_file is not None:
        write_page(json.dumps(numbers(found), indent=2) + "\n", json_file)


def markdown(found: Comparison, datasets: bool) -> str:
    """The table for a page."""
    rows = [["", *(run.name for run in found.runs)], ["---", *["---:"] * len(found.runs)]]
    rows += [[name, *cells] for part in sections(found, datasets) for name, cells in part.items()]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    for line in remarks(found):
        lines += ["", line]
    return "\n".join(lines).replace("*", "\\*") + "\n"  # a star is no emphasis


def numbers(found: Comparison) -> dict[str, Any]:
    """Everything as JSON takes it: scores in percent, differences and intervals in points."""
    runs = [
        {"name": run.name, "folder": str(run.folder), "training": totals(run.stages), "stages": run.stages}
        for run in found.runs
    ]
    averages = {
        name: {"datasets": found.members[name], "scores": [asdict(score) for score in row]}
        for name, row in found.averages.items()
    }
    return {
        "runs": runs,
        "averages": averages,
        "datasets": {name: [asdict(score) for score in row] for name, row in found.datasets.items()},
        "notes": found.notes,
        "level": LEVEL,
        "resamples": found.resamples,
        "seed": found.seed,
    }


def score_table(results: dict[str, dict[str, Any]]) -> Table:
    """hit@1 in percent: a row for each average and data set, a column for each model."""
    table = Table(title="hit@1 (%)")
    table.add_column("")
    for name in results:
        table.add_column(escape(name), justify="right")
    first = next(iter(results.values()))
    for group, average in first["averages"].items():
        if average["datasets"]:
            label = group if not average["missing"] else f"{group} ({average['datasets']} of {average['of']} sets)"
            values = [f"{result['averages'][group]['hit@1']:.1f}" for result in results.values()]
            table.add_row(label, *values, style="bold" if group == "All" else None)
    table.add_section()
    for dataset in first["datasets"]:
        table.add_row(escape(dataset), *[f"{result['datasets'][dataset]:.1f}" for result in results.values()])
    return table
