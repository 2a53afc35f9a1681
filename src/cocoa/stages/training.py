"""What every stage's training shares: a global batch, exact resumption.

Written where the libraries are silently wrong or depend on the number of workers:

- the order of rows comes from (seed, epoch) alone, and a step's batch is the same rows on any number of
  devices (`cocoa.stages.sampling`);
- a trainer's checkpoint holds every trainable parameter by name, and a missing or foreign name is an error
  (`StageTrainer`); transformers restores a full-tuned Qwen2-VL, and DoRA under sentence-transformers, wrongly.

What may go wrong: signals, numbers that are none (`cocoa.stages.watch`), rows (`cocoa.stages.loading`), a full disk.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import skip_first_batches
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from cocoa.account import Meter
from cocoa.errors import CocoaError
from cocoa.failures import explained
from cocoa.features import keep_features
from cocoa.files import write_json, writing
from cocoa.inputs import ImageBudget
from cocoa.stages import loading, saving, sharding, watch
from cocoa.stages.arguments import less_memory
from cocoa.stages.checkpoints import COMPLETE_NAME, account_at, complete_checkpoints, last_checkpoint
from cocoa.stages.loading import BAD_ROWS
from cocoa.stages.progress import ProgressLine
from cocoa.stages.rates import keep_rates, rates_of
from cocoa.stages.sampling import FollowEpoch, GlobalBatchSampler
from cocoa.stages.start import Adapters
from cocoa.stages.weights import load_weights, trainable, whole

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "trainable.safetensors"
LOADER_RESTARTS = 3
"""Times in one step that workers which load data are started again."""


class StageTrainer(Trainer):
    """A `Trainer` whose checkpoints restore exactly, and whose batches do not depend on the machine.

    Once trained, `account` holds seconds, tokens and peak memory of the run (see `cocoa.account`), `skipped_steps`,
    and why which rows were left out (`bad_rows`).

    Args:
        name: of the stage, for the progress line.
        sampler: the order of the rows of `train_dataset`.
        adapters: of the model, if it has any; merged by `save_checkpoint`.
        **kwargs: of `Trainer`.
    """

    def __init__(
        self, *, name: str, sampler: GlobalBatchSampler, adapters: Adapters | None = None, **kwargs: Any
    ) -> None:
        self.name = name
        self.sampler = sampler
        self.adapters = adapters
        self.trained = adapters.what if adapters else "all weights"
        self.left_out: dict[str, Counter[str]] = {}
        super().__init__(**kwargs)
        self.accelerator.ddp_handler.gradient_as_bucket_view = (
            True  # else gradients are there twice in a step of one pass
        )
        if self.is_fsdp_enabled:
            sharding.prepare(self.model, self.accelerator)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.progress = ProgressLine(name)
        self.watch = watch.Watch(self.accelerator, self.args.on_nonfinite, self.row_ids, Path(self.args.output_dir))
        for callback in (self.progress, self.watch, FollowEpoch(sampler)):
            self.add_callback(callback)
        self.bad_rows: dict[str, str] = {}
        self.account: dict[str, Any] = {}
        self._deadly: set[int] = set()
        self._epoch: Iterator[Any] = iter(())
        self._batches: Iterator[Any] = self._epoch  # of the epoch, or of what is left of it after a restart

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the sampler's order, each process its pieces."""
        loader = DataLoader(
            loading.Rows(self.train_dataset, self.args.on_bad_row, self._deadly),
            batch_sampler=self.sampler,
            collate_fn=partial(loading.collate_rows, collate=self.data_collator),
            **loading.worker_options(self.args),
        )
        return self.accelerator.prepare(loader)

    def row_ids(self, step: int) -> list[str]:
        """The rows of a step's batch (the first is 0), over all devices."""
        return [self.train_dataset.rows[row].row_id for row in self.sampler.rows_at(step)]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As the library's, from a new loader where a worker of the old one has ended."""
        if epoch_iterator is not self._epoch:
            self._epoch = self._batches = epoch_iterator
        for restarts in range(LOADER_RESTARTS + 1):
            try:
                batches, count = super().get_batch_samples(self._batches, num_batches, device)
                break
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                if restarts == LOADER_RESTARTS:
                    raise CocoaError(
                        f"workers that load data end again and again ({error}); lower dataloader_num_workers"
                    ) from error
                self._batches = self._load_again(error)
        loading.let_workers_die()
        for batch in batches:
            self._note(batch.pop(BAD_ROWS))
            self.meter.count(batch)
        if self.is_fsdp_enabled:
            sharding.even_out(batches, self.accelerator, self.train_dataset.backbone)
        return batches, count

    def _load_again(self, error: RuntimeError) -> Iterator[Any]:
        """What is left of the epoch, once the rows that were on their way have been tried."""
        logger.warning("a worker that loads data has ended (%s): looking for the row", error)
        done = self.state.global_step % self.sampler.steps_per_epoch * self.args.gradient_accumulation_steps
        mine = islice(self.sampler, self.accelerator.process_index, None, self.accelerator.num_processes)
        batches = islice(mine, done, done + loading.under_way(self.args))
        keys = [key for batch in batches for key in batch if loading.row_of(key) not in self._deadly]
        self._deadly |= loading.find_deadly(self.train_dataset, keys)
        with torch.random.fork_rng([]):  # a loader draws a number when it starts; weights shall not depend on it
            return iter(skip_first_batches(self.get_train_dataloader(), done))

    def _note(self, bad: dict[str, str]) -> None:
        """Remember rows that were left out.

        Raises:
            CocoaError: they are too many.
        """
        for row, reason in bad.items():
            if row not in self.bad_rows:
                logger.warning("left out, and the row behind it in its place: %s", reason)
        self.bad_rows |= bad
        loading.check_share(self.bad_rows, self.args.max_bad_share, len(self.train_dataset))

    def train_or_resume(self) -> None:
        """Train, from the last complete checkpoint where there is one."""
        last = last_checkpoint(Path(self.args.output_dir))
        if last is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
        logger.info("resuming from %s", last)
        if state.global_step < self.total_steps():
            try:
                self.train(resume_from_checkpoint=str(last))
            except UnpicklingError as error:
                raise CocoaError(f"{last}: holds more than numbers ({error}); it is not ours: remove it") from None
        else:  # stopped after its last step; the library would take one more
            self._load_from_checkpoint(str(last))
            self.state, self.account = state, account_at(last)
            self.bad_rows = self.account.get(BAD_ROWS, {})

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            raise CocoaError("resume_from_checkpoint=True: name the checkpoint's folder, or call train_or_resume()")
        before = account_at(Path(resume_from_checkpoint)) if resume_from_checkpoint else {}
        self.meter = Meter(self.args.device, self.args.world_size, before)
        self.watch.skipped, self.bad_rows = before.get("skipped_steps", 0), before.get(BAD_ROWS, {})
        if self.args.cache_inputs and not self.is_fsdp_enabled:  # whose model is still on the CPU
            keep_features(self.train_dataset.backbone, self.train_dataset.images(), not self.args.disable_tqdm)
        with self.watch.listening(), self.progress, closing(self), explained(less_memory(self.args)):
            output = super().train(resume_from_checkpoint, **kwargs)
        self.watch.leave_if_asked(self.state.global_step, saved=self.args.save_strategy != "no")
        self.account = self._account()
        return output

    def close(self) -> None:
        """End the workers that load data, which a traceback would keep."""
        if isinstance(self._batches, Generator):
            self._batches.close()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.see(loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Leave out figures that are no finite numbers, which JSON does not have."""
        bad = {name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)}
        super().log({name: value for name, value in logs.items() if name not in bad}, start_time)

    def _account(self) -> dict[str, Any]:
        """What the run has taken so far, over all processes and sessions; every process must ask."""
        account = self.meter.read(self.accelerator.gather(self.meter.mine()))
        bad = gather_object([self.bad_rows]) if self.args.world_size > 1 else [self.bad_rows]
        self.bad_rows = {row: reason for each in bad for row, reason in each.items()}
        return account | {"skipped_steps": self.watch.skipped, BAD_ROWS: self.bad_rows}

    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self.sampler.steps_per_epoch)

    def save_checkpoint(
        self, folder: str | Path, images: ImageBudget | None = None, record: Mapping[str, Any] | None = None
    ) -> Path:
        """Write what was trained as `cocoa train` writes it; the last thing that a trainer does to its model.

        Adapters are merged in float32, and the weights rounded once, to bfloat16 where `bf16` is set. The folder is
        there only once it is whole. sentence-transformers, transformers and the next stage read it.

        Args:
            folder: must not exist.
            images: token budget that the checkpoint carries; by default that of the training.
            record: what to say in `cocoa.json` beside, or in place of, what the trainer knows.

        Returns:
            The folder.

        Raises:
            CocoaError: it exists, or cannot be written; or the model is split over processes.
        """
        return saving.save_trained(self, Path(folder), images, record or {})

    def save_beside(self, folder: Path) -> None:
        """Write what else of the stage belongs into its checkpoint; nothing, but for stages that override it."""

    def trained_weights(self) -> dict[str, Tensor]:
        """What training changes, whole, by name; every process must ask, and the main one gets it."""
        return whole(dict(trainable(self.model)), self.args.should_save)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        weights = self.trained_weights()
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS_NAME
        try:
            load_weights(model or self.model, load_file(path))
        except CocoaError as error:
            raise CocoaError(
                f"{path}: {error}; the recipe changed since: remove the stage's folder to start it again"
            ) from None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        sharding.save_optimizer(self.optimizer, Path(output_dir), self.args.should_save)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The library's; learning rate and weight decay are those of this run, where the recipe has changed since."""
        if checkpoint is None:
            return
        own = rates_of(self.optimizer)
        if self.is_fsdp_enabled:
            sharding.load_optimizer(self.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        keep_rates(own, self.optimizer, self.lr_scheduler)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        most, self.args.save_total_limit = self.args.save_total_limit, None  # old ones go once this one is whole
        try:
            with writing(checkpoint):
                super()._save_checkpoint(*args, **kwargs)
                account = self._account()  # waits for everyone
                if self.is_world_process_zero():
                    write_json(checkpoint / COMPLETE_NAME, account)
        finally:
            self.args.save_total_limit = most
        if self.is_world_process_zero() and most:
            for old in complete_checkpoints(folder)[:-most]:
                (old / COMPLETE_NAME).unlink()
                shutil.rmtree(old)
