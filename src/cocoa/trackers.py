"""Trackers (`report_to`): the Trainer's own callbacks, so set up that a run's stages are runs of one project."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from cocoa.errors import CocoaError
from cocoa.parsing import suggest
from cocoa.stages.arguments import StageArguments

PROJECT = "cocoa"
"""Project of all runs, where neither the recipe nor `WANDB_PROJECT` names one."""
TRACKERS = ("tensorboard", "trackio", "wandb")
"""Those that are tried; the Trainer knows more."""


def check_trackers(args: StageArguments) -> None:
    """See that every tracker of `report_to` is there.

    Raises:
        CocoaError: one is not known, or not installed; the message has the command that installs it.
    """
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise CocoaError(f"report_to: unknown tracker {name!r}{suggest(name, INTEGRATION_TO_CALLBACK)}")
        if name in TRACKERS and find_spec(name) is None:
            raise CocoaError(f"report_to: {name} is not installed; `pip install {name}`, or leave it out")


def names(options: Mapping[str, Any], run: str, stage: str) -> dict[str, str]:
    """`run_name` and `project` of a stage, where its options do not say them."""
    known = {"run_name": f"{run}-{stage}", "project": os.environ.get("WANDB_PROJECT", PROJECT)}
    return {key: value for key, value in known.items() if key not in options}


@contextmanager
def tracking(trainer: Trainer, logs: Path, wandb_folder: Path) -> Iterator[None]:
    """Within it a stage trains; its trackers begin and end with it.

    Args:
        trainer: of the stage, not yet training.
        logs: folder of TensorBoard's files, unless `TENSORBOARD_LOGGING_DIR` names one.
        wandb_folder: of wandb's files, unless `WANDB_DIR` names one.
    """
    args = trainer.args
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):  # its default lies in a folder that is taken away
            there = os.environ.get("TENSORBOARD_LOGGING_DIR")
            callback.logging_dir = str(Path(there, args.run_name) if there else logs)
    if "wandb" not in args.report_to or not trainer.is_world_process_zero():
        yield
        return
    wandb = import_module("wandb")
    run = wandb.init(project=args.project, name=args.run_name, dir=os.environ.get("WANDB_DIR", str(wandb_folder)))
    try:
        yield
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
