"""Recipes: every mistake is named by its key, overrides reach every key, and what makes two runs the same."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

from cocoa.adapters import Lora
from cocoa.errors import CocoaError
from cocoa.recipe import load_recipe, parse_recipe

CONTENT = {
    "backbone": "Qwen/Qwen2-VL-2B-Instruct",
    "output_dir": "runs/test",
    "seed": 7,
    "dtype": "bfloat16",
    "data": {"train": "MMEB-train", "subsets": "all", "validation_rows": 10},
    "image": {"train_tokens": [4, 64], "resize": "square"},
    "lora": {"r": 16, "vision": ["qkv"]},
    "stages": [
        {"joint_reconstruction": {"batch_size": 16, "data": {"max_rows_per_subset": 50}}},
        "eos_bridge",
        {"contrastive": {"temperature": 0.05, "data": {"hard_negatives": 2}}},
    ],
}


def changed(path, value):
    """CONTENT with one dotted key set; a number is an entry of `stages`."""
    content = copy.deepcopy(CONTENT)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = content
    for part in parents:
        node = node[part]
    node[last] = value
    return content


def write(folder, content):
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


# ------------------------------------------------------------------------------------------------- as it is


def test_a_recipe_says_what_it_says_and_defaults_say_the_rest(tmp_path):
    recipe = load_recipe(write(tmp_path, CONTENT))
    assert (recipe.backbone, recipe.output_dir, recipe.seed) == (CONTENT["backbone"], Path("runs/test"), 7)
    assert [stage.name for stage in recipe.stages] == ["joint_reconstruction", "eos_bridge", "contrastive"]
    assert recipe.lora == Lora(r=16, vision=("qkv",))
    assert (recipe.image.train().tokens, recipe.image.evaluation().tokens) == ((4, 64), (4, 576))
    assert recipe.image.train().resize == recipe.image.evaluation().resize == "square"
    assert recipe.load_dtype == torch.bfloat16
    least = parse_recipe({key: CONTENT[key] for key in ("backbone", "output_dir", "data", "stages")})
    assert (least.seed, least.lora, least.image.resize) == (42, None, "aspect")
    assert least.dtype == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert parse_recipe(changed("lora", None)).load_dtype == torch.float32  # what is trained whole


def test_a_tilde_is_the_home_folder():
    """As the library, too, takes it, which writes there."""
    assert parse_recipe(changed("output_dir", "~/runs/test")).output_dir == Path.home() / "runs" / "test"


def test_a_stage_has_the_data_of_the_recipe_with_its_own_keys_over_it():
    joint, bridge, contrastive = (stage.data for stage in parse_recipe(CONTENT).stages)
    assert {data.train for data in (joint, bridge, contrastive)} == {"MMEB-train"}
    assert {data.validation_rows for data in (joint, bridge, contrastive)} == {10}
    assert (joint.max_rows_per_subset, bridge.max_rows_per_subset) == (50, None)
    assert (bridge.hard_negatives, contrastive.hard_negatives) == (0, 2)


def test_a_stage_s_arguments_are_its_keys_and_what_the_recipe_says_for_all(tmp_path):
    recipe = parse_recipe(changed("stages.2.contrastive.weight_decay", 0.1))
    first, _, last = (recipe.arguments(stage, tmp_path, disable_tqdm=True) for stage in recipe.stages)
    assert (first.batch_size, first.per_device_train_batch_size, first.seed, first.bf16) == (16, 16, 7, True)
    assert (last.temperature, last.weight_decay, last.hard_negatives, last.disable_tqdm) == (0.05, 0.1, 2, True)
    assert last.output_dir == str(tmp_path)
    assert not parse_recipe(changed("dtype", "float32")).arguments(recipe.stages[0], tmp_path).bf16


@pytest.mark.parametrize("key", ["learning_rate", "adam_epsilon", "weight_decay", "temperature"])
def test_numbers_that_yaml_reads_as_text(tmp_path, key):
    path = write(tmp_path, yaml.safe_dump(CONTENT).replace("temperature: 0.05", f"{key}: 2e-5"))
    assert load_recipe(path).stages[2].options[key] == 2e-5


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sead", 1, "sead: unknown key; did you mean seed?"),
        ("data.max_row_per_set", 1, "data.max_row_per_set: unknown key; did you mean max_rows_per_subset?"),
        ("image.tokens", [4, 16], "image.tokens: unknown key; did you mean eval_tokens?"),
        ("lora.rank", 8, "lora.rank: unknown key; there are: r, alpha, dropout, dora, init, text, vision"),
        ("stages.0.joint_reconstruction.temprature", 1, "stages.joint_reconstruction.temprature: unknown key"),
        ("stages.2.contrastive.temprature", 1, "stages.contrastive.temprature: unknown key; did you mean temperature?"),
        ("stages.0.joint_reconstruction.data.split_", 1, "stages.joint_reconstruction.data.split_: unknown key"),
        ("stages.1", "eos_brige", "stages.1: unknown stage 'eos_brige'; did you mean eos_bridge?"),
        ("stages.1", {"eos_bridge": None, "batch_size": 8}, "stages.1: one stage name with its keys indented below it"),
        ("stages.1", 3, "stages.1: a mapping of keys is needed, got 3"),
        ("stages", {"eos_bridge": {}}, "stages: a list is needed"),
        ("stages", [], "stages: missing; a recipe needs"),
        ("backbone", None, "backbone: missing; a recipe needs"),
        ("output_dir", None, "output_dir: missing; a recipe needs"),
        ("data", None, "data: missing; a recipe needs backbone, output_dir, data.train and stages"),
        ("data", {"split": "original"}, "data.train: missing"),
        ("data", "MMEB-train", "data: a mapping of keys is needed, got 'MMEB-train'"),
        ("data.train", 5, "data.train: 5 is not str"),
        ("data.subsets", ["GQA", 5], "data.subsets: 5 is not str"),
        ("data.validation_rows", "ten", "data.validation_rows: 'ten' is not int"),
        ("data.max_rows_per_subset", 0, "data.max_rows_per_subset: must be 1 or more"),
        ("backbone", 2, "backbone: 2 is not str"),
        ("output_dir", ["a"], "output_dir: ['a'] is not str"),
        ("seed", "7", "seed: '7' is not int"),
        ("dtype", "float16", "dtype: 'float16' is not one of float32, bfloat16"),
        ("dtype", ["bfloat16"], "dtype: ['bfloat16'] is not str"),
        ("image.train_tokens", 256, "image.train_tokens: a list is needed, got 256"),
        ("image.train_tokens", [4], "image.train_tokens: [4] is not [least, most]"),
        ("image.eval_tokens", [64, 4], "image tokens [64, 4]: need 1 <= least <= most"),
        ("image.resize", "squash", "image.resize 'squash': choose aspect or square"),
        ("lora", True, "lora: a mapping of keys is needed, got True"),
        ("lora.r", 8.5, "lora.r: 8.5 is not int"),
        ("lora.dora", "yes please", "lora.dora: 'yes please' is not bool"),
        ("lora.text", "q_proj", "lora.text: a list is needed, got 'q_proj'"),
        ("stages.0.joint_reconstruction.batch_size", True, "joint_reconstruction.batch_size: True is not int"),
        ("stages.0.joint_reconstruction.learning_rate", "fast", "learning_rate: 'fast' is not float"),
        ("stages.0.joint_reconstruction.learning_rate", None, "learning_rate: None is not float"),
        ("stages.0.joint_reconstruction.gradient_checkpointing", "on", "gradient_checkpointing: 'on' is not bool"),
        (
            "stages.0.joint_reconstruction.seed",
            1,
            "joint_reconstruction.seed: not a stage's to set; use seed at the top",
        ),
        (
            "stages.1",
            {"eos_bridge": {"output_dir": "x"}},
            "eos_bridge.output_dir: not a stage's to set; use output_dir",
        ),
        ("stages.2.contrastive.per_device_train_batch_size", 8, "not a stage's to set; use batch_size, which counts"),
        ("stages.2.contrastive.bf16", True, "contrastive.bf16: not a stage's to set; use dtype: bfloat16"),
        ("stages.2.contrastive.fp16", True, "contrastive.fp16: not a stage's to set; use dtype: bfloat16"),
        ("stages.2.contrastive.hard_negatives", 1, "contrastive.hard_negatives: not a stage's to set; use data.hard"),
        ("stages.2.contrastive.accelerator_config", True, "accelerator_config: True is not dict or str"),  # a file: 1
    ],
)
def test_a_mistake_is_named_by_file_and_key(tmp_path, path, value, message):
    with pytest.raises(CocoaError) as found:
        load_recipe(write(tmp_path, changed(path, value)))
    assert str(found.value).startswith(f"{tmp_path / 'recipe.yaml'}: ")
    assert message in str(found.value)


def test_a_gpu_without_bfloat16_is_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    with pytest.raises(CocoaError, match="dtype: Tesla T4 does not compute in bfloat16; write float32"):
        parse_recipe(changed("dtype", "bfloat16"))
    assert parse_recipe(changed("dtype", None)).dtype == "float32"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 0, "stages.contrastive: batch_size 0 does not divide by 1 devices"),
        ("gradient_accumulation_steps", 3, "stages.contrastive: batch_size 256 does not divide by 1 devices x 3"),
        ("gradient_accumulation_steps", 2, "stages.contrastive: contrastive: gradient_accumulation_steps would shrink"),
        ("eval_strategy", "sometimes", "stages.contrastive: sometimes is not a valid IntervalStrategy"),
        ("deepspeed", "zero3.json", "stages.contrastive: DeepSpeed is not supported"),
        ("accelerator_config", "none.json", "stages.contrastive: [Errno 2] No such file or directory: 'none.json'"),
        ("optim", "sgdd", "stages.contrastive: sgdd is not a valid OptimizerNames"),
    ],
)
def test_a_value_that_a_stage_refuses_is_named_by_the_stage(tmp_path, key, value, message):
    recipe = parse_recipe(changed(f"stages.2.contrastive.{key}", value))
    with pytest.raises(CocoaError) as found:
        recipe.arguments(recipe.stages[2], tmp_path)
    assert str(found.value).startswith(message)


def test_files_that_are_no_recipes(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    write(tmp_path, "backbone: [")
    (tmp_path / "list.yaml").write_text("- contrastive")
    for name, message in (
        ("none.yaml", "no such recipe"),
        ("", "cannot be read"),
        ("binary.yaml", "not YAML"),
        ("recipe.yaml", "not YAML"),
        ("list.yaml", "a recipe is a mapping of keys"),
    ):
        with pytest.raises(CocoaError, match=message) as found:
            load_recipe(tmp_path / name)
        assert str(tmp_path / name) in str(found.value)


# ------------------------------------------------------------------------------------------------ overrides


def test_overrides_are_dotted_and_name_a_stage_by_name_or_number(tmp_path):
    overrides = ["seed=9", "data.train=[a, b]", "lora.r=4", "image.eval_tokens=[4, 100]", "stages.0.batch_size=8"]
    overrides += [
        "stages.eos_bridge.max_steps=3",
        "stages.contrastive.data.subsets=[GQA]",
        "stages.1.learning_rate=1e-4",
    ]
    recipe = load_recipe(write(tmp_path, CONTENT), overrides)
    joint, bridge, contrastive = recipe.stages
    assert (recipe.seed, recipe.lora.r, recipe.image.eval_tokens) == (9, 4, (4, 100))
    assert joint.data.train == ["a", "b"] and joint.data.max_rows_per_subset == 50
    assert joint.options == {"batch_size": 8}
    assert bridge.options == {"max_steps": 3, "learning_rate": 1e-4}
    assert contrastive.data.subsets == ["GQA"] and contrastive.data.hard_negatives == 2
    assert load_recipe(write(tmp_path, CONTENT), ["lora=null"]).lora is None
    without = {key: value for key, value in CONTENT.items() if key != "image"}
    assert load_recipe(write(tmp_path, without), ["image.resize=square"]).image.resize == "square"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed': an override is key=value"),
        ("=5", "'=5': an override is key=value"),
        ("seed=[1", "'seed=[1': the value is not YAML"),
        ("seed.deep=1", "seed: not a mapping, so 'seed.deep=1' cannot be applied"),
        ("backbone.a.b=1", "backbone.a: not a mapping"),
        ("stages.contrastive=5", "name a key of the stage, such as stages.contrastive.max_steps=100"),
        ("stages.colbert.max_steps=1", "stages.colbert: the recipe has no such stage"),
        ("stages.3.max_steps=1", "stages.3: the recipe has no such stage"),
        ("stages.0.maxsteps=1", "stages.joint_reconstruction.maxsteps: unknown key; did you mean max_steps?"),
        ("lora.vision=qkv", "lora.vision: a list is needed, got 'qkv'"),
    ],
)
def test_a_mistake_in_an_override(tmp_path, override, message):
    with pytest.raises(CocoaError) as found:
        load_recipe(write(tmp_path, CONTENT), [override])
    assert message in str(found.value)


# ------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    ("path", "value", "stage"),
    [
        ("backbone", "other", 1),
        ("seed", 8, 1),
        ("dtype", "float32", 1),
        ("lora.r", 4, 1),
        ("lora", None, 1),
        ("image.resize", "aspect", 1),
        ("image.eval_tokens", [4, 64], 1),
        ("data.train", "other", 1),
        ("data.validation_rows", 11, 1),
        ("stages.0.joint_reconstruction.batch_size", 8, 1),
        ("stages.0.joint_reconstruction.data.max_rows_per_subset", 51, 1),
        ("stages.1", {"eos_bridge": {"layout": "strict"}}, 2),
        ("stages.2.contrastive.temperature", 0.02, 3),
        ("stages.2.contrastive.data.hard_negatives", 0, 3),
    ],
)
def test_the_fingerprint_changes_from_the_stage_on_that_a_change_reaches(path, value, stage):
    before, after = parse_recipe(CONTENT), parse_recipe(changed(path, value))
    different = [before.fingerprint(n) != after.fingerprint(n) for n in (1, 2, 3)]
    assert different == [n >= stage for n in (1, 2, 3)]


def test_the_fingerprint_does_not_change_with_what_changes_no_number():
    quiet = {"report_to": "none", "logging_steps": 3, "save_steps": 7, "save_total_limit": 1, "run_name": "again"}
    forgiving = {"on_nonfinite": "skip"}
    content = changed("stages.1", {"eos_bridge": {**quiet, **forgiving, "dataloader_num_workers": 4}})
    content["output_dir"] = "elsewhere"
    content["data"] |= {"on_bad_row": "skip", "max_bad_share": 0.2}
    assert parse_recipe(content).fingerprint(3) == parse_recipe(CONTENT).fingerprint(3)
    assert len({parse_recipe(CONTENT).fingerprint(n) for n in (1, 2, 3)}) == 3
