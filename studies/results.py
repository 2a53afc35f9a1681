"""Raw results of the studies: small CSV files beside them, filled by as many processes as there are cores."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

FOLDER = Path(__file__).parent / "results"
RUNS = Path("runs/studies")
"""Scenes, weights that runs share, locks: everything that is not kept in the repository."""

logger = logging.getLogger("studies")

Row = dict[str, Any]


def start_log() -> None:
    """Tell of every task that is done."""
    logging.basicConfig(level=logging.WARNING)
    logger.setLevel(logging.INFO)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows at the end of a file, all in one write."""
    rows = list(rows)
    with FileLock(lock_path(path.stem)):
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


def work(path: Path, tasks: Iterable[tuple[Mapping[str, Any], Callable[[], list[Row]]]]) -> None:
    """Do the tasks whose rows are not in a file yet, and wait for those that other processes are at.

    Args:
        path: the file.
        tasks: in order, what tells a task from others (columns of the file) and what makes its other columns. One
            that is stopped is done again by the next call.
    """
    elsewhere = []
    for key, make in tasks:
        try:
            _do(path, key, make, timeout=0)
        except Timeout:
            elsewhere.append((key, make))
    for key, make in elsewhere:
        _do(path, key, make, timeout=-1)


def _do(path: Path, key: Mapping[str, Any], make: Callable[[], list[Row]], timeout: float) -> None:
    names = {name: str(value) for name, value in key.items()}
    title = " ".join(names.values())
    with FileLock(lock_path(f"{path.stem}-{title}"), timeout=timeout):
        if any(all(row[name] == value for name, value in names.items()) for row in read(path)):
            return
        started = time.perf_counter()
        append(path, [{**key, **row} for row in make()])
        logger.info("%s: %.0f s", title, time.perf_counter() - started)


def pack(hits: np.ndarray) -> str:
    """(queries,) booleans as hexadecimal text."""
    return np.packbits(hits).tobytes().hex()


def unpack(text: str, queries: int) -> np.ndarray:
    """(queries,) booleans; see `pack`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=queries).astype(bool)


def hit_rows(hits: Mapping[str, np.ndarray]) -> list[Row]:
    """A row for each data set: its queries, hit@1 in percent, and the hits themselves."""
    return [
        {"dataset": name, "queries": len(own), "hit@1": f"{100 * own.mean():.1f}", "hits": pack(own)}
        for name, own in hits.items()
    ]


def lock_path(name: str) -> Path:
    """The file that is locked while something is done by one process."""
    folder = RUNS / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name.replace('/', '-').replace(' ', '_')}.lock"
