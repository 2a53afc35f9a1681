"""What goes wrong while a stage trains: numbers, rows, workers, the disk, and somebody who wants it to stop."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from test_training import distance, make_trainer, weights
from toy import arguments, prepared, toy_pairs
from transformers import TrainerCallback

from cocoa.checkpoint import read_record
from cocoa.errors import CocoaError
from cocoa.failures import explained
from cocoa.pairs import Side
from cocoa.stages import contrastive, watch
from cocoa.stages.checkpoints import complete_checkpoints, last_checkpoint
from cocoa.stages.loading import DEADLY, find_deadly, worker_options

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}


class At(TrainerCallback):
    """Does something at the beginning of a step, or of every step."""

    def __init__(self, step, action):
        self.step = step
        self.action = action

    def on_step_begin(self, args, state, control, **kwargs):
        if self.step in (state.global_step, None):
            self.action()


def interrupt():
    raise InterruptedError


# ------------------------------------------------------------------------------------------------ numbers


def spoil_loss(trainer, steps, what=float("nan")):
    """The losses of some steps become what is no number."""
    plain = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        loss = plain(*args, **kwargs)
        return loss * what if trainer.state.global_step in steps else loss

    trainer.compute_loss = compute_loss


def spoil_gradient(trainer, steps):
    """The gradients of some steps have an infinite element; their loss is as it was."""
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)

    def hook(gradient):
        if trainer.state.global_step in steps:
            gradient = gradient.clone()
            gradient.view(-1)[0] = float("inf")
        return gradient

    parameter.register_hook(hook)


SPOILERS = {"loss": spoil_loss, "gradient": spoil_gradient}


@pytest.mark.parametrize("what", SPOILERS)
@pytest.mark.parametrize("stage", ["joint_reconstruction", pytest.param("contrastive", marks=pytest.mark.slow)])
def test_a_bad_number_ends_the_run_and_names_the_rows(tiny_backbone, tmp_path, stage, what):
    trainer = make_trainer(stage, tiny_backbone(), tmp_path, **SAVING)
    SPOILERS[what](trainer, {2})
    with pytest.raises(CocoaError, match=f"step 3: the {what} is not finite; its rows are toy") as raised:
        trainer.train_or_resume()
    rows = json.loads((tmp_path / "bad-step-3.json").read_text())
    assert len(rows) == 8 and rows[0] in str(raised.value)
    epoch, place = divmod(2, trainer.sampler.steps_per_epoch)
    assert rows == [trainer.train_dataset.rows[i].row_id for i in trainer.sampler.order(epoch)[8 * place :][:8]]
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert all(parameter.isfinite().all() for parameter in weights(trainer).values())


@pytest.mark.slow
@pytest.mark.parametrize("what", SPOILERS)
def test_a_bad_step_is_left_out_on_demand(tiny_backbone, tmp_path, what, caplog):
    """The weights after it are those before it, and the count goes on after a restart."""
    options = SAVING | {"on_nonfinite": "skip", "warmup_steps": 0}
    trainer = make_trainer("eos_bridge", tiny_backbone(), tmp_path, **options)
    SPOILERS[what](trainer, {1})
    seen = []
    trainer.add_callback(At(None, lambda: seen.append(weights(trainer))))
    trainer.add_callback(At(3, interrupt))
    with pytest.raises(InterruptedError):
        trainer.train_or_resume()
    assert distance(seen[0], seen[1]) > 0 and distance(seen[1], seen[2]) == 0 and distance(seen[2], seen[3]) > 0
    assert f"step 2 is left out: the {what} is not finite" in caplog.text
    again = make_trainer("eos_bridge", tiny_backbone(), tmp_path, **options)
    again.train_or_resume()
    assert again.account["skipped_steps"] == 1
    json.dumps(again.state.log_history, allow_nan=False)


@pytest.mark.slow
def test_a_model_gone_bad_is_given_up(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "PATIENCE", 2)
    trainer = make_trainer("eos_bridge", tiny_backbone(), tmp_path, on_nonfinite="skip", **SAVING)
    spoil_loss(trainer, {1, 2})
    with pytest.raises(CocoaError, match="2 steps were left out one after the other; step 3"):
        trainer.train_or_resume()


# --------------------------------------------------------------------------------------------------- rows


@pytest.fixture
def torn_pairs(tmp_path):
    """Twenty pairs, of which the images of 3 and 4 cannot be read."""
    pairs = toy_pairs(20)
    for row in (3, 4):
        file = tmp_path / f"torn-{row}.png"
        file.write_bytes(b"\x89PNG torn")
        pairs[row] = replace(pairs[row], query=Side(image=str(file)))
    return pairs


def contrastive_trainer(backbone, pairs, folder, **options):
    known = {"batch_size": 4, "max_steps": 5, "tokens_per_pass": 100}
    args = arguments(contrastive.ContrastiveArguments, folder, **known | options)
    return contrastive.ContrastiveTrainer(backbone, args, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_cannot_be_read_is_an_error(tiny_backbone, torn_pairs, tmp_path, workers):
    trainer = contrastive_trainer(tiny_backbone(), torn_pairs, tmp_path, dataloader_num_workers=workers)
    with pytest.raises(CocoaError, match=r"row toy0/[34]: .*torn-[34].png: not a readable image"):
        trainer.train_or_resume()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_row_behind_takes_the_place_of_a_bad_one(tiny_backbone, torn_pairs, tmp_path, workers, caplog):
    options = {"on_bad_row": "skip", "max_bad_share": 0.1, "dataloader_num_workers": workers}
    trainer = contrastive_trainer(tiny_backbone(), torn_pairs, tmp_path / "torn", **options)
    trainer.train_or_resume()
    assert sorted(trainer.account["bad_rows"]) == ["toy0/3", "toy0/4"]
    assert caplog.text.count("left out, and the row behind it in its place: row toy0/3") == 1
    whole = list(torn_pairs)
    whole[3] = whole[4] = whole[5]
    plain = contrastive_trainer(tiny_backbone(), whole, tmp_path / "whole")
    plain.train_or_resume()
    assert distance(weights(trainer), weights(plain)) == 0


def test_bad_rows_are_in_the_way_of_no_checkpoint(tiny_backbone, torn_pairs, tmp_path):
    """Neither among the probes of a model that is saved, nor among held-out rows, nor where features are kept."""
    options = {"on_bad_row": "skip", "max_bad_share": 0.1, "max_steps": 5, "cache_inputs": True, "eval_steps": 1}
    args = arguments(contrastive.ContrastiveArguments, tmp_path / "run", batch_size=4, **options)
    backbone = tiny_backbone()
    backbone.model.model.visual.requires_grad_(False)
    trainer = contrastive.ContrastiveTrainer(backbone, args, torn_pairs, validation=torn_pairs[:8])
    assert len(trainer.eval_dataset) == 6
    trainer.train_or_resume()
    assert any("eval_validation_hit@1" in entry for entry in trainer.state.log_history)
    record = read_record(trainer.save_checkpoint(tmp_path / "model"))
    assert record["merge_cosine"] > 0.999 and sorted(record["bad_rows"]) == ["toy0/3", "toy0/4"]


def test_bad_rows_are_known_where_nothing_is_left_to_train(tiny_backbone, torn_pairs, tmp_path):
    options = {"on_bad_row": "skip", "max_bad_share": 0.1}
    contrastive_trainer(tiny_backbone(), torn_pairs, tmp_path, **options).train_or_resume()
    again = contrastive_trainer(tiny_backbone(), torn_pairs, tmp_path, **options)
    again.train_or_resume()
    assert sorted(again.bad_rows) == ["toy0/3", "toy0/4"]


def test_a_checkpoint_to_go_on_from_is_named(tiny_backbone, torn_pairs, tmp_path):
    trainer = contrastive_trainer(tiny_backbone(), torn_pairs, tmp_path)
    with pytest.raises(CocoaError, match="name the checkpoint's folder, or call train_or_resume"):
        trainer.train(resume_from_checkpoint=True)


def test_one_held_out_row_tells_nothing(tiny_backbone, tmp_path):
    """There is no other target that it could be mistaken for."""
    args = arguments(contrastive.ContrastiveArguments, tmp_path, batch_size=4, max_steps=1)
    trainer = contrastive.ContrastiveTrainer(tiny_backbone(), args, toy_pairs(8), validation=toy_pairs(1))
    trainer.train()
    assert trainer.evaluate() == {}
    assert not any("eval_validation_hit@1" in entry for entry in trainer.state.log_history)


def test_held_out_rows_that_cannot_be_read_are_an_error_by_default(tiny_backbone, torn_pairs, tmp_path):
    args = arguments(contrastive.ContrastiveArguments, tmp_path, batch_size=4, max_steps=1)
    trainer = contrastive.ContrastiveTrainer(tiny_backbone(), args, torn_pairs[5:], validation=torn_pairs[:8])
    with pytest.raises(CocoaError, match=r"torn-[34].png: not a readable image"):
        trainer.evaluate()


def test_too_many_bad_rows_are_an_error(tiny_backbone, torn_pairs, tmp_path):
    trainer = contrastive_trainer(tiny_backbone(), torn_pairs, tmp_path, on_bad_row="skip", max_bad_share=0.05)
    with pytest.raises(CocoaError, match=r"2 rows could not be used, more than max_bad_share 0.05 of 20 allows"):
        trainer.train_or_resume()


def make_deadly(trainer, rows, seconds=0):
    """Encoding these rows ends the process, after a while."""
    plain = type(trainer.train_dataset).__getitem__

    class Dataset(type(trainer.train_dataset)):
        def __getitem__(self, key):
            row = key[1] if isinstance(key, tuple) else key
            if row in rows:
                time.sleep(seconds)
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, key)

    trainer.train_dataset.__class__ = Dataset


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["eos_bridge", "contrastive"])
def test_a_row_that_kills_its_worker_is_left_out(tiny_backbone, tmp_path, stage, caplog):
    """And the weights are what they would have been, had the row been known to be bad."""
    results = []
    for name in ("deadly", "known"):
        options = {"on_bad_row": "skip", "max_bad_share": 0.1, "dataloader_num_workers": 1, "max_steps": 4}
        trainer = make_trainer(stage, tiny_backbone(), tmp_path / name, **options)
        if name == "deadly":
            make_deadly(trainer, {5, 11})
        else:
            trainer._deadly |= {5, 11}
        trainer.train_or_resume()
        results.append(weights(trainer))
        (bad,) = {frozenset(trainer.account["bad_rows"])}
        assert {row.rpartition("/")[2] for row in bad} == {"5", "11"}
        assert all(DEADLY in reason for reason in trainer.account["bad_rows"].values())
    assert distance(*results) == 0


@pytest.mark.slow
def test_a_worker_s_death_waits_until_its_batch_is_wanted(tiny_backbone, tmp_path):
    """It comes while a step is computed, which takes longer here than the batches that are made meanwhile."""
    options = {"on_bad_row": "skip", "max_bad_share": 0.1, "dataloader_num_workers": 1, "max_steps": 4}
    trainer = make_trainer("eos_bridge", tiny_backbone(), tmp_path, rows=40, **options)  # an epoch of five steps
    deadly = trainer.sampler.rows_at(2)[0]
    make_deadly(trainer, {deadly}, seconds=1)
    trainer.add_callback(At(0, lambda: time.sleep(3)))
    trainer.train_or_resume()
    assert [row.rpartition("/")[2] for row in trainer.account["bad_rows"]] == [str(deadly)]


@pytest.mark.slow
def test_a_row_that_kills_its_worker_is_an_error_by_default(tiny_backbone, tmp_path):
    trainer = make_trainer("eos_bridge", tiny_backbone(), tmp_path, dataloader_num_workers=1, max_steps=4)
    make_deadly(trainer, {5})
    with pytest.raises(CocoaError, match=f"row toy/5: {DEADLY}"):
        trainer.train_or_resume()


@pytest.mark.slow
def test_workers_that_end_for_no_row_end_the_run_in_the_end(tiny_backbone, tmp_path):
    trainer = make_trainer("eos_bridge", tiny_backbone(), tmp_path, dataloader_num_workers=1, max_steps=4)
    main = os.getpid()
    plain = trainer.data_collator

    def collate(samples):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(samples)

    trainer.data_collator = collate
    with pytest.raises(CocoaError, match="workers that load data end again and again"):
        trainer.train_or_resume()


def test_a_row_that_hangs_is_deadly_too(monkeypatch):
    class Slow:
        def __len__(self):
            return 2

        def __getitem__(self, key):
            if key == 1:
                signal.pause()
            return key

    monkeypatch.setattr("cocoa.stages.loading.PATIENCE", 1.0)
    assert find_deadly(Slow(), [0, 1]) == {1}


@pytest.mark.skipif(sys.platform != "linux", reason="forks are Linux'")
def test_workers_are_forked_whatever_python_does_by_default(tiny_backbone, tmp_path):
    """Python 3.14 would send each of them the model."""
    for workers, context in ((0, None), (2, "fork")):
        trainer = make_trainer("contrastive", tiny_backbone(), tmp_path, dataloader_num_workers=workers)
        assert worker_options(trainer.args)["multiprocessing_context"] == context
        assert len(list(trainer.get_train_dataloader())) == trainer.sampler.steps_per_epoch


@pytest.mark.slow
def test_no_row_is_blamed_for_a_process_that_takes_long_to_begin(monkeypatch):
    """As where processes are not forked, and import everything anew."""
    monkeypatch.setattr("cocoa.stages.loading.START", "spawn")
    monkeypatch.setattr("cocoa.stages.loading.PATIENCE", 1.0)
    assert find_deadly(["a", "b"], [0, 1]) == set()


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("stage", ["eos_bridge", "contrastive"])
def test_a_full_memory_is_told_with_what_takes_less(tiny_backbone, tmp_path, stage, monkeypatch):
    trainer = make_trainer(stage, tiny_backbone(), tmp_path, max_steps=1)
    monkeypatch.setattr(trainer.watch, "see", lambda loss: torch.empty(2**50))
    with pytest.raises(CocoaError, match=r"memory is full .*lower tokens_per_pass \(\d+\), then gradient_check"):
        trainer.train_or_resume()


def test_other_errors_of_torch_pass():
    with pytest.raises(RuntimeError, match="shapes"), explained("buy more"):
        raise RuntimeError("shapes differ")
    with pytest.raises(CocoaError, match=r"memory is full .*; buy more"), explained("buy more"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with pytest.raises(CocoaError, match="another process of this run has ended"), explained("buy more"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer.")
    with pytest.raises(RuntimeError, match="Duplicate GPU"), explained("buy more"):
        raise RuntimeError("NCCL error: invalid usage\nDuplicate GPU detected")
    with pytest.raises(CocoaError, match="memory is full"), explained("buy more"):
        raise RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'")


# --------------------------------------------------------------------------------------------------- disk


NO_SPACE = {
    "weights": (
        "cocoa.stages.training.save_file",
        SafetensorError("I/O error: No space left on device"),
    ),
    "mark": ("os.replace", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", NO_SPACE)
def test_a_full_disk_leaves_the_checkpoint_before(tiny_backbone, tmp_path, monkeypatch, fault):
    name, error = NO_SPACE[fault]
    whole = make_trainer("eos_bridge", tiny_backbone(), tmp_path / "whole", **SAVING)
    whole.train_or_resume()
    options = SAVING | {"save_total_limit": 1}
    trainer = make_trainer("eos_bridge", tiny_backbone(), tmp_path / "full", **options)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patched:
        trainer.add_callback(At(2, lambda: patched.setattr(name, fail)))
        with pytest.raises(CocoaError, match=r"checkpoint-3: cannot be written .* what was saved before is whole"):
            trainer.train_or_resume()
    assert [path.name for path in (tmp_path / "full").glob("checkpoint-*")] == ["checkpoint-2"]
    again = make_trainer("eos_bridge", tiny_backbone(), tmp_path / "full", **options)
    again.train_or_resume()
    assert distance(weights(again), weights(whole)) == 0
    assert complete_checkpoints(tmp_path / "full") == [tmp_path / "full" / "checkpoint-4"]


# ------------------------------------------------------------------------------------------------ SIGTERM


def stop_all():
    """As a scheduler does: SIGTERM to the run and to its workers."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    subprocess.run(["kill", "-TERM", *map(str, processes)], check=True)


@pytest.mark.parametrize(
    ("stage", "workers"),
    [("contrastive", 0), *(pytest.param("eos_bridge", workers, marks=pytest.mark.slow) for workers in (0, 1))],
)
def test_sigterm_saves_and_ends_within_a_step(tiny_backbone, tmp_path, stage, workers):
    options = {"max_steps": 4, "logging_steps": 1, "dataloader_num_workers": workers}
    whole = make_trainer(stage, prepared(tiny_backbone(), stage), tmp_path / "whole", **options)
    whole.train_or_resume()
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(stage, prepared(tiny_backbone(), stage), tmp_path / "stopped", **options)
    trainer.add_callback(At(1, stop_all))
    with pytest.raises(SystemExit) as ended:
        trainer.train_or_resume()
    assert ended.value.code == 143
    assert trainer.state.global_step == 2 and last_checkpoint(tmp_path / "stopped").name == "checkpoint-2"
    assert signal.getsignal(signal.SIGTERM) is before
    torch.manual_seed(123)
    again = make_trainer(stage, prepared(tiny_backbone(), stage), tmp_path / "stopped", **options)
    again.train_or_resume()
    assert distance(weights(again), weights(whole)) == 0


def press(times):
    """Ctrl-C, which a terminal sends to the run and to its workers."""
    for _ in range(times):
        for process in (*multiprocessing.active_children(), None):
            os.kill(process.pid if process else os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ctrl_c_saves_too_and_twice_does_not_wait(tiny_backbone, tmp_path, workers, caplog):
    options = {"max_steps": 4, "logging_steps": 1, "dataloader_num_workers": workers}
    trainer = make_trainer("contrastive", tiny_backbone(), tmp_path / "once", **options)
    trainer.add_callback(At(1, lambda: press(1)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train_or_resume()
    assert trainer.state.global_step == 2 and last_checkpoint(tmp_path / "once").name == "checkpoint-2"
    assert "Ctrl-C again stops at once" in caplog.text and "stopped by Ctrl-C, saved at step 2" in caplog.text
    trainer = make_trainer("contrastive", tiny_backbone(), tmp_path / "twice", **options)
    trainer.add_callback(At(1, lambda: press(2)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train_or_resume()
    assert trainer.state.global_step == 1 and last_checkpoint(tmp_path / "twice") is None


class Saved(TrainerCallback):
    """Does something while the last step is saved."""

    def __init__(self, action):
        self.action = action

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.action()


def test_sigterm_behind_the_last_step_ends_the_run_too(tiny_backbone, tmp_path):
    trainer = make_trainer("contrastive", tiny_backbone(), tmp_path, **SAVING | {"max_steps": 2})
    trainer.add_callback(Saved(stop_all))
    with pytest.raises(SystemExit) as ended:
        trainer.train_or_resume()
    assert ended.value.code == 143 and last_checkpoint(tmp_path).name == "checkpoint-2"
    again = make_trainer("contrastive", tiny_backbone(), tmp_path, **SAVING | {"max_steps": 2})
    again.train_or_resume()
    assert distance(weights(again), weights(trainer)) == 0
    unsaved = make_trainer("contrastive", tiny_backbone(), tmp_path / "unsaved", max_steps=1, save_strategy="no")
    unsaved.add_callback(At(None, lambda: None))
    unsaved.watch.on_step_end = lambda *args, **kwargs: stop_all()
    unsaved.train_or_resume()  # nothing is saved yet, so it is not left
    assert unsaved.state.global_step == 1
