"""The arguments that every stage shares."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields
from functools import cache

import torch
from transformers import TrainingArguments

from cocoa.backbone import Backbone, Form
from cocoa.bad_rows import POLICIES
from cocoa.errors import CocoaError
from cocoa.inputs import MAX_LENGTH
from cocoa.stages.sharding import check_strategy

logger = logging.getLogger(__name__)

_REFUSED = {
    "load_best_model_at_end": "a stage ends with its last weights",
    "save_only_model": "a restart would not be exact",
    "ignore_data_skip": "a restart would not be exact",
    "label_smoothing_factor": "the losses are the method's",
    "neftune_noise_alpha": "what a stage hides is all the noise there is",
    "auto_find_batch_size": "where memory is short, lower tokens_per_pass",
    "dataloader_drop_last": "a batch is always whole",
    "data_seed": "seed decides the order of rows too",
    "train_sampling_strategy": "rows come in an order of their own, which does not depend on the machine",
    "per_device_eval_batch_size": "held-out rows are embedded in batches of equal work",
    "use_liger_kernel": "its patches do not reach the model inside a stage",
}
"""Of `TrainingArguments`, what a stage cannot obey, and why."""


@dataclass
class StageArguments(TrainingArguments):
    """Arguments that every stage shares, over `TrainingArguments` (whose other names work, but for `_REFUSED`).

    Defaults that differ from transformers: `dataloader_drop_last`, `remove_unused_columns` and `ddp_broadcast_buffers`
    (no buffer changes) are what the stages need; `learning_rate` 2e-5, `warmup_steps` 0.05 (a share), `logging_steps`
    10, `save_steps` 0.1 (a share), `save_total_limit` 2.

    Args:
        batch_size: pairs a step over all devices and accumulation steps; what does not divide is an error.
        max_length: tokens a sequence may have, image tokens included; text is shortened to fit, an image
            or EOS never.
        tokens_per_pass: a device's share of a batch goes through the model in parts of at most so many tokens: bounds
            the memory, leaves the gradients as they are, but for which masks dropout draws.
        cache_inputs: keep each row's encoded image and text in memory instead of encoding them in every epoch,
            for small data: 2.4 kB an image token, in every process and data loader worker. Of an image that is shown
            whole to a frozen tower (`lora.vision: []`) its features are computed once and kept instead, but not where
            the model is split over devices.
        on_nonfinite: a loss or gradient that is infinite or not a number is an `error`, or the step is left out
            (`skip`), which is counted; ten of them one after the other are an error.
        on_bad_row: a row that cannot be encoded is an `error`, or the row behind it takes its place (`skip`).
        max_bad_share: share of the rows that may be left out so. Each device counts those that it meets, and all are
            counted together where training goes on after a stop.
    """

    batch_size: int = 64
    max_length: int = MAX_LENGTH
    tokens_per_pass: int = 16_384
    cache_inputs: bool = False
    on_nonfinite: str = "error"
    on_bad_row: str = "error"
    max_bad_share: float = 0.01
    learning_rate: float = 2e-5
    warmup_steps: float = 0.05
    logging_steps: float = 10
    save_steps: float = 0.1
    save_total_limit: int | None = 2
    dataloader_drop_last: bool = True
    remove_unused_columns: bool | None = False
    ddp_broadcast_buffers: bool | None = False

    def __post_init__(self) -> None:
        check_strategy(self.fsdp, self.deepspeed)  # before the library looks for DeepSpeed
        for field in fields(self):
            if field.name in _REFUSED and getattr(self, field.name) != field.default:
                raise CocoaError(f"{field.name}: {_REFUSED[field.name]}; leave it out")
        super().__post_init__()
        if self.n_gpu > 1:
            _say_once(f"training on one of {self.n_gpu} GPUs; for all of them start with `accelerate launch`")
            self._n_gpu = 1  # else the library splits batches over them by threads
        self.dataloader_pin_memory &= torch.cuda.is_available()  # else the library warns for every loader
        check_range("tokens_per_pass", self.tokens_per_pass, 0)
        check_range("max_bad_share", self.max_bad_share, 0, 1)
        for name in ("on_nonfinite", "on_bad_row"):
            if (value := getattr(self, name)) not in POLICIES:
                raise CocoaError(f"{name} {value!r}: choose {' or '.join(POLICIES)}")
        parts = self.world_size * self.gradient_accumulation_steps
        if self.batch_size < 1 or self.batch_size % parts:
            raise CocoaError(
                f"batch_size {self.batch_size} does not divide by {self.world_size} devices x "
                f"{self.gradient_accumulation_steps} accumulation steps; change one of them"
            )
        self.per_device_train_batch_size = self.batch_size // parts

    def form(self, recorded: Form | None) -> Form:
        """How the stage reads its backbone, given what the record of a checkpoint of ours says, if it is one."""
        return Form()

    def new_tokens(self, backbone: Backbone) -> list[int]:
        """Ids of the tokens that the stage brings in, whose rows adapters train too: the compression tokens, if any."""
        return backbone.compression_token_ids


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuse an argument outside (low, high].

    Raises:
        CocoaError: names the argument and its range.
    """
    if not low < value <= high:
        limit = f"and at most {high:g}" if high < math.inf else ""
        raise CocoaError(f"{name}: {value} must be above {low:g} {limit}".rstrip())


def less_memory(args: StageArguments) -> str:
    """What makes a step smaller, the cheapest first; the first leaves the result as it is."""
    knobs = [f"lower tokens_per_pass ({args.tokens_per_pass})"]
    if getattr(args, "passes_kept", 1) > 1:
        knobs.insert(0, f"lower passes_kept ({args.passes_kept})")
    if not args.gradient_checkpointing:
        knobs.append("gradient_checkpointing: true")
    return ", then ".join([*knobs, "lower image.train_tokens", "fewer trained weights (lora)"])
