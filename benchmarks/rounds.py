"""Paths measured in turn, each in a process of its own, round after round; what is told of them are ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

from cocoa.checkpoint import versions

Measured = dict[str, float]
"""`seconds` of a step, `memory` above the weights in MiB, `loss`, real `tokens`, the `floor` in seconds (the step's
operations at the machine's `rate`), and that rate in GFLOP/s."""


def run(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], Measured]) -> None:
    """Measure `ours` and the `reference`, or the one that `--path` names, and print what came out.

    Args:
        parser: of the benchmark's own options.
        measure: one path, by `path` of the options.
    """
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--path", choices=("ours", "reference"), help="measure one, and print JSON")
    args = parser.parse_args()
    if args.path:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[Measured]] = {"ours": [], "reference": []}
    for _ in range(args.rounds):
        for path, rows in found.items():
            command = [sys.executable, sys.argv[0], *sys.argv[1:], "--path", path]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    ours, theirs = ({key: statistics.median(each[key] for each in rows) for key in rows[0]} for rows in found.values())
    if abs(ours["loss"] - theirs["loss"]) > 1e-2 * theirs["loss"]:
        raise SystemExit(f"the paths' losses differ: {ours['loss']:.4f} and {theirs['loss']:.4f}")
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"{ours['tokens']:.0f} tokens a step; one large product: {ours['rate']:.0f} GFLOP/s")
    for path, each in (("ours", ours), ("reference", theirs)):
        share = each["floor"] / each["seconds"]
        told = f"{each['seconds']:6.2f} s a step, {each['memory']:7.0f} MiB above the weights, {share:.0%} of that rate"
        print(f"{path:>9}: {told}")
    faster, memory = theirs["seconds"] / ours["seconds"], ours["memory"] / theirs["memory"]
    print(f"    ratio: {faster:.2f} x faster, {memory:.2f} x the memory")
