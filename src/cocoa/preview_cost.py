"""What a stage costs: its model with adapters in place, counted, and memory and time from that.

The model is the one that training builds, on the meta device; the formulas are those of `cocoa.estimate`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig

from cocoa.backbone import Backbone
from cocoa.errors import CocoaError
from cocoa.estimate import Estimate, Layer, Stack, Tuning, stage_flops, stage_memory, whole_bytes
from cocoa.preview_samples import Measured
from cocoa.recipe import DTYPES, Recipe
from cocoa.reconstruction import LOGITS_AT_ONCE, PatchDecoder
from cocoa.stages.arguments import StageArguments
from cocoa.stages.contrastive import ContrastiveArguments
from cocoa.stages.joint_reconstruction import JointReconstructionArguments
from cocoa.stages.reconstruction import Reconstructor
from cocoa.stages.start import stage_adapters
from cocoa.stages.weights import trainable


def stage_model(recipe: Recipe, backbone: Backbone, args: StageArguments) -> nn.Module:
    """What the stage trains, adapters in place, as its trainer holds it."""
    stage_adapters(backbone, args, recipe.lora)
    if isinstance(args, ContrastiveArguments):
        return backbone.model.model
    if not isinstance(args, JointReconstructionArguments):
        return Reconstructor(backbone)
    return Reconstructor(backbone, patch_decoder=PatchDecoder(backbone.model.model.language_model, backbone.unit_size))


def trained_by_place(model: nn.Module) -> dict[str, int]:
    """Trained parameters by where they are."""
    places: Counter[str] = Counter()
    for name, parameter in trainable(model):
        if name.startswith("patch_decoder."):
            place = "patch decoder"
        elif "trainable_tokens" in name:
            place = "rows of new tokens"
        elif "embed_tokens" in name:
            place = "token embeddings"
        else:
            place = "vision tower" if "visual." in name else "text model"
        places[place] += parameter.numel()
    return dict(places)


def estimate_stage(
    recipe: Recipe,
    args: StageArguments,
    backbone: Backbone,
    model: nn.Module,
    measured: Measured,
    pairs_seen: int,
    tflops: float,
    devices: int,
    split: bool = False,
) -> Estimate:
    """Memory and time from the shapes of the model and the lengths that were measured.

    Args:
        recipe: says dtype and tuning.
        args: of the stage.
        backbone: the model's, adapters in place.
        model: of `stage_model`.
        measured: lengths of the stage's rows.
        pairs_seen: over the whole stage.
        tflops: 10^12 operations a second that a device is assumed to reach.
        devices: that the run would have.
        split: the model over the devices (FSDP2, `cocoa.stages.sharding`); else each has all of it.

    Raises:
        CocoaError: a global batch that does not divide by the devices.
    """
    config, inner = backbone.model.config, backbone.model.model
    text = config.text_config
    size = Shape("text", text.num_hidden_layers, text.hidden_size, text.intermediate_size)
    layers = [p for name, p in inner.language_model.named_parameters() if "embed_tokens" not in name]
    tower = list(inner.visual.parameters())
    patches = backbone.processor.image_processor.merge_size**2  # that the tower takes for a merged token
    tokens, longest = measured.per_row("total"), measured.longest("total")
    image, largest = patches * measured.per_row("image"), patches * measured.longest("image")
    predicted = measured.per_row("masked") + measured.per_row("answers")
    reached = any(parameter.requires_grad for parameter in tower)
    stacks = [
        _stack(layers, size, tokens, longest),
        _stack(tower, vision_shape(config), image, largest, reached),
    ]
    if not isinstance(args, ContrastiveArguments):
        head = list(backbone.model.get_output_embeddings().parameters())
        stacks.append(_stack(head, size._replace(layers=0), predicted, longest))
    if isinstance(model, Reconstructor) and model.patch_decoder is not None:
        decoder = list(model.patch_decoder.parameters())
        stacks.append(_stack(decoder, size._replace(layers=1), tokens, longest))

    rows = rows_at_once(args, devices, longest)
    kept = passes_kept(args, devices, rows)
    trained = sum(trained_by_place(model).values())
    tuning: Tuning = "full" if recipe.lora is None else "dora" if recipe.lora.dora else "lora"
    memory = stage_memory(
        stacks,
        frozen=sum(parameter.numel() for parameter in model.parameters()) - trained,
        trained=trained,
        frozen_bytes=recipe.load_dtype.itemsize,
        element_bytes=DTYPES[recipe.dtype].itemsize,
        tuning=tuning,
        rows_at_once=rows,
        logits=min(rows * predicted * text.vocab_size, LOGITS_AT_ONCE),
        passes=kept,
        shares=devices if split else 1,
        whole=whole_at_once(model, inner._no_split_modules, recipe.load_dtype.itemsize) if split else 0,
        exchanged=devices > 1 and not split and kept * rows < sequences_of(args, devices),
    )
    checkpointing = bool(args.gradient_checkpointing)
    flops = stage_flops(stacks, pairs_seen, checkpointing, embedded_twice(args, devices, tokens))
    return Estimate(memory, checkpointing, rows, longest, flops, tflops, devices)


def whole_at_once(model: nn.Module, units: Sequence[str], frozen_bytes: int) -> int:
    """Bytes that a device has whole of a split model: what is outside the units, and two of them.

    Args:
        model: of `stage_model`.
        units: classes of the modules that are gathered one at a time, while the next one is on its way.
        frozen_bytes: of a frozen weight.
    """

    def size(module: nn.Module) -> int:
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return whole_bytes(sum(p.numel() for p in module.parameters()) - trained, trained, frozen_bytes)

    sizes = [size(module) for module in model.modules() if type(module).__name__ in units]
    return size(model) - sum(sizes) + 2 * max(sizes)


def rows_of(args: StageArguments, devices: int) -> int:
    """Rows of a batch that go through a device in one step.

    Raises:
        CocoaError: the global batch does not divide by devices and accumulation steps.
    """
    parts = devices * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise CocoaError(
            f"batch_size {args.batch_size} does not divide by {devices} devices x "
            f"{args.gradient_accumulation_steps} accumulation steps; change one of them"
        )
    return args.batch_size // parts


def sequences_of(args: StageArguments, devices: int) -> int:
    """Sequences of a batch that go through a device in one step."""
    columns = 2 + args.hard_negatives if isinstance(args, ContrastiveArguments) else 1
    return rows_of(args, devices) * columns


def rows_at_once(args: StageArguments, devices: int, longest: int) -> int:
    """Sequences in a device's pass, were all as long as the longest."""
    return max(1, min(sequences_of(args, devices), args.tokens_per_pass // longest))


def passes_kept(args: StageArguments, devices: int, rows: int) -> int:
    """Passes of so many sequences whose activations are in memory at a time."""
    if not isinstance(args, ContrastiveArguments):
        return 1
    return min(args.passes_kept, math.ceil(sequences_of(args, devices) / rows))


def embedded_twice(args: StageArguments, devices: int, tokens: float) -> float:
    """Share of a batch that GradCache embeds twice: all but the passes that are kept.

    Args:
        args: of the stage.
        devices: that share a batch.
        tokens: of a pair, all its sequences together.
    """
    if not isinstance(args, ContrastiveArguments):
        return 0.0
    return max(0.0, 1 - args.passes_kept * args.tokens_per_pass / (rows_of(args, devices) * tokens))


class Shape(NamedTuple):
    """Of a stack of layers: what kind, how many, width of the hidden state, width of the MLP."""

    layer: Layer
    layers: int
    width: int
    intermediate: int


def vision_shape(config: PretrainedConfig) -> Shape:
    """Of the vision tower; the two architectures name its sizes differently."""
    vision = config.vision_config
    if config.model_type == "qwen2_vl":
        return Shape("qwen2_vl", vision.depth, vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio))
    return Shape("qwen2_5_vl", vision.depth, vision.hidden_size, vision.intermediate_size)


def _stack(parameters: list[nn.Parameter], shape: Shape, tokens: float, longest: int, reached: bool = True) -> Stack:
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Stack(*shape, trained, sum(p.numel() for p in parameters) - trained, tokens, longest, reached)
