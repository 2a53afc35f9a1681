"""Writing a file whole or not at all."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any


def unfinished(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`; no two writers have the same."""
    return path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


def write_json(path: Path, content: Any) -> None:
    """Write JSON to be read by people too; the file is there only once it is whole."""
    unfinished(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished(path), path)
