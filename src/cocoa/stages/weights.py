"""The weights of a stage's model by name, whole or split over processes (`cocoa.stages.sharding`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from cocoa.errors import CocoaError


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that training changes, by name; shared ones once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole weights, which every process has, into a model.

    Args:
        model: split or not.
        weights: all that are trained, by name.

    Raises:
        CocoaError: a parameter that only one of them has, or that has another shape.
    """
    parameters = dict(trainable(model))
    if different := sorted(weights.keys() ^ parameters.keys()):
        raise CocoaError(f"parameter {different[0]} is not in both the file and this run's model")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            here, there = list(parameter.shape), list(weights[name].shape)
            raise CocoaError(f"parameter {name}: {there} in the file, {here} in this run's model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(slice_like(weights[name], parameter))


def is_split(model: Any) -> bool:
    """Whether each process holds only slices of the weights."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This process' slice of a tensor, or all of one that is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors whole and on the CPU, gathered one by one; every process must ask.

    Args:
        tensors: split or not.
        keep: on this process; else the result is empty.
    """
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full.detach().cpu().contiguous()
    return found


def slice_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, split as another of its shape; as it is where that one is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
