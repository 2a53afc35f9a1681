"""A CPU that passes for a GPU: tensors know which of the two they are on, and those that meet have to be on one.

On a CPU alone a tensor that was left behind goes unnoticed. Here `.to("cuda")` and `device="cuda"` give tensors that
say they are on the GPU, as does what is computed of them, and an operation on tensors of both is an error, as on a GPU;
so are NumPy's view of one, and a collective of tensors of the CPU, which NCCL has not. Kernels, numbers and speed are
those of the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.autograd import Variable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cocoa import blocks

CPU, GPU = torch.device("cpu"), torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
aten = torch.ops.aten
MIXES = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
"""Operations on a GPU's tensor that take indices of the CPU."""
READS = {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}
"""What a tensor of the GPU says of itself."""
CUDA = {
    "is_available": True,
    "device_count": 1,
    "set_device": None,
    "empty_cache": None,
    "is_bf16_supported": True,
    "get_device_name": "pretended",
    "max_memory_allocated": 1,
    "reset_peak_memory_stats": None,
    "manual_seed_all": None,
    "device": nullcontext(),
}
"""What functions of `torch.cuda` give."""
COLLECTIVES = ("all_gather", "all_reduce", "broadcast", "gather", "reduce")


class _Calls(TorchFunctionMode):
    """What Python asks tensors for, and asks of them."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in READS and args[0] in self.places:
            return READS[func]
        if func is Tensor.numpy and args[0] in self.places:
            raise TypeError("can't convert a tensor of the GPU to numpy; call .cpu() first")
        if func is Tensor.pin_memory:
            return args[0].clone()
        if func is Tensor.backward:
            return self._backward(*args, **options)
        if func in (Tensor.cpu, Tensor.cuda):
            return self.places.moved(args[0], CPU if func is Tensor.cpu else GPU)
        if func is Tensor.to:
            return self._to(*args, **options)
        if options.get("device") is None or torch.device(options["device"]).type != "cuda":
            return func(*args, **options)
        made = func(*args, **options | {"device": CPU})
        return self.places.add(made.clone() if func is torch.as_tensor else made)

    def _backward(self, loss: Tensor, gradient: Tensor | None = None, **options: Any) -> None:
        """In force there too: what is checkpointed is computed again."""
        gradient = torch.ones_like(loss) if gradient is None else gradient
        with _Calls(self.places):
            Variable._execution_engine.run_backward(
                (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **options: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            return self.places.moved(tensor, GPU if args[0] in self.places else CPU, args[0].dtype, copy)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **options)
        if device is None:
            return tensor.to(dtype, copy=copy)
        return self.places.moved(tensor, device, dtype, copy)


class _Places(TorchDispatchMode):
    """Which tensors are on the GPU: by storage, so that views are where the whole is."""

    def __init__(self) -> None:
        super().__init__()
        self.there: set[StorageWeakRef] = set()
        self.moving = False

    def __contains__(self, tensor: Tensor) -> bool:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            return StorageWeakRef(tensor.untyped_storage()) in self.there

    def add(self, tensor: Tensor) -> Tensor:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            self.there.add(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def moved(
        self, tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None, copy: bool = False
    ) -> Tensor:
        """The tensor there, itself if it is there already."""
        dtype = dtype or tensor.dtype
        if (device.type == "cuda") == (tensor in self):
            return tensor.to(dtype, copy=copy)
        self.moving = True
        try:
            other = tensor.to(dtype, copy=True)
        finally:
            self.moving = False
        return self.add(other) if device.type == "cuda" else other

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        made = func(*args, **options)
        options.pop("out", None)  # of PyTorch's own, in DistributedDataParallel's buckets
        given = [each for each in tree_leaves((args, options)) if isinstance(each, Tensor)]
        there = [each in self for each in given]
        if self.moving or not any(there) or func.overloadpacket is aten.copy_ or func.namespace == "c10d":
            return made  # copied between the two, or from another process
        astray = [each for each, found in zip(given, there, strict=True) if not found and each.dim()]
        if astray and not (there[0] and func.overloadpacket in MIXES):
            raise RuntimeError(f"{func}: a tensor of shape {tuple(astray[0].shape)} is on the CPU, others on the GPU")
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self.add(each)
        return made


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """A GPU is said to be there, one for each process, and tensors are kept apart."""
    places = _Places()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CUDA.items():
            patch.setattr(torch.cuda, name, lambda *args, value=value, **options: value)
        for module in (torch.cuda, torch.cuda.random):
            patch.setattr(module, "get_rng_state", lambda *args: torch.get_rng_state())
            patch.setattr(module, "set_rng_state", lambda *args: None)
        checkpoint = torch.utils.checkpoint
        patch.setattr(checkpoint.DefaultDeviceType, "_default_device_type", "cuda")
        patch.setitem(checkpoint._allowed_determinism_checks_to_fns, "default", lambda tensor: None)
        patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda optimizer: None)
        patch.setattr(dist, "init_process_group", partial(_gloo, dist.init_process_group))
        patch.setattr(dist.distributed_c10d, "_get_object_coll_device", lambda group=None: GPU)
        for name in COLLECTIVES:
            patch.setattr(dist, name, partial(_collective, places, getattr(dist, name)))
        patch.setattr(dist, "all_gather_into_tensor", _gather_flat)
        patch.setattr(blocks, "causal_lower_right", _lower_right)  # whose tensors are of a class of their own
        AcceleratorState._reset_state(reset_partial_state=True)
        with places, _Calls(places):
            yield
        AcceleratorState._reset_state(reset_partial_state=True)


def _gloo(begin: Any, *args: Any, **options: Any) -> None:
    begin("gloo", timeout=options.get("timeout"))


def _collective(places: _Places, function: Any, *args: Any, **options: Any) -> Any:
    if not all(each in places for each in tree_leaves((args, options)) if isinstance(each, Tensor)):
        raise RuntimeError(f"{function.__name__} of a tensor that is on the CPU, which NCCL has not")
    return function(*args, **options)


def _gather_flat(flat: Tensor, own: Tensor) -> None:
    """As NCCL has it; gloo asks for other shapes."""
    dist.all_gather([*flat.view(dist.get_world_size(), -1)], own.flatten())


def _lower_right(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=GPU).tril(keys - queries)
