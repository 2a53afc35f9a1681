"""A YAML recipe to the arguments of every stage, with errors that name the key.

A recipe needs `backbone`, `output_dir`, `data.train` and `stages`; a stage's keys are the fields of its
arguments class, so every `TrainingArguments` name works. `key=value` overrides are dotted
(`data.train=/data/MMEB-train`, `stages.contrastive.max_steps=100`, `stages.0.batch_size=8`).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml

from cocoa.adapters import Lora
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.sources import DataConfig
from cocoa.stages.contrastive import ContrastiveArguments
from cocoa.stages.eos_bridge import EosBridgeArguments
from cocoa.stages.joint_reconstruction import JointReconstructionArguments
from cocoa.stages.training import StageArguments

T = TypeVar("T")

STAGES: dict[str, type[StageArguments]] = {
    "joint_reconstruction": JointReconstructionArguments,
    "eos_bridge": EosBridgeArguments,
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
}
_WITHOUT_EFFECT = ("report_to", "run_name", "logging_", "log_", "save_", "dataloader_num_workers", "disable_tqdm")
"""Beginnings of the options that change nothing in the result: a stopped run may go on under others."""


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
    """One stage of a recipe: its name, the keys of its arguments, and its own data."""

    name: str
    options: dict[str, Any]
    data: DataConfig


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
            **overrides,
        }
        if stage.name == "contrastive":
            options["hard_negatives"] = stage.data.hard_negatives
        try:
            return STAGES[stage.name](**options)
        except CocoaError as error:
            raise CocoaError(f"stages.{stage.name}: {error}") from None
        except (TypeError, ValueError) as error:
            raise CocoaError(f"stages.{stage.name}: {str(error).splitlines()[0]}") from error

    def fingerprint(self, stages: int) -> str:
        """What the result of the first `stages` stages depends on, as a short hash."""
        what: list[Any] = [self.backbone, self.seed, self.dtype, dataclasses.asdict(self.image)]
        what += [self.lora and dataclasses.asdict(self.lora)]
        for stage in self.stages[:stages]:
            options = {key: value for key, value in stage.options.items() if not key.startswith(_WITHOUT_EFFECT)}
            what += [stage.name, options, dataclasses.asdict(stage.data)]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides.

    Raises:
        CocoaError: no such file, no YAML, an unknown or missing key, a value of the wrong type.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CocoaError(f"{path}: no such recipe") from None
    except OSError as error:
        raise CocoaError(f"{path}: cannot be read ({error.strerror}); name a recipe file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise CocoaError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise CocoaError(f"{path}: a recipe is a mapping of keys; see recipes/ for examples")
    for override in overrides:
        _apply_override(content, override)
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
    _check_keys(content, [f.name for f in dataclasses.fields(Recipe)] + ["data"], "")
    for key in ("backbone", "output_dir", "data", "stages"):
        if not content.get(key):
            raise CocoaError(f"{key}: missing; a recipe needs backbone, output_dir, data.train and stages")
    for key in ("backbone", "output_dir", "seed", "dtype"):
        if content.get(key) is not None:
            content[key] = _convert(content[key], "int" if key == "seed" else "str", key)
    data = _mapping(content.pop("data"), "data")
    stages = [_stage(entry, i, data) for i, entry in enumerate(_list(content.pop("stages"), "stages"))]
    if content.get("dtype") is None:
        content["dtype"] = "bfloat16" if torch.cuda.is_available() else "float32"
    if content["dtype"] not in DTYPES:
        raise CocoaError(f"dtype: {content['dtype']!r} is not one of {', '.join(DTYPES)}")
    if content.get("image") is not None:
        content["image"] = _image(content["image"])
    if content.get("lora") is not None:
        content["lora"] = build(Lora, content["lora"], "lora")
    content["output_dir"] = Path(content["output_dir"])
    return Recipe(stages=stages, **{key: value for key, value in content.items() if value is not None})


def _image(values: Any) -> ImageConfig:
    """The `image:` block, with both of its budgets tried."""
    image = build(ImageConfig, values, "image")
    for key in ("train_tokens", "eval_tokens"):
        tokens = getattr(image, key)
        if len(tokens) != 2 or not all(isinstance(count, int) for count in tokens):
            raise CocoaError(f"image.{key}: {list(tokens)} is not [least, most], two whole numbers")
    image.train()
    image.evaluation()
    return image


def build(cls: type[T], values: Any, where: str) -> T:
    """An instance of a dataclass of ours from a mapping, lists as tuples where the field is one.

    Raises:
        CocoaError: an unknown key, or a value whose type is not its default's.
    """
    values = _mapping(values, where)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    _check_keys(values, known, f"{where}.")
    for key, f in known.items():
        if f.default is f.default_factory is dataclasses.MISSING and values.get(key) is None:
            raise CocoaError(f"{where}.{key}: missing")
    return cls(**{key: _convert(value, known[key].type, f"{where}.{key}") for key, value in values.items()})


def _stage(entry: Any, index: int, data: Mapping[str, Any]) -> Stage:
    """One entry of `stages:`, `name` or `name: {keys}`."""
    if isinstance(entry, str):
        entry = {entry: {}}
    entry = _mapping(entry, f"stages.{index}")
    if len(entry) != 1:
        raise CocoaError(f"stages.{index}: one stage name with its keys indented below it, got {list(entry)}")
    name, options = next(iter(entry.items()))
    where = f"stages.{name}"
    if name not in STAGES:
        raise CocoaError(f"stages.{index}: unknown stage {name!r}{_suggest(name, STAGES)}")
    options = dict(_mapping(options or {}, where))
    own_data = _mapping(options.pop("data", None) or {}, f"{where}.data")
    fields = {f.name: f for f in dataclasses.fields(STAGES[name]) if f.init}
    for key in options:
        if key in _GIVEN_ELSEWHERE:
            raise CocoaError(f"{where}.{key}: not a stage's to set; use {_GIVEN_ELSEWHERE[key]}")
    _check_keys(options, [*fields, "data"], f"{where}.")
    options = {key: _convert(value, fields[key].type, f"{where}.{key}") for key, value in options.items()}
    return Stage(name, options, build(DataConfig, {**data, **own_data}, "data" if not own_data else f"{where}.data"))


def _convert(value: Any, annotation: Any, where: str) -> Any:
    """A YAML value as the field's annotation wants it; annotations beyond the simple ones pass as they are."""
    value = str(value) if isinstance(value, Path) else value
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kinds = {part.strip() for part in name.replace("typing.", "").split("|")}
    if value is None and "None" in kinds:
        return None
    if any(kind.startswith("tuple") for kind in kinds):
        return tuple(_list(value, where))
    if "list[str]" in kinds and isinstance(value, (list, tuple)):
        return [_convert(item, "str", where) for item in value]
    kinds.discard("list[str]")
    if kinds <= {"int", "float", "bool", "str", "None"}:
        if "float" in kinds and isinstance(value, str) and "str" not in kinds:
            try:
                return float(value)  # YAML reads 2e-5, without a dot, as text
            except ValueError:
                pass
        allowed: tuple[type, ...] = tuple(
            kind for name, kind in {"int": int, "float": float, "bool": bool, "str": str}.items() if name in kinds
        )
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            return value
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise CocoaError(f"{where}: {value!r} is not {' or '.join(sorted(kinds - {'None'}))}")
    return value


def _apply_override(content: dict[str, Any], override: str) -> None:
    """Set one dotted key of a recipe's mapping."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise CocoaError(f"{override!r}: an override is key=value, dotted, such as stages.contrastive.max_steps=100")
    *parents, last = dotted.split(".")
    node: Any = content
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = _stage_of(node, part, where)
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise CocoaError(f"{where}: not a mapping, so {override!r} cannot be applied")
    if isinstance(node, list):
        raise CocoaError(f"{override!r}: name a key of the stage, such as {dotted}.max_steps=100")
    if not isinstance(node, dict):
        raise CocoaError(f"{'.'.join(parents)}: not a mapping, so {override!r} cannot be applied")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CocoaError(f"{override!r}: the value is not YAML ({' '.join(str(error).split())})") from None


def _stage_of(stages: list[Any], part: str, where: str) -> dict[str, Any]:
    """The keys of the stage that an override means, by number or name."""
    for index, entry in enumerate(stages):
        if isinstance(entry, str):
            stages[index] = entry = {entry: {}}
        name = next(iter(_mapping(entry, f"stages.{index}")), None)
        if part in (name, str(index)):
            entry[name] = _mapping(entry.get(name) or {}, f"stages.{name}")
            return entry[name]
    raise CocoaError(f"{where}: the recipe has no such stage")


def _check_keys(values: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            raise CocoaError(f"{where}{key}: unknown key{_suggest(key, known)}")


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are: {', '.join(known)}" if len(known) < 20 else ""


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CocoaError(f"{where}: a mapping of keys is needed, got {value!r}")
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise CocoaError(f"{where}: a list is needed, got {value!r}")
    return list(value)
