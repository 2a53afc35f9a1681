"""Every file in `recipes/` parses, and is built, all its objects, on a tiny backbone over the photographs."""

from pathlib import Path

import pytest
import torch
import yaml

from cocoa.architectures import EMBEDDED
from cocoa.backbone import Form
from cocoa.pipeline import build_trainer, load_stage_backbone, stage_forms
from cocoa.recipe import load_recipe
from cocoa.stage_data import stage_data

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
STAGES = {
    "cocoa": ["joint_reconstruction", "eos_bridge", "contrastive"],
    "coma": ["compression", "contrastive"],
    "moca": ["joint_reconstruction", "contrastive"],
    "contrastive": ["contrastive"],
}
"""The stages of a recipe, by how its name begins."""
FORMS = {
    "cocoa": Form("bidirectional", "lasttoken"),
    "coma": Form("causal", "compression", 4),
    "moca": Form("bidirectional", "mean"),
    "contrastive-bidirectional": Form("bidirectional", "lasttoken"),
    "contrastive-causal": Form("causal", "lasttoken"),
}
"""How the last stage reads its backbone, by how a recipe's name begins."""


def by_name(table, path):
    """The entry of the longest key that the recipe's name begins with; None if there is none."""
    found = [key for key in table if path.stem.startswith(key)]
    return table[max(found, key=len)] if found else None


def fitted(path, backbone, data, photo_dialogues):
    """The overrides that make a recipe fit a tiny model and the photographs."""
    overrides = [f"backbone={backbone}", f"data.train={data}", "data.split=original"]
    for i, entry in enumerate(yaml.safe_load(path.read_text())["stages"]):
        ((name, options),) = entry.items()
        small = {"batch_size": 8, "report_to": "none", "dataloader_num_workers": 0}
        if "gradient_accumulation_steps" in (options or {}):
            small["gradient_accumulation_steps"] = 2
        if name == "contrastive":
            small["tokens_per_pass"] = 100
            if (options or {}).get("sub_batch_size", 1) > 1:
                small["sub_batch_size"] = 1
        if name == "compression":
            small |= {"compression_tokens": 4, "data.train": photo_dialogues, "data.image_root": "null"}
        overrides += [f"stages.{i}.{key}={value}" for key, value in small.items()]
    return overrides


def test_there_is_a_recipe_of_each_method_for_each_backbone_of_its_paper():
    recipes = {path: load_recipe(path) for path in RECIPES}
    for method, backbones in {
        "cocoa": {f"Qwen/Qwen2-VL-{size}-Instruct" for size in ("2B", "7B")},
        "coma": set(),
        "moca": set(),
        "contrastive-causal": {"Qwen/Qwen2-VL-2B-Instruct"},
        "contrastive-bidirectional": {"Qwen/Qwen2-VL-2B-Instruct"},
    }.items():
        large = {f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B")}
        there = {recipe.backbone for path, recipe in recipes.items() if path.stem.startswith(method)}
        assert there == backbones | large | {EMBEDDED[0]}
    for path, recipe in recipes.items():
        stages = by_name(STAGES, path)
        assert stages is None or [stage.name for stage in recipe.stages] == stages
    assert len({recipe.output_dir for recipe in recipes.values()}) == len(recipes)


LARGE = ("cocoa-qwen", "coma-qwen", "moca-qwen", "contrastive-causal-qwen", "contrastive-bidirectional-qwen")
PUBLISHED = {
    "cocoa-qwen": {
        "lora": {"r": 8, "alpha": 64, "dropout": 0.1, "dora": True},
        "joint_reconstruction": {"batch_size": 128, "max_steps": 3000, "learning_rate": 2e-5, "warmup_steps": 100}
        | {"text_mask_ratio": 0.2, "patch_mask_ratio": 0.5, "patch_loss_weight": 0.5},
        "eos_bridge": {"batch_size": 64, "num_train_epochs": 2, "learning_rate": 2e-5, "text_mask_ratio": 0.7},
        "contrastive": {"batch_size": 1024, "max_steps": 2000, "learning_rate": 2e-5, "warmup_steps": 200}
        | {"temperature": 0.02, "sub_batch_size": 1, "hard_negatives": 0},
    },
    "coma-qwen": {
        "lora": {"r": 16, "alpha": 64, "dropout": 0.1, "dora": True, "embeddings": "all", "vision": ()}
        | {"text": ("q_proj", "k_proj", "v_proj", "o_proj")},
        "compression": {"compression_tokens": 32, "batch_size": 256, "num_train_epochs": 1, "learning_rate": 5e-5}
        | {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.0, "max_length": 8192},
        "contrastive": {"batch_size": 1024, "sub_batch_size": 64, "dataset_sampling": "uniform", "max_steps": 1500}
        | {"temperature": 0.03, "learning_rate": 5e-5, "lr_scheduler_type": "cosine", "hard_negatives": 0},
    },
    "moca-qwen": {
        "joint_reconstruction": {"text_mask_ratio": 0.4, "patch_mask_ratio": 0.5, "patch_loss_weight": 0.5}
        | {"learning_rate": 2e-6, "text_objective": "mntp"},
        "contrastive": {"batch_size": 2048, "temperature": 0.03, "hard_negatives": 2, "pooling": "mean"},
    },
    "contrastive-": {"contrastive": {"batch_size": 1024, "temperature": 0.02, "max_steps": 2000}},
}
"""Published values (facts of the papers), by how a recipe's name begins."""


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.startswith(LARGE)], ids=lambda path: path.stem)
def test_published_values_stand_in_the_recipes(path, tmp_path):
    recipe = load_recipe(path)
    for what, values in by_name(PUBLISHED, path).items():
        stages = [stage for stage in recipe.stages if stage.name == what]
        holder = recipe.lora if what == "lora" else recipe.arguments(stages[0], tmp_path)
        assert {key: getattr(holder, key) for key in values} == values


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_ships_builds_all_its_objects(path, tiny_backbone_path, photo_data, photo_dialogues, tmp_path):
    written = load_recipe(path)
    assert [written.arguments(stage, tmp_path).batch_size for stage in written.stages]
    backbone = tiny_backbone_path("qwen2_5_vl" if "qwen2.5" in written.backbone.lower() else "qwen2_vl")
    recipe = load_recipe(path, fitted(path, backbone, photo_data / "MMEB-train", photo_dialogues))
    assert [stage.name for stage in recipe.stages] == [stage.name for stage in written.stages]
    for stage, form in zip(recipe.stages, stage_forms(recipe), strict=True):
        args = recipe.arguments(stage, tmp_path)
        loaded = load_stage_backbone(recipe, stage, recipe.backbone, form)
        data = stage_data(stage, loaded, args)
        trainer = build_trainer(stage, loaded, data, args, recipe.lora)
        batch = next(iter(trainer.get_train_dataloader()))
        tensors = [value for part in batch.get("passes", [batch]) for value in part.values() if torch.is_tensor(value)]
        assert tensors and all(torch.isfinite(tensor).all() for tensor in tensors)
        assert sum(data.datasets().values()) >= 8
        assert len(data.datasets()) > 5 or stage.name == "compression"
    form = by_name(FORMS, path)
    assert form is None or loaded.form == form
