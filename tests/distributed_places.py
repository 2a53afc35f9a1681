"""Trains stages for a step on devices that are pretended: run by `test_distributed.py` on two processes."""

import sys
from pathlib import Path

import torch
from pretend_gpu import GPU, pretend_gpu
from test_training import make_trainer
from toy import prepared, with_adapters

from cocoa.backbone import load_backbone
from cocoa.inputs import ImageBudget
from cocoa.processes import leave

stages, backbone_path, folder = sys.argv[1:]
torch.set_num_threads(1)
with pretend_gpu():
    for stage in stages.split(","):
        backbone = prepared(load_backbone(backbone_path, ImageBudget((4, 16)), attention="bidirectional"), stage)
        with_adapters(backbone)
        trainer = make_trainer(stage, backbone, Path(folder) / stage, max_steps=1, use_cpu=False, tokens_per_pass=100)
        trainer.train()
        assert {parameter.device for parameter in backbone.model.parameters()} == {GPU}
        assert trainer.account["device"] == "2 x pretended"
    leave()
