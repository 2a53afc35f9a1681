"""Trains stages for a few steps each and saves what they trained: run by `test_distributed.py` on 1 and 2 processes."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_training import make_trainer
from toy import prepared, with_adapters

from cocoa.backbone import load_backbone
from cocoa.inputs import ImageBudget
from cocoa.processes import leave
from cocoa.stages.training import trainable


def save(trainer, folder, name):
    weights = {name: p.detach().contiguous() for name, p in trainable(trainer.model)}
    save_file(weights, folder / f"{name}.safetensors")


def run(stage, backbone_path, folder, resume_at):
    torch.manual_seed(0)
    backbone = prepared(load_backbone(backbone_path, ImageBudget((4, 16)), attention="bidirectional"), stage)
    with_adapters(backbone, dropout=0.0)
    # Plain SGD without clipping: AdamW and clipping would hide a wrong scale of the loss.
    options = {
        "max_steps": 3,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    if resume_at:
        options |= {"max_steps": 6, "save_strategy": "steps", "save_steps": resume_at}
    trainer = make_trainer(stage, backbone, folder / "trainer", **options)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        save(trainer, folder, "start")
    trainer.train_or_resume()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses.json").write_text(json.dumps(losses))
        (folder / "account.json").write_text(json.dumps(trainer.account))
        save(trainer, folder, "trained")


stages, backbone_path, folder, resume_at = sys.argv[1:]
torch.set_num_threads(1)
for stage in stages.split(","):
    run(stage, backbone_path, Path(folder) / stage, int(resume_at))
leave()
threads = [Path(each, "comm").read_text() for each in Path("/proc/self/task").glob("*")]
assert not [name for name in threads if "gloo" in name], threads  # one that is left may abort the process
