"""FSDP2 in one process: what is refused and why, the shipped configurations, and what evens processes out."""

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from test_training import make_trainer
from toy import row_of

from cocoa.errors import CocoaError
from cocoa.stages.sharding import check_strategy, even_out, without_exchange

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
MARKS = ("ACCELERATE_USE_", "FSDP_")


def environment(name):
    """What `accelerate launch --config_file` puts into the environment of its processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), "train.py"])
    found = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return {key: value for key, value in found.items() if key.startswith(MARKS)}


def test_the_shipped_configurations_are_read_and_accepted(monkeypatch):
    for name in [key for key in os.environ if key.startswith(MARKS)]:
        monkeypatch.delenv(name)
    assert not environment("ddp.yaml")
    check_strategy(None, None)
    for name, value in environment("fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    check_strategy(None, None)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP1 is not supported: .* set fsdp_version: 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading leaves .* set it to false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set gradient_checkpointing in the recipe's stages instead"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not tested"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported: .*fsdp2.yaml"),
    ],
)
def test_other_strategies_are_refused(monkeypatch, settings, message):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CocoaError, match=message):
        check_strategy(None, None)


def test_a_stage_cannot_ask_for_itself():
    with pytest.raises(CocoaError, match="DeepSpeed is not supported"):
        check_strategy(None, {"zero_optimization": {"stage": 3}})
    with pytest.raises(CocoaError, match="fsdp: a run is split as a whole"):
        check_strategy(True, None)


def test_a_split_model_exchanges_the_gradients_of_every_pass():
    """What it does not exchange each device holds whole."""
    asked = []
    for split in (True, False):
        accelerator = SimpleNamespace(is_fsdp2=split, no_sync=lambda model: asked.append(model) or nullcontext())
        with without_exchange("model", accelerator):
            assert asked == ([] if split else ["model"])


class Beside:
    """An accelerator of two processes, the other of which has so many passes, and so many of them with images."""

    device = torch.device("cpu")

    def __init__(self, passes, images):
        self.other = torch.tensor([[passes, images]])

    def gather(self, mine):
        return torch.cat([mine, self.other[None]])


@pytest.mark.parametrize("stage", ["joint_reconstruction", "eos_bridge", "compression"])
def test_a_pass_without_weight_changes_no_sum_and_no_gradient(tiny_backbone, tmp_path, stage):
    backbone = tiny_backbone()
    trainer = make_trainer(stage, backbone, tmp_path)
    keys = [(0, 0), (0, 1)]
    row = row_of(trainer, [trainer.train_dataset[key] for key in keys])
    batch = {"passes": [row]}
    even_out([batch], Beside(3, 3), backbone)
    assert batch["passes"][0] is row and len(batch["passes"]) == 3
    sums = trainer.model(**batch["passes"][1])
    assert all(total.item() == count.item() == 0 for total, count in sums.values())
    sum(total for name, (total, _) in sums.items() if name != "accuracy").backward()
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_an_idle_image_changes_nothing_and_uses_the_tower(tiny_backbone, tmp_path, model_type):
    backbone = tiny_backbone(model_type)
    trainer = make_trainer("mostly texts", backbone, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[1]])
    assert not any("pixel_values" in each for each in batch["passes"])
    plain = trainer.model(*batch["passes"])
    even_out([batch], Beside(len(batch["passes"]) + 1, 0), backbone)
    assert not any("idle_pixels" in each for each in batch["passes"])  # no process has an image in this batch
    even_out([batch], Beside(2, 1), backbone)
    vectors = trainer.model(*batch["passes"])[: len(plain)]
    assert torch.equal(vectors, plain)
    vectors.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in backbone.model.model.visual.parameters())
    even_out([], SimpleNamespace(), backbone)  # an epoch that has no batches left
