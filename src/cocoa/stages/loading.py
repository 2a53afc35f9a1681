"""Rows that cannot be encoded, while a stage trains: an error, or another row in their place.

A file that ends the worker that decodes it (a decoder that crashes, or takes all memory) ends no run either: the row is
found by encoding those that were under way in processes of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from cocoa.errors import CocoaError

Key = Any
"""Of a dataset: a row, or `(epoch, row)`."""
BAD_ROWS = "bad_rows"
"""In a batch: what was left out of it, by row id."""
DEADLY = "encoding it ends the process"
START = "fork" if sys.platform == "linux" else None
"""How processes that load data are started: where not forked, as by Python 3.14's default, each is sent the model."""
PATIENCE = 20.0
"""Seconds that a row may take in a process of its own."""


class Rows(Dataset):
    """A stage's rows; one that cannot be encoded is an error, or the row behind it takes its place.

    Args:
        dataset: of samples, by row or `(epoch, row)`; its `rows` have a `row_id`.
        policy: `error` or `skip`.
        deadly: rows that end the process that encodes them, which are bad.
    """

    def __init__(self, dataset: Any, policy: str, deadly: set[int]) -> None:
        self.dataset = dataset
        self.policy = policy
        self.deadly = deadly

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Any, dict[str, str]]:
        """A sample, and why rows before it are left out, by row id."""
        bad: dict[str, str] = {}
        for _ in range(len(self)):
            try:
                if row_of(key) in self.deadly:
                    raise CocoaError(f"row {self.row_id(key)}: {DEADLY}")
                return self.dataset[key], bad
            except CocoaError as error:
                if self.policy == "error":
                    raise
                bad[self.row_id(key)] = str(error)
                key = _behind(key, len(self))
        raise CocoaError("no row can be encoded; the first says why, with `on_bad_row: error`")

    def row_id(self, key: Key) -> str:
        """The name of a row."""
        return self.dataset.rows[row_of(key)].row_id


def let_workers_die() -> None:
    """Let a worker's death be seen where its next batch is asked for, and so be mended.

    torch, once it loads, has it raise wherever the main thread happens to be, in the midst of a step too. Another's
    handler stays.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    if str(getattr(signal.getsignal(signal.SIGCHLD), "__module__", "")).startswith("torch."):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def find_deadly(dataset: Any, keys: Sequence[Key]) -> set[int]:
    """The rows that end, or hang, the process that encodes them; they are tried in processes of their own."""
    deadly: set[int] = set()
    while keys:
        done = _survived(dataset, keys)
        if done < len(keys):
            deadly.add(row_of(keys[done]))
        keys = keys[done + 1 :]
    return deadly


def under_way(args: TrainingArguments) -> int:
    """How many batches a loader and its workers may have in hand."""
    return 1 + (args.dataloader_num_workers + 1) * (args.dataloader_prefetch_factor or 2)


def check_share(bad: dict[str, str], most: float, rows: int) -> None:
    """See that no more rows are left out than `max_bad_share` allows.

    Raises:
        CocoaError: they are too many.
    """
    if len(bad) > most * rows:
        raise CocoaError(
            f"{len(bad)} rows could not be used, more than max_bad_share {most:g} of {rows} allows; repair the data, "
            f"or raise it. The last: {next(reversed(bad.values()))}"
        )


def row_of(key: Key) -> int:
    """The row of a dataset's key."""
    return key[1] if isinstance(key, tuple) else key


def _behind(key: Key, rows: int) -> Key:
    after = (row_of(key) + 1) % rows
    return (key[0], after) if isinstance(key, tuple) else after


def collate_rows(items: Sequence[tuple[Any, dict[str, str]]], collate: Callable[[list[Any]], dict[str, Any]]) -> Any:
    """A batch of `Rows`, with what was left out of it."""
    bad = {name: reason for _, each in items for name, reason in each.items()}
    return collate([sample for sample, _ in items]) | {BAD_ROWS: bad}


def worker_options(args: TrainingArguments) -> dict[str, Any]:
    """What a `DataLoader` is to know of its workers."""
    return {
        "worker_init_fn": outlive_signals,
        "num_workers": args.dataloader_num_workers,
        "multiprocessing_context": START if args.dataloader_num_workers else None,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
    }


def outlive_signals(worker: int) -> None:
    """For a worker that loads data: only its parent ends it, so that a run that is asked to stop has its last batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _survived(dataset: Any, keys: Sequence[Key]) -> int:
    """How many rows, one after the other, a process encodes before it ends or hangs."""
    context: Any = multiprocessing.get_context(START)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_encode, args=(dataset, keys, sender), daemon=True)
    process.start()
    sender.close()
    done = 0
    try:
        receiver.recv()  # it has begun, which takes long where it imports everything anew
        while done < len(keys) and receiver.poll(PATIENCE):
            receiver.recv()
            done += 1
    except EOFError:
        pass
    process.kill()
    process.join()
    receiver.close()
    return done


def _encode(dataset: Any, keys: Sequence[Key], sender: Any) -> None:
    torch.set_num_threads(1)  # a fork has lost the threads of its parent's pool, and would wait for them
    sender.send(None)
    for key in keys:
        with suppress(CocoaError):  # bad, but harmless
            dataset[key]
        sender.send(None)
