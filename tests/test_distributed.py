"""Two gloo processes give the weights that one gives, in every stage, whole on each or split over them (FSDP2)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launching import launch, torchrun
from safetensors.torch import load_file
from short_run import short_recipe

import cocoa.cli
from cocoa.checkpoint import read_record

STAGES = ["joint_reconstruction", "eos_bridge", "compression", "contrastive", "matching"]
STAGES += ["mostly texts", "mostly texts and kept"]
SCRIPT = Path(__file__).parent / "distributed_stage.py"
pytestmark = pytest.mark.slow


def train(processes, stages, backbone, folder, save_at=0, tuning="adapters", split=False):
    """The folder of each stage, trained on so many processes in one launch."""
    folder.mkdir(exist_ok=True)
    launch(processes, SCRIPT, ",".join(stages), backbone, folder, save_at, tuning, split=split)
    return {stage: folder / stage for stage in stages}


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def trained(tiny_backbone_path, tmp_path_factory):
    """Number of processes -> stage -> folder."""
    folder = tmp_path_factory.mktemp("trained")
    return {number: train(number, STAGES, tiny_backbone_path(), folder / str(number)) for number in (1, 2)}


@pytest.fixture(scope="module")
def whole_and_split(trained, tiny_backbone_path, tmp_path_factory):
    """What is tuned -> stage -> folders: of one process, and of two that the model is split over."""
    folder, backbone = tmp_path_factory.mktemp("split"), tiny_backbone_path()
    ones = {"adapters": trained[1], "full": train(1, STAGES, backbone, folder / "one", tuning="full")}
    twos = {tuning: train(2, STAGES, backbone, folder / tuning, tuning=tuning, split=True) for tuning in ones}
    return {tuning: {stage: (ones[tuning][stage], twos[tuning][stage]) for stage in STAGES} for tuning in ones}


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(trained, stage):
    folders = [trained[number][stage] for number in (1, 2)]
    one, two = (load_file(folder / "trained.safetensors") for folder in folders)
    moved = distance(one, load_file(folders[0] / "start.safetensors"))
    assert moved > 1e-3
    assert distance(one, two) < 1e-3 * moved
    losses = [json.loads((folder / "losses.json").read_text()) for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    accounts = [json.loads((folder / "account.json").read_text()) for folder in folders]
    assert accounts[0]["tokens"] == accounts[1]["tokens"] > 0
    assert [account["device"] for account in accounts] == ["cpu", "2 x cpu"]


def test_nothing_that_two_processes_share_is_left_on_the_cpu(tiny_backbone_path, tmp_path):
    """Which NCCL could not gather."""
    launch(2, SCRIPT.with_name("distributed_places.py"), ",".join(STAGES), tiny_backbone_path(), tmp_path)


def test_a_run_goes_on_with_another_number_of_processes(tiny_backbone_path, tmp_path):
    """Begun by one, ended by two, in a later epoch: the same rows, so the weights of a run by one process.

    Accelerate's own loader forgets the epoch of a restart on several processes; ours does not.
    """
    backbone, stages = tiny_backbone_path(), ["eos_bridge", "contrastive"]
    folders = train(1, stages, backbone, tmp_path, save_at=3).values()
    whole = [load_file(trained_file(folder)) for folder in folders]
    for folder in folders:
        shutil.rmtree(folder / "trainer" / "checkpoint-6")
    train(2, stages, backbone, tmp_path, save_at=3)
    for one, folder in zip(whole, folders, strict=True):
        assert json.loads((folder / "account.json").read_text())["device"] == "cpu, then 2 x cpu"
        moved = distance(one, load_file(folder / "start.safetensors"))
        assert distance(one, load_file(trained_file(folder))) < 1e-3 * moved


def test_four_processes_equal_one(trained, tiny_backbone_path, tmp_path):
    stages = ["joint_reconstruction", "eos_bridge", "contrastive"]
    for stage, folder in train(4, stages, tiny_backbone_path(), tmp_path / "4").items():
        one, four = (load_file(where / "trained.safetensors") for where in (trained[1][stage], folder))
        assert distance(one, four) < 1e-3 * distance(one, load_file(folder / "start.safetensors"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tuning", ["full", "adapters"])
def test_split_over_two_processes_equals_one(whole_and_split, tuning, stage):
    folders = whole_and_split[tuning][stage]
    start, *ends = (load_file(path) for path in (folders[0] / "start.safetensors", *map(trained_file, folders)))
    assert distance(start, ends[0]) > 1e-3
    assert distance(*ends) < 1e-5 * max(1, distance(start, ends[0]))
    losses = [json.loads((folder / "losses.json").read_text()) for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    accounts = [json.loads((folder / "account.json").read_text()) for folder in folders]
    assert accounts[0]["tokens"] == accounts[1]["tokens"] > 0  # what evens processes out is not counted


def test_split_over_four_processes_equals_one(whole_and_split, tiny_backbone_path, tmp_path):
    stages = ["joint_reconstruction", "eos_bridge", "compression", "mostly texts"]
    for stage, folder in train(4, stages, tiny_backbone_path(), tmp_path / "4", tuning="full", split=True).items():
        one, four = (load_file(trained_file(where)) for where in (whole_and_split["full"][stage][0], folder))
        assert distance(one, four) < 1e-5


def test_a_split_run_resumes_exactly_and_goes_on_whole(tiny_backbone_path, tmp_path):
    """AdamW's state is split too; the checkpoint is that of one process, so that one process can go on from it."""
    backbone, stages = tiny_backbone_path(), ["eos_bridge", "contrastive"]
    folders = train(2, stages, backbone, tmp_path / "2", save_at=3, tuning="adamw", split=True)
    whole = {stage: load_file(trained_file(folder)) for stage, folder in folders.items()}
    for folder in folders.values():
        shutil.rmtree(folder / "trainer" / "checkpoint-6")
    shutil.copytree(tmp_path / "2", tmp_path / "1")
    for stage, folder in train(2, stages, backbone, tmp_path / "2", save_at=3, tuning="adamw", split=True).items():
        assert distance(whole[stage], load_file(trained_file(folder))) == 0
    for stage, folder in train(1, stages, backbone, tmp_path / "1", save_at=3, tuning="adamw").items():
        assert json.loads((folder / "account.json").read_text())["device"] == "2 x cpu, then cpu"
        moved = distance(whole[stage], load_file(folder / "start.safetensors"))
        assert distance(whole[stage], load_file(trained_file(folder))) < 1e-2 * moved


def test_a_split_run_s_checkpoints_are_those_of_one_process(tiny_backbone_path, photo_data, tmp_path):
    """The three stages, adapters merged, with gradient checkpointing."""
    outputs = []
    for processes, program in ((1, Path(cocoa.cli.__file__)), (2, SCRIPT.with_name("split_on_cpu.py"))):
        outputs.append(tmp_path / str(processes))
        recipe = short_recipe(tiny_backbone_path("qwen2_5_vl", False), photo_data, outputs[-1], "dora")
        recipe["lora"]["dropout"] = 0.0
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        launch(processes, program, "train", path, split=processes > 1)
    for one in outputs[0].rglob("*.safetensors"):
        two = outputs[1] / one.relative_to(outputs[0])
        assert distance(load_file(one), load_file(two)) < 1e-5
    for name in ("1-joint_reconstruction", "2-eos_bridge", "final"):
        one, two = (output / name for output in outputs)
        assert files_of(one) == files_of(two)
        assert read_record(two)["merge_cosine"] > 0.9999 and read_record(two)["device"] == "2 x cpu"
        assert read_record(one)["tokens"] == read_record(two)["tokens"]


def trained_file(folder):
    return folder / "trained.safetensors"


def files_of(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.mark.parametrize("split", [False, True])
def test_a_fault_of_one_process_ends_both(tiny_backbone_path, tmp_path, split):
    """SIGTERM and a loss that is no number: both processes say so, with the last good step on disk."""
    launch(2, Path(__file__).parent / "distributed_faults.py", tiny_backbone_path(), tmp_path, split=split)
    met = {"stop": "exit 143", "no_number": "step 3: the loss is not finite; its "}
    for stage in ("eos_bridge", "contrastive"):
        for fault, what in met.items():
            both = [(tmp_path / stage / fault / f"process-{process}").read_text() for process in (0, 1)]
            assert both == [f"{what}, checkpoint-2"] * 2


def test_a_process_that_dies_ends_the_others_with_a_message(tiny_backbone_path, tmp_path):
    script = Path(__file__).parent / "distributed_death.py"
    assert torchrun(2, script, "contrastive", tiny_backbone_path(), tmp_path).returncode
    met, seconds = (tmp_path / "met").read_text().splitlines()
    assert met.startswith("another process of this run has ended, and its own last lines say why")
    assert float(seconds) < 60


def test_two_processes_score_as_one_and_share_the_work(tiny_backbone_path, photo_data, tmp_path):
    command = [tiny_backbone_path(), "--data", photo_data / "MMEB-eval", "--batch-size", "2"]
    found = {}
    for number in (1, 2):
        output = tmp_path / str(number)
        printed = launch(number, Path(cocoa.cli.__file__), "evaluate", *command, "--output", output)
        assert printed.count("score files:") == 1
        found[number] = json.loads((output / "summary.json").read_text())
        shards = [load_file(path) for path in output.glob("embeddings/*/*.safetensors")]
        assert len(shards) == number
        keys = torch.cat([shard["keys"] for shard in shards])
        assert len(keys) == len(keys.unique(dim=0))  # nothing twice
        found[number]["rows"] = {
            key.numpy().tobytes(): row
            for shard in shards
            for key, row in zip(shard["keys"], shard["embeddings"], strict=True)
        }
    one, two = (found[number].pop("rows") for number in (1, 2))
    assert found[1] == found[2]
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_process_that_is_late_does_not_change_who_encodes_what(tiny_backbone_path, photo_data, tmp_path):
    launch(2, SCRIPT.with_name("late_evaluation.py"), tiny_backbone_path(), photo_data / "MMEB-eval", tmp_path)
    shards = [load_file(path) for path in tmp_path.glob("embeddings/*/*.safetensors")]
    keys = torch.cat([shard["keys"] for shard in shards])
    assert len(shards) == 2 and len(keys) == len(keys.unique(dim=0))
