"""What every stage's training promises: order by seed alone, exact restarts, a global batch."""

import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from sentence_transformers.base.modules.transformer import Transformer
from toy import arguments, content_rows, dialogues, prepared, toy_pairs, with_adapters
from transformers import Trainer, TrainerCallback, TrainingArguments

from cocoa.checkpoint import as_sentence_transformer
from cocoa.embedding import Embedder
from cocoa.errors import CocoaError
from cocoa.pairs import Side
from cocoa.stages import compression, contrastive, eos_bridge, joint_reconstruction
from cocoa.stages.arguments import StageArguments, _say_once
from cocoa.stages.checkpoints import last_checkpoint
from cocoa.stages.reconstruction import ReconstructionTrainer
from cocoa.stages.sampling import GlobalBatchSampler
from cocoa.stages.training import StageTrainer
from cocoa.stages.weights import load_weights, trainable

STAGES = ["joint_reconstruction", "eos_bridge", "compression", "contrastive", "matching"]
"""`matching` is the contrastive stage on compression tokens."""
QUICK = ("eos_bridge", "contrastive")
"""Stages whose longer tests run without the slow ones."""


def make_trainer(stage, backbone, folder, rows=20, **options):
    prepared(backbone, stage)
    if stage == "compression":
        args = arguments(compression.CompressionArguments, folder, compression_tokens=4, **options)
        return compression.CompressionTrainer(backbone, args, dialogues(rows))
    if stage == "joint_reconstruction":
        args = arguments(joint_reconstruction.JointReconstructionArguments, folder, **options)
        return joint_reconstruction.JointReconstructionTrainer(backbone, args, content_rows(rows, False))
    if stage == "eos_bridge":
        args = arguments(eos_bridge.EosBridgeArguments, folder, **options)
        return eos_bridge.EosBridgeTrainer(backbone, args, content_rows(rows, True))
    pairs = toy_pairs(rows)
    if stage.startswith("mostly texts"):  # so that a process may have no image in a batch
        pairs = [replace(pair, query=Side(text=f"{i}")) if i % 7 else pair for i, pair in enumerate(pairs)]
    known = {"tokens_per_pass": 100, "passes_kept": 100 if stage.endswith("kept") else 1}
    if stage == "matching":
        known |= {"attention": "causal", "pooling": "compression", "compression_tokens": 4}
    args = arguments(contrastive.ContrastiveArguments, folder, **known | options)
    return contrastive.ContrastiveTrainer(backbone, args, pairs)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainable(trainer.model)}


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ------------------------------------------------------------------------------------------- order of rows


def steps_of(sampler, pieces):
    batches = list(sampler)
    return [sorted(row for batch in batches[i : i + pieces] for row in batch) for i in range(0, len(batches), pieces)]


@pytest.mark.parametrize("sub_batch_size", [1, 4])
def test_global_batch_does_not_depend_on_the_pieces(sub_batch_size):
    datasets = ["a"] * 30 + ["b"] * 20 + ["c"] * 7
    whole = GlobalBatchSampler(datasets, 16, 16, seed=1, sub_batch_size=sub_batch_size)
    pieces = GlobalBatchSampler(datasets, 16, 2, seed=1, sub_batch_size=sub_batch_size)
    for epoch in (0, 1):
        whole.epoch = pieces.epoch = epoch
        assert steps_of(whole, 1) == steps_of(pieces, 8)
    assert len(whole) == whole.steps_per_epoch and len(pieces) == 8 * whole.steps_per_epoch


def test_order_changes_with_epoch_and_seed_and_repeats_no_row():
    sampler = GlobalBatchSampler(["a"] * 50, 8, 8, seed=1)
    first, second = sampler.order(0), sampler.order(1)
    assert first != second and first == sampler.order(0)
    assert first != GlobalBatchSampler(["a"] * 50, 8, 8, seed=2).order(0)
    assert len(first) == len(set(first)) == 48


def test_sub_batches_are_homogeneous():
    datasets = ["a"] * 30 + ["b"] * 50
    sampler = GlobalBatchSampler(datasets, 16, 16, seed=1, sub_batch_size=8)
    runs = [batch[i : i + 8] for batch in sampler for i in (0, 8)]
    kinds = [{datasets[row] for row in run} for run in runs]
    assert all(len(kind) == 1 for kind in kinds)
    assert {"a", "b"} == set().union(*kinds)


def test_uniform_sampling_draws_small_data_sets_as_often_as_large_ones():
    """The small one's rows come again in a new order; each run is of one data set, whatever the pieces."""
    datasets = ["large"] * 4000 + ["small"] * 20 + ["tiny"] * 3
    options = {"seed": 1, "sub_batch_size": 4, "dataset_sampling": "uniform"}
    sampler = GlobalBatchSampler(datasets, 16, 16, **options)
    order = sampler.order(0)
    assert len(order) == len(GlobalBatchSampler(datasets, 16, 16, seed=1, sub_batch_size=4).order(0))
    runs = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(len(set(run)) == 4 and len({datasets[row] for row in run}) == 1 for run in runs)
    drawn = Counter(datasets[row] for row in order)
    assert drawn.keys() == {"large", "small"}  # three rows fill no run of four
    assert drawn["small"] == pytest.approx(len(order) / 2, rel=0.1)
    small = [row for row in order if datasets[row] == "small"]
    assert sorted(small[:20]) == sorted(small[20:40]) == list(range(4000, 4020)) and small[:20] != small[20:40]
    pieces = GlobalBatchSampler(datasets, 16, 2, **options)
    assert steps_of(sampler, 1) == steps_of(pieces, 8) and order != sampler.order(1)


def test_uniform_sampling_repeats_a_row_in_a_batch_only_where_it_must():
    """Sets of 100 and 60 rows, batches of 32: each is shuffled anew in the middle of a batch now and then."""
    sampler = GlobalBatchSampler(
        ["a"] * 100 + ["b"] * 60 + ["c"] * 3000, 32, 32, seed=3, sub_batch_size=4, dataset_sampling="uniform"
    )
    batches = list(sampler)
    assert len(batches) > 90 and all(len(set(batch)) == len(batch) for batch in batches)


def test_a_data_set_too_small_for_a_run_is_named(caplog):
    GlobalBatchSampler(["a"] * 40 + ["b"] * 3, 8, 8, seed=1, sub_batch_size=4)
    assert "data set b: 3 rows fill no run of 4; none is used" in caplog.text


def test_keys_carry_the_epoch():
    sampler = GlobalBatchSampler(["a"] * 8, 4, 4, seed=1, with_epoch=True)
    sampler.epoch = 5
    assert {epoch for batch in sampler for epoch, _ in batch} == {5}


def test_mistakes_in_batch_sizes():
    with pytest.raises(CocoaError, match="batch_size 16 is more than the 8 rows"):
        GlobalBatchSampler(["a"] * 8, 16, 16, seed=1)
    with pytest.raises(CocoaError, match="batch_size 16 does not divide by sub_batch_size 5"):
        arguments(contrastive.ContrastiveArguments, "unused", batch_size=16, sub_batch_size=5)
    with pytest.raises(CocoaError, match="batch_size 10 does not divide by 1 devices x 4 accumulation steps"):
        arguments(StageArguments, "unused", batch_size=10, gradient_accumulation_steps=4)


def test_of_several_gpus_a_process_uses_one_and_says_so(monkeypatch, caplog):
    def found(self):
        self._n_gpu, self.distributed_state = 4, None
        return torch.device("cpu")

    _say_once.cache_clear()
    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(found))
    assert arguments(StageArguments, "unused").n_gpu == 1
    assert "training on one of 4 GPUs; for all of them start with `accelerate launch`" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[:-1])
def test_worker_count_changes_nothing(tiny_backbone, tmp_path, stage):
    results = []
    for workers in (0, 2):
        trainer = make_trainer(
            stage, tiny_backbone(), tmp_path / str(workers), dataloader_num_workers=workers, max_steps=3
        )
        trainer.train_or_resume()
        results.append(weights(trainer))
    assert distance(*results) == 0


# ------------------------------------------------------------------------------------------- global batch


@pytest.mark.parametrize(
    "stage",
    ["eos_bridge", *(pytest.param(each, marks=pytest.mark.slow) for each in ("joint_reconstruction", "compression"))],
)
def test_eight_by_one_equals_one_by_eight(tiny_backbone, tmp_path, stage):
    results = []
    for accumulation in (1, 8):
        trainer = make_trainer(
            stage, tiny_backbone(), tmp_path / str(accumulation), gradient_accumulation_steps=accumulation, max_steps=2
        )
        losses = []
        trainer.train_or_resume()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((weights(trainer), losses))
    assert distance(results[0][0], results[1][0]) < 2e-5
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "dora"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_changes_nothing(tiny_backbone, tmp_path, stage, tuning):
    results = []
    for checkpointing in (False, True):
        backbone = prepared(tiny_backbone(), stage)
        if tuning == "dora":
            torch.manual_seed(0)
            with_adapters(backbone)
        folder = tmp_path / str(checkpointing)
        trainer = make_trainer(stage, backbone, folder, gradient_checkpointing=checkpointing, max_steps=2)
        trainer.train_or_resume()
        assert backbone.model.model.language_model.layers[0].gradient_checkpointing == checkpointing
        results.append(weights(trainer))
    assert distance(*results) < 1e-6


def test_accumulation_is_refused_where_it_costs_negatives(tmp_path):
    with pytest.raises(CocoaError, match="gradient_accumulation_steps would shrink the pool of negatives"):
        arguments(contrastive.ContrastiveArguments, tmp_path, gradient_accumulation_steps=2)


def test_logged_terms_are_means_over_the_global_batch(tiny_backbone, tmp_path):
    trainer = make_trainer(
        "joint_reconstruction", tiny_backbone(), tmp_path, max_steps=1, gradient_accumulation_steps=4
    )
    trainer.train_or_resume()
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(logs["token_loss"] + 0.5 * logs["patch_loss"], abs=1e-3)


# ----------------------------------------------------------------------------------------------- restarts


class Killed(Exception):
    """Stands for the process dying."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("tuning", [pytest.param("full", marks=pytest.mark.slow), "dora"])
@pytest.mark.parametrize(
    "stage", [stage if stage in QUICK else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
)
def test_killed_and_resumed_equals_uninterrupted(tiny_backbone, tmp_path, stage, tuning):
    """Bit for bit, over an epoch's end, with dropout and (where allowed) accumulation."""
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    if stage not in ("contrastive", "matching"):
        options["gradient_accumulation_steps"] = 2

    def trainer(folder):
        torch.manual_seed(0)
        backbone = prepared(tiny_backbone(), stage)
        if tuning == "dora":
            with_adapters(backbone)
        return make_trainer(stage, backbone, tmp_path / folder, **options)

    whole = trainer("whole")
    start = weights(whole)
    whole.train_or_resume()

    killed = trainer("killed")
    killed.add_callback(KillAt(3))
    with pytest.raises(Killed):
        killed.train_or_resume()
    torch.manual_seed(123)
    resumed = trainer("killed")
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-2"
    resumed.train_or_resume()
    assert resumed.state.global_step == 5
    assert distance(weights(resumed), weights(whole)) == 0
    assert distance(weights(whole), start) > 0


def test_a_half_written_checkpoint_is_not_resumed(tiny_backbone, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer("eos_bridge", tiny_backbone(), tmp_path, **options).train_or_resume()
    (tmp_path / "checkpoint-4" / "complete").unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) is None


def test_a_checkpoint_of_another_model_is_an_error(tiny_backbone, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer("eos_bridge", tiny_backbone(), tmp_path, **options).train_or_resume()
    backbone = tiny_backbone()
    with_adapters(backbone)
    with pytest.raises(CocoaError, match="is not in both the file and this run's model"):
        make_trainer("eos_bridge", backbone, tmp_path, **options).train_or_resume()


def test_weights_of_another_shape_are_an_error_and_leave_the_model_as_it_was():
    model = torch.nn.Linear(4, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CocoaError, match=r"parameter weight: \[1, 4\] in the file, \[8, 4\] in this run's model"):
        load_weights(model, {"weight": torch.zeros(1, 4), "bias": torch.zeros(8)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_trainer_checkpoints_hold_no_pickled_arguments(tiny_backbone, tmp_path):
    make_trainer(
        "eos_bridge", tiny_backbone(), tmp_path, max_steps=2, save_strategy="steps", save_steps=2
    ).train_or_resume()
    assert not list(tmp_path.glob("**/training_args.bin"))


# ------------------------------------------------------------------------------------- what is wired to what


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_patch_loss_weight_is_used(tiny_backbone, tmp_path):
    trainer = make_trainer("joint_reconstruction", tiny_backbone(), tmp_path, max_steps=1, patch_loss_weight=3.0)
    trainer.train_or_resume()
    expected = logged(trainer, "token_loss")[0] + 3 * logged(trainer, "patch_loss")[0]
    assert logged(trainer, "loss")[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("temperature", "masked"), [(0.5, True), (0.5, False), (0.05, True)])
def test_temperature_and_equal_targets_are_used(tiny_backbone, tmp_path, temperature, masked):
    """Four rows of two targets: the loss by hand from the embeddings before the step."""
    pairs = [replace(pair, target=toy_pairs(2)[i % 2].target) for i, pair in enumerate(toy_pairs(4))]
    options = {"temperature": temperature, "mask_equal_targets": masked, "batch_size": 4, "max_steps": 1}
    args = arguments(contrastive.ContrastiveArguments, tmp_path, **options)
    trainer = contrastive.ContrastiveTrainer(tiny_backbone(), args, pairs)
    backbone = tiny_backbone()
    model = as_sentence_transformer(backbone)
    queries, targets = (
        Embedder(model, backbone.images).embed([getattr(pair, side) for pair in pairs]) for side in ("query", "target")
    )
    logits = queries @ targets.T / temperature
    if masked:
        ids = torch.tensor([pair.target.content_id() for pair in pairs])
        logits[(ids[:, None] == ids) & ~torch.eye(4, dtype=torch.bool)] = -torch.inf
    trainer.train_or_resume()
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4)).item()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, abs=1e-3)


def test_contrastive_rows_obey_max_length(tiny_backbone, tmp_path):
    backbone = tiny_backbone()
    pair = replace(toy_pairs(1)[0], target=Side("Find it.", "coffee " * 200))
    args = arguments(contrastive.ContrastiveArguments, tmp_path, max_length=30)
    ids = contrastive.PairDataset([pair], backbone, args)[0]["target"]["input_ids"]
    assert len(ids) <= 30 and ids[-1] == backbone.eos_token_id


def test_the_patch_decoder_is_plain_where_adapters_are_in_place(tiny_backbone, tmp_path):
    backbone = tiny_backbone()
    middle = backbone.model.model.language_model.layers[1].self_attn.q_proj.weight.detach().clone()
    with_adapters(backbone)
    decoder = make_trainer("joint_reconstruction", backbone, tmp_path).model.patch_decoder
    assert not [name for name, _ in decoder.named_modules() if "lora" in name]
    assert torch.equal(decoder.layer.self_attn.q_proj.weight, middle)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in decoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_training_takes_no_step_when_started_again(tiny_backbone, tmp_path, stage):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    first = make_trainer(stage, tiny_backbone(), tmp_path, **options)
    first.train_or_resume()
    again = make_trainer(stage, tiny_backbone(), tmp_path, **options)
    again.train_or_resume()
    assert again.state.global_step == 2
    assert distance(weights(first), weights(again)) == 0


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (eos_bridge.EosBridgeArguments, {"text_mask_ratio": 0.0}, "text_mask_ratio: 0.0 must be above 0 and at most 1"),
        (joint_reconstruction.JointReconstructionArguments, {"patch_mask_ratio": 1.5}, "patch_mask_ratio: 1.5"),
        (
            eos_bridge.EosBridgeArguments,
            {"eval_strategy": "steps"},
            "eval_strategy, eval_on_start: only the contrastive",
        ),
        (contrastive.ContrastiveArguments, {"temperature": 0.0}, "temperature: 0.0 must be above 0"),
        (contrastive.ContrastiveArguments, {"tokens_per_pass": 0}, "tokens_per_pass: 0"),
        (contrastive.ContrastiveArguments, {"sub_batch_size": 0}, "sub_batch_size: 0"),
        (contrastive.ContrastiveArguments, {"pooling": "max"}, "pooling 'max': choose one of lasttoken, mean, compr"),
        (
            contrastive.ContrastiveArguments,
            {"attention": "both"},
            "attention 'both': choose one of bidirectional, causal",
        ),
        (contrastive.ContrastiveArguments, {"dataset_sampling": "even"}, "dataset_sampling 'even': choose one of prop"),
        (
            joint_reconstruction.JointReconstructionArguments,
            {"text_objective": "ntp"},
            "text_objective 'ntp': choose mntp",
        ),
        (eos_bridge.EosBridgeArguments, {"layout": "loose"}, "layout 'loose': choose one of published, strict"),
        (eos_bridge.EosBridgeArguments, {"on_nonfinite": "ignore"}, "on_nonfinite 'ignore': choose error or skip"),
        (eos_bridge.EosBridgeArguments, {"max_bad_share": 2.0}, "max_bad_share: 2.0 must be above 0 and at most 1"),
        (eos_bridge.EosBridgeArguments, {"eval_on_start": True}, "eval_strategy, eval_on_start: only the contrastive"),
        (eos_bridge.EosBridgeArguments, {"save_only_model": True}, "save_only_model: a restart would not be exact"),
        (contrastive.ContrastiveArguments, {"label_smoothing_factor": 0.1}, "label_smoothing_factor: the losses are"),
        (contrastive.ContrastiveArguments, {"use_liger_kernel": True}, "use_liger_kernel: its patches do not reach"),
        (contrastive.ContrastiveArguments, {"dataloader_drop_last": False}, "dataloader_drop_last: a batch is always"),
        (contrastive.ContrastiveArguments, {"data_seed": 3}, "data_seed: seed decides"),
        (
            eos_bridge.EosBridgeArguments,
            {"load_best_model_at_end": True},
            "a stage ends with its last weights",
        ),
        (eos_bridge.EosBridgeArguments, {"fsdp": True}, "fsdp: a run is split as a whole, not stage by stage"),
    ],
)
def test_values_out_of_range_are_mistakes(tmp_path, cls, options, message):
    with pytest.raises(CocoaError, match=message):
        arguments(cls, tmp_path, **options)


@pytest.mark.parametrize(
    ("parent", "child", "names"),
    [
        (Trainer, StageTrainer, ["get_train_dataloader", "get_batch_samples", "training_step", "log"]),
        (
            Trainer,
            StageTrainer,
            ["save_model", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_save_checkpoint"],
        ),
        (Trainer, ReconstructionTrainer, ["_get_num_items_in_batch", "compute_loss", "log"]),
        (Trainer, contrastive.ContrastiveTrainer, ["compute_loss", "evaluate"]),
        (Transformer, Transformer, ["_load_model"]),
    ],
)
def test_what_we_override_is_there_to_be_overridden(parent, child, names):
    """A hook that a library renames would silently stop being called."""
    assert all(callable(getattr(parent, name, None)) and callable(getattr(child, name)) for name in names)
