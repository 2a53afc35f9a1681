"""Writing a file whole or not at all, into a folder that is this run's."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cocoa.errors import CocoaError, first_line


def check_writable(path: Path, is_folder: bool) -> None:
    """See that an output can be written, as far as that can be told before the work is done.

    Args:
        path: that an option `output` named.
        is_folder: it shall be a folder; else a file.

    Raises:
        CocoaError: it cannot.
    """
    path = path.absolute()
    there = next(each for each in (path if is_folder else path.parent, *path.parents) if each.exists())
    if (path.is_dir() and not is_folder) or not there.is_dir() or not os.access(there, os.W_OK):
        raise CocoaError(f"output {path}: cannot be written; choose another place")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Write a file or folder whole or not at all.

    Raises:
        CocoaError: the disk is full, or does not let us; what there is of a folder is taken away.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        shutil.rmtree(path, ignore_errors=True)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CocoaError(
            f"{path}: cannot be written ({reason}); what was saved before is whole: make room, and start the same "
            "command again"
        ) from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is renamed to `path` once it is whole, and goes if it never is; each writer's own."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text; the file is there only once it is whole."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON to be read by people too; the file is there only once it is whole."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def claim_folder(folder: Path, mark: str, wanted: Mapping[str, Any], holds: str) -> None:
    """Mark an output folder as a run's; one in which nothing was written yet is free.

    Args:
        folder: made where it does not exist.
        mark: name of the file that says whose the folder is.
        wanted: what the run's result depends on, as JSON has it.
        holds: what the folder holds that some run has written; empty where there is nothing.

    Raises:
        CocoaError: it is another run's, or not ours, or cannot be written.
    """
    try:
        if holds:
            if not (folder / mark).is_file():
                raise CocoaError(f"{folder}: holds {holds} of something else; choose another --output")
            found = json.loads((folder / mark).read_text(encoding="utf-8"))
            for key, value in wanted.items():
                if found.get(key) != value:
                    other = f"other {key}" if isinstance(value, dict) else f"another {key} ({found.get(key)!r})"
                    raise CocoaError(f"{folder}: made with {other}; choose another --output")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / mark, wanted)
    except (OSError, ValueError, AttributeError) as error:
        raise CocoaError(f"{folder}: cannot be used ({error}); choose another --output") from None
