"""What ends a run that is no mistake in recipe or data: memory that does not suffice, a process that has died."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cocoa.errors import CocoaError

NO_MEMORY = re.compile("DefaultCPUAllocator|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure.*out of memory")
LOST = re.compile(
    "gloo.*(closed by peer|reset by peer|Timed out|Broken pipe)|"
    "NCCL.*(remote process exited|[Tt]imeout|timed out|aborted)",
    re.DOTALL,
)
"""What a collective operation says in a process when another one is gone."""
WITHOUT_GPU = "where it is a GPU's, hide it (CUDA_VISIBLE_DEVICES=), and the CPU does the work"
"""What helps where a model is looked into."""


@contextmanager
def explained(remedy: str) -> Iterator[None]:
    """Tell what a full memory, or another process' death, means for the user; other errors pass.

    Args:
        remedy: what takes less memory, the cheapest first.

    Raises:
        CocoaError: in place of what torch raises.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error).strip() or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY.search(said):
            raise CocoaError(f"memory is full ({said.splitlines()[0]}); {remedy}") from error
        if LOST.search(said):
            raise CocoaError(
                "another process of this run has ended, and its own last lines say why; the same command goes on from "
                f"what is saved ({said.splitlines()[-1]})"
            ) from error
        raise
