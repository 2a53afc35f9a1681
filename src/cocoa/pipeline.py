"""Running a recipe's stages in order, each from the checkpoint before it; stopped anywhere, it goes on from there.

`output_dir` holds one folder a stage (`1-joint_reconstruction`, ..., the last one `final`), each a
checkpoint that appears only once it is whole, `trainer/`, the running stage's own files, and what
`cocoa.run_folder` writes.
"""

from __future__ import annotations

import gc
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cocoa.adapters import Lora
from cocoa.backbone import Backbone, Form, load_backbone
from cocoa.checkpoint import recorded_form
from cocoa.errors import CocoaError
from cocoa.inputs import room
from cocoa.output_folder import claim, is_done, owned
from cocoa.processes import WAIT_FOR_OTHERS, this_process
from cocoa.recipe import Recipe, Stage
from cocoa.run_folder import LOGS, METRICS_NAME, explain
from cocoa.sources import list_sources
from cocoa.stage_data import StageData, stage_data
from cocoa.stages.arguments import StageArguments
from cocoa.stages.compression import CompressionArguments, CompressionTrainer
from cocoa.stages.contrastive import ContrastiveArguments, ContrastiveTrainer
from cocoa.stages.eos_bridge import EosBridgeArguments, EosBridgeTrainer
from cocoa.stages.joint_reconstruction import JointReconstructionArguments, JointReconstructionTrainer
from cocoa.stages.metrics_file import MetricsFile
from cocoa.stages.saving import put_together
from cocoa.stages.training import StageTrainer
from cocoa.stages.weights import is_split
from cocoa.trackers import check_trackers, names, tracking

logger = logging.getLogger(__name__)


def train(recipe: Recipe, accept_changes: bool = False) -> Path:
    """Run every stage of a recipe that is not done yet.

    Args:
        recipe: what to run.
        accept_changes: go on in a folder of a recipe with other settings: what is done stays, what was stopped goes
            on under the new ones.

    Returns:
        The folder of the last stage's checkpoint, `<output_dir>/final`.

    Raises:
        CocoaError: a mistake in recipe, data or backbone; another run in the folder, or another recipe's.

    Example:
        >>> import cocoa, json, pathlib
        >>> rows = [{"query": {"text": f"{n} stars"}, "target": {"text": f"stars: {n}"}} for n in range(4)]
        >>> _ = pathlib.Path("pairs.json").write_text(json.dumps(rows))
        >>> text = "{backbone: mini-qwen2-vl, output_dir: run, data: {train: pairs.json, validation_rows: 0}, "
        >>> text += "stages: [contrastive: {batch_size: 4, max_steps: 1}]}"
        >>> _ = pathlib.Path("recipe.yaml").write_text(text)
        >>> cocoa.train(cocoa.load_recipe("recipe.yaml")).as_posix()
        'run/final'
    """
    state = this_process(max(stage.options.get("ddp_timeout") or WAIT_FOR_OTHERS for stage in recipe.stages))
    with owned(recipe.output_dir, state.is_main_process):
        folders = enumerate(stage_folders(recipe), 1)
        done = [is_done(folder, recipe.settings(stages), accept_changes) for stages, folder in folders]
        forms = stage_forms(recipe)  # a mistake in a later stage is found before the first one
        for index, stage in enumerate(recipe.stages):
            with of_stage(stage):
                check_trackers(stage_arguments(recipe, index))
            if not done[index]:
                list_sources(stage.data)
        if not all(done) and state.is_main_process:
            claim_stage(recipe, done.index(False), accept_changes)
            explain(recipe, stage_folders(recipe))
        if all(done) and state.is_main_process:  # killed before it had cleared up
            shutil.rmtree(recipe.output_dir / "trainer", ignore_errors=True)
        source = recipe.backbone
        for index, stage in enumerate(recipe.stages):
            folder = stage_folder(recipe, index)
            if not done[index]:
                run_stage(recipe, index, source, forms[index], accept_changes)
                gc.collect()  # trainers refer to themselves; the next stage needs the memory
            else:
                logger.info("stage %s is done: %s", stage.name, folder)
            source = str(folder)
    return Path(source)


def stage_folder(recipe: Recipe, index: int) -> Path:
    """Where the checkpoint of a stage is written."""
    last = index == len(recipe.stages) - 1
    return recipe.output_dir / ("final" if last else f"{index + 1}-{recipe.stages[index].name}")


def stage_folders(recipe: Recipe) -> list[Path]:
    """Where the checkpoints of all stages are written, in order."""
    return [stage_folder(recipe, index) for index in range(len(recipe.stages))]


def run_stage(recipe: Recipe, index: int, source: str, form: Form, accept_changes: bool = False) -> None:
    """Train one stage from the checkpoint `source`, read as `form` says, and write its own."""
    stage, state = recipe.stages[index], this_process()
    if state.is_main_process:
        claim_stage(recipe, index, accept_changes)
    args = stage_arguments(recipe, index)
    backbone = load_stage_backbone(recipe, stage, source, form)
    data = stage_data(stage, backbone, args)
    trainer = build_trainer(stage, backbone, data, args, recipe.lora)
    logger.info("stage %s: %d rows, training %s", stage.name, sum(data.datasets().values()), trainer.trained)
    for reason, count in sum(data.left_out.values(), Counter()).most_common():
        logger.info("stage %s: %d rows left out: %s", stage.name, count, reason)
    name, output = numbered(recipe, index), recipe.output_dir
    trainer.add_callback(MetricsFile(output / METRICS_NAME, name))
    with tracking(trainer, output / LOGS / name, output):
        trainer.train_or_resume()

    weights = trainer.trained_weights() if is_split(trainer.model) else None
    if weights is not None and state.is_main_process:
        put_together(trainer, load_stage_backbone(recipe, stage, source, form), recipe.lora, weights)
    record = {
        "source": source,
        "fingerprint": recipe.fingerprint(index + 1),
        "settings": recipe.settings(index + 1),
        "options": stage.options,
        "left_out": {dataset: dict(reasons) for dataset, reasons in data.left_out.items()},
    }
    trainer.save_checkpoint(stage_folder(recipe, index), stage.image.evaluation(), record)
    if state.is_main_process:
        shutil.rmtree(Path(args.output_dir).parent)
    state.wait_for_everyone()


def numbered(recipe: Recipe, index: int) -> str:
    """What a stage is called where stages of one name are to differ: `1-joint_reconstruction`."""
    return f"{index + 1}-{recipe.stages[index].name}"


def claim_stage(recipe: Recipe, index: int, accept_changes: bool) -> None:
    """Mark the folder of a stage's trainer as this run's; see `claim`."""
    claim(recipe.output_dir / "trainer" / numbered(recipe, index), recipe.settings(index + 1), accept_changes)


def stage_arguments(recipe: Recipe, index: int) -> StageArguments:
    """A stage's arguments as it trains with them: in its own folder, under its own name, quiet without a terminal."""
    stage, name = recipe.stages[index], numbered(recipe, index)
    noisy = sys.stderr.isatty() and this_process().is_local_main_process and not stage.options.get("disable_tqdm")
    named = names(stage.options, recipe.output_dir.name, name)
    return recipe.arguments(stage, recipe.output_dir / "trainer" / name, disable_tqdm=not noisy, **named)


@contextmanager
def of_stage(stage: Stage) -> Iterator[None]:
    """Within it the message of a mistake begins with the stage."""
    try:
        yield
    except CocoaError as error:
        raise CocoaError(f"stages.{stage.name}: {error}") from None


def stage_forms(recipe: Recipe) -> list[Form]:
    """How each stage reads its backbone: as it says, else as the stage before it left it.

    Raises:
        CocoaError: a mistake in a stage's arguments, another number of compression tokens than there are by then,
            more of them than the backbone has room for, or a last stage whose inputs have no room for an image as it is
            shown in evaluation.
    """
    forms: list[Form] = []
    known = recorded_form(recipe.backbone)
    there = known.compression_tokens if known else 0
    for stage in recipe.stages:
        args = recipe.arguments(stage, recipe.output_dir)
        with of_stage(stage):
            form = args.form(known)
            if form.compression_tokens and not there:
                load_backbone(recipe.backbone, weights=False, **form._asdict())  # is there room for them?
            if there and form.compression_tokens not in (0, there):
                raise CocoaError(f"compression_tokens: {form.compression_tokens}, but there are {there}; write {there}")
            shown = stage.image.evaluation()
            if stage is recipe.stages[-1] and room(shown, True, args.max_length, form.compression_tokens or 1) < 0:
                raise CocoaError(
                    f"max_length {args.max_length}: no room for an image of image.eval_tokens {shown.tokens[1]}, so "
                    "that the model could embed none; raise it, or lower those"
                )
        forms.append(form)
        known, there = form, form.compression_tokens or there
    return forms


def load_stage_backbone(recipe: Recipe, stage: Stage, source: str, form: Form, weights: bool = True) -> Backbone:
    """The backbone as the stage reads it, with its training budget.

    Raises:
        CocoaError: see `load_backbone`; the message names the stage.
    """
    with of_stage(stage):
        return load_backbone(source, stage.image.train(), recipe.load_dtype, weights=weights, **form._asdict())


def build_trainer(
    stage: Stage, backbone: Backbone, data: StageData, args: StageArguments, lora: Lora | None
) -> StageTrainer:
    """The stage's trainer over its data.

    Raises:
        CocoaError: arguments that do not fit the data; the message names the stage.
    """
    with of_stage(stage):
        if isinstance(args, JointReconstructionArguments):
            return JointReconstructionTrainer(backbone, args, data.rows, lora)
        if isinstance(args, EosBridgeArguments):
            return EosBridgeTrainer(backbone, args, data.rows, lora)
        if isinstance(args, CompressionArguments):
            return CompressionTrainer(backbone, args, data.rows, lora)
        assert isinstance(args, ContrastiveArguments)
        return ContrastiveTrainer(backbone, args, data.pairs, data.validation, lora)
