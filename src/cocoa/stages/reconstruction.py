"""What the reconstruction stages and compression share: the model around the backbone, and its trainer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn

from cocoa.architectures import recompute_activations
from cocoa.backbone import Backbone
from cocoa.blocks import IN_BLOCKS, Layout
from cocoa.corruption import IGNORE_INDEX
from cocoa.packing import by_length, final_states, pack
from cocoa.reconstruction import PatchDecoder, TokenPrediction, patch_loss, predict_tokens
from cocoa.stages.content import ContentDataset
from cocoa.stages.sampling import GlobalBatchSampler
from cocoa.stages.sharding import without_exchange
from cocoa.stages.start import Adapters
from cocoa.stages.training import StageTrainer

Sums = dict[str, tuple[Tensor, Tensor]]
"""Named sums with the counts they are to be divided by."""


class Prediction(NamedTuple):
    """What a forward pass puts in place of the hidden elements."""

    tokens: TokenPrediction
    pixels: Tensor | None
    """(P, unit_size) of the P hidden units in row-major order; None without a patch decoder."""


class Reconstructor(nn.Module):
    """The backbone, and what rebuilds the hidden elements of a batch; who attends to whom, the batch says.

    Args:
        backbone: with its language-model head; adapters, if any, already in place.
        patch_decoder: rebuilds hidden patches, or None where no patch is hidden.
        shifted: a token is predicted from the state before it, or from its own (see `predict_tokens`).
    """

    def __init__(self, backbone: Backbone, patch_decoder: PatchDecoder | None = None, shifted: bool = True) -> None:
        super().__init__()
        self.model = backbone.model
        self.model.set_attn_implementation({"text_config": IN_BLOCKS})
        self.patch_decoder = patch_decoder
        self.shifted = shifted
        self.pixels = backbone.pixels
        self._excluded_ids = [backbone.mask_token_id, *backbone.compression_token_ids]

    def anew(self, backbone: Backbone) -> Reconstructor:
        """The same around another backbone, with a new patch decoder where there is one."""
        decoder = self.patch_decoder and PatchDecoder(backbone.model.model.language_model, backbone.unit_size)
        return Reconstructor(backbone, decoder, self.shifted)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the backbone's activations in the backward pass."""
        recompute_activations(self.model, **kwargs)

    def predict(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        attention: Layout | Tensor,
        hidden_units: Tensor | None = None,
        **others: Tensor,
    ) -> Prediction:
        """One forward pass over the corrupted input, and what it makes of everything hidden.

        Args:
            input_ids: (1, N) corrupted ids of a row of `cocoa.packing.pack`.
            labels: (1, N) ids of the tokens to predict, `IGNORE_INDEX` elsewhere.
            position_ids: (3, 1, N) M-RoPE positions.
            attention: who attends to whom, in blocks or as a boolean mask (1, 1, N, N).
            hidden_units: (1, N) True on image tokens whose patches are hidden; only with a patch decoder.
            **others: the images, as `cocoa.packing.final_states` takes them, and what else a batch holds.
        """
        hidden_states = final_states(self.model.model, self.pixels, input_ids, position_ids, attention, others)
        head = self.model.lm_head
        if isinstance(head, TrainableTokensWrapper):  # puts trained rows into a tied head: those that are excluded
            head = head.original_module
        tokens = predict_tokens(hidden_states, head, labels, self._excluded_ids, self.shifted)
        if self.patch_decoder is None:
            return Prediction(tokens, None)
        assert hidden_units is not None
        return Prediction(tokens, self.patch_decoder(hidden_states, attention, position_ids, hidden_units))

    def forward(self, labels: Tensor, target_pixels: Tensor | None = None, **batch: Any) -> Sums:
        """Every loss term of one forward pass; arguments as `predict`, and the pixels to compare with.

        Args:
            labels: (1, N).
            target_pixels: (P, unit_size) pixels of the hidden units.
            **batch: the other arguments of `predict`.

        Returns:
            Sums and counts: `token` (cross-entropy), `accuracy`, and `patch` (MAE) or, with a bridge, `first` (the
            first token of block B, decoded from the final state of EOS itself).
        """
        tokens, pixels = self.predict(labels=labels, **batch)
        count = labels.new_full((), len(tokens.losses))
        sums = {"token": (tokens.losses.sum(), count), "accuracy": (tokens.correct.sum(), count)}
        if "eos_position" in batch:
            first = torch.isin(tokens.positions, batch["eos_position"] + 1)
            sums["first"] = (tokens.losses.where(first, 0).sum(), first.sum())
        if pixels is not None:
            assert target_pixels is not None
            sums["patch"] = (patch_loss(pixels, target_pixels), batch["hidden_units"].sum())
        return sums


class ReconstructionTrainer(StageTrainer):
    """Sums each loss term over the global batch and divides once, so that 8 x 1 equals 1 x 8.

    Logs the mean of every term: `token_loss`, `token_accuracy`, `patch_loss`, `first_loss`.

    Args:
        name: of the stage.
        model: what is trained.
        dataset: rows, encoded and corrupted.
        weights: weight of each loss term that is trained on.
        adapters: of the model, if it has any.
    """

    def __init__(
        self,
        name: str,
        model: Reconstructor,
        dataset: ContentDataset,
        weights: dict[str, float],
        adapters: Adapters | None = None,
    ) -> None:
        args = dataset.args
        datasets = [row.dataset for row in dataset.rows]
        pieces = (args.batch_size, args.per_device_train_batch_size)
        super().__init__(
            name=name,
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=partial(collate, dataset=dataset),
            sampler=GlobalBatchSampler(datasets, *pieces, args.seed, with_epoch=True),
            adapters=adapters,
        )
        self.weights = weights
        self.loss_is_scaled_for_ga = True
        self._logged: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, device=self.args.device))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The loss of all passes, their gradients summed; devices exchange them once."""
        *first, last = inputs["passes"]
        losses = []
        with without_exchange(model, self.accelerator):
            for each in first:
                losses.append(super().training_step(model, each, num_items_in_batch))
        losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """(2,) predicted tokens and hidden patch units of the step, over all devices and accumulation steps."""
        counts = torch.zeros(2, device=device)
        for batch in (each for sample in batch_samples for each in sample["passes"]):
            counts[0] += (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
            if "hidden_units" in batch:
                counts[1] += batch["hidden_units"].sum()
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted loss of this piece, as its share of the global batch's mean."""
        sums = model(**inputs)
        counts = dict(zip(("token", "patch"), num_items_in_batch, strict=True))
        loss = sum(weight * sums[term][0] / counts[term] for term, weight in self.weights.items())
        for term, (total, count) in sums.items():
            self._logged[term] += torch.stack([total.detach().float(), count.float()])
        loss = loss * self.args.world_size  # DDP averages the gradients of the processes
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms' means since the last log to the trainer's line."""
        if "loss" in logs:
            for term in sorted(self._logged):
                total, count = self.accelerator.reduce(self._logged[term], reduction="sum").tolist()
                name = "token_accuracy" if term == "accuracy" else f"{term}_loss"
                logs[name] = round(total / max(count, 1), 4)
            self._logged.clear()
        super().log(logs, start_time)


def collate(samples: Sequence[dict[str, Tensor]], dataset: ContentDataset) -> dict[str, list[dict[str, Any]]]:
    """A batch in `passes` of packed samples of like length."""
    parts = by_length(samples, dataset.args.tokens_per_pass)
    return {"passes": [pack([samples[place] for place in part], dataset.backbone, dataset.layout) for part in parts]}
