"""The evaluation data of a report, and the embeddings that evaluations of it have kept: no model is loaded for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import torch
from torch import Tensor

from cocoa.bad_rows import BadRows
from cocoa.catalogue import find_dataset, scored_name, stage_rows
from cocoa.embedding_cache import EmbeddingCache
from cocoa.eval_inputs import distinct_inputs, with_images_readable
from cocoa.evaluation import data_hash, read_data
from cocoa.gallery import Gallery, Mistake, gallery, mistakes
from cocoa.images import image_size
from cocoa.inputs import ImageBudget, image_tokens
from cocoa.mmeb import list_subsets
from cocoa.mmeb_eval import EvalDataset
from cocoa.pairs import ContentPair, Pair, Side
from cocoa.report_scores import TASKS, meta_task

T = TypeVar("T")

LOOKED_AT = 20
"""Rows at the beginning of a data set from which samples are taken."""
SPREAD = 4
"""Data sets whose rows are rebuilt."""


@dataclass(frozen=True)
class ReportData:
    """A few data sets.

    Attributes:
        datasets: by meta-task.
        embeddings: by run and data set, the (inputs, D); of runs that were scored on this very data.
        notes: which runs have none, and why.
    """

    datasets: dict[str, list[EvalDataset]]
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def galleries(self, queries: int) -> list[Gallery]:
        """The first queries of a data set of each meta-task, asked of every run that has embeddings of it.

        It is the first one in which pictures are looked for, or else the first.
        """
        found = []
        for datasets in self.datasets.values():
            dataset = next((each for each in datasets if _finds_pictures(each)), datasets[0])
            rows = range(min(queries, len(dataset.queries)))
            having = {run: own[dataset.name] for run, own in self.embeddings.items() if dataset.name in own}
            if having:
                models = {run: gallery(dataset, embeddings, rows) for run, embeddings in having.items()}
                found.append(Gallery(dataset.name, models))
        return found

    def mistakes(self, run: str, number: int) -> dict[str, list[Mistake]]:
        """By meta-task, what a run is most confidently wrong in; without those where it makes no mistake."""
        own, found = self.embeddings[run], {}
        for task, datasets in self.datasets.items():
            there = [dataset for dataset in datasets if dataset.name in own]
            found[task] = mistakes(there, [own[dataset.name] for dataset in there], number)
        return {task: each for task, each in found.items() if each}

    def rows(self, stage: str, number: int) -> list[ContentPair]:
        """Rows that a reconstruction stage could rebuild, of the data sets with the longest texts in turn."""
        every = [list(stage_rows(_pairs(dataset), stage)) for each in self.datasets.values() for dataset in each]
        longest = sorted((rows for rows in every if rows), key=lambda rows: -mean(len(row.text) for row in rows))
        return sorted(_in_turn(longest[:SPREAD])[:number], key=lambda row: row.dataset)

    def sides(self, images: ImageBudget, pictures: int, texts: int) -> list[Side]:
        """Inputs to look at: pictures of 4 patches and more, of every meta-task in turn; then long texts alone."""
        by_dataset = [
            list(dict.fromkeys(side for pair in _pairs(dataset) for side in pair.sides))
            for dataset in _in_turn(list(self.datasets.values()))
        ]
        large = _in_turn([[side for side in sides if _patches(side, images) >= 4] for sides in by_dataset])
        plain = [
            max((s for s in sides if s.image is None), key=lambda s: len(s.text), default=None) for sides in by_dataset
        ]
        longest = sorted((side for side in plain if side is not None), key=lambda side: -len(side.text))
        return large[:pictures] + list(dict.fromkeys(longest))[:texts]


def read_report_data(
    data: Path,
    image_root: Path | None,
    split: str,
    prompt_style: str,
    most: int,
    evaluations: Mapping[str, tuple[Path, dict[str, Any]]],
) -> ReportData:
    """Read a few data sets of each meta-task, of those that were scored if any of them is there, and their embeddings.

    Args:
        data: folder in MMEB-eval's layout, or a file of pairs.
        image_root: what image paths are relative to; see `evaluate`.
        split: which files of each data set.
        prompt_style: how the evaluations read it.
        most: data sets of a meta-task.
        evaluations: by run, its folder and summary.

    Raises:
        CocoaError: the data cannot be read.
    """
    scored = dict.fromkeys(name for _, summary in evaluations.values() for name in summary["datasets"])
    there = [data.stem] if data.is_file() else list_subsets(data)
    names = [name for name in there if scored_name(name) in scored] or there
    tasks: dict[str, list[str]] = {}
    for name in sorted(names, key=_rebuilt_first):
        tasks.setdefault(meta_task(name), []).append(name)
    wanted = [name for own in tasks.values() for name in own[:most]]
    bad = BadRows("skip")  # as an evaluation may have; whether it did, the hash tells
    found = read_data(data, "all" if data.is_file() else wanted, split, image_root, bad, prompt_style)
    found, digests = with_images_readable(found, bad)
    found, inputs = distinct_inputs(found, digests)
    result = ReportData({})
    for dataset in sorted(
        found, key=lambda dataset: (TASKS.index(meta_task(dataset.name)), _rebuilt_first(dataset.name))
    ):
        result.datasets.setdefault(meta_task(dataset.name), []).append(dataset)
    for run, (folder, summary) in evaluations.items():
        cache = EmbeddingCache(folder / summary.get("embeddings", "embeddings/none"))
        cache.read()
        hashes = summary.get("data_hash", {})
        own: dict[str, Tensor] = {}
        for dataset, places in zip(found, inputs.places, strict=True):
            keys = [inputs.keys[place] for place in places.tolist()]
            if hashes.get(dataset.name) == data_hash(dataset, keys) and cache.rows.keys() >= set(keys):
                own[dataset.name] = torch.stack([cache.rows[key] for key in keys])
        if own:
            result.embeddings[run] = own
        else:
            result.notes.append(f"{run}: no embeddings of the data in {data} are kept in {folder}")
    return result


def _rebuilt_first(name: str) -> tuple[bool, bool]:
    """Puts data sets first that are in distribution, and of those the ones that feed the EOS-bridge."""
    entry = find_dataset(name)
    return (entry.ood, entry.eos_bridge == "off") if entry else (False, False)


def _finds_pictures(dataset: EvalDataset) -> bool:
    return dataset.inputs[dataset.candidates[0][0]].image is not None


def _pairs(dataset: EvalDataset) -> list[Pair]:
    """The first queries of a data set with their right candidates."""
    sides = dataset.inputs
    rows = zip(dataset.queries[:LOOKED_AT].tolist(), dataset.candidates[:LOOKED_AT], strict=True)
    return [Pair(sides[query], sides[ids[0]], (), dataset.name, row) for row, (query, ids) in enumerate(rows)]


def _in_turn(lists: Sequence[Sequence[T]]) -> list[T]:
    """The first of each list, then the second of each, and so on."""
    return [item for row in zip_longest(*lists, fillvalue=None) for item in row if item is not None]


def _patches(side: Side, images: ImageBudget) -> int:
    """Merged tokens of a side's picture; 0 without one."""
    return 0 if side.image is None else image_tokens(image_size(side.image), images)
