"""Trains stages for a few steps each and saves what they trained: run by `test_distributed.py` on 1 and 2 processes."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from split_on_cpu import end, is_asked_for, split_on_cpu
from test_training import make_trainer
from toy import prepared, with_adapters

from cocoa.backbone import load_backbone
from cocoa.inputs import ImageBudget
from cocoa.processes import leave
from cocoa.stages.weights import is_split

RATES = {"adapters": 0.5, "full": 0.01, "adamw": 1e-3}
"""Learning rates, by what is trained and how."""


def save(trainer, folder, name):
    weights = trainer.trained_weights()
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / f"{name}.safetensors")


def run(stage, backbone_path, folder, resume_at, tuning):
    torch.manual_seed(0)
    backbone = prepared(load_backbone(backbone_path, ImageBudget((4, 16)), attention="bidirectional"), stage)
    if tuning == "adapters":
        with_adapters(backbone, dropout=0.0)
    # Plain SGD without clipping: AdamW and clipping would hide a wrong scale of the loss.
    options = {
        "max_steps": 3,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "learning_rate": RATES[tuning],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "tokens_per_pass": 100,  # several passes, and not as many on each process
    }
    if tuning == "adamw":  # whose state is to be resumed
        options |= {"optim": "adamw_torch", "max_grad_norm": 1.0}
    if resume_at:
        options |= {"max_steps": 6, "save_strategy": "steps", "save_steps": resume_at}
    trainer = make_trainer(stage, backbone, folder / "trainer", **options)
    save(trainer, folder, "start")
    trainer.train_or_resume()
    units = sum(is_split(module) for module in trainer.model.modules())
    own = 6 + (stage == "joint_reconstruction")  # the root, 3 layers, 2 blocks of the tower, the patch decoder's layer
    assert units == (own if is_asked_for() else 0)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses.json").write_text(json.dumps(losses))
        (folder / "account.json").write_text(json.dumps(trainer.account))
    save(trainer, folder, "trained")


stages, backbone_path, folder, resume_at, tuning = sys.argv[1:]
split_on_cpu()
torch.set_num_threads(1)
for stage in stages.split(","):
    run(stage, backbone_path, Path(folder) / stage, int(resume_at), tuning)
leave()
if is_asked_for():
    end()
threads = [Path(each, "comm").read_text() for each in Path("/proc/self/task").glob("*")]
assert not [name for name in threads if "gloo" in name], threads  # one that is left may abort the process
