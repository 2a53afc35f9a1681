"""One of two processes is killed while it trains: run by `test_distributed.py`, writes what the other one meets."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from test_faults import SAVING, At
from test_training import make_trainer

from cocoa.backbone import load_backbone
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.processes import this_process

stage, backbone_path, folder = sys.argv[1:]
torch.set_num_threads(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which may come before the message is written
backbone = load_backbone(backbone_path, ImageBudget((4, 16)), attention="bidirectional")
trainer = make_trainer(stage, backbone, Path(folder) / "trainer", **SAVING)
died = Path(folder) / "died"
if this_process().process_index == 1:
    trainer.add_callback(At(2, lambda: (died.touch(), os.kill(os.getpid(), signal.SIGKILL))))
try:
    trainer.train_or_resume()
except CocoaError as error:
    (Path(folder) / "met").write_text(f"{error}\n{time.time() - died.stat().st_mtime}")
    raise
