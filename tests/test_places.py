"""On a CPU that passes for a GPU: nothing that meets on a device was left on the other one."""

import pytest
import torch
import yaml
from pretend_gpu import GPU, pretend_gpu
from short_run import NAMES, short_recipe
from test_training import STAGES, make_trainer
from test_varlen import taken_to_work
from toy import pictures, with_adapters
from typer.testing import CliRunner

from cocoa.adapters import Lora, add_adapters
from cocoa.checkpoint import read_record
from cocoa.cli import app
from cocoa.embedding import embedder_of
from cocoa.pairs import Side


@pytest.fixture(autouse=True)
def gpu():
    """In all tests here."""
    with pretend_gpu():
        yield


def test_tensors_are_kept_apart():
    layer, here = torch.nn.Linear(3, 2), torch.ones(4, 3)
    layer.to("cuda")
    there = here.to("cuda")
    assert (here.device.type, there.device, layer(there).device) == ("cpu", GPU, GPU)
    assert torch.arange(3, device=there.device).is_cuda and not there.cpu().is_cuda
    layer(there).sum().backward()
    assert layer.weight.grad.device == GPU and layer(there).sum().item() != 0
    assert (there * torch.tensor(2.0))[torch.tensor([0, 1])].is_cuda  # numbers, and places of rows, may be elsewhere
    for meeting in (lambda: layer(here), lambda: there + here, lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="is on the CPU, others on the GPU"):
            meeting()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="NCCL"):
        torch.distributed.all_reduce(here)


@pytest.mark.parametrize(
    "stage", [stage if stage == "eos_bridge" else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
)
def test_a_stage_trains_on_the_device(tiny_backbone, tmp_path, stage):
    backbone = tiny_backbone()
    with_adapters(backbone)
    trainer = make_trainer(stage, backbone, tmp_path, use_cpu=False, gradient_checkpointing=True)
    trainer.train()
    assert {parameter.device for parameter in backbone.model.parameters()} == {GPU}
    assert trainer.account["device"] == "pretended"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["contrastive", "eos_bridge"])
def test_attention_in_one_call_has_what_it_needs_there(tiny_backbone, tmp_path, stage, monkeypatch):
    calls = taken_to_work(monkeypatch)
    make_trainer(stage, tiny_backbone("qwen2_5_vl"), tmp_path, use_cpu=False).train()
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["contrastive", "eos_bridge"])
def test_a_frozen_tower_keeps_features_for_the_device(tiny_backbone, tmp_path, stage):
    backbone = tiny_backbone()
    add_adapters(backbone.model, Lora(vision=(), dropout=0.0), [backbone.mask_token_id])
    make_trainer(stage, backbone, tmp_path, use_cpu=False, cache_inputs=True).train()


def test_embeddings_come_back(tiny_backbone):
    backbone = tiny_backbone()
    backbone.model.to("cuda")
    sides = [Side("Look.", "a cat", image) for image in pictures(3)] + [Side(text="a dog")]
    vectors = embedder_of(backbone, 512).embed(sides, batch_size=2)
    assert vectors.shape[0] == 4 and vectors.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "tuning"), [("qwen2_vl", "full"), ("qwen2_5_vl", "dora")])
def test_commands_run_on_the_device(tiny_backbone_path, photo_data, tmp_path, model_type, tuning):
    output, path, page = tmp_path / "run", tmp_path / "recipe.yaml", tmp_path / "report.html"
    path.write_text(yaml.safe_dump(short_recipe(tiny_backbone_path(model_type), photo_data, output, tuning)))
    final, data, scores = (str(each) for each in (output / "final", photo_data / "MMEB-eval", tmp_path / "scores"))
    for command in (
        ["train", str(path)],
        ["evaluate", final, "--data", data, "--output", scores],
        ["report", str(output), scores, "--checkpoints", "--data", data, "--output", str(page)],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    record = read_record(output / "final")
    assert [each["stage"] for each in record["history"]] + [record["stage"]] == list(NAMES)
    assert record["device"] == "pretended"
    told = page.read_text(encoding="utf-8")
    assert "Where EOS looks" in told and "on the CPU, others" not in told
