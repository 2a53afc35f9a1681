"""A trainer's own checkpoints in its folder, and which of them were written to their end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMPLETE_NAME = "complete"
"""File in a checkpoint that is written last; it holds the account so far."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, the oldest first."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE_NAME}")]
    return sorted(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    return next(reversed(complete_checkpoints(folder)), None)


def account_at(checkpoint: Path) -> dict[str, Any]:
    """What the run had taken by then, see `cocoa.account`."""
    return json.loads((checkpoint / COMPLETE_NAME).read_text(encoding="utf-8"))
