"""Stage 3, contrastive learning on the embedding: InfoNCE from query to target, on sentence-transformers' trainer.

Ours over sentence-transformers: equal targets do not count as negatives (by option), a batch that fits into
memory is embedded once, rows are drawn by seed alone, and DoRA resumes exactly (`StageTrainer`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.util import all_gather_with_grad
from torch import Tensor
from torch.utils.data import Dataset

from cocoa.backbone import ATTENTIONS, POOLINGS, Attention, Backbone, Form, Pooling
from cocoa.checkpoint import as_sentence_transformer
from cocoa.errors import CocoaError
from cocoa.pairs import Pair, Side
from cocoa.special_tokens import COMPRESSION_TOKENS
from cocoa.stages.sampling import SAMPLINGS, DatasetSampling, GlobalBatchSampler
from cocoa.stages.training import StageArguments, StageTrainer, check_range
from cocoa.validation import InPoolEvaluator

NAME = "contrastive"
FILLER_ID = -1
"""Content id of a hard negative that a row does not have; never a negative."""


@dataclass
class ContrastiveArguments(StageArguments, SentenceTransformerTrainingArguments):
    """Arguments of stage 3, over `StageArguments` and sentence-transformers' own.

    `eval_steps` (default 0.25, a share) says how often in-pool hit@1 is taken on the held-out rows.

    Args:
        mini_batch_size: pairs embedded at once (GradCache); bounds the memory, leaves the gradients as they are.
            A batch that fits into one saves GradCache's second forward pass, on one device.
        temperature: of the softmax.
        sub_batch_size: 1 shuffles all data sets together; 64 fills the batch with runs of 64 of one data set.
        mask_equal_targets: a target with the same text and image as the row's own is no negative.
        attention: of the text model; `bidirectional` is CoCoA's, `causal` CoMa's and the plain baseline's. Left out,
            that of a checkpoint of ours stays, and an untouched backbone becomes bidirectional.
        pooling: `lasttoken` is CoCoA's EOS, `mean` is MoCa's, `compression` CoMa's. Left out, as `attention`.
        compression_tokens: how many of them, if they are pooled; a checkpoint keeps those it has.
        dataset_sampling: `proportional` to the rows of each data set, or `uniform`, where each run of
            `sub_batch_size` rows is of any data set with equal probability (CoMa).
        hard_negatives: how many of a row's own negatives to use, 0 for none.
    """

    batch_size: int = 256
    mini_batch_size: int = 8
    temperature: float = 0.02
    sub_batch_size: int = 1
    mask_equal_targets: bool = True
    attention: Attention | None = None
    pooling: Pooling | None = None
    compression_tokens: int | None = None
    dataset_sampling: DatasetSampling = "proportional"
    hard_negatives: int = 0
    eval_strategy: str = "steps"
    eval_steps: float | None = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("temperature", self.temperature, 0)
        check_range("mini_batch_size", self.mini_batch_size, 0)
        check_range("sub_batch_size", self.sub_batch_size, 0)
        if self.batch_size % self.sub_batch_size:
            raise CocoaError(f"batch_size {self.batch_size} does not divide by sub_batch_size {self.sub_batch_size}")
        if self.gradient_accumulation_steps != 1:
            raise CocoaError(
                "contrastive: gradient_accumulation_steps would shrink the pool of negatives; "
                "lower mini_batch_size instead, which costs no negatives"
            )
        if self.compression_tokens is not None:
            check_range("compression_tokens", self.compression_tokens, 0)
        for name, known in (("attention", ATTENTIONS), ("pooling", POOLINGS), ("dataset_sampling", SAMPLINGS)):
            if (value := getattr(self, name)) is not None and value not in known:
                raise CocoaError(f"{name} {value!r}: choose one of {', '.join(known)}")

    def form(self, recorded: Form | None) -> Form:
        """As said, else as the checkpoint was trained, else CoCoA's.

        Raises:
            CocoaError: compression tokens are asked for, and not pooled.
        """
        known = recorded or Form()
        pooling = self.pooling or known.pooling
        if self.compression_tokens is not None and pooling != "compression":
            raise CocoaError(f"compression_tokens: the pooling is {pooling}; leave it out, or set pooling: compression")
        count = self.compression_tokens or known.compression_tokens or COMPRESSION_TOKENS
        return Form(self.attention or known.attention, pooling, count if pooling == "compression" else 0)


class EqualTargetsLoss(CachedMultipleNegativesRankingLoss):
    """`CachedMultipleNegativesRankingLoss` (query to document) that knows which documents are the same.

    Args:
        model: the embedding model.
        mask_equal_targets: leave a document out of a row's negatives where its content id is that of the
            row's positive, over the batch gathered from all devices.
        **kwargs: of the parent: `scale`, `mini_batch_size`, `gather_across_devices`.

    Inputs:
        Columns query, target and any number of negatives; labels (B, 1 + negatives) content ids of target
        and negatives, int64, `FILLER_ID` for a negative that stands in for none.

    Relations:
        Equal to the parent where all ids differ.
    """

    def __init__(self, model: SentenceTransformer, mask_equal_targets: bool = True, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.mask_equal_targets = mask_equal_targets

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss; a batch that fits into one mini-batch is embedded once, without the gradient cache.

        Not on several devices: DDP does not take one forward pass that uses the tower and one that does not.
        """
        columns = list(sentence_features)
        several = dist.is_initialized() and dist.get_world_size() > 1
        if several or max(len(column["input_ids"]) for column in columns) > self.mini_batch_size:
            return super().forward(columns, labels)
        return self.calculate_loss([[self.model(column)["sentence_embedding"]] for column in columns], labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """InfoNCE over the gathered batch, `mini_batch_size` rows of the score matrix at a time."""
        if labels is None:
            raise ValueError("EqualTargetsLoss needs content ids in the label column")
        queries = torch.cat(reps[0])  # (B, D)
        documents = [torch.cat(column) for column in reps[1:]]
        batch_size, rank = len(queries), 0
        ids = labels.T.contiguous()  # (1 + negatives, B)
        if self.gather_across_devices and dist.is_initialized():
            documents = [all_gather_with_grad(column) for column in documents]
            gathered = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, ids)
            ids = torch.cat(gathered, dim=1)
            rank = dist.get_rank()
        candidates = torch.cat(documents)  # (world * B * (1 + negatives), D)
        candidate_ids = ids.flatten()
        own = torch.arange(batch_size, device=queries.device) + rank * batch_size  # (B,) column of the positive

        losses = []
        for begin in range(0, batch_size, self.mini_batch_size):
            columns = own[begin : begin + self.mini_batch_size]  # (b,)
            scores = self.similarity_fct(queries[begin : begin + len(columns)], candidates) * self.scale
            excluded = (candidate_ids == FILLER_ID).expand(len(columns), -1)
            if self.mask_equal_targets:
                excluded = excluded | (candidate_ids == candidate_ids[columns, None])
            excluded = excluded.scatter(1, columns[:, None], False)
            scores = scores.masked_fill(excluded, float("-inf"))
            loss = torch.nn.functional.cross_entropy(scores, columns, reduction="sum") / batch_size
            if with_backward:
                loss.backward()
                loss = loss.detach()
            losses.append(loss)
        return torch.stack(losses).sum()

    def get_config_dict(self) -> dict[str, Any]:
        """The parent's settings and ours."""
        return {**super().get_config_dict(), "mask_equal_targets": self.mask_equal_targets}


class ContrastiveTrainer(StageTrainer, SentenceTransformerTrainer):
    """Sentence-transformers' trainer with our order of rows and exact resumption."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No card: it would read the data set again for its examples, and our checkpoint has its own record."""


class PairDataset(Dataset):
    """Rows of chat messages, rendered when asked for: `query`, `target`, `negative_1`, ..., and content ids.

    The `label` of a row holds the content ids of its target and its negatives; a negative that the row does
    not have, or that equals the target, is no negative (`FILLER_ID`).

    Args:
        pairs: what to render.
        backbone: renders a side.
        args: of the stage, for length and number of hard negatives.
    """

    def __init__(self, pairs: Sequence[Pair], backbone: Backbone, args: ContrastiveArguments) -> None:
        self.pairs = pairs
        self.backbone = backbone
        self.args = args
        self.column_names = ["query", "target", *(f"negative_{i + 1}" for i in range(args.hard_negatives)), "label"]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        negatives = pair.negatives[: self.args.hard_negatives]
        missing = self.args.hard_negatives - len(negatives)
        target_id = pair.target.content_id()
        ids = [side.content_id() for side in negatives]
        ids = [FILLER_ID if content_id == target_id else content_id for content_id in ids]
        try:
            sides = [pair.query, pair.target, *negatives, *[Side()] * missing]
            columns: list[Any] = [
                self.backbone.messages(self.backbone.fit_text(side, self.args.max_length)) for side in sides
            ]
        except CocoaError as error:
            raise CocoaError(f"row {pair.row_id}: {error}") from error
        columns.append([target_id, *ids, *[FILLER_ID] * missing])
        return dict(zip(self.column_names, columns, strict=True))


def build_trainer(
    backbone: Backbone, pairs: Sequence[Pair], validation: Sequence[Pair], args: ContrastiveArguments
) -> ContrastiveTrainer:
    """The trainer of stage 3.

    Args:
        backbone: to be trained, adapters (if any) already in place.
        pairs: to train on.
        validation: held-out pairs for in-pool hit@1; may be empty.
        args: of the stage.

    Raises:
        CocoaError: fewer pairs than a batch.
    """
    model = as_sentence_transformer(backbone)
    if not validation:
        args.eval_strategy = "no"
    return ContrastiveTrainer(
        name=NAME,
        model=model,
        args=args,
        train_dataset=PairDataset(pairs, backbone, args),
        loss=EqualTargetsLoss(
            model,
            mask_equal_targets=args.mask_equal_targets,
            scale=1 / args.temperature,
            mini_batch_size=args.mini_batch_size,
            gather_across_devices=True,
        ),
        evaluator=InPoolEvaluator(validation, backbone, args.mini_batch_size, args.max_length) if validation else None,
        sampler=GlobalBatchSampler(
            [pair.dataset for pair in pairs],
            args.batch_size,
            args.per_device_train_batch_size,
            args.seed,
            args.sub_batch_size,
            dataset_sampling=args.dataset_sampling,
        ),
    )
