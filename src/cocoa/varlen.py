"""Attention within many spans of tokens, of unlike lengths, in one call: PyTorch's kernel for it, where it works.

A call for each length is right everywhere, and what a CPU does. On a GPU a row of images and texts has so many lengths
that starting the calls takes longer than computing them.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

logger = logging.getLogger(__name__)

FULL, CAUSAL = (-1, -1), (-1, 0)
"""How many tokens to its left and right a query sees; -1 is all."""
_kernel: Callable[..., Any] = varlen_attn
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""PyTorch 2.11 takes fewer heads of keys without being told."""
LARGEST_ERROR = 0.02
"""Relative to the numbers of float32; a wrong block or diagonal is off by half."""


class Spans(NamedTuple):
    """Where spans of tokens lie, one behind the other.

    Attributes:
        starts: (spans + 1,) int32, the last is how many tokens there are.
        longest: tokens of the longest.
    """

    starts: Tensor
    longest: int

    def to(self, device: torch.device, non_blocking: bool = False) -> Spans:
        """Moved to a device."""
        return self._replace(starts=self.starts.to(device, non_blocking=non_blocking))


def spans_of(lengths: Sequence[int]) -> Spans:
    """Spans of these lengths."""
    return Spans(F.pad(torch.tensor(lengths), (1, 0)).cumsum(0, dtype=torch.int32), max(lengths))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Spans,
    keys: Spans,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of each span of queries to its own span of keys.

    Args:
        query: (N, H, D).
        key: (K, H or fewer, D), as value.
        value: as key.
        queries: where the spans of queries lie.
        keys: where their keys lie, as many spans.
        causal: the last query of a span sees all its keys, each before it one key less.
        scale: of the scores, 1 / sqrt(D) if None.

    Returns:
        (N, H, D).
    """
    rows, seen = (queries.starts, keys.starts, queries.longest, keys.longest), CAUSAL if causal else FULL
    # cuDNN, which would come first, plans anew for lengths that it has not seen
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found: Tensor = _kernel(query, key, value, *rows, scale=scale, window_size=seen, **_GROUPED)
    return found


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the precision that autocast asks for, as PyTorch's other attention takes them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(each.to(torch.get_autocast_dtype(device)) for each in tensors)


def works(query: Tensor, key: Tensor) -> bool:
    """Whether `attend` can be used: it is tried once for each device, precision, and number and size of heads.

    First asked in a forward pass: a backward pass has one thread for a device, which would wait for the trial's.

    Args:
        query: (N, H, D) on its device.
        key: (K, H or fewer, D).
    """
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return _works(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2])


@cache
def _works(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
    with ThreadPoolExecutor(1) as thread:  # where no gradient mode, hook or autocast of the caller's is in force
        try:
            off = thread.submit(error, device, dtype, heads, key_heads, width).result()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as reason:
            logger.warning("attention on %s is computed length by length: %s", device, reason)
            return False
    if off > LARGEST_ERROR:
        logger.warning("attention on %s is computed length by length: in one call it is off by %.2f", device, off)
        return False
    return True


def error(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> float:
    """How far `attend` is from PyTorch's other attention in float32: the largest of outputs and gradients, relative."""
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 3, 1), (7, 3, 4)  # fewer queries than keys, as many, and one
    sizes = [(sum(lengths[0]), heads), *[(sum(lengths[1]), key_heads)] * 2]
    inputs = [torch.randn(*size, width, generator=generator).to(device, dtype) for size in sizes]
    weight = torch.randn(inputs[0].shape, generator=generator).to(device)
    queries, keys = (spans_of(each).to(device) for each in lengths)
    largest = 0.0
    for causal in (False, True):
        (q, k, v), exact = (
            [each.detach().to(kind).requires_grad_() for each in inputs] for kind in (dtype, torch.float)
        )
        ours, theirs = attend(q, k, v, queries, keys, causal), torch.cat(list(_one_by_one(exact, lengths, causal)))
        found = [ours, *torch.autograd.grad((ours * weight).sum(), (q, k, v))]
        expected = [theirs, *torch.autograd.grad((theirs * weight).sum(), exact)]
        for mine, other in zip(found, expected, strict=True):
            largest = max(largest, ((mine - other).norm() / other.norm()).nan_to_num(math.inf).item())
    return largest


def _one_by_one(
    inputs: Sequence[Tensor], lengths: tuple[Sequence[int], Sequence[int]], causal: bool
) -> Iterator[Tensor]:
    """Each span's output of PyTorch's other attention."""
    queries, keys = (list(each) for each in lengths)
    parts = (tensor.split(sizes) for tensor, sizes in zip(inputs, (queries, keys, keys), strict=True))
    for own in zip(*parts, strict=True):
        q, k, v = (each.transpose(0, 1)[None] for each in own)
        mask = causal_lower_right(q.shape[2], k.shape[2]) if causal else None
        yield F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)
