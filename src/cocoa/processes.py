"""The processes of a run, as `accelerate launch` or `torchrun` started them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import track

S = TypeVar("S")
T = TypeVar("T")

WORKERS = min(4, os.cpu_count() or 1)
"""Threads of a process that read files."""


def this_process() -> PartialState:
    """This process among those of the run, in the group that the trainers use as well (without a GPU, gloo)."""
    return PartialState(cpu=not torch.cuda.is_available() and "LOCAL_RANK" in os.environ)


def leave() -> None:
    """End the process group, the last thing of a run: a process that exits with it open may abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shared(function: Callable[[S], T], items: Sequence[S], what: str) -> list[T]:
    """`function` of every item in threads; each process does its share, and all of them get all results.

    Args:
        function: of one item.
        items: the same in every process.
        what: stands beside the progress bar.
    """
    state = this_process()
    mine = items[state.process_index :: state.num_processes]
    silent = not (state.is_main_process and sys.stderr.isatty())
    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(track(pool.map(function, mine), what, len(mine), disable=silent, transient=True))
    if state.num_processes == 1:
        return results
    parts = gather_object([results])
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(items))]
