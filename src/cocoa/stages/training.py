"""What every stage's training shares: a global batch, exact resumption.

Written where the libraries are silently wrong or depend on the number of workers:

- the order of rows comes from (seed, epoch) alone, and a step's batch is the same rows on any number of
  devices (`cocoa.stages.sampling`);
- a trainer's checkpoint holds every trainable parameter by name, and a missing or foreign name is an error
  (`StageTrainer`); transformers restores a full-tuned Qwen2-VL, and DoRA under sentence-transformers, wrongly.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from cocoa.account import Meter
from cocoa.backbone import Form
from cocoa.errors import CocoaError
from cocoa.features import keep_features
from cocoa.inputs import MAX_LENGTH
from cocoa.stages.progress import ProgressLine
from cocoa.stages.sampling import GlobalBatchSampler

logger = logging.getLogger(__name__)

_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
WEIGHTS_NAME = "trainable.safetensors"
COMPLETE_NAME = "complete"
"""File in a trainer's checkpoint that is written last; it holds the account so far."""


@dataclass
class StageArguments(TrainingArguments):
    """Arguments that every stage shares, over `TrainingArguments` (every name of which works).

    Defaults that differ from transformers: `dataloader_drop_last` and `remove_unused_columns` are what the
    stages need; `learning_rate` 2e-5, `warmup_steps` 0.05 (a share), `logging_steps` 10, `save_steps` 0.1
    (a share), `save_total_limit` 2.

    Args:
        batch_size: pairs a step over all devices and accumulation steps; what does not divide is an error.
        max_length: tokens a sequence may have, image tokens included; text is shortened to fit, an image
            or EOS never.
        tokens_per_pass: a device's share of a batch goes through the model in parts of at most so many tokens: bounds
            the memory, leaves the gradients as they are.
        cache_inputs: keep each row's encoded image and text in memory instead of encoding them in every epoch,
            for small data: 2.4 kB an image token, in every process and data loader worker. Of an image that is shown
            whole to a frozen tower (`lora.vision: []`) its features are computed once and kept instead.
    """

    batch_size: int = 64
    max_length: int = MAX_LENGTH
    tokens_per_pass: int = 16_384
    cache_inputs: bool = False
    learning_rate: float = 2e-5
    warmup_steps: float = 0.05
    logging_steps: float = 10
    save_steps: float = 0.1
    save_total_limit: int | None = 2
    dataloader_drop_last: bool = True
    remove_unused_columns: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_gpu > 1:
            raise CocoaError(
                "several GPUs in one process are not supported: start with `accelerate launch` or `torchrun`, "
                "or set CUDA_VISIBLE_DEVICES to one"
            )
        if self.fsdp or self.deepspeed or any(os.environ.get(name) == "true" for name in _SHARDED):
            raise CocoaError(
                "FSDP and DeepSpeed are not supported yet: weights must be whole on each device to be merged and "
                "saved; use plain data parallelism (accelerate launch --multi_gpu) and gradient_checkpointing"
            )
        if self.save_only_model or self.ignore_data_skip:
            raise CocoaError("save_only_model and ignore_data_skip would make a restart inexact; leave them out")
        check_range("tokens_per_pass", self.tokens_per_pass, 0)
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


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuse an argument outside (low, high].

    Raises:
        CocoaError: names the argument and its range.
    """
    if not low < value <= high:
        limit = f"and at most {high:g}" if high < math.inf else ""
        raise CocoaError(f"{name}: {value} must be above {low:g} {limit}".rstrip())


class _FollowEpoch(TrainerCallback):
    """Tells the sampler which epoch it is, also after a restart on several devices, where the loader does not."""

    def __init__(self, sampler: GlobalBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.epoch = state.global_step // self.sampler.steps_per_epoch


class StageTrainer(Trainer):
    """A `Trainer` whose checkpoints restore exactly, and whose batches do not depend on the machine.

    Once trained, `account` holds seconds, tokens and peak memory of the run (see `cocoa.account`).

    Args:
        name: of the stage, for the progress line.
        sampler: the order of the rows of `train_dataset`.
        **kwargs: of the trainer this is mixed into.
    """

    def __init__(self, *, name: str, sampler: GlobalBatchSampler, **kwargs: Any) -> None:
        self.sampler = sampler
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(ProgressLine(name))
        self.add_callback(_FollowEpoch(sampler))

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the sampler's order, each process its pieces."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def train_or_resume(self) -> None:
        """Train, from the last complete checkpoint where there is one."""
        last = last_checkpoint(Path(self.args.output_dir))
        if last is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
        logger.info("resuming from %s", last)
        if state.global_step < self.total_steps():
            self.train(resume_from_checkpoint=str(last))
        else:  # stopped after its last step; the library would take one more
            self._load_from_checkpoint(str(last))
            self.state, self.account = state, _account_at(last)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        before = _account_at(Path(resume_from_checkpoint)) if resume_from_checkpoint else {}
        self.meter = Meter(self.args.device, self.args.world_size, before)
        if self.args.cache_inputs:
            keep_features(self.train_dataset.backbone, self.train_dataset.images(), not self.args.disable_tqdm)
        output = super().train(resume_from_checkpoint, **kwargs)
        self.account = self._account()
        return output

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.meter.count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _account(self) -> dict[str, Any]:
        """What the run has taken so far, over all processes and sessions; every process must ask."""
        return self.meter.read(self.accelerator.gather(self.meter.mine()))

    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self.sampler.steps_per_epoch)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in trainable(self.model)}, folder / WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS_NAME
        saved = load_file(path)
        parameters = dict(trainable(model or self.model))
        if different := sorted(saved.keys() ^ parameters.keys()):
            raise CocoaError(
                f"{path}: parameter {different[0]} is not in both the file and this run's model; the recipe "
                "changed since: remove the stage's folder to start it again"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        account = self._account()  # waits for everyone
        if self.is_world_process_zero():
            complete = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE_NAME
            partial = complete.with_suffix(".partial")
            partial.write_text(json.dumps(account), encoding="utf-8")
            os.replace(partial, complete)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that training changes, by name; shared ones once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _account_at(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / COMPLETE_NAME).read_text(encoding="utf-8"))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest trainer checkpoint that was written to its end, or None."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE_NAME}")]
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
