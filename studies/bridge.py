"""Where the content goes: nats through the bridge, patched layer by layer, and the embedding straight after each stage.

    python studies/bridge.py

Nothing is chosen by what this finds: validation scenes, two seeds, the demo's learning rate for every model.

- `bridge_nats.csv`: the loss of a wholly hidden B under another row's image less that under its own, by class of token,
  after stages 0, 1 and 2 of each layout. `first` is B's first token, which is decoded from EOS' final state alone.
- `bridge_patching.csv`: captions whose EOS has another picture's keys and values in some layers, as the share of the
  nats that this takes away (all layers: 100 %). What B reads and where: one layer alone, and all from a layer on.
- `bridge_zero_shot.csv`: hit@1 of EOS' final state as an embedding, no contrastive stage.
- `bridge_nats_deciding.csv`: nats as above, of models as the deciding experiment trains them: more pairs, a lower rate;
  and with as many pairs at the rate of the others. `final state`: a bridge of our own (`objectives.py`), read in its
  own way, at both rates; added when `beyond.py explore` was done.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from deciding import BACKBONE, COMPARED, JOINT, LAYOUTS, PRETRAINING, TUNING_SEED, phases_after, validated
from deciding import PAIRS as DECIDING_PAIRS
from lab import Lab, Phase, Start, open_lab
from nats import AT_ONCE, batch_of, held_out_rows, nats, with_other_images
from patching import HeldKeysAndValues, mixed
from results import FOLDER, Row, work
from torch import Tensor

from cocoa.attention import BridgeLayout
from cocoa.backbone import Backbone, Form
from cocoa.pairs import ContentPair
from cocoa.stages.reconstruction import Reconstructor

NATS, PATCHING, ZERO_SHOT = (FOLDER / f"bridge_{name}.csv" for name in ("nats", "patching", "zero_shot"))
DECIDING_NATS = FOLDER / "bridge_nats_deciding.csv"
STAGE_2 = ("published", "strict", "full", "shuffled", "ntp")
MODELS = ("stage 0", "stage 1", *STAGE_2)
PATCHED = ("published", "strict")
PAIRS, RATE = 100, 6e-4
SEEDS = (101, 102)


def phases_of(model: str) -> list[Phase]:
    """What a model has gone through."""
    if model in STAGE_2:
        *first, last = PRETRAINING[model]
        return [*first, last.having(learning_rate=RATE)]
    return [JOINT] if model == "stage 1" else []


def with_final_state(phases: list[Phase]) -> list[Phase]:
    """The same with stage 2 as `objectives.FinalState`."""
    *first, last = phases
    return [*first, replace(last, stage="final")]


def layout_of(model: str) -> BridgeLayout:
    """The layout a model is looked at under: its own, but for those whose own would show B the picture."""
    return "strict" if model == "strict" else "published"


def train(lab: Lab, model: str, seed: int) -> Backbone:
    """A model, its weights kept for the other tables."""
    return trained(lab, Start(BACKBONE, PAIRS, seed), phases_of(model))


def trained(lab: Lab, start: Start, phases: list[Phase], anew: int = 0) -> Backbone:
    """The backbone behind these phases, to be looked at; the last few may be trained anew."""
    backbone = lab.train(start, phases, keep=len(phases) - anew) if phases else lab.load(start, form=Form())
    backbone.encoded = lab.known(backbone, "bridge")
    backbone.model.eval()
    return backbone


def rows_of(lab: Lab, *names: str) -> list[ContentPair]:
    """Held-out rows of these data sets, or of all that feed stage 2 in training."""
    found, _ = lab.evaluation("validation")
    return held_out_rows(
        [dataset for dataset in found if (dataset.name in names if names else "-" not in dataset.name)]
    )


@torch.inference_mode()
def patched(backbone: Backbone, rows: list[ContentPair], layout: BridgeLayout) -> list[Row]:
    """The share of the nats that patched layers take away, of all tokens of B but its first.

    Args:
        backbone: the model.
        rows: whose blocks A are equally long, so that EOS stands at the same place.
        layout: of the bridge.
    """
    model, layers = Reconstructor(backbone).eval(), len(backbone.model.model.language_model.layers)
    sets = {("alone", layer): [layer] for layer in range(layers)}
    sets |= {("from", layer): list(range(layer, layers)) for layer in range(layers)}
    sets[("none", 0)] = []
    totals = dict.fromkeys(sets, 0.0)
    others = with_other_images(rows)
    for start in range(0, len(rows), AT_ONCE):
        own, other = (batch_of(backbone, part[start : start + AT_ONCE], layout) for part in (rows, others))
        held = own["eos_position"][None]
        recorded: list[list[Tensor]] = []
        for batch in (own, other):
            with HeldKeysAndValues(model, held) as hold:
                model.predict(**batch)
            recorded.append(hold.recorded)
        for name, chosen in sets.items():
            with HeldKeysAndValues(model, held, replay=mixed(recorded[0], recorded[1], chosen)):
                tokens = model.predict(**own).tokens
            read = ~torch.isin(tokens.positions, own["eos_position"] + 1)  # the first is EOS' own to predict
            totals[name] += tokens.losses[read].sum().item()
    lost = totals["from", 0] - totals["none", 0]
    return [
        {"patched": kind, "layer": layer, "share": f"{100 * (total - totals['none', 0]) / lost:.1f}"}
        for (kind, layer), total in totals.items()
        if kind != "none"
    ]


def main() -> None:
    """Fill the tables."""
    lab = open_lab()

    def nats_rows(model: str, seed: int) -> list[Row]:
        return told(train(lab, model, seed), model)

    def deciding_rows(model: str, phases: list[Phase]) -> list[Row]:
        return told(trained(lab, Start(BACKBONE, DECIDING_PAIRS, TUNING_SEED), phases), model)

    def final_state_rows(phases: list[Phase]) -> list[Row]:
        backbone = trained(lab, Start(BACKBONE, DECIDING_PAIRS, TUNING_SEED), phases, anew=1)
        return told(backbone, "strict", lab.objective)  # whose projection is not kept with the weights

    def told(backbone: Backbone, model: str, objective: Reconstructor | None = None) -> list[Row]:
        found = nats(backbone, rows_of(lab), layout_of(model), objective)
        return [{"class": name, "nats": f"{value:.3f}"} for name, value in found.items()]

    def patching_rows(model: str, seed: int) -> list[Row]:
        return patched(train(lab, model, seed), rows_of(lab, "Scenes_i2t"), layout_of(model))

    def zero_shot_rows(model: str, seed: int) -> list[Row]:
        return [validated(lab, train(lab, model, seed))]

    for seed in SEEDS:
        keys = {model: {"model": model, "seed": seed} for model in MODELS}
        work(NATS, [(keys[model], partial(nats_rows, model, seed)) for model in MODELS])
        work(PATCHING, [(keys[model], partial(patching_rows, model, seed)) for model in PATCHED])
        work(ZERO_SHOT, [(keys[model], partial(zero_shot_rows, model, seed)) for model in MODELS])
    found = {model: (model, phases_after(model)[:-1]) for model in LAYOUTS}
    found |= {f"{model}, rate {RATE:g}": (model, phases_of(model)) for model in COMPARED}
    tasks = [({"model": name, "seed": TUNING_SEED}, partial(deciding_rows, *each)) for name, each in found.items()]
    tasks += [
        ({"model": name, "seed": TUNING_SEED}, partial(final_state_rows, with_final_state(phases)))
        for name, phases in (
            ("final state", phases_after("published")[:-1]),
            (f"final state, rate {RATE:g}", phases_of("published")),
        )
    ]
    work(DECIDING_NATS, tasks)


if __name__ == "__main__":
    main()
