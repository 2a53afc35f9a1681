"""Stage 3, contrastive learning on the embedding: InfoNCE from query to target with all others of the batch.

A batch is embedded in passes of packed rows (GradCache: first all embeddings without gradients, then the loss, then
every pass again with the gradient of its own embeddings), the last ones once: a batch whose activations fit into
memory is embedded once. The loss itself is in `cocoa.contrastive_loss`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cocoa.adapters import Lora
from cocoa.architectures import ATTENTIONS, Attention
from cocoa.backbone import POOLINGS, Backbone, Form, Pooling
from cocoa.catalogue import StageRows
from cocoa.contrastive_loss import FILLER_ID, cached_loss, info_nce
from cocoa.embedding import embedder_of
from cocoa.errors import CocoaError
from cocoa.packing import PackedEmbedder, by_length, pack
from cocoa.pairs import Pair, Side
from cocoa.sources import read_pairs
from cocoa.special_tokens import COMPRESSION_TOKENS
from cocoa.stages.arguments import StageArguments, check_range
from cocoa.stages.sampling import SAMPLINGS, DatasetSampling, GlobalBatchSampler
from cocoa.stages.sharding import gathered_root, without_exchange
from cocoa.stages.start import stage_adapters, stage_backbone
from cocoa.stages.training import StageTrainer
from cocoa.validation import InPoolEvaluator, readable

NAME = "contrastive"


@dataclass
class ContrastiveArguments(StageArguments):
    """Arguments of stage 3, over `StageArguments`.

    `eval_steps` (default 0.25, a share) says how often in-pool hit@1 is taken on the held-out rows.

    Args:
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
        passes_kept: so many passes of a batch keep their activations until the loss is known and are embedded once, the
            others twice. With gradient checkpointing a pass that is kept takes its layers' inputs alone.
        matryoshka_dims: lengths at which an embedding shall be usable too, cut and normalised (Matryoshka
            representation learning, arXiv 2205.13147): the loss is the mean over them and the whole embedding.

    Example:
        >>> import cocoa
        >>> args = cocoa.ContrastiveArguments(output_dir="trainer", batch_size=64, pooling="mean", hard_negatives=2)
        >>> args.temperature, args.pooling
        (0.02, 'mean')
    """

    batch_size: int = 256
    temperature: float = 0.02
    sub_batch_size: int = 1
    mask_equal_targets: bool = True
    attention: Attention | None = None
    pooling: Pooling | None = None
    compression_tokens: int | None = None
    dataset_sampling: DatasetSampling = "proportional"
    hard_negatives: int = 0
    passes_kept: int = 1
    matryoshka_dims: Sequence[int] = ()
    eval_strategy: str = "steps"
    eval_steps: float | None = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("temperature", self.temperature, 0)
        check_range("sub_batch_size", self.sub_batch_size, 0)
        check_range("passes_kept", self.passes_kept, 0)
        if self.batch_size % self.sub_batch_size:
            raise CocoaError(f"batch_size {self.batch_size} does not divide by sub_batch_size {self.sub_batch_size}")
        if self.gradient_accumulation_steps != 1:
            raise CocoaError(
                "contrastive: gradient_accumulation_steps would shrink the pool of negatives; "
                "lower tokens_per_pass instead, which costs no negatives"
            )
        if self.compression_tokens is not None:
            check_range("compression_tokens", self.compression_tokens, 0)
        dims = self.matryoshka_dims
        if not isinstance(dims, (list, tuple)) or not all(type(dim) is int and dim > 0 for dim in dims):
            raise CocoaError(f"matryoshka_dims {dims!r}: must be a list of whole numbers above 0")
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


class PairDataset(Dataset):
    """Rows encoded when asked for: `query`, `target`, `negative_1`, ..., each as `Backbone.encode_side` gives it.

    The `label` of a row holds the content ids of its target and its negatives; a negative that the row does
    not have, or that equals the target, is no negative (`FILLER_ID`).

    Args:
        pairs: what to encode.
        backbone: encodes a side.
        args: of the stage, for length and number of hard negatives.
    """

    def __init__(self, pairs: Sequence[Pair], backbone: Backbone, args: ContrastiveArguments) -> None:
        self.rows = pairs
        self.backbone = backbone
        self.args = args
        backbone.encoded = {} if args.cache_inputs else None
        self.column_names = ["query", "target", *(f"negative_{i + 1}" for i in range(args.hard_negatives)), "label"]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self) -> list[Side]:
        """All sides, as they are encoded."""
        return [side for pair in self.rows for side in self._sides(pair)]

    def _sides(self, pair: Pair) -> list[Side]:
        sides = [pair.query, pair.target, *pair.negatives[: self.args.hard_negatives]]
        return [self.backbone.fit_text(side, self.args.max_length) for side in sides]

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.rows[index]
        target_id = pair.target.content_id()
        ids = [side.content_id() for side in pair.negatives[: self.args.hard_negatives]]
        ids = [FILLER_ID if content_id == target_id else content_id for content_id in ids]
        missing = self.args.hard_negatives - len(ids)
        try:
            sides = [*self._sides(pair), *[Side()] * missing]
            columns: list[Any] = [self.backbone.encode_side(side) for side in sides]
        except CocoaError as error:
            raise CocoaError(f"row {pair.row_id}: {error}") from error
        columns.append([target_id, *ids, *[FILLER_ID] * missing])
        return dict(zip(self.column_names, columns, strict=True))


class ContrastiveTrainer(StageTrainer):
    """The trainer of stage 3.

    Embeds a batch pass by pass, and takes in-pool hit@1 where another trainer takes its loss on held-out rows.

    Args:
        model: to be trained: the folder, hub id or embedded name that it is loaded from, or a backbone, whose attention
            and pooling stay where `args` leaves them out.
        args: of the stage.
        pairs: to train on; or a file or folder of pairs.
        validation: held-out pairs for in-pool hit@1; may be empty. With `on_bad_row: skip`, one that cannot be read is
            left out.
        lora: adapters to train in place of all weights.

    Raises:
        CocoaError: a mistake in the data, or fewer pairs than a batch.

    Example:
        >>> import cocoa
        >>> from PIL import Image
        >>> colours = {name: Image.new("RGB", (84, 84), name) for name in ("red", "green", "blue", "white")}
        >>> sides = [({"image": image}, {"text": f"a {name} square"}) for name, image in colours.items()]
        >>> pairs = cocoa.read_pairs([{"query": query, "target": target} for query, target in sides])
        >>> args = cocoa.ContrastiveArguments(output_dir="trainer", batch_size=4, max_steps=1)
        >>> trainer = cocoa.ContrastiveTrainer("mini-qwen2-vl", args, pairs)
        >>> trainer.train().global_step
        1
        >>> trainer.save_checkpoint("model").name
        'model'
        >>> from sentence_transformers import SentenceTransformer
        >>> SentenceTransformer("model").encode([{"image": colours["red"]}, "a red square"]).shape
        (2, 128)
    """

    def __init__(
        self,
        model: Backbone | str | Path,
        args: ContrastiveArguments,
        pairs: str | Path | Sequence[Pair],
        validation: Sequence[Pair] = (),
        lora: Lora | None = None,
    ) -> None:
        backbone = stage_backbone(model, args, lora)
        whole = backbone.model.config.text_config.hidden_size
        if long := [dim for dim in args.matryoshka_dims if dim > whole]:
            raise CocoaError(f"matryoshka_dims {long}: an embedding has {whole} numbers")
        usable = usable_pairs(read_pairs(pairs) if isinstance(pairs, str | Path) else pairs, backbone, args)
        adapters = stage_adapters(backbone, args, lora)
        embedder = embedder_of(backbone, args.max_length)
        if args.on_bad_row == "skip":
            validation = readable(validation, embedder)
        evaluator = InPoolEvaluator(validation, embedder)
        if not evaluator.pools:
            args.eval_strategy = "no"
        datasets = [pair.dataset for pair in usable]
        pieces = (args.batch_size, args.per_device_train_batch_size)
        super().__init__(
            name=NAME,
            model=PackedEmbedder(backbone),
            args=args,
            train_dataset=PairDataset(usable, backbone, args),
            eval_dataset=validation,
            data_collator=partial(collate, backbone=backbone, tokens=args.tokens_per_pass),
            sampler=GlobalBatchSampler(
                datasets, *pieces, args.seed, args.sub_batch_size, dataset_sampling=args.dataset_sampling
            ),
            adapters=adapters,
        )
        self.left_out = usable.left_out
        self.evaluator = evaluator

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; devices exchange gradients once, in its backward pass."""

        def loss_of(vectors: Tensor) -> Tensor:
            return info_nce(
                vectors[inputs["places"]],
                inputs["ids"],
                self.args.temperature,
                self.args.mask_equal_targets,
                self.args.matryoshka_dims,
            )

        alone = partial(without_exchange, model, self.accelerator)
        kept, backward = self.args.passes_kept, self.accelerator.backward
        loss = cached_loss(model, inputs["passes"], loss_of, kept, backward, alone)
        return (loss, {}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """In-pool hit@1 on the held-out pairs."""
        with gathered_root(self.model), self.accelerator.autocast():
            metrics = {f"eval_{name}": score for name, score in self.evaluator().items()}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def collate(rows: Sequence[dict[str, Any]], backbone: Backbone, tokens: int) -> dict[str, Any]:
    """A batch: `passes` of packed sides, `ids` (1 + negatives, B), and the `places` (2 + negatives, B) of its sides.

    A place is where a side's embedding stands among those of all passes.
    """
    ids = torch.tensor([row["label"] for row in rows]).T  # (1 + negatives, B)
    sides = [row[column] for column in rows[0] if column != "label" for row in rows]
    parts = by_length(sides, tokens)
    places = torch.tensor([place for part in parts for place in part]).argsort().view(-1, len(rows))
    passes = [pack([sides[place] for place in part], backbone) for part in parts]
    return {"passes": passes, "places": places, "ids": ids.contiguous()}


def usable_pairs(pairs: Sequence[Pair], backbone: Backbone, args: ContrastiveArguments) -> StageRows[Pair]:
    """The pairs that have a target and fit into `max_length`; what this has given already is taken as it is."""
    if isinstance(pairs, StageRows):
        return pairs
    kept: StageRows[Pair] = StageRows()
    for pair in pairs:
        if pair.target == Side():
            kept.left_out.setdefault(pair.dataset, Counter())["a dialogue without a caption has no target"] += 1
        elif all(backbone.fits(side, args.max_length) for side in pair.sides):
            kept.append(pair)
        else:
            kept.left_out.setdefault(pair.dataset, Counter())["image and instruction fill max_length"] += 1
    return kept
