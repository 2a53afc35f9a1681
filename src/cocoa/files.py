"""Writing a file whole or not at all, into a folder that is this run's."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoa.errors import CocoaError


def unfinished(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`; no two writers have the same."""
    return path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write a text; the file is there only once it is whole."""
    unfinished(path).write_text(text, encoding="utf-8")
    os.replace(unfinished(path), path)


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
