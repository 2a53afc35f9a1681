"""What happens to one of two processes happens to both: run by `test_distributed.py`, writes what each process met."""

import os
import signal
import sys
from pathlib import Path

import torch
from split_on_cpu import end, is_asked_for, split_on_cpu
from test_faults import SAVING, At, spoil_loss
from test_training import make_trainer

from cocoa.backbone import load_backbone
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.processes import leave, this_process
from cocoa.stages.checkpoints import last_checkpoint


def stop(trainer):
    trainer.add_callback(At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))


def no_number(trainer):
    spoil_loss(trainer, {2})


split_on_cpu()
torch.set_num_threads(1)
state, backbone_path, folder = this_process(), *sys.argv[1:]
for stage in ("eos_bridge", "contrastive"):
    for fault in (stop, no_number):
        where = Path(folder) / stage / fault.__name__
        backbone = load_backbone(backbone_path, ImageBudget((4, 16)), attention="bidirectional")
        trainer = make_trainer(stage, backbone, where, **SAVING)
        if state.process_index == 1:
            fault(trainer)
        try:
            trainer.train_or_resume()
            met = "nothing"
        except SystemExit as ended:
            met = f"exit {ended.code}"
        except CocoaError as error:
            met = str(error)[:36]
        state.wait_for_everyone()
        (where / f"process-{state.process_index}").write_text(f"{met}, {last_checkpoint(where).name}")
leave()
if is_asked_for():
    end()
