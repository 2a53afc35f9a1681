"""FSDP2: weights, gradients and the optimiser's state split over the processes of a run.

accelerate splits a stage's model when its training starts. From then on a process holds a slice (`DTensor`) of every
weight, and the whole of a unit's weights only while that unit computes. A layer of the text model or a block of the
vision tower is a unit; all else belongs to the root, whose weights are there while the stage's model runs. Where this
departs from what the libraries do:

- processes gather a unit's weights together, so all of them must run the same units as often: `even_out`;
- a trainer's checkpoint holds whole tensors, the same files as without FSDP, so that any number of processes, split
  or not, goes on from it, and frozen weights are not in it;
- weights are gathered in their own dtype and computed with under autocast, as without FSDP: accelerate's policy for
  bfloat16 would also round what the model returns, embeddings and sums of losses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.optim import Optimizer
from transformers.trainer import OPTIMIZER_NAME

from cocoa.backbone import Backbone
from cocoa.corruption import IGNORE_INDEX
from cocoa.errors import CocoaError
from cocoa.packing import IDLE_GRID, IDLE_PIXELS
from cocoa.pixels import CHANNELS
from cocoa.stages.weights import is_split, slice_like, whole

_START = "start with `accelerate launch --config_file recipes/accelerate/fsdp2.yaml`"
_REFUSED = {
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading leaves the weights of all processes but the "
    "first unread, and unties a head from its embedding; set it to false",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing renames the layers that adapters and checkpoints "
    "name; set gradient_checkpointing in the recipe's stages instead",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params is not tested; set it to false",
}


def check_strategy(fsdp: Any, deepspeed: Any) -> None:
    """Refuse what splits a model otherwise than FSDP2 as `accelerate launch` sets it up.

    Args:
        fsdp: a stage's argument of that name.
        deepspeed: likewise.

    Raises:
        CocoaError: DeepSpeed, FSDP1, FSDP for one stage alone, or an option of FSDP2 that would go wrong.
    """
    if deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise CocoaError(
            "DeepSpeed is not supported: under it every backward pass takes an optimiser step, and a stage's step has "
            f"several of them; for a model that is too large for a device {_START}"
        )
    if fsdp:
        raise CocoaError(f"fsdp: a run is split as a whole, not stage by stage; leave it out, and {_START}")
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise CocoaError(
            "FSDP1 is not supported: it makes one flat weight of a unit, in which frozen weights and trained ones, or "
            "two dtypes, cannot lie together; set fsdp_version: 2"
        )
    for name, reason in _REFUSED.items():
        if _is_set(name):
            raise CocoaError(reason)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")


def prepare(model: Any, accelerator: Accelerator) -> None:
    """Say how accelerate is to split a stage's model, before it does.

    Args:
        model: the stage's, around the backbone.
        accelerator: of the trainer.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = model.model._no_split_modules
    plugin.mixed_precision_policy = None
    forward = model.forward

    def computed(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = computed


def without_exchange(model: nn.Module, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Within it the devices do not exchange the gradients of a backward pass, which more passes add to.

    Those of a split model do all the same: what is not exchanged each device holds whole, for the whole model.
    """
    return nullcontext() if accelerator.is_fsdp2 else accelerator.no_sync(model)


@contextmanager
def gathered_root(model: Any) -> Iterator[None]:
    """Within it parts of a split model may be called, and not only the model itself."""
    if is_split(model):
        model.unshard()
    try:
        yield
    finally:
        if is_split(model):
            model.reshard()


def save_optimizer(optimizer: Optimizer, folder: Path, keep: bool) -> None:
    """Write the optimiser's state whole, as the Trainer writes it without FSDP; every process must ask.

    Args:
        optimizer: of split weights.
        folder: of the trainer's checkpoint.
        keep: whether this process writes.

    Raises:
        CocoaError: an optimiser that keeps other things than values of the weights' shapes.
    """
    state = optimizer.state_dict()
    for number, weight in enumerate(_weights(optimizer)):
        values = state["state"].get(number, {})
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if any(value.dim() and value.shape != weight.shape for value in tensors.values()):
            raise CocoaError("optim: under FSDP its state must have the weights' shapes; choose adamw_torch")
        if values:
            state["state"][number] = values | whole(tensors, keep)
    if keep:
        torch.save(state, folder / OPTIMIZER_NAME)


def load_optimizer(optimizer: Optimizer, folder: Path) -> None:
    """Read the optimiser's state as `save_optimizer`, or the Trainer without FSDP, wrote it."""
    state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
    for number, weight in enumerate(_weights(optimizer)):
        values = state["state"].get(number, {})
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                values[name] = slice_like(value, weight)
    optimizer.load_state_dict(state)


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def even_out(batches: Sequence[dict[str, Any]], accelerator: Accelerator, backbone: Backbone) -> None:
    """Give a batch as many passes as it has on any process, and every pass an image where one has any.

    What is added has no weight: a pass with nothing to predict, whose embeddings no place of the batch names, and an
    image whose features are multiplied by nought.

    Args:
        batches: of a step, on this process; changed in place. Each has `passes`.
        accelerator: of the trainer.
        backbone: that they are for.
    """
    if not batches:
        return
    sizes = [[len(batch["passes"]), sum("pixel_values" in each for each in batch["passes"])] for batch in batches]
    most = accelerator.gather(torch.tensor([sizes], device=accelerator.device)).amax(0)  # (steps, 2)
    idle = {name: tensor.to(accelerator.device) for name, tensor in idle_image(backbone).items()}
    for batch, (count, images) in zip(batches, most.tolist(), strict=True):
        passes = [*batch["passes"], *[without_weight(batch["passes"][0])] * (count - len(batch["passes"]))]
        batch["passes"] = [each if "pixel_values" in each or not images else each | idle for each in passes]


def without_weight(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `cocoa.packing.pack` in which nothing is hidden, and so nothing predicted."""
    empty = {"labels": lambda value: torch.full_like(value, IGNORE_INDEX), "hidden_units": torch.zeros_like}
    empty["target_pixels"] = lambda value: value[:0]
    return row | {name: make(row[name]) for name, make in empty.items() if name in row}


def idle_image(backbone: Backbone) -> dict[str, Tensor]:
    """The smallest image there is, as `cocoa.packing.final_states` takes one that is not in the text."""
    images = backbone.processor.image_processor
    side = images.merge_size
    return {
        IDLE_PIXELS: torch.zeros(side**2, CHANNELS * images.patch_size**2, dtype=torch.uint8),
        IDLE_GRID: torch.tensor([[1, side, side]]),
    }
