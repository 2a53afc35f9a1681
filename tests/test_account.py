"""What training took: tokens as counted by hand, sums over the sessions of a run, and the stages before."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from test_training import STAGES, KillAt, Killed, make_trainer
from toy import arguments, prepared, toy_pairs

from cocoa import account
from cocoa.account import FACTS, Meter, history, peak_bytes, stages_of, totals
from cocoa.checkpoint import save_checkpoint
from cocoa.stages import contrastive


def tokens_by_hand(trainer, steps):
    """Tokens of the rows of the first steps, each row encoded alone, so that nothing is padded."""
    dataset, sampler = trainer.train_dataset, trainer.sampler
    size = sampler.global_batch_size
    lengths = []
    for step in range(steps):
        epoch, place = divmod(step, sampler.steps_per_epoch)
        for row in sampler.order(epoch)[place * size : (place + 1) * size]:
            if isinstance(dataset, contrastive.PairDataset):
                lengths += [len(side["input_ids"]) for name, side in dataset[row].items() if name != "label"]
            else:
                lengths.append(len(dataset[epoch, row]["input_ids"]))
    assert len(set(lengths)) > 1, "nothing would be padded"
    return sum(lengths)


@pytest.mark.parametrize("stage", STAGES)
def test_tokens_are_those_of_the_rows_without_padding(tiny_backbone, tmp_path, stage):
    """Over an epoch's end: 20 rows are two steps of 8."""
    trainer = make_trainer(stage, tiny_backbone(), tmp_path, max_steps=3)
    trainer.train_or_resume()
    assert trainer.account["tokens"] == tokens_by_hand(trainer, 3)
    assert trainer.account["device"] == "cpu" and trainer.account["seconds"] > 0
    assert 0.1 < trainer.account["peak_memory_gb"] < 100  # of a process that has imported torch


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("contrastive", {"tokens_per_pass": 40}),
        ("contrastive", {"tokens_per_pass": 10_000}),  # no gradient cache
        ("joint_reconstruction", {"gradient_accumulation_steps": 4}),
        ("eos_bridge", {"gradient_checkpointing": True}),
    ],
)
def test_a_row_is_counted_once_however_the_step_is_computed(tiny_backbone, tmp_path, stage, options):
    trainer = make_trainer(stage, tiny_backbone(), tmp_path, max_steps=2, **options)
    trainer.train_or_resume()
    assert trainer.account["tokens"] == tokens_by_hand(trainer, 2)


def test_hard_negatives_are_counted_and_validation_is_not(tiny_backbone, tmp_path):
    options = {"tokens_per_pass": 60, "hard_negatives": 2, "eval_steps": 1, "max_steps": 2}
    pairs = toy_pairs(12, negatives=2)
    args = arguments(contrastive.ContrastiveArguments, tmp_path, **options)
    trainer = contrastive.ContrastiveTrainer(prepared(tiny_backbone(), "contrastive"), args, pairs, toy_pairs(4))
    trainer.train_or_resume()
    assert any("eval_validation_hit@1" in entry for entry in trainer.state.log_history)
    assert trainer.account["tokens"] == tokens_by_hand(trainer, 2)


@pytest.mark.parametrize(
    "stage", [stage if stage == "contrastive" else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
)
def test_killed_and_resumed_counts_no_step_twice_and_none_too_few(tiny_backbone, tmp_path, stage):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    killed = make_trainer(stage, tiny_backbone(), tmp_path, **options)
    killed.add_callback(KillAt(3))  # step 3 is done and lost
    with pytest.raises(Killed):
        killed.train_or_resume()
    complete = tmp_path / "checkpoint-2" / "complete"
    before = json.loads(complete.read_text())
    assert before["tokens"] == tokens_by_hand(killed, 2) and before["seconds"] > 0
    complete.write_text(json.dumps(before | {"seconds": 1000.0, "peak_memory_gb": 500.0, "device": "Abacus"}))

    resumed = make_trainer(stage, tiny_backbone(), tmp_path, **options)
    resumed.train_or_resume()
    found = resumed.account
    assert found["tokens"] == tokens_by_hand(resumed, 5)
    assert 1000 < found["seconds"] < 1100 and found["peak_memory_gb"] == 500
    assert found["device"] == "Abacus, then cpu"

    last = json.loads((tmp_path / "checkpoint-5" / "complete").read_text())
    again = make_trainer(stage, tiny_backbone(), tmp_path, **options)  # killed after its last step
    again.train_or_resume()
    assert again.account == last and last["tokens"] == found["tokens"]


def test_processes_are_summed_and_the_most_memory_is_taken(monkeypatch):
    monkeypatch.setattr(account, "peak_bytes", lambda device: 3_000_000_000)
    meter = Meter(torch.device("cpu"), 2, {})
    meter.count({"passes": [{"lengths": torch.tensor([2, 1])}, {"lengths": torch.tensor([2])}]})
    meter.count({"passes": [{"lengths": torch.tensor([4]), "input_ids": torch.ones(1, 4)}]})
    assert meter.mine().tolist() == [[9, 3_000_000_000]]
    found = meter.read(torch.cat([meter.mine(), torch.tensor([[20, 4_500_000_000]])]))
    assert (found["tokens"], found["peak_memory_gb"], found["device"]) == (29, 4.5, "2 x cpu")
    for _ in range(2):  # sessions on fewer
        found = Meter(torch.device("cpu"), 1, found).read(torch.tensor([[1, 0]]))
    assert (found["tokens"], found["peak_memory_gb"], found["device"]) == (31, 4.5, "2 x cpu, then cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_the_kernel_says():
    status = Path("/proc/self/status").read_text()
    assert peak_bytes(torch.device("cpu")) == pytest.approx(
        1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1]), rel=1e-3
    )


def test_a_gpu_s_peak_is_what_torch_held(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {"cuda:1": 7}[str(device)])
    assert peak_bytes(torch.device("cuda:1")) == 7


def facts(stage, seconds, tokens, peak, device="cpu"):
    return dict(zip(FACTS, (stage, 2, seconds, tokens, peak, device), strict=True))


def test_a_checkpoint_carries_the_stages_before_it(tiny_backbone, tmp_path):
    first, second = facts("joint_reconstruction", 10.0, 100, 2.0), facts("contrastive", 5.0, 70, 1.5, "H100")
    save_checkpoint(tiny_backbone(), tmp_path / "made", {**second, "history": [first], "seed": 1})
    assert history(str(tmp_path / "made")) == [first, second]
    assert totals([first, second]) == {"seconds": 15, "tokens": 170, "peak_memory_gb": 2, "device": "cpu, H100"}
    assert history("mini-qwen2-vl") == stages_of({}) == []


def test_what_is_not_known_is_not_guessed():
    """A checkpoint of before there was an account, and an untouched backbone."""
    old = stages_of({"stage": "eos_bridge", "steps": 3, "seed": 1})
    assert old == [dict.fromkeys(FACTS) | {"stage": "eos_bridge", "steps": 3}]
    known = facts("contrastive", 5.0, 70, 1.5)
    assert totals([*old, known]) == {"seconds": None, "tokens": None, "peak_memory_gb": None, "device": "cpu"}
    assert totals([]) == dict.fromkeys(("seconds", "tokens", "peak_memory_gb", "device"))
