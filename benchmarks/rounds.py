"""Paths measured in turn, each in a process of its own, round after round; what is told of them are ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

from shapes import ADAPTERS, SHAPES, Floor, bandwidth, matmul_rate, median_seconds

from cocoa.account import peak_bytes
from cocoa.backbone import Backbone
from cocoa.checkpoint import versions

Measured = dict[str, float]
"""`seconds` of a step, `memory` above the weights in MiB, `loss`, real `tokens`; the step's `operations` and `bytes`,
how many of each the machine does in a second (`rate`, `bandwidth`), measured; `mfu`, the share of its rate."""


def measured(
    step: Callable[[], float], work: Floor, backbone: Backbone, before: int, args: argparse.Namespace
) -> Measured:
    """What a path takes.

    Args:
        step: a forward and a backward pass; returns the loss.
        work: that a forward pass has to do. A backward pass does as much for the gradients of inputs, and as much again
            for those of weights that are trained.
        backbone: that is trained.
        before: peak bytes before anything was computed.
        args: of the benchmark.
    """
    device = backbone.model.device
    loss = step()
    seconds = median_seconds(step, device, args.repeats)
    peak = peak_bytes(device)  # before the machine is measured
    operations, rate = (3 if args.adapters == "none" else 2) * work.forward, matmul_rate(device)
    return {
        "seconds": seconds,
        "memory": (peak - before) / 2**20,
        "loss": loss,
        "tokens": work.tokens,
        "operations": operations,
        "bytes": work.bytes(),
        "rate": rate,
        "mfu": operations / rate / seconds,
        "bandwidth": bandwidth(device),
    }


def run(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], Measured]) -> None:
    """Measure `ours` and the `reference`, or the one that `--path` names, and print what came out.

    Args:
        parser: of the benchmark's own options.
        measure: one path, by `path` of the options.
    """
    parser.add_argument("--shape", choices=SHAPES, default="middle")
    parser.add_argument("--adapters", choices=ADAPTERS, default="none", help="none trains all weights")
    parser.add_argument("--tokens-per-pass", type=int, default=16_384, help="of ours")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--by-length", action="store_true", help="attention in a call for each length, on a GPU too")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the text model's layers")
    parser.add_argument("--repeats", type=int, default=2)
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
    print(f"losses {ours['loss']:.4f} and {theirs['loss']:.4f}")
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"one large product: {ours['rate'] / 1e9:.0f} GFLOP/s; one large copy: {ours['bandwidth'] / 1e9:.1f} GB/s")
    computed, moved = ours["operations"] / ours["rate"], ours["bytes"] / ours["bandwidth"]
    print(
        f"{ours['tokens']:.0f} tokens a step: {ours['operations'] / 1e9:.0f} GFLOP, {computed:.2f} s at that rate; "
        f"{ours['bytes'] / 1e9:.2f} GB, {moved:.2f} s"
    )
    for path, each in (("ours", ours), ("reference", theirs)):
        told = f"{each['seconds']:6.2f} s a step, {each['memory']:7.0f} MiB above the weights, MFU {each['mfu']:.0%}"
        print(f"{path:>9}: {told}")
    if abs(ours["loss"] - theirs["loss"]) > 1e-2 * theirs["loss"] or ours["tokens"] != theirs["tokens"]:
        raise SystemExit("the paths do not compute the same")
    faster, memory = theirs["seconds"] / ours["seconds"], ours["memory"] / theirs["memory"]
    print(f"    ratio: {faster:.2f} x faster, {memory:.2f} x the memory")
