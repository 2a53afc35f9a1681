"""DoRA as peft computes it, without forming the adapted weight."""

import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cocoa.dora import LeanDora, compute_leanly, row_lengths

IN, OUT, RANK = 24, 40, 4


def layers(lean, dropout=0.0, bias=True, dora=True):
    """A model of one adapted layer whose adapters are far from their start, float32, as peft computes it or lean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, use_dora=dora, target_modules=["0"])
    get_peft_model(model, config)
    if lean:
        compute_leanly(model)
    adapter = model[0]
    nn.init.normal_(adapter.lora_B["default"].weight, std=0.1)
    if dora:
        with torch.no_grad():
            adapter.lora_magnitude_vector["default"].weight.mul_(torch.linspace(0.5, 2, OUT))
    return model.train()


def outputs(model, x):
    """What it gives, and the gradients of its input and its weights."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, IN), (2, 5, IN)])
def test_output_and_gradients_are_peft_s(bias, shape):
    theirs, ours = (layers(lean, bias=bias) for lean in (False, True))
    x = torch.randn(shape)
    for mine, other in zip(outputs(ours, x), outputs(theirs, x), strict=True):
        assert torch.isfinite(mine).all() and mine.abs().max() > 0.01
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_near_it(autocast):
    """A frozen layer in bfloat16 under adapters in float32, in training and where a trained model embeds."""
    exact, ours = (layers(lean) for lean in (False, True))
    ours[0].base_layer.to(torch.bfloat16)
    x = torch.randn(64, IN)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = outputs(ours, x if autocast else x.bfloat16())
    assert found[0].dtype == torch.bfloat16 and found[-1].dtype == torch.float32
    for mine, other in zip(found, outputs(exact, x), strict=True):
        assert (mine - other).norm() < 0.02 * other.norm()


def test_dropout_leaves_the_frozen_layer_s_output_alone():
    model = layers(True, dropout=0.5)
    x, adapter, base = torch.randn(1, IN), model[0], model[0].base_layer
    many = model(x.expand(20_000, IN))
    assert many.std(0).max() > 0.1
    torch.testing.assert_close(many.mean(0), model.eval()(x)[0], atol=0.02, rtol=0)  # right on the average
    with torch.no_grad():
        adapter.lora_B["default"].weight.zero_()
        scale = adapter.lora_magnitude_vector["default"].weight / base.weight.norm(dim=1)
    torch.testing.assert_close(model.train()(x), scale * (base(x) - base.bias) + base.bias)


def test_lengths_are_those_of_the_adapted_weight():
    torch.manual_seed(0)
    weight, a, b = torch.randn(OUT, IN), torch.randn(RANK, IN), torch.randn(OUT, RANK)
    torch.testing.assert_close(row_lengths(weight, a, b, 0.5), (weight + 0.5 * b @ a).norm(dim=1))
    assert row_lengths(-b @ a, a, b, 1.0).max() < 0.02  # all but nothing is left, and no square below zero


def test_plain_lora_stays_peft_s_and_a_layer_can_be_pickled():
    plain = layers(True, dora=False)
    assert not plain[0].lora_variant and plain[0].cast_input_dtype_enabled
    again = pickle.loads(pickle.dumps(layers(True)))
    assert isinstance(again[0].lora_variant["default"], LeanDora)


def test_at_its_start_a_rounded_layer_gives_what_it_gave():
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT).to(torch.bfloat16)
    weight = layer.weight.detach().float()
    model = nn.Sequential(layer)
    get_peft_model(model, LoraConfig(r=RANK, use_dora=True, target_modules=["0"]))
    rounded = model[0].lora_magnitude_vector["default"].weight.detach().clone()
    compute_leanly(model)
    start = model[0].lora_magnitude_vector["default"].weight.detach()
    torch.testing.assert_close(start.float(), weight.norm(dim=1))
    assert (rounded.float() - weight.norm(dim=1)).abs().max() > 1e-3 * weight.norm(dim=1).min()
