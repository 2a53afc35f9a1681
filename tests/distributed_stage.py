"""Trains one stage for a few steps and saves what it trained: run by `test_distributed.py` on 1 and 2 processes."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_training import make_trainer
from toy import with_adapters

from cocoa.backbone import load_backbone
from cocoa.inputs import ImageBudget
from cocoa.stages.training import trainable

stage, backbone_path, folder, resume_at = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
backbone = load_backbone(backbone_path, ImageBudget((4, 16)), attention="bidirectional")
with_adapters(backbone, dropout=0.0)
options = {"max_steps": 3}
if int(resume_at):
    options |= {"max_steps": 6, "save_strategy": "steps", "save_steps": int(resume_at)}
trainer = make_trainer(stage, backbone, Path(folder) / "trainer", **options)
trainer.train_or_resume()
if trainer.is_world_process_zero():
    save_file(
        {name: p.detach().contiguous() for name, p in trainable(trainer.model)}, Path(folder) / "trained.safetensors"
    )
