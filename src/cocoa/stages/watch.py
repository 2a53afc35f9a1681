"""What ends a run before its last step: a request to stop (SIGTERM, Ctrl-C), and numbers gone bad.

All processes decide alike.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocoa.errors import CocoaError
from cocoa.files import write_json
from cocoa.stages.weights import local

logger = logging.getLogger(__name__)

PATIENCE = 10
"""Steps left out one after the other after which a run is given up: a model gone bad does not recover."""
NAMED = 3
"""Rows of a bad batch that a message names."""
STOPPED = 128 + signal.SIGTERM
"""Exit status of a run that was asked to stop, as of one that SIGTERM ends."""


class Watch(TrainerCallback):
    """Stops a run on SIGTERM or Ctrl-C once its step is saved, and on a loss or gradient that is no finite number.

    Args:
        accelerator: of the trainer.
        policy: `error` raises, `skip` leaves the weights as they were before the step.
        rows_of: the ids of the rows of a step's batch, over all devices.
        folder: where the rows of a bad batch are listed.

    Attributes:
        skipped: steps that were left out, also before the run was stopped and went on.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        policy: str,
        rows_of: Callable[[int], list[str]],
        folder: Path,
    ) -> None:
        self.accelerator = accelerator
        self.policy = policy
        self.rows_of = rows_of
        self.folder = folder
        self.skipped = 0
        self.in_a_row = 0
        self.asked = 0
        """The signal that asked this process to stop; 0 without."""
        self.stopping = False
        self.bad_losses = torch.zeros((), device=accelerator.device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it a signal does not end the process, but the run after its step; a second Ctrl-C does."""
        if threading.current_thread() is not threading.main_thread():  # the only one that may take signals
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if self.asked:
                raise KeyboardInterrupt
            logger.warning("stopping behind this step, which is saved; Ctrl-C again stops at once")
        self.asked = number

    def see(self, loss: Tensor) -> None:
        """Note whether a pass' loss is finite, without waiting for it."""
        self.bad_losses += ~loss.detach().isfinite()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Ask all processes whether this step is good and the last.

        Raises:
            CocoaError: it is not good, and such steps are not left out.
        """
        assert model is not None
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        scaled = self.accelerator.scaler is not None  # float16, whose scaler leaves such a step out by itself
        bad_norm = self.bad_losses.new_zeros(()) if scaled else (~get_total_norm(gradients).isfinite()).float()
        found = torch.stack([self.bad_losses, bad_norm, self.bad_losses.new_tensor(float(self.asked > 0))])
        losses, norms, asked = self.accelerator.reduce(found, reduction="sum").tolist()
        self.stopping = asked > 0
        self.bad_losses = torch.zeros_like(self.bad_losses)
        if not losses and not norms:
            self.in_a_row = 0
            return
        what = "the loss" if losses else "the gradient"
        step = state.global_step + 1
        if self.policy == "error":
            raise CocoaError(self._complaint(what, step))
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= PATIENCE:
            raise CocoaError(f"{PATIENCE} steps were left out one after the other; {self._complaint(what, step)}")
        logger.warning("step %d is left out: %s is not finite", step, what)
        for parameter in model.parameters():
            parameter.grad = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save, and end the training."""
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def leave_if_asked(self, step: int, saved: bool) -> None:
        """End the process where any was asked to stop, even if that was behind the last step.

        Args:
            step: that was the last.
            saved: whether a last step is saved as such.

        Raises:
            SystemExit: one was asked, or KeyboardInterrupt, by Ctrl-C here.
        """
        asked = (
            saved and self.accelerator.reduce(self.bad_losses.new_tensor(float(self.asked > 0)), reduction="sum").item()
        )
        if asked or self.stopping:
            by = "Ctrl-C" if self.asked == signal.SIGINT else "SIGTERM"
            logger.warning("stopped by %s, saved at step %d; the same command goes on", by, step)
            raise KeyboardInterrupt if self.asked == signal.SIGINT else SystemExit(STOPPED)

    def _complaint(self, what: str, step: int) -> str:
        rows = self.rows_of(step - 1)
        listed = self.folder / f"bad-step-{step}.json"
        if self.accelerator.is_main_process:
            listed.parent.mkdir(parents=True, exist_ok=True)
            write_json(listed, rows)
        others = f" and {len(rows) - NAMED} more, all in {listed}" if len(rows) > NAMED else ""
        return (
            f"step {step}: {what} is not finite; its rows are {', '.join(rows[:NAMED])}{others}. The last checkpoint "
            "is good, and the same command goes on from it, with on_nonfinite: skip past such steps; or look at these "
            "rows, or start anew with a lower learning_rate"
        )
