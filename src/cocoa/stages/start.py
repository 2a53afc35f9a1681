"""The model that a stage starts from: a backbone read as the stage reads it, with its adapters in place."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import set_seed

from cocoa.adapters import Lora, adapted_layers, add_adapters, describe
from cocoa.architectures import set_attention
from cocoa.backbone import Backbone, load_backbone
from cocoa.checkpoint import recorded_form
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.stages.arguments import StageArguments

logger = logging.getLogger(__name__)


class Adapters(NamedTuple):
    """Adapters in a model.

    Attributes:
        handle: saves and merges them.
        what: the layers that they adapt, in one line.
    """

    handle: PeftModel
    what: str


def stage_backbone(model: Backbone | str | Path, args: StageArguments, lora: Lora | None = None) -> Backbone:
    """The backbone that a stage trains.

    Args:
        model: a backbone, taken as it was loaded, but that its attention is set where the stage has one of its own;
            or a folder, hub id or embedded name, loaded as `cocoa train` does where its recipe says nothing of images.
        args: of the stage.
        lora: adapters to come, with which a loaded model is held in the dtype that is computed in.

    Raises:
        CocoaError: it cannot be loaded, or is read with another pooling than the stage's.
    """
    if not isinstance(model, Backbone):
        dtype = torch.bfloat16 if lora is not None and args.bf16 else torch.float32
        return load_backbone(model, ImageBudget(), dtype, **args.form(recorded_form(model))._asdict())
    form = args.form(model.form)
    if (form.pooling, form.compression_tokens) != (model.pooling, model.compression_tokens):
        raise CocoaError(
            f"backbone {model.name}: its pooling is {model.pooling} ({model.compression_tokens} compression tokens), "
            f"the stage's {form.pooling} ({form.compression_tokens}); give the trainer the model's name, or load the "
            "backbone so: load_backbone(..., pooling=..., compression_tokens=...)"
        )
    if model.form.attention != form.attention:
        logger.info("backbone %s: its attention becomes %s", model.name, form.attention)
        set_attention(model.model.config, form.attention)
    return model


def stage_adapters(backbone: Backbone, args: StageArguments, lora: Lora | None) -> Adapters | None:
    """Adapters as `lora` says, with the rows of the tokens that the stage brings in; None for full tuning."""
    if lora is None:
        return None
    what = describe(adapted_layers(backbone.model, lora))
    set_seed(args.seed)  # of the adapters' new weights
    return Adapters(add_adapters(backbone.model, lora, args.new_tokens(backbone)), what)
