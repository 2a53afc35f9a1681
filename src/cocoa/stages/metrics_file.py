"""A run's `metrics.jsonl`: all that its stages log, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocoa.files import write_text


class MetricsFile(TrainerCallback):
    """Appends what a stage logs; a run that goes on from a checkpoint has no line twice, and none torn.

    Args:
        path: of the file, which the stages of a run share.
        stage: what stands under `stage` in this one's lines.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage
        self.there: set[tuple[int, tuple[str, ...]]] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take out this stage's lines from behind the step that it goes on from; they are logged again."""
        if not state.is_world_process_zero:
            return
        kept = []
        for line in read_metrics(self.path):
            own = line["stage"] == self.stage
            if not own or 0 < line["step"] <= state.global_step:
                kept.append(line)
                self.there |= {_key(line)} if own else set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(map(_text, kept)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add a line."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"stage": self.stage, "step": state.global_step, "time": now, **(logs or {})}
        if state.is_world_process_zero and _key(line) not in self.there:
            self.there.add(_key(line))
            with self.path.open("ab", buffering=0) as file:  # one system call, so that a line is there or not
                file.write(_text(line).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of the file, but for one that a full disk has torn; none without file."""
    if not path.is_file():
        return []
    return list(_parsed(path.read_text(encoding="utf-8", errors="replace").splitlines()))


def _parsed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "stage" in found and isinstance(found.get("step"), int):
            yield found


def _key(line: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """What a stage logs once: these figures at this step."""
    return line["step"], tuple(sorted(line))


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
