"""`cocoa report`: what finished runs left in their folders, put on one page; what is missing is named with its remedy.

A run is the `output_dir` of `cocoa train`, with its scores in `scores` there, or an output folder of `cocoa evaluate`.
An evaluation of a run's last checkpoint that is named beside the run is that run's, before any in its folder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from cocoa.architectures import locate
from cocoa.checkpoint import RECORD_NAME, read_record, training_part
from cocoa.compare import FINAL, SCORES, Run, named_apart, read_run, read_summary
from cocoa.eos_attention import eos_attention
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.rebuild import rebuild_images, rebuild_texts, swapped
from cocoa.report import Missing, Report
from cocoa.report_curves import numbered
from cocoa.report_data import ReportData, read_report_data
from cocoa.report_scores import score_table
from cocoa.scores import SUMMARY_NAME
from cocoa.stages import eos_bridge, joint_reconstruction

logger = logging.getLogger(__name__)

PICTURES, TEXTS = 6, 12
"""Pictures and texts that are rebuilt."""
LOOKED_AT = (3, 3)
"""Pictures and texts on which EOS' attention is shown."""
QUERIES, MISTAKES = 2, 4
"""Queries of a data set in a gallery; wrong ones of a meta-task."""
MOST_BYTES = 3e9
"""Weights of a checkpoint that is loaded on a CPU without being asked for."""


@dataclass(frozen=True)
class Source:
    """A run with where its files are.

    Attributes:
        run: its name and scores.
        stages: the checkpoints of its stages, in order; empty for an evaluation alone.
        evaluation: where its scores are; None without.
        summary: of its evaluation; empty without.
    """

    run: Run
    stages: list[Path]
    evaluation: Path | None
    summary: dict[str, Any]


def report_of(
    folders: Sequence[Path],
    data: Path | None = None,
    image_root: Path | None = None,
    most: int = 3,
    checkpoints: bool | None = None,
    rivals: tuple[str, str] | None = None,
) -> Report:
    """Collect what runs have to show.

    Scores, their intervals, and curves come from the runs' files. Galleries and mistakes need the evaluation data and
    the embeddings that `cocoa evaluate` has kept. What was rebuilt, and where EOS looks, is computed from the
    checkpoints of the last run that has them.

    Args:
        folders: of the runs.
        data: the evaluation data; by default where the evaluations say it was.
        image_root: what its image paths are relative to; by default what the evaluations say.
        most: data sets of a meta-task that are looked into.
        checkpoints: whether to load checkpoints; by default on a GPU, or where each has less than `MOST_BYTES`.
        rivals: names of the two runs whose difference is shown; by default the first and the last with scores.

    Raises:
        CocoaError: a folder is no run, files do not fit each other, or `data` cannot be read.
    """
    sources = read_sources(folders)
    table = score_table([source.run for source in sources], rivals)
    report = Report(
        title=f"Report of {', '.join(source.run.name for source in sources)}",
        scores=table,
        seconds=_seconds(sources),
        runs={source.run.name: source.stages for source in sources if source.stages},
        notes=table.notes if table else (),
    )
    missing = _not_scored(sources)
    found = _data(sources, data, image_root, most, missing)
    if found is None:
        return replace(report, missing=missing)
    missing += [Missing("what is found", note, "evaluate again, into the same folder") for note in found.notes]
    report = replace(report, galleries=found.galleries(QUERIES))
    scored = [source.run.name for source in sources if source.run.name in found.embeddings]
    if scored:
        report = replace(report, mistakes=found.mistakes(scored[-1], MISTAKES), mistakes_of=scored[-1])
    if _may_load(sources, checkpoints, missing):
        report = _rebuilt(_attended(report, sources, found, missing), sources, found, missing)
    return replace(report, missing=missing)


def read_sources(folders: Sequence[Path]) -> list[Source]:
    """The runs, named apart, evaluations joined with the training run whose checkpoint they are of.

    Raises:
        CocoaError: a folder is no run.
    """
    sources = [_read_source(folder) for folder in folders]
    joined: list[Source] = []
    taken: list[Source] = []
    for source in sources:
        made = training_part(read_record(source.stages[-1])) if source.stages else None
        others = [one for one in sources if made and not one.stages and one.summary.get("recipe") == made]
        for other in others[-1:]:
            own = replace(source.run, hits=other.run.hits, hashes=other.run.hashes, ranks=other.run.ranks)
            source = replace(source, run=own, evaluation=other.evaluation, summary=other.summary)
        taken += others[-1:]
        joined.append(source)
    there = [source for source in joined if not any(source is other for other in taken)]
    named = named_apart([source.run for source in there])
    return [replace(source, run=run) for source, run in zip(there, named, strict=True)]


def _read_source(folder: Path) -> Source:
    run = read_run(folder)
    if (folder / SUMMARY_NAME).is_file():
        return Source(run, [], folder, read_summary(folder / SUMMARY_NAME))
    evaluation = folder / SCORES if run.hits else None
    summary = read_summary(evaluation / SUMMARY_NAME) if evaluation else {}
    return Source(replace(run, name=folder.resolve().name), stage_checkpoints(folder), evaluation, summary)


def stage_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training run's stages, in order, as `cocoa.pipeline.stage_folder` names them."""
    numbered = [path for path in folder.glob("[0-9]*-*") if (path / RECORD_NAME).is_file()]
    return [*sorted(numbered, key=lambda path: int(path.name.partition("-")[0])), folder / FINAL]


def _seconds(sources: Sequence[Source]) -> dict[str, float]:
    """What each stage of the training runs took, where it is known."""
    found: dict[str, float] = {}
    for source in sources:
        for stage in source.run.stages if source.stages else ():
            if stage["seconds"] is not None:
                found[numbered(f"{source.run.name}: {stage['stage']}", found)] = stage["seconds"]
    return found


def _not_scored(sources: Sequence[Source]) -> list[Missing]:
    return [
        Missing(
            "scores",
            f"{source.run.name} was not scored",
            f"cocoa evaluate {quote(str(source.stages[-1]))} --data MMEB_EVAL "
            f"--output {quote(str(source.run.folder / SCORES))}",
        )
        for source in sources
        if source.evaluation is None
    ]


def _data(
    sources: Sequence[Source], data: Path | None, image_root: Path | None, most: int, missing: list[Missing]
) -> ReportData | None:
    """The evaluation data as the last evaluation read it; None where it is not there, which is put under `missing`."""
    evaluations = {s.run.name: (s.evaluation, s.summary) for s in sources if s.evaluation is not None}
    summary = list(evaluations.values())[-1][1] if evaluations else {}
    place = data or Path(summary.get("data", ""))
    if data is None and ("data" not in summary or not place.exists()):
        why = (
            f"the evaluation data is not in {place} (any more)" if "data" in summary else "there is no evaluation data"
        )
        what = "what is found, mistakes, rebuilt pictures and captions, where EOS looks"
        missing.append(Missing(what, why, "cocoa report ... --data MMEB_EVAL"))
        return None
    root = image_root or (Path(summary["image_root"]) if summary.get("image_root") else None)
    logger.info("reading %s", place)
    style = summary.get("prompt_style", "cocoa")
    return read_report_data(place, root, summary.get("split", "test"), style, most, evaluations)


def _may_load(sources: Sequence[Source], asked: bool | None, missing: list[Missing]) -> bool:
    """Whether checkpoints are loaded; where not though there are some, that is put under `missing`."""
    folders = [folder for source in sources for folder in source.stages]
    most = max((sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders), default=0)
    load = asked if asked is not None else torch.cuda.is_available() or most <= MOST_BYTES
    if not load and folders:
        why = "no checkpoint was to be loaded" if asked is False else "the checkpoints are large, and there is no GPU"
        what = "rebuilt pictures and captions, where EOS looks"
        missing.append(Missing(what, why, "cocoa report ... --checkpoints"))
    return load and bool(folders)


def _rebuilt(report: Report, sources: Sequence[Source], data: ReportData, missing: list[Missing]) -> Report:
    """The report with what the reconstruction stages of the last run that has them make of the data's first rows."""
    failed: dict[str, str] = {}
    for run, folder in _last(sources, joint_reconstruction.NAME, joint_reconstruction.DECODER_NAME):
        logger.info("rebuilding pictures with %s", folder)
        try:
            images = rebuild_images(folder, data.rows(joint_reconstruction.NAME, PICTURES))
            report = replace(report, images=images, images_of=run)
        except CocoaError as error:
            failed[joint_reconstruction.NAME] = str(error)
    for run, folder in _last(sources, eos_bridge.NAME, RECORD_NAME):
        layout = read_record(folder).get("options", {}).get("layout", "published")
        if layout == "full":
            failed[eos_bridge.NAME] = (
                f"stage 2 of {run} cut nothing (layout: full), so that its texts see their pictures"
            )
            continue
        logger.info("rebuilding captions with %s", folder)
        rows = data.rows(eos_bridge.NAME, TEXTS)
        try:
            rebuilt = rebuild_texts(folder, [*rows, *swapped(rows)], layout)
            report = replace(report, texts=rebuilt[: len(rows)], texts_elsewhere=rebuilt[len(rows) :], texts_of=run)
        except CocoaError as error:
            failed[eos_bridge.NAME] = str(error)
    for what, there, stage, file in (
        ("rebuilt pictures", report.images, joint_reconstruction.NAME, joint_reconstruction.DECODER_NAME),
        ("rebuilt captions", report.texts, eos_bridge.NAME, RECORD_NAME),
    ):
        if there:
            continue
        if _last(sources, stage, file):
            why, remedy = "the data has nothing to rebuild", "cocoa report ... of another run, or --data OTHER_DATA"
        else:
            why, remedy = f"no run has a checkpoint of the stage {stage}", f"cocoa train a recipe with {stage}"
        missing.append(Missing(what, failed.get(stage, why), remedy))
    return report


def _last(sources: Sequence[Source], stage: str, file: str) -> list[tuple[str, Path]]:
    """The last run with a checkpoint of that stage which holds a file, and that checkpoint; empty without."""
    found = [
        (source.run.name, folder)
        for source in sources
        for folder in source.stages
        if read_record(folder)["stage"] == stage and (folder / file).is_file()
    ]
    return found[-1:]


def _attended(report: Report, sources: Sequence[Source], data: ReportData, missing: list[Missing]) -> Report:
    """The report with EOS' attention in the backbone of the last training run, and in all checkpoints."""
    trained = [source for source in sources if source.stages]
    image = read_record(trained[-1].stages[-1])["image"]
    images = ImageBudget(tuple(image["tokens"]), image["resize"])
    name = read_record(trained[-1].stages[0])["source"]
    before = local_folder(name)
    models = {"before training": before} if before else {}
    for source in trained:
        for number, folder in enumerate(source.stages, 1):
            models[f"{source.run.name} {number}: {read_record(folder)['stage']}"] = folder
    if before is None:
        what = "where EOS looks before training"
        remedy = f"hf download {quote(name)}, or put its folder back"
        missing.append(Missing(what, f"the backbone {name} is not on this machine", remedy))
    logger.info("looking where EOS looks in %d models", len(models))
    try:
        return replace(report, attention=eos_attention(models, data.sides(images, *LOOKED_AT), images))
    except CocoaError as error:
        missing.append(Missing("where EOS looks", str(error), "cocoa report ... without that run"))
        return report


def local_folder(name: str) -> Path | None:
    """The folder of a backbone by folder, embedded name or hub id; None where it is not on this machine."""
    if (path := Path(locate(name))).is_dir():
        return path
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a folder that is gone
        return None
    if not isinstance(cached, str) or not any(Path(cached).parent.glob("*.safetensors")):  # or its weights are not
        return None
    return Path(cached).parent
