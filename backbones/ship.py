"""Writing a mini backbone as it ships: float16 weights, processor, chat template, curve and card."""

from __future__ import annotations

import csv
from pathlib import Path

from transformers import AutoProcessor

from cocoa.backbone import Backbone

HERE = Path(__file__).parent
NOT_SHARES = ("step", "train_loss", "loss")


def write_backbone(
    backbone: Backbone, folder: Path, source: Path, curve: list[dict[str, float]], facts: dict[str, str]
) -> None:
    """The checkpoint as it ships: float16 weights, the processor that fits it, the curve, the card.

    Args:
        backbone: the model.
        folder: made where it does not exist.
        source: holds the processor's files as they were before `load_backbone`.
        curve: the figures at each evaluation, the last of which stand in the card.
        facts: more of what the card says, by placeholder.
    """
    weights = {key: tensor.half() for key, tensor in backbone.model.state_dict().items()}
    for config in (backbone.model.config, backbone.model.config.text_config):
        config.use_cache = True  # for `generate`
    backbone.model.save_pretrained(folder, state_dict=weights)  # config.json says float32: how it is to be loaded
    processor = AutoProcessor.from_pretrained(source)
    processor.image_processor.size = backbone.processor.image_processor.size
    processor.chat_template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    processor.save_pretrained(folder)
    with (folder / "curve.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(curve[0]))
        writer.writeheader()
        writer.writerows({key: f"{value:.4f}".rstrip("0").rstrip(".") for key, value in row.items()} for row in curve)
    (folder / "README.md").write_text(card(backbone, folder.name, curve[-1], facts), encoding="utf-8")


def read_curve(folder: Path) -> list[dict[str, float]]:
    """The figures at each evaluation of a backbone that was written, the latest last."""
    with (folder / "curve.csv").open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def card(backbone: Backbone, name: str, figures: dict[str, float], facts: dict[str, str]) -> str:
    """`card.md` with what is true of this backbone."""
    config, parameters = backbone.model.config, sum(p.numel() for p in backbone.model.parameters())
    text, vision = config.text_config, config.vision_config
    windows = ""
    if vision.model_type == "qwen2_5_vl_vision":
        windows = f", windows of {vision.window_size} px but in layers {vision.fullatt_block_indexes}"
    values = facts | {
        "NAME": name,
        "ARCHITECTURE": f"`{type(backbone.model).__name__}`",
        "PARAMETERS": f"{parameters / 1e6:.2f}",
        "MEGABYTES": f"{2 * parameters / 1e6:.1f}",
        "TEXT": f"{text.num_hidden_layers} layers, hidden {text.hidden_size}, MLP {text.intermediate_size}, "
        f"{text.num_attention_heads} heads / {text.num_key_value_heads} KV, {text.vocab_size} rows, tied head",
        "VISION": f"{vision.depth} layers, {vision.num_heads} heads{windows}",
        "LOSS": f"{figures['loss']:.4f}",
        "FIGURES": "\n".join(f"| {k} | {100 * v:.1f} |" for k, v in figures.items() if k not in NOT_SHARES),
    }
    filled = (HERE / "card.md").read_text(encoding="utf-8")
    for key, value in values.items():
        filled = filled.replace(f"[{key}]", value)
    return filled
