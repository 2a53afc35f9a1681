"""Whose a run's output folder is: one run's at a time, and one recipe's."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cocoa.checkpoint import read_record
from cocoa.errors import CocoaError
from cocoa.files import write_json
from cocoa.recipe import differences
from cocoa.stages.checkpoints import last_checkpoint

logger = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
"""File in a trainer's folder: the settings of the run that fills it."""
NAMED = 4
"""Changed settings that a message names."""


def is_done(folder: Path, settings: dict[str, Any], accept_changes: bool) -> bool:
    """Whether a stage's checkpoint is in its folder.

    Raises:
        CocoaError: it is there, but was made with other settings, and those are not accepted.
    """
    if not folder.exists():
        return False
    before = read_record(folder).get("settings")
    if before != settings:
        _refuse(folder, before, settings, accept_changes)
    return True


def claim(folder: Path, settings: dict[str, Any], accept_changes: bool) -> None:
    """Mark a trainer's folder with what fills it; what ended before its first checkpoint is no claim.

    Raises:
        CocoaError: a run with other settings was stopped there, and those are not accepted.
    """
    mark = folder / SETTINGS_NAME
    before = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else None
    if before == settings:
        return
    if last_checkpoint(folder) is not None:
        _refuse(folder, before, settings, accept_changes)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, settings)


def _refuse(folder: Path, before: dict[str, Any] | None, now: dict[str, Any], accept_changes: bool) -> None:
    found = differences(before, now) if before is not None else ["its settings are not known"]
    changed = ", ".join(found[:NAMED]) + (f", and {len(found) - NAMED} more" if len(found) > NAMED else "")
    if not accept_changes:
        raise CocoaError(
            f"{folder}: made by another recipe ({changed}); choose a new output_dir, or go on all the same with "
            "--accept-changes"
        )
    logger.warning("%s: going on, though the recipe has changed since (%s)", folder, changed)


@contextmanager
def owned(folder: Path, is_main: bool, option: str = "output_dir") -> Iterator[None]:
    """Hold an output folder, which an option named, for this run (its main process) alone."""
    if not is_main:
        yield
        return
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CocoaError(f"{option} {folder}: another run is writing here; wait for it or choose another") from None
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise CocoaError(f"{option} {folder}: cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()
