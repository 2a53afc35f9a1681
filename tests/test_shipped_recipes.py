"""Every file in `recipes/` parses, and is built, all its objects, on a tiny backbone over the photographs."""

from pathlib import Path

import pytest
import torch
import yaml

from cocoa.adapters import add_adapters
from cocoa.pipeline import build_trainer, load_stage_backbone
from cocoa.recipe import STAGES, load_recipe
from cocoa.stage_data import stage_data

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def fitted(path, backbone, data):
    """The overrides that make a recipe fit a tiny model and the photographs."""
    overrides = [f"backbone={backbone}", f"data.train={data}", "data.split=original"]
    for i, entry in enumerate(yaml.safe_load(path.read_text())["stages"]):
        ((name, options),) = entry.items()
        small = {"batch_size": 8, "report_to": "none", "dataloader_num_workers": 0}
        if name == "contrastive":
            small["mini_batch_size"] = 4
            if (options or {}).get("sub_batch_size", 1) > 1:
                small["sub_batch_size"] = 1
        overrides += [f"stages.{i}.{key}={value}" for key, value in small.items()]
    return overrides


def test_there_is_a_recipe_of_the_three_stages_for_each_backbone():
    recipes = [load_recipe(path) for path in RECIPES]
    whole = {recipe.backbone for recipe in recipes if [stage.name for stage in recipe.stages] == list(STAGES)}
    named = [f"Qwen/Qwen2-VL-{size}-Instruct" for size in ("2B", "7B")]
    assert whole == {*named, *(f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B"))}
    assert len({recipe.output_dir for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_ships_builds_all_its_objects(path, tiny_backbone_path, photo_data, tmp_path):
    written = load_recipe(path)
    assert [written.arguments(stage, tmp_path).batch_size for stage in written.stages]
    backbone = tiny_backbone_path("qwen2_5_vl" if "qwen2.5" in written.backbone.lower() else "qwen2_vl")
    recipe = load_recipe(path, fitted(path, backbone, photo_data / "MMEB-train"))
    assert [stage.name for stage in recipe.stages] == [stage.name for stage in written.stages]
    assert recipe.lora == written.lora and recipe.image == written.image
    for stage in recipe.stages:
        args = recipe.arguments(stage, tmp_path)
        loaded = load_stage_backbone(recipe, stage, recipe.backbone, args)
        assert loaded.model.config.text_config.is_causal == ("causal" in path.stem)
        data = stage_data(stage, loaded, args)
        if recipe.lora is not None:
            add_adapters(loaded.model, recipe.lora, [loaded.mask_token_id] if stage.name != "contrastive" else [])
        trainer = build_trainer(stage, loaded, data, args)
        batch = next(iter(trainer.get_train_dataloader()))
        assert all(torch.isfinite(tensor).all() for tensor in batch.values() if torch.is_tensor(tensor))
        assert sum(data.datasets().values()) >= 8 and len(data.datasets()) > 5
