"""The order of the training rows, the same on any number of devices, workers and restarts."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch.utils.data import BatchSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocoa.errors import CocoaError

logger = logging.getLogger(__name__)

DatasetSampling = Literal["proportional", "uniform"]
SAMPLINGS: tuple[str, ...] = get_args(DatasetSampling)


class GlobalBatchSampler(BatchSampler):
    """The order of the training rows, decided by seed and epoch alone.

    Each step's global batch is cut into consecutive pieces, one for each device and accumulation step, so
    that the union of a step's pieces does not depend on how many there are. Rows that do not fill a last
    batch wait for the next epoch's order.

    Args:
        datasets: the data set of each row.
        batch_size: rows in a global batch.
        piece_size: rows in a piece.
        seed: of the order.
        sub_batch_size: 1 shuffles all rows; n, which divides the batch, fills it with runs of n rows of one data set.
        with_epoch: yield `(epoch, row)` keys, for masks that change with the epoch, instead of rows.
        dataset_sampling: `proportional` takes each row once an epoch; `uniform` draws the data set of each run with
            equal probability, so that rows of small ones come again, each time in a new order, in as many steps; into
            the same batch only where it takes more rows than the data set has.

    Raises:
        CocoaError: fewer rows than a batch.
    """

    def __init__(
        self,
        datasets: Sequence[str],
        batch_size: int,
        piece_size: int,
        seed: int,
        sub_batch_size: int = 1,
        with_epoch: bool = False,
        dataset_sampling: DatasetSampling = "proportional",
    ) -> None:
        self.rows_of: dict[str, list[int]] = defaultdict(list)
        for row, dataset in enumerate(datasets):
            self.rows_of[dataset if sub_batch_size > 1 or dataset_sampling == "uniform" else ""].append(row)
        usable = sum(len(rows) // sub_batch_size * sub_batch_size for rows in self.rows_of.values())
        self.steps_per_epoch = usable // batch_size
        for dataset, rows in self.rows_of.items():
            if len(rows) < sub_batch_size:
                logger.warning(
                    "data set %s: %d rows fill no run of %d; none is used", dataset, len(rows), sub_batch_size
                )
        if not self.steps_per_epoch:
            raise CocoaError(f"batch_size {batch_size} is more than the {usable} rows there are; lower it or add data")
        self.global_batch_size = batch_size
        self.batch_size = piece_size
        self.drop_last = True
        self.seed = seed
        self.sub_batch_size = sub_batch_size
        self.with_epoch = with_epoch
        self.dataset_sampling = dataset_sampling
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps_per_epoch * (self.global_batch_size // self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        order = self.order(self.epoch)
        keys: list[Any] = [(self.epoch, row) for row in order] if self.with_epoch else order
        for start in range(0, len(keys), self.batch_size):
            yield keys[start : start + self.batch_size]

    def order(self, epoch: int) -> list[int]:
        """The rows of one epoch, a multiple of the global batch."""
        digest = hashlib.blake2b(f"{self.seed}\0order\0{epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        size = self.sub_batch_size
        if self.dataset_sampling == "uniform":
            return self._uniform_order(size, generator)
        runs: list[list[int]] = []
        for rows in self.rows_of.values():
            shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            runs += [shuffled[i : i + size] for i in range(0, len(rows) // size * size, size)]
        if len(self.rows_of) > 1:
            runs = [runs[i] for i in torch.randperm(len(runs), generator=generator).tolist()]
        flat = [row for run in runs for row in run]
        return flat[: self.steps_per_epoch * self.global_batch_size]

    def rows_at(self, step: int) -> list[int]:
        """The rows of a step's global batch; the first step is 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[place * self.global_batch_size :][: self.global_batch_size]

    def _uniform_order(self, size: int, generator: torch.Generator) -> list[int]:
        """Runs of `size` rows, each of a data set drawn with equal probability among those that fill one."""
        members = [rows for rows in self.rows_of.values() if len(rows) >= size]
        waiting: list[list[int]] = [[] for _ in members]
        runs = self.steps_per_epoch * self.global_batch_size // size
        flat: list[int] = []
        for drawn in torch.randint(len(members), (runs,), generator=generator).tolist():
            if len(waiting[drawn]) < size:
                rows = members[drawn]
                shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
                batch = set(flat[len(flat) // self.global_batch_size * self.global_batch_size :])
                waiting[drawn] = sorted(shuffled, key=lambda row: row in batch)  # those of this batch last
            flat += waiting[drawn][:size]
            del waiting[drawn][:size]
        return flat


class FollowEpoch(TrainerCallback):
    """Tells the sampler which epoch it is, also after a restart on several devices, where the loader does not."""

    def __init__(self, sampler: GlobalBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """By the steps taken so far."""
        self.sampler.epoch = state.global_step // self.sampler.steps_per_epoch
