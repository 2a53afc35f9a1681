"""The processes of a run, as `accelerate launch` or `torchrun` started them."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import Progress, track

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

WORKERS = min(4, os.cpu_count() or 1)
"""Threads of a process that read files, and prepare what a model takes."""
LOG_EVERY = 30.0
"""Seconds between two log lines where there is no terminal."""
WAIT_FOR_OTHERS = 1800.0
"""Seconds that processes wait for each other, as transformers has it (`ddp_timeout`)."""
WAIT = 0.5
"""Seconds between two looks at what other processes have written."""


def this_process(timeout: float = WAIT_FOR_OTHERS) -> PartialState:
    """This process among those of the run, in the group that the trainers use as well (without a GPU, gloo).

    Args:
        timeout: seconds that processes wait for each other; the first call, which makes the group, decides.
    """
    cpu = not torch.cuda.is_available() and "LOCAL_RANK" in os.environ
    return PartialState(cpu=cpu, timeout=timedelta(seconds=timeout))


def leave() -> None:
    """End the process group, the last thing of a run: a process that exits with it open may abort.

    Its threads end with the last reference to it, and trainers, which hold one, refer to themselves.
    """
    if torch.distributed.is_initialized():
        gc.collect()
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


@contextmanager
def counting(what: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told how many more are done: a bar on a terminal, else a log line now and then.

    Args:
        what: is counted.
        total: of it, in this process.
        shown: whether this process shows anything.
    """
    terminal, done, logged = sys.stderr.isatty(), 0, time.monotonic()
    with Progress(disable=not (shown and terminal)) as bar:
        task = bar.add_task(what, total=total)

        def count(more: int) -> None:
            nonlocal done, logged
            done += more
            bar.advance(task, more)
            if shown and not terminal and time.monotonic() - logged > LOG_EVERY:
                logger.info("%d/%d %s", done, total, what)
                logged = time.monotonic()

        yield count


def wait_for_files(paths: Iterable[Path]) -> None:
    """Wait until other processes have written their files; a barrier would time out where they need long."""
    for path in paths:
        while not path.exists():
            time.sleep(WAIT)
