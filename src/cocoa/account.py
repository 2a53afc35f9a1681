"""What training took: seconds, tokens, peak memory; of a stage over all its sessions, and of the stages before it.

Every checkpoint's record holds the facts of its own stage beside `history`, the same facts of the stages it was
made by, so that the last checkpoint carries the whole account.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cocoa.checkpoint import find_record

if sys.platform != "win32":
    import resource

FACTS = ("stage", "steps", "seconds", "tokens", "peak_memory_gb", "device")
"""What is kept of a stage; None where it is not known (a checkpoint of before there was an account)."""


class Meter:
    """Counts what one stage's training takes, over all the sessions of a run that is stopped and goes on.

    Seconds are wall-clock, with validation and the writing of checkpoints in them. Tokens are those that went
    through the model in training: image tokens and hidden ones too, padding not, each once however often a step
    computes it (GradCache, gradient checkpointing), and none of validation. Memory is the most over the
    processes: on a GPU that torch has held since the session's start, on a CPU that the process has ever held,
    the stages before it included.

    Args:
        device: that this process trains on.
        processes: how many there are.
        before: what `read` gave at the checkpoint that the run goes on from; empty at its beginning.
    """

    def __init__(self, device: torch.device, processes: int, before: dict[str, Any]) -> None:
        self.device = device
        self.before = before
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.name = name if processes == 1 else f"{processes} x {name}"
        self.tokens = torch.zeros((), dtype=torch.long, device=device)  # of this process in this session
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.started = time.perf_counter()

    def count(self, inputs: dict[str, Any]) -> None:
        """Add all `passes` of a batch."""
        for row in inputs["passes"]:
            self.tokens += row["lengths"].sum().to(self.device)  # no copy to the host: a step shall not wait for it

    def mine(self) -> Tensor:
        """(1, 2) tokens and peak bytes of this process in this session, to be gathered."""
        return torch.stack([self.tokens, torch.tensor(peak_bytes(self.device), device=self.device)])[None]

    def read(self, gathered: Tensor) -> dict[str, Any]:
        """`seconds`, `tokens`, `peak_memory_gb` and `device` of the run so far.

        Args:
            gathered: (processes, 2), what every process has in `mine`.
        """
        before = self.before
        peak = max(before.get("peak_memory_gb") or 0.0, gathered[:, 1].max().item() / 1e9)
        devices = [*before["device"].split(", then "), self.name] if before else [self.name]
        return {
            "seconds": round(before.get("seconds", 0.0) + time.perf_counter() - self.started, 3),
            "tokens": before.get("tokens", 0) + int(gathered[:, 0].sum()),
            "peak_memory_gb": round(peak, 3) or None,
            "device": ", then ".join(dict.fromkeys(devices)),
        }


def peak_bytes(device: torch.device) -> int:
    """The most memory that torch has held on a GPU, or else this process in all; 0 where nobody counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def history(model: str) -> list[dict[str, Any]]:
    """The facts of every stage that made a checkpoint, the first one first; none of an untouched backbone."""
    return stages_of(find_record(model) or {})


def stages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of every stage from a checkpoint's record, the first one first; none of an empty record."""
    if "stage" not in record:
        return []
    return [*record.get("history", []), {key: record.get(key) for key in FACTS}]


def totals(stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`seconds` and `tokens` in sum, the most `peak_memory_gb`, and the devices; None where a stage's is not known."""
    sums: dict[str, Any] = {}
    for key, together in (("seconds", sum), ("tokens", sum), ("peak_memory_gb", max)):
        values = [stage[key] for stage in stages]
        sums[key] = together(values) if values and None not in values else None
    devices = dict.fromkeys(stage["device"] for stage in stages if stage["device"])
    return sums | {"device": ", ".join(devices) or None}
