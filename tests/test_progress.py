"""What a terminal and a log show of a training."""

import io
import logging
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerState

from cocoa.stages import progress
from cocoa.stages.progress import ProgressLine

FIGURES = {"loss": 2.153, "token_loss": 2.158, "first_loss": 0.7923, "token_accuracy": 0.3521, "learning_rate": 1e-4}


def shown(monkeypatch, width, terminal):
    """What a training of 120 steps shows that is logged at step 81 and evaluated at step 90."""
    file, args = io.StringIO(), SimpleNamespace(disable_tqdm=False)
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "_Bar", partial(progress._Bar, console=console, auto_refresh=False))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    line, state = ProgressLine("joint_reconstruction"), TrainerState(max_steps=120, is_world_process_zero=True)
    with line:
        line.on_train_begin(args, state, None)
        for step, logs in ((81, FIGURES), (90, {"eval_validation_hit@1": 0.4545}), (90, FIGURES)):
            state.global_step = step
            line.on_step_end(args, state, None)
            line.on_log(args, state, None, logs=logs)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_figures_stand_below_the_bar_and_scores_stay(monkeypatch, width):
    text = shown(monkeypatch, width, True)
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", line) for line in text.splitlines()]
    bar = next(number for number, line in reversed(list(enumerate(lines))) if "90/120 " in line and "left" in line)
    assert lines[bar].startswith("joint_reconstruction") and max(map(len, lines)) <= width
    assert lines[bar + 1].startswith("loss 2.153, token_loss 2.158")
    assert "joint_reconstruction 90/120: validation_hit@1 0.4545\n" in text


def test_elsewhere_a_line_is_logged(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "cocoa")
    assert shown(monkeypatch, 80, False) == ""
    assert caplog.messages[0].startswith("joint_reconstruction 81/120: loss 2.153, token_loss 2.158")
    assert caplog.messages[1] == "joint_reconstruction 90/120: validation_hit@1 0.4545"
