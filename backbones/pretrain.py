"""Pre-train a backbone that ships in the package: `python backbones/pretrain.py mini-qwen2-vl`.

Causal next-token prediction on scenes, as a multimodal LLM is trained: captions in every style, bound
questions in growing conversations, lists of questions, plain image-text documents, and reading without an
image. Before that the vision tower alone learns what stands in each cell; captions by themselves leave it near
chance for a long time. That dense loss stays on at a small weight, or the tower forgets which cell a token is of,
and "where is the star?" is never learned. Its heads are thrown away. Only scenes of the training split are seen.

A constant learning rate, then a linear decay to zero over the last third. State is saved at every evaluation;
run again, the command goes on from there. It writes `<output>/<name>/`: the checkpoint with float16 weights,
`curve.csv`, and a card with the figures on test scenes.

`--start FOLDER` takes weights and curve of a backbone that was written before, and goes on from its last step with
a warm-up of its own (`--steps` counts from the very first): for more training where the saved state is gone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from documents import IMAGE, Batches, Document, collate, conversation, draw_document, pixels, scenes_of
from ship import read_curve, write_backbone
from torch import Tensor, nn

from cocoa.backbone import Backbone, load_backbone
from cocoa.catalogue import known_instructions
from cocoa.inputs import ImageBudget
from cocoa.scenes.dialogues import ASK_QUESTIONS, REQUESTS
from cocoa.scenes.language import ATTRIBUTE_KINDS, HELD_OUT_STYLES, STYLES, TEMPLATES, ask, caption
from cocoa.scenes.world import ATTRIBUTES, Scene, sample_scene
from cocoa.tiny import write_tiny_backbone

NAMES = {"mini-qwen2-vl": "qwen2_vl", "mini-qwen2.5-vl": "qwen2_5_vl"}
TOWERS = {
    "qwen2_vl": {"depth": 4, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 3},
    "qwen2_5_vl": {"depth": 4, "hidden_size": 96, "num_heads": 4, "intermediate_size": 192}
    | {"window_size": 56, "fullatt_block_indexes": [1, 3]},
}
IMAGES = ImageBudget((1, 64))
BATCH = 32
EVAL_SCENES = 1000
TOWER_STEPS = 2000
DENSE_WEIGHT = 0.1
TOWER_SHARE = 0.3  # of the learning rate, for the tower that has had its own training


def cell_labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """For each attribute the (scenes, 9) class in each cell, 0 where it is empty; and the cell itself."""
    labels = {name: torch.zeros(len(scenes), 9, dtype=torch.long) for name in ATTRIBUTES}
    labels["cell"] = torch.arange(9).expand(len(scenes), 9)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            for name, values in ATTRIBUTES.items():
                labels[name][i, thing.cell] = 1 + values.index(getattr(thing, name))
    return labels


def new_heads(backbone: Backbone) -> nn.ModuleDict:
    """What reads each attribute of each cell, and the cell itself, off the tower's merged tokens; thrown away later."""
    width = backbone.model.config.text_config.hidden_size
    classes = {name: 1 + len(values) for name, values in ATTRIBUTES.items()} | {"cell": 9}
    return nn.ModuleDict({name: nn.Linear(width, number) for name, number in classes.items()})


def dense_loss(heads: nn.ModuleDict, tokens: Tensor, scenes: list[Scene]) -> tuple[Tensor, dict[str, float]]:
    """How well the tower's tokens (scenes, 9, width) tell of each cell: loss, and share right in cells not empty."""
    labels = {name: label.to(tokens.device) for name, label in cell_labels(scenes).items()}
    logits = {name: heads[name](tokens).float() for name in labels}
    cross_entropy = nn.functional.cross_entropy
    loss = torch.stack([cross_entropy(logits[name].flatten(0, 1), labels[name].flatten()) for name in labels]).sum()
    full = labels["shape"] > 0
    return loss, {name: (logits[name].argmax(-1) == labels[name])[full].float().mean().item() for name in labels}


def train_tower(
    backbone: Backbone, heads: nn.ModuleDict, steps: int, device: str, bfloat16: bool, log: Path, frozen: bool
) -> None:
    """Teach the vision tower what stands in each cell; where it is frozen, the new heads alone."""
    model, rng = backbone.model, random.Random(1)
    parameters = [*heads.parameters(), *([] if frozen else model.model.visual.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.1)
    started = time.time()
    for step in range(1, steps + 1):
        scenes = [sample_scene(rng, (3, 4, 5), "train") for _ in range(BATCH)]
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            features = model.model.get_image_features(**{k: v.to(device) for k, v in pixels(backbone, scenes).items()})
            loss, right = dense_loss(heads, torch.stack(features.pooler_output), scenes)
        loss.backward()
        optimizer.step()
        schedule.step()
        model.zero_grad()
        heads.zero_grad()
        if step % 100 == 0 or step == steps:
            told = " ".join(f"{name} {100 * share:.1f}" for name, share in right.items())
            write_line(log, f"tower step {step} loss {loss.item():.4f} right {told} ({time.time() - started:.0f} s)")


@torch.no_grad()
def measure(backbone: Backbone, device: str, scenes: int) -> dict[str, float]:
    """Held-out loss, and how often an answer is wholly right (greedy), on test scenes.

    Args:
        backbone: the model.
        device: where it is.
        scenes: how many test scenes; each is asked every kind of question and captioned in every style.

    Returns:
        `loss` (nats a predicted token) and the share right by kind of question and `caption <style>`.
    """
    model, rng = backbone.model.eval(), random.Random(7)
    items: list[tuple[str, Document]] = []
    for _ in range(scenes):
        scene = sample_scene(rng, (2, 3, 4), "test")
        for style in STYLES + HELD_OUT_STYLES:
            items.append((f"caption {style}", conversation([(REQUESTS[style], caption(scene, style))], scene)))
        for kind in TEMPLATES:
            question = ask(rng, scene, kind, rng.randrange(2))
            if question is not None:
                items.append((kind, conversation([(question.text, question.answer)], scene)))
    right: dict[str, list[float]] = {}
    total = count = 0.0
    for start in range(0, len(items), 256):
        chunk = items[start : start + 256]
        batch = {k: v.to(device) for k, v in collate(backbone, [d for _, d in chunk]).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()  # (B, T, V)
        wanted = labels >= 0
        total += nn.functional.cross_entropy(logits[wanted], labels[wanted], reduction="sum").item()
        count += wanted.sum().item()
        exact = ((logits.argmax(-1) == labels) | ~wanted).all(1)
        for (kind, _), hit in zip(chunk, exact.tolist(), strict=True):
            right.setdefault(kind, []).append(hit)
    model.train()
    return {"loss": total / count} | {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}


def write_line(path: Path, line: str) -> None:
    """Append to the log."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def main() -> None:
    """Parse, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--output", type=Path, default=Path("src/cocoa/data/backbones"))
    parser.add_argument("--work", type=Path, default=Path("runs/backbones"), help="logs and the state to go on from")
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--eval-scenes", type=int, default=EVAL_SCENES, help="at the end; along the way fewer")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="faster on CUDA and on processors that have it (AMX, AVX512-BF16), ten times slower on others",
    )
    parser.add_argument("--start", type=Path, help="folder of a backbone to go on from, with a new optimizer")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    work = args.work / args.name
    work.mkdir(parents=True, exist_ok=True)
    log, state_path = work / "log.txt", work / "state.pt"
    start, curve = 0, []
    if args.start is None:
        backbone = new_backbone(args.name, work)
    else:
        backbone = load_backbone(args.start, IMAGES, attention="causal")
        curve = read_curve(args.start)
        start = int(curve[-1]["step"])
    model = backbone.model.to(args.device).train()
    model.set_attn_implementation({"text_config": "eager"})
    heads = new_heads(backbone).to(args.device)
    seen: list[Tensor] = []  # the tower's merged tokens (scenes * 9, width) in the present step
    groups = [
        {"params": [p for p in part.parameters() if (p.ndim > 1) == matrix], "weight_decay": decay, "share": share}
        for part, share in ((model.model.visual, TOWER_SHARE), (model.model.language_model, 1.0), (heads, 1.0))
        for matrix, decay in ((True, 0.05), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    step = start
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        heads.load_state_dict(state["heads"])
        step, start, curve = state["step"], state["start"], state["curve"]
    else:
        train_tower(backbone, heads, args.tower_steps, args.device, args.bfloat16, log, frozen=args.start is not None)
    model.model.visual.register_forward_hook(lambda module, inputs, output: seen.append(output.pooler_output))
    batches, started = Batches(BATCH, args.seed * 1_000_003 + step), time.time()
    losses: list[float] = []
    while step < args.steps:
        share = min(1, (step - start + 1) / 300, 3 * (args.steps - step) / (args.steps - start))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * share * group["share"]
        documents = next(batches)
        scenes = scenes_of(documents)
        batch = {key: tensor.to(args.device) for key, tensor in collate(backbone, documents).items()}
        labels = batch.pop("labels")[:, 1:]
        seen.clear()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bfloat16):
            hidden = model.model(**batch).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[labels >= 0])
            dense, right = dense_loss(heads, seen[0].unflatten(0, (len(scenes), 9)), scenes)
        loss = nn.functional.cross_entropy(logits.float(), labels[labels >= 0])
        (loss + DENSE_WEIGHT * dense).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 100 == 0:
            told = f"loss {np.mean(losses[-100:]):.4f} tower {dense.item():.4f} cell {100 * right['cell']:.1f}"
            write_line(log, f"step {step} {told} ({time.time() - started:.0f} s)")
        if step % args.eval_every == 0 or step == args.steps:
            number = args.eval_scenes if step == args.steps else min(150, args.eval_scenes)
            figures = measure(backbone, args.device, number)
            curve.append({"step": step, "train_loss": float(np.mean(losses[-args.eval_every :])), **figures})
            write_line(log, json.dumps({k: round(v, 4) for k, v in curve[-1].items()}))
            state = {"model": model.state_dict(), "heads": heads.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step, "start": start, "curve": curve}, state_path)
            facts = {
                "STEPS": f"{step:,}",
                "BATCH": str(BATCH),
                "TOWER": f"{args.tower_steps:,}",
                "SCENES": f"{number:,}",
            }
            write_backbone(backbone, args.output / args.name, args.start or work, curve, facts)


def new_backbone(name: str, folder: Path) -> Backbone:
    """A randomly initialised backbone with a tokenizer for scenes and for MMEB's instructions, written once."""
    if not (folder / "model.safetensors").exists():
        rng = random.Random(0)
        texts = [*known_instructions(), *REQUESTS.values(), *[ASK_QUESTIONS.format(n) for n in range(3, 7)]] * 20
        for _ in range(6000):
            texts += [piece.replace(IMAGE, "") for piece, _ in draw_document(rng).pieces]
        texts += [answer for kind in ATTRIBUTE_KINDS for answer in ATTRIBUTES[kind]] * 50
        size = {"hidden_size": 128, "intermediate_size": 384, "layers": 6, "vocabulary": 1024}
        write_tiny_backbone(folder, texts, NAMES[name], vision=TOWERS[NAMES[name]], **size)
    return load_backbone(folder, IMAGES, attention="causal")


if __name__ == "__main__":
    main()
