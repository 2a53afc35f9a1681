"""One progress bar with time left and the latest figures on a terminal; one log line a log step elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_SHOWN = ("loss", "token_loss", "patch_loss", "first_loss", "token_accuracy", "learning_rate", "eval_validation_hit@1")


class _Bar(Progress):
    """A bar, and below it the latest figures, for which a narrow terminal has no room beside it."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(self.figures, style="dim", overflow="ellipsis", no_wrap=True)


class ProgressLine(TrainerCallback):
    """Shows how far a stage is; as a context, takes the bar away however the training ends.

    Args:
        name: of the stage.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.progress: _Bar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.disable_tqdm and state.is_world_process_zero and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.progress = _Bar(*columns, TextColumn("left"), TimeRemainingColumn())
            self.task = self.progress.add_task(self.name, total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        figures = figures_of(logs or {})
        if not figures or not state.is_world_process_zero:
            return
        line = f"{self.name} {state.global_step}/{state.max_steps}: {figures}"
        if self.progress is None:
            logger.info("%s", line)
        elif any(name.startswith("eval_") for name in logs or {}):
            self.progress.console.print(line, highlight=False, markup=False)  # to stay
        else:
            self.progress.figures = figures

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        if self.progress is not None:
            self.progress.stop()


def figures_of(logs: dict[str, Any]) -> str:
    """The figures of a log entry worth a look: `loss 2.31, token_accuracy 0.52, ...`."""
    return ", ".join(f"{name.removeprefix('eval_')} {logs[name]:.4g}" for name in _SHOWN if name in logs)
