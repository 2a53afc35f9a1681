"""FSDP2 on CPUs, for tests: accelerate turns it on for GPUs alone (`AcceleratorState`), though torch has it for both.

As a program it is the `cocoa` command under it.
"""

import os
import sys

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from cocoa.cli import main


def is_asked_for():
    """Whether `accelerate launch` has asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def end():
    """End the process here: torch's caches keep gloo's threads under FSDP, and one may abort a process that unwinds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def split_on_cpu():
    """Where `accelerate launch` has asked for FSDP, let the state of several CPU processes say so."""
    if not is_asked_for():
        return
    init = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


if __name__ == "__main__":
    split_on_cpu()
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
        end()
