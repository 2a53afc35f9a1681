"""On a GPU: the numbers of the CPU, in float32 closely and in bfloat16 about; nothing here runs without one."""

import pytest
import torch
import yaml
from short_run import NAMES, short_recipe
from test_blocks import LAYOUTS, LENGTHS, dense
from test_training import STAGES, make_trainer, weights
from torch.nn.functional import scaled_dot_product_attention
from toy import pictures, prepared, with_adapters
from typer.testing import CliRunner

from cocoa import blocks, varlen
from cocoa.adapters import Lora, add_adapters
from cocoa.backbone import load_backbone
from cocoa.checkpoint import read_record
from cocoa.cli import app
from cocoa.embedding import embedder_of, load_embedder
from cocoa.inputs import ImageBudget
from cocoa.pairs import Side

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
DEVICE = "cuda"
HEADS = [(12, 2, 128), (28, 4, 128), (16, 2, 128), (16, 16, 80)]
"""Of queries, of keys, and their width: Qwen2-VL-2B, the 7B models, Qwen2.5-VL-3B, and the tower of all."""


@pytest.fixture(autouse=True)
def exact():
    """No TensorFloat-32, whose products have ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("heads", HEADS)
def test_attention_of_the_real_backbones_is_one_call(heads):
    query, key = (torch.empty(1, each, heads[2], dtype=torch.bfloat16, device=DEVICE) for each in heads[:2])
    assert varlen.works(query, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_is_that_of_the_mask(name, dtype):
    found, masks = LAYOUTS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, sum(LENGTHS), 64) for heads in (4, 2, 2)]
    weight = torch.randn(1, sum(LENGTHS), 4, 64)
    given = [each.to(DEVICE, dtype).requires_grad_() for each in inputs]
    ours, _ = blocks.attend(None, *given, blocks.Layout(found).to(torch.device(DEVICE)))
    held = [each.to(dtype).float().requires_grad_() for each in inputs]
    theirs = scaled_dot_product_attention(*held, dense(masks), enable_gqa=True).transpose(1, 2)
    (ours * weight.to(DEVICE)).sum().backward()
    (theirs * weight).sum().backward()
    for mine, other in [(ours, theirs), *((mine.grad, other.grad) for mine, other in zip(given, held, strict=True))]:
        assert (mine.float().cpu() - other).norm() / other.norm() < (1e-5 if dtype == torch.float32 else 0.02)


def moved(trainer):
    """How far training moves all weights, in one vector."""
    before = {name: weight.cpu() for name, weight in weights(trainer).items()}
    trainer.train()
    return torch.cat([(after.cpu() - before[name]).flatten() for name, after in weights(trainer).items()])


@pytest.mark.parametrize("stage", STAGES)
def test_training_is_that_of_the_cpu(tiny_backbone, tmp_path, stage):
    """But for gradients near zero, whose sign decides where Adam steps first."""
    found = []
    for cpu in (True, False):  # one after the other, since the library knows one device at a time
        trainer = make_trainer(stage, tiny_backbone(), tmp_path / str(cpu), use_cpu=cpu)
        found.append(moved(trainer))
    theirs, ours = found
    assert theirs.norm() > 0 and (ours - theirs).norm() < 0.02 * theirs.norm()
    account = trainer.account
    assert account["device"] == torch.cuda.get_device_name() and account["peak_memory_gb"] > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_adapters_train_to_about_the_same_loss(tiny_backbone_path, tmp_path, stage, checkpointing):
    losses = []
    for bf16 in (False, True):
        dtype = torch.bfloat16 if bf16 else torch.float32
        backbone = load_backbone(tiny_backbone_path(), ImageBudget((4, 16)), dtype, attention="bidirectional")
        torch.manual_seed(0)
        with_adapters(backbone, dropout=0.0)
        options = {"use_cpu": False, "bf16": bf16, "gradient_checkpointing": checkpointing, "logging_steps": 4}
        trainer = make_trainer(stage, backbone, tmp_path / str(bf16), **options)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.parametrize("stage", ["contrastive", "eos_bridge"])
def test_a_frozen_tower_is_asked_once_on_the_device(tiny_backbone, tmp_path, stage):
    backbone, asked = tiny_backbone(), []
    add_adapters(backbone.model, Lora(vision=(), dropout=0.0), [backbone.mask_token_id])
    backbone.model.model.visual.register_forward_hook(lambda m, given, out: asked.append(given[0].device.type))
    make_trainer(stage, backbone, tmp_path, use_cpu=False, cache_inputs=True).train()
    kept = [each["image_features"] for each in backbone.encoded.values() if "image_features" in each]
    assert kept and {each.device.type for each in kept} == {"cpu"}  # they go with the batches
    assert asked == [DEVICE]  # twenty small pictures at once


def test_embeddings_are_those_of_the_cpu(tiny_backbone):
    sides = [Side("Look.", "a cat " * n, image) for n, image in enumerate(pictures(5))] + [Side(text="a dog")]
    found = []
    for device in ("cpu", DEVICE):
        backbone = tiny_backbone()
        backbone.model.to(device)
        found.append(embedder_of(backbone, 512).embed(sides, batch_size=2).cpu())
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_what_pools_an_embedding_follows_the_model(tiny_backbone):
    """An embedder is made before a trainer moves the model, and compression tokens are pooled by weights."""
    backbone = prepared(tiny_backbone(), "compression")
    embedder = embedder_of(backbone, 512)
    before = embedder.embed([Side(text="a dog")])
    backbone.model.to(DEVICE)
    torch.testing.assert_close(embedder.embed([Side(text="a dog")]), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tuning", ["full", "dora"])
def test_a_recipe_runs_in_bfloat16_and_its_checkpoint_is_evaluated(tiny_backbone_path, photo_data, tmp_path, tuning):
    output, path = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe = short_recipe(tiny_backbone_path("qwen2_5_vl"), photo_data, output, tuning, dtype="bfloat16")
    path.write_text(yaml.safe_dump(recipe))
    final, data, scores = (str(each) for each in (output / "final", photo_data / "MMEB-eval", tmp_path / "scores"))
    for command in (["train", str(path)], ["evaluate", final, "--data", data, "--output", scores]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    record = read_record(output / "final")
    assert [each["stage"] for each in record["history"]] + [record["stage"]] == list(NAMES)
    assert torch.isfinite(load_embedder(final).embed([Side(text="a cup")])).all()
