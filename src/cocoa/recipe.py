"""A YAML recipe to the arguments of every stage, with errors that name the key.

A recipe needs `backbone`, `output_dir`, `data.train` and `stages`; a stage's keys are the fields of its
arguments class, so every `TrainingArguments` name works. `key=value` overrides are dotted
(`data.train=/data/MMEB-train`, `stages.contrastive.max_steps=100`, `stages.0.batch_size=8`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from cocoa.adapters import Lora
from cocoa.errors import CocoaError, first_line
from cocoa.inputs import ImageBudget
from cocoa.overrides import apply_override
from cocoa.parsing import as_list, as_mapping, build, check_keys, convert, no_such_recipe, suggest
from cocoa.sources import DataConfig
from cocoa.stages.arguments import StageArguments
from cocoa.stages.compression import CompressionArguments
from cocoa.stages.contrastive import ContrastiveArguments
from cocoa.stages.eos_bridge import EosBridgeArguments
from cocoa.stages.joint_reconstruction import JointReconstructionArguments
from cocoa.yaml_text import read_yaml

STAGES: dict[str, type[StageArguments]] = {
    "joint_reconstruction": JointReconstructionArguments,
    "eos_bridge": EosBridgeArguments,
    "compression": CompressionArguments,
    "contrastive": ContrastiveArguments,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_GIVEN_ELSEWHERE = {
    "output_dir": "output_dir at the top of the recipe",
    "seed": "seed at the top of the recipe",
    "bf16": "dtype: bfloat16",
    "fp16": "dtype: bfloat16",
    "per_device_train_batch_size": "batch_size, which counts all devices",
    "hard_negatives": "data.hard_negatives",
    "on_bad_row": "data.on_bad_row",
    "max_bad_share": "data.max_bad_share",
    "hub_token": "`hf auth login`, so that no file holds it",
    "push_to_hub": "`cocoa push` once the run is done",
}
_WITHOUT_EFFECT = (
    *("report_to", "run_name", "project", "trackio_", "logging_", "log_", "disable_tqdm"),
    *("save_strategy", "save_steps", "save_total_limit", "dataloader_num_workers"),
    *("tokens_per_pass", "gradient_checkpointing", "activation_checkpointing", "cache_inputs"),
    *("on_nonfinite", "on_bad_row", "max_bad_share", "ddp_timeout"),
)
"""Beginnings of the options that leave the result as it is, rounding aside, or have no effect before the fault that
ends a run: a stopped run may go on under others."""


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The `image:` block: token budgets for training and for the checkpoints, and how images are resized."""

    train_tokens: tuple[int, int] = (4, 256)
    eval_tokens: tuple[int, int] = (4, 576)
    resize: Literal["aspect", "square"] = "aspect"

    def train(self) -> ImageBudget:
        """The budget while training."""
        return ImageBudget(self.train_tokens, self.resize)

    def evaluation(self) -> ImageBudget:
        """The budget that checkpoints carry."""
        return ImageBudget(self.eval_tokens, self.resize)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a recipe: its name, the keys of its arguments, and its data and image budget.

    `data:` and `image:` in a stage go over the recipe's, key by key.
    """

    name: str
    options: dict[str, Any]
    data: DataConfig
    image: ImageConfig = field(default_factory=ImageConfig)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, checked; see the module's docstring."""

    backbone: str
    output_dir: Path
    stages: list[Stage]
    seed: int = 42
    dtype: str = "float32"
    image: ImageConfig = field(default_factory=ImageConfig)
    lora: Lora | None = None

    @property
    def load_dtype(self) -> torch.dtype:
        """Dtype of the weights in memory: what is trained whole is float32, what is frozen the recipe's dtype."""
        return torch.float32 if self.lora is None else DTYPES[self.dtype]

    def arguments(self, stage: Stage, folder: Path, **overrides: Any) -> StageArguments:
        """The arguments object of a stage.

        Args:
            stage: one of this recipe's.
            folder: for the trainer's own checkpoints.
            **overrides: fields that are not the recipe's to say (progress bars, say).

        Raises:
            CocoaError: a value that the class refuses; the message names the stage.
        """
        options: dict[str, Any] = {
            "use_cpu": not torch.cuda.is_available(),
            **stage.options,
            "output_dir": str(folder),
            "seed": self.seed,
            "bf16": self.dtype == "bfloat16",
            "on_bad_row": stage.data.on_bad_row,
            "max_bad_share": stage.data.max_bad_share,
            **overrides,
        }
        if stage.name == "contrastive":
            options["hard_negatives"] = stage.data.hard_negatives
        try:
            return STAGES[stage.name](**options)
        except CocoaError as error:
            raise CocoaError(f"stages.{stage.name}: {error}") from None
        except (TypeError, ValueError, OSError, ImportError) as error:  # of the library's own arguments
            raise CocoaError(f"stages.{stage.name}: {first_line(error)}") from error

    def settings(self, stages: int) -> dict[str, Any]:
        """What the result of the first `stages` stages depends on, by dotted key, as JSON has it."""

        def affecting(options: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in options.items() if not key.startswith(_WITHOUT_EFFECT)}

        what: dict[str, Any] = {"backbone": self.backbone, "seed": self.seed, "dtype": self.dtype}
        what |= {"image": dataclasses.asdict(self.image), "lora": self.lora and dataclasses.asdict(self.lora)}
        for number, stage in enumerate(self.stages[:stages]):
            own = {"data": affecting(dataclasses.asdict(stage.data)), "image": dataclasses.asdict(stage.image)}
            what[f"stages.{number}.{stage.name}"] = affecting(stage.options) | own
        return json.loads(json.dumps(_flat(what), default=str))

    def fingerprint(self, stages: int) -> str:
        """Those settings as a short hash."""
        return hashlib.sha256(json.dumps(self.settings(stages), sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed from some settings to others: `seed: 6 (was 5)`, ..."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key}: {now.get(key)} (was {before.get(key)})" for key in changed]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides.

    Raises:
        CocoaError: no such file, no YAML, an unknown or missing key, a value of the wrong type.

    Example:
        >>> import cocoa, pathlib
        >>> text = "{backbone: mini-qwen2-vl, output_dir: run, data: {train: pairs.jsonl}, stages: [contrastive]}"
        >>> _ = pathlib.Path("recipe.yaml").write_text(text)
        >>> recipe = cocoa.load_recipe("recipe.yaml", ["stages.contrastive.max_steps=100"])
        >>> recipe.stages[0].options
        {'max_steps': 100}
    """
    path = Path(path)
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise no_such_recipe(path) from None
    except OSError as error:
        raise CocoaError(f"{path}: cannot be read ({error.strerror}); name a recipe file") from None
    except ValueError as error:
        raise CocoaError(f"{path}: not YAML ({error}); see recipes/ for examples") from None
    if not isinstance(content, dict):
        raise CocoaError(f"{path}: a recipe is a mapping of keys; see recipes/ for examples")
    for override in overrides:
        apply_override(content, override)
    try:
        return parse_recipe(content)
    except CocoaError as error:
        raise CocoaError(f"{path}: {error}") from None


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """A recipe from its mapping.

    Raises:
        CocoaError: see `load_recipe`.
    """
    content = dict(content)
    check_keys(content, [f.name for f in dataclasses.fields(Recipe)] + ["data"], "")
    for key in ("backbone", "output_dir", "data", "stages"):
        if not content.get(key):
            raise CocoaError(f"{key}: missing; a recipe needs backbone, output_dir, data.train and stages")
    for key in ("backbone", "output_dir", "seed", "dtype"):
        if content.get(key) is not None:
            content[key] = convert(content[key], "int" if key == "seed" else "str", key)
    if not 0 <= (content.get("seed") or 0) < 2**32:
        raise CocoaError(f"seed: {content['seed']} must be from 0 to 4294967295")
    data = as_mapping(content.pop("data"), "data")
    image = as_mapping(content.pop("image", None) or {}, "image")
    content["image"] = _image(image, "image")
    stages = [_stage(entry, i, data, image) for i, entry in enumerate(as_list(content.pop("stages"), "stages"))]
    emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    if content.get("dtype") is None:
        content["dtype"] = "bfloat16" if torch.cuda.is_available() and not emulated else "float32"
    if content["dtype"] not in DTYPES:
        raise CocoaError(f"dtype: {content['dtype']!r} is not one of {', '.join(DTYPES)}")
    if content["dtype"] == "bfloat16" and emulated:
        raise CocoaError(f"dtype: {torch.cuda.get_device_name()} does not compute in bfloat16; write float32")
    if content.get("lora") is not None:
        content["lora"] = build(Lora, content["lora"], "lora")
    content["output_dir"] = Path(content["output_dir"]).expanduser()
    return Recipe(stages=stages, **{key: value for key, value in content.items() if value is not None})


def _image(values: dict[str, Any], where: str) -> ImageConfig:
    """An `image:` block, with both of its budgets tried."""
    image = build(ImageConfig, values, where)
    for key in ("train_tokens", "eval_tokens"):
        tokens = getattr(image, key)
        if len(tokens) != 2 or not all(isinstance(count, int) for count in tokens):
            raise CocoaError(f"{where}.{key}: {list(tokens)} is not [least, most], two whole numbers")
    image.train()
    image.evaluation()
    return image


def _stage(entry: Any, index: int, data: Mapping[str, Any], image: Mapping[str, Any]) -> Stage:
    """One entry of `stages:`, `name` or `name: {keys}`."""
    if isinstance(entry, str):
        entry = {entry: {}}
    entry = as_mapping(entry, f"stages.{index}")
    if len(entry) != 1:
        raise CocoaError(f"stages.{index}: one stage name with its keys indented below it, got {list(entry)}")
    name, options = next(iter(entry.items()))
    where = f"stages.{name}"
    if name not in STAGES:
        raise CocoaError(f"stages.{index}: unknown stage {name!r}{suggest(name, STAGES)}")
    options = dict(as_mapping(options or {}, where))
    own_data = as_mapping(options.pop("data", None) or {}, f"{where}.data")
    own_image = as_mapping(options.pop("image", None) or {}, f"{where}.image")
    fields = {f.name: f for f in dataclasses.fields(STAGES[name]) if f.init}
    for key in options:
        if key in _GIVEN_ELSEWHERE:
            raise CocoaError(f"{where}.{key}: not a stage's to set; use {_GIVEN_ELSEWHERE[key]}")
    check_keys(options, [*fields, "data", "image"], f"{where}.")
    options = {key: convert(value, fields[key].type, f"{where}.{key}") for key, value in options.items()}
    stage_data = build(DataConfig, {**data, **own_data}, f"{where}.data" if own_data else "data")
    stage_image = _image({**image, **own_image}, f"{where}.image" if own_image else "image")
    return Stage(name, options, stage_data, stage_image)
